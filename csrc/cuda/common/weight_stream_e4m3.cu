// Launches of the kernel that streams weights of e4m3.
#include "cuda/common/weight_stream_kernel.cuh"

namespace gqa::cuda {

gqa_status launch_e4m3_stream(const gqa_launch &plan, int32_t dtype, const WeightStream &p, cudaStream_t stream) {
  if (dtype == GQA_DTYPE_BFLOAT16) return launch_stream<__nv_bfloat16, E4m3>(plan, p, stream);
  return launch_stream<__half, E4m3>(plan, p, stream);
}

}  // namespace gqa::cuda
