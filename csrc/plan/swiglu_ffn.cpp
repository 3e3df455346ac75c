#include "plan/swiglu_ffn.h"

#include <algorithm>

namespace gqa {
namespace {

bool aligned(const void *data, int64_t stride, int64_t rows) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (rows == 1 || stride % 8 == 0);
}

// Why the kernels don't serve valid params, or nullptr.
const char *refusal(const gqa_swiglu_ffn_params &p, const gqa_device &device) {
  if (device.compute_capability != 90 || !has_sm90_code()) return "not sm_90: torch's matrix products around swiglu";
  if (p.dtype == GQA_DTYPE_FLOAT32) return "float32: torch's matrix products around swiglu";
  if (p.tokens > kFfnMaxTokens) return "more than 16 tokens: torch's matrix products around swiglu";
  if (p.hidden % 8 != 0 || p.intermediate % 8 != 0) {
    return "sizes are no multiples of 8: torch's matrix products around swiglu";
  }
  const bool fits = aligned(p.x, p.x_stride, p.tokens) && aligned(p.w_gate, p.w_gate_stride, p.intermediate) &&
                    aligned(p.w_up, p.w_up_stride, p.intermediate) &&
                    aligned(p.w_down, p.w_down_stride, p.out_features) &&
                    aligned(p.activation, p.intermediate, p.tokens);
  if (!fits) return "rows are not 16-byte aligned: torch's matrix products around swiglu";
  constexpr int64_t kLargest = int64_t{1} << 30;
  if (std::max({p.hidden, p.intermediate, p.out_features}) > kLargest) {
    return "more than 2^30 columns: torch's matrix products around swiglu";
  }
  return nullptr;
}

// A block for each SM, where there is an output for each.
gqa_launch launch_of(const char *kernel, const gqa_swiglu_ffn_params &p, int64_t features, const gqa_device &device) {
  const Dim3 grid{std::min<int64_t>(device.num_sms, features)}, block{32 * kFfnWarps};
  return make_launch("swiglu_ffn", kernel, p.dtype, grid, block, ffn_shared_memory(p.tokens), ffn_variant(p.tokens));
}

}  // namespace

gqa_status check_params(const gqa_swiglu_ffn_params *p) {
  GQA_RETURN_IF_ERROR(check_struct(p));
  if (!is_float_dtype(p->dtype)) return GQA_STATUS_UNSUPPORTED;
  if (p->tokens < 0 || p->hidden < 1 || p->intermediate < 1 || p->out_features < 1) return GQA_STATUS_INVALID_ARGUMENT;
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
  add_launch(plan, launch_of("ffn_gate_up", *p, p->intermediate, *device));
  add_launch(plan, launch_of("ffn_down", *p, p->out_features, *device));
  return GQA_STATUS_OK;
}

}  // extern "C"
