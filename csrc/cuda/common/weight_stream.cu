// Launches of the kernel that streams weights of x's dtype.
#include "cuda/common/weight_stream_kernel.cuh"

namespace gqa::cuda {

gqa_status launch_weight_stream(const gqa_launch &plan, int32_t dtype, const WeightStream &p, cudaStream_t stream) {
  if (p.scale[0] != nullptr) return launch_e4m3_stream(plan, dtype, p, stream);
  if (dtype == GQA_DTYPE_BFLOAT16) return launch_stream<__nv_bfloat16, __nv_bfloat16>(plan, p, stream);
  return launch_stream<__half, __half>(plan, p, stream);
}

}  // namespace gqa::cuda
