// A row's logits as they are sampled from: what is added to them, taken from them or forbidden, found by token.
#pragma once

#include "common/sampling.h"

namespace gqa::sampling {

GQA_HOST_DEVICE float value_or(const float *values, int64_t stride, float otherwise, int64_t row) {
  return values == nullptr ? otherwise : values[row * stride];
}

GQA_HOST_DEVICE bool has_penalties(const gqa_sample_params &p) {
  return p.repetition_penalties != nullptr || p.frequency_penalties != nullptr || p.presence_penalties != nullptr;
}

// Whether sampling sees anything but the logits themselves.
GQA_HOST_DEVICE bool is_adjusted(const gqa_sample_params &p) {
  return p.logit_bias != nullptr || p.allowed_bitmask != nullptr || has_penalties(p);
}

// Whether the Hopper kernel holds what sampling sees as float32; else as the logits' type, and apart what that cannot
// hold: few tokens have penalties, but all may have a bias.
GQA_HOST_DEVICE bool is_widened(const gqa_sample_params &p) {
  return is_adjusted(p) && (p.dtype == GQA_DTYPE_FLOAT32 || p.logit_bias != nullptr);
}

// A row's part of each tensor, NULL where there is none. T: the logits' type.
template <typename T>
struct Adjustments {
  const int32_t *counts;
  const void *bias;
  bool bias_is_float;
  const int32_t *allowed;
  Penalties penalties;

  // f(values) with the bias as the type it has.
  template <typename F>
  GQA_HOST_DEVICE auto with_bias(F &&f) const {
    if (sizeof(T) == 4 || bias_is_float) return f(static_cast<const float *>(bias));
    return f(static_cast<const T *>(bias));
  }

  GQA_HOST_DEVICE bool is_allowed(uint32_t i) const {
    return allowed == nullptr || (static_cast<uint32_t>(allowed[i / 32]) >> i % 32 & 1) != 0;
  }
};

template <typename T>
GQA_HOST_DEVICE Adjustments<T> load_adjustments(const gqa_sample_params &p, int64_t row) {
  Adjustments<T> by{};
  if (has_penalties(p)) by.counts = p.token_counts + row * p.token_counts_stride;
  by.bias_is_float = sizeof(T) == 4 || p.logit_bias_dtype == GQA_DTYPE_FLOAT32;
  if (p.logit_bias != nullptr) {
    const int64_t offset = row * p.logit_bias_stride * (by.bias_is_float ? sizeof(float) : sizeof(T));
    by.bias = static_cast<const char *>(p.logit_bias) + offset;
  }
  if (p.allowed_bitmask != nullptr) by.allowed = p.allowed_bitmask + row * p.allowed_bitmask_stride;
  by.penalties.repetition = value_or(p.repetition_penalties, p.repetition_penalties_stride, 1.0f, row);
  by.penalties.frequency = value_or(p.frequency_penalties, p.frequency_penalties_stride, 0.0f, row);
  by.penalties.presence = value_or(p.presence_penalties, p.presence_penalties_stride, 0.0f, row);
  return by;
}

}  // namespace gqa::sampling
