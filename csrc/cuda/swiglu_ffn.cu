// swiglu_ffn for up to 16 tokens: activation = swiglu(x w_gate^T, x w_up^T), then out = residual + activation w_down^T.
// Two launches of the kernel that streams weights (common/weight_stream_kernel.cuh), first gated, then plain.
// Memory order: w_gate and w_up row by row in turn, then w_down, which is read before the first kernel ends.
// Limits: sm_90; sizes multiples of 8, before e4m3 weights of 16; 16-byte aligned rows.
// Determinism: as of that kernel, bitwise repeatable.
#include "cuda/common/weight_stream.cuh"
#include "plan/swiglu_ffn.h"

namespace gqa::cuda {
namespace {

gqa_status run(const gqa_plan &plan, const gqa_swiglu_ffn_params &p, cudaStream_t stream) {
  const auto tokens = static_cast<int32_t>(p.tokens), hidden = static_cast<int32_t>(p.hidden);
  const auto intermediate = static_cast<int32_t>(p.intermediate), out_features = static_cast<int32_t>(p.out_features);
  WeightStream first{};
  first.weights[0] = p.w_gate;
  first.weights[1] = p.w_up;
  first.weight_stride[0] = p.w_gate_stride;
  first.weight_stride[1] = p.w_up_stride;
  first.scale[0] = p.w_gate_scale;
  first.scale[1] = p.w_up_scale;
  first.x = p.x;
  first.x_stride = p.x_stride;
  first.out = p.activation;
  first.out_stride = first.features = intermediate;
  first.columns = hidden;
  first.tokens = tokens;
  first.gated = true;
  first.early = p.static_weights != 0;
  GQA_RETURN_IF_ERROR(launch_weight_stream(plan.launches[0], p.dtype, first, stream));
  WeightStream second{};
  second.weights[0] = p.w_down;
  second.weight_stride[0] = p.w_down_stride;
  second.scale[0] = p.w_down_scale;
  second.residual = p.residual;
  second.residual_stride = p.residual_stride;
  second.ends[0] = second.ends[1] = out_features;
  second.x = p.activation;
  second.x_stride = p.intermediate;
  second.out = p.out;
  second.out_stride = second.features = out_features;
  second.columns = intermediate;
  second.tokens = tokens;
  second.early = true;
  return launch_weight_stream(plan.launches[1], p.dtype, second, stream);
}

}  // namespace
}  // namespace gqa::cuda

extern "C" gqa_status gqa_swiglu_ffn_cuda(const gqa_swiglu_ffn_params *p, CUstream_st *stream) {
  using namespace gqa::cuda;
  GQA_RETURN_IF_ERROR(gqa::check_params(p));
  gqa_device device;
  GQA_RETURN_IF_ERROR(current_device(&device));
  gqa_plan plan;
  GQA_RETURN_IF_ERROR(gqa_swiglu_ffn_plan(p, &device, &plan));
  return plan.num_launches == 0 ? GQA_STATUS_OK : run(plan, *p, stream);
}
