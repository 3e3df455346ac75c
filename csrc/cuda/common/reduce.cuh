// Sums and maxima over a warp and over a block, in a fixed order.
#pragma once

namespace gqa::cuda {

__device__ __forceinline__ float warp_sum(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) value += __shfl_xor_sync(0xffffffffu, value, offset);
  return value;
}

__device__ __forceinline__ float warp_max(float value) {
#pragma unroll
  for (int offset = 16; offset > 0; offset >>= 1) value = fmaxf(value, __shfl_xor_sync(0xffffffffu, value, offset));
  return value;
}

// Every thread gets the sum. One barrier: a second call in the same kernel needs its own buffer of 32 floats.
__device__ __forceinline__ float block_sum(float value, float *buffer) {
  value = warp_sum(value);
  const int warps = (blockDim.x + 31) / 32;
  if (threadIdx.x % 32 == 0) buffer[threadIdx.x / 32] = value;
  __syncthreads();
  float sum = 0;
  for (int warp = 0; warp < warps; ++warp) sum += buffer[warp];
  return sum;
}

}  // namespace gqa::cuda
