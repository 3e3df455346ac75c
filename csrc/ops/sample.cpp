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

void refuse(const char *name, const Optional &tensor) {
  if (tensor) fail(kOp, std::string(name) + " must be None, got a tensor: " + name + " is not supported yet");
}

// A setting's values as rows with one stride: 0 where one value serves all rows.
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
  refuse("logit_bias", logit_bias);
  refuse("allowed_bitmask", allowed_bitmask);
  refuse("token_counts", token_counts);
  refuse("repetition_penalty", repetition_penalty);
  refuse("frequency_penalty", frequency_penalty);
  refuse("presence_penalty", presence_penalty);

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

  Rows rows;
  if (!collapse(logits, &rows) || rows.count[0] != 1) {
    rows = Rows{};
    collapse(torch::stable::contiguous(logits), &rows);
  }
  p.logits = rows.tensor.data_ptr();
  p.rows = rows.count[1];
  p.vocab = rows.width;
  p.logits_stride = rows.stride[1];

  const auto sizes = logits.sizes();
  const std::vector<int64_t> leading(sizes.begin(), sizes.end() - 1);
  const torch::headeronly::IntHeaderOnlyArrayRef shape(leading.data(), leading.size());
  const int64_t none = 0;
  Tensor ids = torch::stable::new_empty(logits, shape, ScalarType::Long);
  Tensor valid = torch::stable::new_empty(logits, shape, ScalarType::Bool);
  Tensor logprob = return_logprob ? torch::stable::new_empty(logits, shape, ScalarType::Float)
                                  : torch::stable::new_empty(logits, {&none, 1}, ScalarType::Float);
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
