// linear for up to 16 tokens: out = residual + (x w^T + bias), of up to three matrices whose outputs lie side by side.
// One launch of the kernel that streams weights (common/weight_stream_kernel.cuh).
// Memory order: each weight once; before the kernel before has ended, where the caller promises static weights.
// Limits: sm_90; in_features a multiple of 8, of e4m3 weights of 16; 16-byte aligned rows.
// Determinism: as of that kernel, bitwise repeatable.
#include "cuda/common/weight_stream.cuh"
#include "plan/linear.h"

namespace gqa::cuda {
namespace {

gqa_status run(const gqa_launch &plan, const gqa_linear_params &p, cudaStream_t stream) {
  WeightStream w{};
  for (int i = 0; i < 3; ++i) {
    w.weights[i] = p.weights[i];
    w.weight_stride[i] = p.weight_stride[i];
  }
  w.ends[0] = static_cast<int32_t>(p.out_features[0]);
  w.ends[1] = static_cast<int32_t>(p.out_features[0] + p.out_features[1]);
  w.scale[0] = p.weight_scale;
  w.bias = p.bias;
  w.residual = p.residual;
  w.residual_stride = p.residual_stride;
  w.x = p.x;
  w.x_stride = p.x_stride;
  w.out = p.out;
  w.out_stride = p.out_stride;
  w.features = static_cast<int32_t>(total_features(p));
  w.columns = static_cast<int32_t>(p.in_features);
  w.tokens = static_cast<int32_t>(p.tokens);
  w.early = p.static_weights != 0;
  return launch_weight_stream(plan, p.dtype, w, stream);
}

}  // namespace
}  // namespace gqa::cuda

extern "C" gqa_status gqa_linear_cuda(const gqa_linear_params *p, CUstream_st *stream) {
  using namespace gqa::cuda;
  GQA_RETURN_IF_ERROR(gqa::check_params(p));
  gqa_device device;
  GQA_RETURN_IF_ERROR(current_device(&device));
  gqa_plan plan;
  GQA_RETURN_IF_ERROR(gqa_linear_plan(p, &device, &plan));
  return plan.num_launches == 0 ? GQA_STATUS_OK : run(plan.launches[0], *p, stream);
}
