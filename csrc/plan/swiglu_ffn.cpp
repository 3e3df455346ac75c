#include "plan/swiglu_ffn.h"

#include <algorithm>

#include "plan/weight_stream.h"

namespace gqa {
namespace {

// Why the kernels don't serve valid params, or nullptr.
const char *refusal(const gqa_swiglu_ffn_params &p, const gqa_device &device) {
  if (device.compute_capability != 90 || !has_sm90_code()) return "not sm_90: torch's matrix products around swiglu";
  if (p.dtype == GQA_DTYPE_FLOAT32) return "float32: torch's matrix products around swiglu";
  if (p.tokens > kStreamMaxTokens) return "more than 16 tokens: torch's matrix products around swiglu";
  if (p.hidden % 8 != 0 || p.intermediate % 8 != 0) {
    return "sizes are no multiples of 8: torch's matrix products around swiglu";
  }
  const bool first = p.w_gate_scale != nullptr, second = p.w_down_scale != nullptr;  // of e4m3
  if ((first && p.hidden % 16 != 0) || (second && p.intermediate % 16 != 0)) {
    return "sizes are no multiples of 16: torch's matrix products around swiglu";
  }
  const bool fits = streams_rows(p.x, p.x_stride, p.tokens) &&
                    streams_rows(p.w_gate, p.w_gate_stride, p.intermediate, first) &&
                    streams_rows(p.w_up, p.w_up_stride, p.intermediate, first) &&
                    streams_rows(p.w_down, p.w_down_stride, p.out_features, second) &&
                    streams_rows(p.activation, p.intermediate, p.tokens);
  if (!fits) return "rows are not 16-byte aligned: torch's matrix products around swiglu";
  constexpr int64_t kLargest = int64_t{1} << 30;
  if (std::max({p.hidden, p.intermediate, p.out_features}) > kLargest) {
    return "more than 2^30 columns: torch's matrix products around swiglu";
  }
  return nullptr;
}

}  // namespace

gqa_status check_params(const gqa_swiglu_ffn_params *p) {
  GQA_RETURN_IF_ERROR(check_struct(p));
  if (!is_float_dtype(p->dtype)) return GQA_STATUS_UNSUPPORTED;
  if (p->tokens < 0 || p->hidden < 1 || p->intermediate < 1 || p->out_features < 1) return GQA_STATUS_INVALID_ARGUMENT;
  if ((p->w_gate_scale == nullptr) != (p->w_up_scale == nullptr)) return GQA_STATUS_INVALID_ARGUMENT;
  if (p->tokens == 0) return GQA_STATUS_OK;
  const bool complete = p->x && p->w_gate && p->w_up && p->w_down && p->activation && p->out;
  return complete ? GQA_STATUS_OK : GQA_STATUS_NULL_POINTER;
}

}  // namespace gqa

extern "C" {

int64_t gqa_swiglu_ffn_rows(const gqa_swiglu_ffn_params *p) { return p->tokens; }

gqa_status gqa_swiglu_ffn_plan(const gqa_swiglu_ffn_params *p, const gqa_device *device, gqa_plan *plan) {
  using namespace gqa;
  GQA_RETURN_IF_ERROR(check_params(p));
  *plan = {};
  if (p->tokens == 0) return GQA_STATUS_OK;
  plan->reason = refusal(*p, *device);
  if (plan->reason != nullptr) return GQA_STATUS_UNSUPPORTED;
  plan->reason = "few tokens: two kernels stream the weights";
  const StreamShape first{true, p->w_gate_scale != nullptr, p->tokens, p->intermediate, p->hidden};
  const StreamShape second{false, p->w_down_scale != nullptr, p->tokens, p->out_features, p->intermediate};
  add_launch(plan, stream_launch("swiglu_ffn", "ffn_gate_up", p->dtype, first, *device));
  add_launch(plan, stream_launch("swiglu_ffn", "ffn_down", p->dtype, second, *device));
  return GQA_STATUS_OK;
}

}  // extern "C"
