#include "plan/linear.h"

#include "plan/weight_stream.h"

namespace gqa {
namespace {

// Why the kernel doesn't serve valid params, or nullptr.
const char *refusal(const gqa_linear_params &p, const gqa_device &device) {
  if (device.compute_capability != 90 || !has_sm90_code()) return "not sm_90: torch's matrix product";
  if (p.dtype == GQA_DTYPE_FLOAT32) return "float32: torch's matrix product";
  if (p.tokens > kStreamMaxTokens) return "more than 16 tokens: torch's matrix product";
  const bool e4m3 = p.weight_scale != nullptr;
  if (p.in_features % 8 != 0) return "in_features is no multiple of 8: torch's matrix product";
  if (e4m3 && p.in_features % 16 != 0) return "in_features is no multiple of 16: torch's matrix product";
  bool fits = streams_rows(p.x, p.x_stride, p.tokens);
  for (int i = 0; i < 3; ++i) {
    if (p.out_features[i] > 0) fits = fits && streams_rows(p.weights[i], p.weight_stride[i], p.out_features[i], e4m3);
  }
  if (!fits) return "rows are not 16-byte aligned: torch's matrix product";
  constexpr int64_t kLargest = int64_t{1} << 30;
  if (p.in_features > kLargest || total_features(p) > kLargest) return "more than 2^30 columns: torch's matrix product";
  return nullptr;
}

}  // namespace

gqa_status check_params(const gqa_linear_params *p) {
  GQA_RETURN_IF_ERROR(check_struct(p));
  if (!is_float_dtype(p->dtype)) return GQA_STATUS_UNSUPPORTED;
  if (p->tokens < 0 || p->in_features < 1 || p->out_features[0] < 1) return GQA_STATUS_INVALID_ARGUMENT;
  if (p->out_features[1] < 0 || p->out_features[2] < 0) return GQA_STATUS_INVALID_ARGUMENT;
  if (p->tokens == 0) return GQA_STATUS_OK;
  bool complete = p->x && p->out;
  for (int i = 0; i < 3; ++i) complete = complete && (p->weights[i] || p->out_features[i] == 0);
  return complete ? GQA_STATUS_OK : GQA_STATUS_NULL_POINTER;
}

}  // namespace gqa

extern "C" {

int64_t gqa_linear_rows(const gqa_linear_params *p) { return p->tokens; }

gqa_status gqa_linear_plan(const gqa_linear_params *p, const gqa_device *device, gqa_plan *plan) {
  using namespace gqa;
  GQA_RETURN_IF_ERROR(check_params(p));
  *plan = {};
  if (p->tokens == 0) return GQA_STATUS_OK;
  plan->reason = refusal(*p, *device);
  if (plan->reason != nullptr) return GQA_STATUS_UNSUPPORTED;
  plan->reason = "few tokens: one kernel streams the weights";
  const StreamShape shape{false, p->weight_scale != nullptr, p->tokens, total_features(*p), p->in_features};
  add_launch(plan, stream_launch("linear", "linear_stream", p->dtype, shape, *device));
  return GQA_STATUS_OK;
}

}  // extern "C"
