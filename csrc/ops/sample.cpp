// sample: checks, then params for the CPU twin or the CUDA kernel.
#include <torch/csrc/stable/library.h>

#include <cmath>
#include <tuple>

#include "common/sampling.h"
#include "ops/rows.h"
#include "ops/run.h"

namespace gqa::ops {
namespace {

constexpr auto kOp = "sample";
using Optional = std::optional<Tensor>;

std::string number(double value) {
  char text[32];
  std::snprintf(text, sizeof(text), "%g", value);
  return text;
}

// A setting's values, or rows of them, with the stride from row to row: 0 where one serves all rows.
struct RowValues {
  Optional tensor;  // keeps a copy alive
  const void *data = nullptr;
  int64_t stride = 0;
};

RowValues row_values(const char *name, const Optional &given, const Tensor &logits) {
  if (!given) return {};
  check_same_device(kOp, name, *given, "logits", logits);
  const auto sizes = given->sizes(), like = logits.sizes();
  if (sizes.size() == 0) return {given, given->data_ptr(), 0};
  if (sizes.size() + 1 != like.size() || !std::equal(sizes.begin(), sizes.end(), like.begin())) {
    fail(kOp, std::string(name) + " must be a number, a tensor of one value or one value per row of logits " +
                  shape_string(logits) + ", got shape " + shape_string(*given));
  }
  const Tensor values = torch::stable::contiguous(*given);
  return {values, values.data_ptr(), 1};
}

RowValues float_values(const char *name, const Optional &given, const Tensor &logits) {
  if (given && given->scalar_type() != ScalarType::Float) {
    fail(kOp, std::string(name) + " must be float32, got " + dtype_string(*given));
  }
  return row_values(name, given, logits);
}

RowValues index_values(const char *name, const Optional &given, const Tensor &logits, gqa_index *index) {
  if (given) check_index_dtype(kOp, name, *given);
  RowValues values = row_values(name, given, logits);
  if (given) *index = {values.data, gqa_dtype_of(*given), {values.stride, 0}};
  return values;
}

// A tensor [..., width] as rows with one stride, copied where its strides take more.
Rows as_flat_rows(const Tensor &tensor) {
  Rows rows;
  if (collapse(tensor, &rows) && rows.count[0] == 1) return rows;
  rows = Rows{};
  collapse(torch::stable::contiguous(tensor), &rows);
  return rows;
}

// `width` values for each row of logits, or the same for all.
RowValues wide_values(const char *name, const Optional &given, const Tensor &logits, int64_t width) {
  if (!given) return {};
  check_same_device(kOp, name, *given, "logits", logits);
  const auto sizes = given->sizes(), like = logits.sizes();
  const bool shared = sizes.size() == 1 && sizes[0] == width;
  const bool per_row = sizes.size() == like.size() && std::equal(sizes.begin(), sizes.end() - 1, like.begin());
  check_value(kOp, shared || (per_row && sizes.back() == width), name,
              "[" + std::to_string(width) + "] or one such row per row of logits " + shape_string(logits),
              "shape " + shape_string(*given));
  const Rows rows = as_flat_rows(*given);
  return {rows.tensor, rows.tensor.data_ptr(), rows.stride[1]};
}

RowValues wide_int32(const char *name, const Optional &given, const Tensor &logits, int64_t width) {
  if (given && given->scalar_type() != ScalarType::Int) {
    fail(kOp, std::string(name) + " must be int32, got " + dtype_string(*given));
  }
  return wide_values(name, given, logits, width);
}

void check_numbers(double temperature, double top_p, double min_p) {
  check_value(kOp, temperature >= 0 && std::isfinite(temperature), "temperature", "0 (greedy) or a larger number",
              number(temperature));
  check_value(kOp, top_p > 0 && top_p <= 1, "top_p", "above 0 and at most 1 (off)", number(top_p));
  check_value(kOp, min_p >= 0 && min_p <= 1, "min_p", "between 0 (off) and 1", number(min_p));
}

void check_logits(const Tensor &logits) {
  check_device(kOp, "logits", logits);
  check_float_dtype(kOp, "logits", logits);
  if (logits.dim() < 1) fail(kOp, "logits must be [..., vocab], got shape " + shape_string(logits));
  const int64_t vocab = logits.size(logits.dim() - 1);
  check_value(kOp, vocab >= 1 && vocab <= sampling::kMaxVocab, "logits",
              "[..., vocab] with vocab from 1 to " + std::to_string(sampling::kMaxVocab),
              "shape " + shape_string(logits));
}

std::tuple<Tensor, Tensor, Tensor> sample(const Tensor &logits, double temperature, int64_t top_k, double top_p,
                                          double min_p, int64_t seed, int64_t offset, const Optional &temperatures,
                                          const Optional &top_ks, const Optional &top_ps, const Optional &min_ps,
                                          const Optional &seeds, const Optional &offsets, const Optional &logit_bias,
                                          const Optional &allowed_bitmask, const Optional &token_counts,
                                          const Optional &repetition_penalty, const Optional &frequency_penalty,
                                          const Optional &presence_penalty, bool return_logprob) {
  check_logits(logits);
  check_numbers(temperature, top_p, min_p);
  gqa_sample_params p{};
  p.struct_size = sizeof(p);
  p.dtype = gqa_dtype_of(logits);
  p.temperature = static_cast<float>(temperature);
  p.top_k = top_k;
  p.top_p = static_cast<float>(top_p);
  p.min_p = static_cast<float>(min_p);
  p.seed = static_cast<uint64_t>(seed);
  p.offset = static_cast<uint64_t>(offset);
  const RowValues t = float_values("temperature", temperatures, logits);
  const RowValues k = index_values("top_k", top_ks, logits, &p.top_ks);
  const RowValues nucleus = float_values("top_p", top_ps, logits);
  const RowValues least = float_values("min_p", min_ps, logits);
  const RowValues keys = index_values("seed", seeds, logits, &p.seeds);
  const RowValues counters = index_values("offset", offsets, logits, &p.offsets);
  p.temperatures = static_cast<const float *>(t.data);
  p.temperatures_stride = t.stride;
  p.top_ps = static_cast<const float *>(nucleus.data);
  p.top_ps_stride = nucleus.stride;
  p.min_ps = static_cast<const float *>(least.data);
  p.min_ps_stride = least.stride;

  const int64_t vocab = logits.size(logits.dim() - 1);
  if (logit_bias) check_weight_dtype(kOp, "logit_bias", *logit_bias, "logits", logits);
  const RowValues bias = wide_values("logit_bias", logit_bias, logits, vocab);
  const RowValues allowed = wide_int32("allowed_bitmask", allowed_bitmask, logits, (vocab + 31) / 32);
  const RowValues counts = wide_int32("token_counts", token_counts, logits, vocab);
  const RowValues repetition = float_values("repetition_penalty", repetition_penalty, logits);
  const RowValues frequency = float_values("frequency_penalty", frequency_penalty, logits);
  const RowValues presence = float_values("presence_penalty", presence_penalty, logits);
  check_value(kOp, token_counts || !(repetition_penalty || frequency_penalty || presence_penalty), "token_counts",
              "given together with a penalty", "None");
  p.logit_bias = bias.data;
  p.logit_bias_stride = bias.stride;
  p.logit_bias_dtype = logit_bias ? gqa_dtype_of(*logit_bias) : GQA_DTYPE_FLOAT32;
  p.allowed_bitmask = static_cast<const int32_t *>(allowed.data);
  p.allowed_bitmask_stride = allowed.stride;
  p.token_counts = static_cast<const int32_t *>(counts.data);
  p.token_counts_stride = counts.stride;
  p.repetition_penalties = static_cast<const float *>(repetition.data);
  p.repetition_penalties_stride = repetition.stride;
  p.frequency_penalties = static_cast<const float *>(frequency.data);
  p.frequency_penalties_stride = frequency.stride;
  p.presence_penalties = static_cast<const float *>(presence.data);
  p.presence_penalties_stride = presence.stride;

  const Rows rows = as_flat_rows(logits);
  p.logits = rows.tensor.data_ptr();
  p.rows = rows.count[1];
  p.vocab = rows.width;
  p.logits_stride = rows.stride[1];

  const auto sizes = logits.sizes();
  const std::vector<int64_t> leading(sizes.begin(), sizes.end() - 1);
  const torch::headeronly::IntHeaderOnlyArrayRef shape(leading.data(), leading.size());
  const int64_t none = 0;
  Tensor ids = new_tensor(logits, shape, ScalarType::Long);
  Tensor valid = new_tensor(logits, shape, ScalarType::Bool);
  Tensor logprob =
      return_logprob ? new_tensor(logits, shape, ScalarType::Float) : new_tensor(logits, {&none, 1}, ScalarType::Float);
  p.ids = static_cast<int64_t *>(ids.data_ptr());
  p.valid = static_cast<uint8_t *>(valid.data_ptr());
  p.logprob = return_logprob ? static_cast<float *>(logprob.data_ptr()) : nullptr;
  if (ids.numel() != 0) run(GQA_ENTRY(kOp, sample, gqa_sample_params), p, logits, p.vocab);
  return {ids, valid, logprob};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CPU, m) { m.impl("sample", TORCH_BOX(&sample)); }

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CUDA, m) { m.impl("sample", TORCH_BOX(&sample)); }

}  // namespace gqa::ops
