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

// A row's part of each tensor, NULL where there is none. T: the logits' type.
template <typename T>
struct Adjustments {
  const int32_t *counts;
  const float *bias;
  const T *bias_like_logits;
  const int32_t *allowed;
  Penalties penalties;

  GQA_HOST_DEVICE Adjustments(const gqa_sample_params &p, int64_t row)
      : counts(has_penalties(p) ? p.token_counts + row * p.token_counts_stride : nullptr),
        bias(nullptr),
        bias_like_logits(nullptr),
        allowed(p.allowed_bitmask == nullptr ? nullptr : p.allowed_bitmask + row * p.allowed_bitmask_stride) {
    if (p.logit_bias != nullptr && p.logit_bias_dtype == GQA_DTYPE_FLOAT32) {
      bias = static_cast<const float *>(p.logit_bias) + row * p.logit_bias_stride;
    } else if (p.logit_bias != nullptr) {
      bias_like_logits = static_cast<const T *>(p.logit_bias) + row * p.logit_bias_stride;
    }
    penalties.repetition = value_or(p.repetition_penalties, p.repetition_penalties_stride, 1.0f, row);
    penalties.frequency = value_or(p.frequency_penalties, p.frequency_penalties_stride, 0.0f, row);
    penalties.presence = value_or(p.presence_penalties, p.presence_penalties_stride, 0.0f, row);
  }

  // Of the i-th token, whose logit is z.
  template <typename ToFloat>
  GQA_HOST_DEVICE float adjust(float z, uint32_t i, ToFloat &&to_float) const {
    if (counts != nullptr && counts[i] != 0) z = penalize(z, counts[i], penalties);
    if (bias != nullptr) z = add(z, bias[i]);
    if (bias_like_logits != nullptr) z = add(z, to_float(bias_like_logits[i]));
    return allowed == nullptr || (static_cast<uint32_t>(allowed[i / 32]) >> i % 32 & 1) != 0 ? z : kForbidden;
  }
};

}  // namespace gqa::sampling
