// The sum of the squares of a row, in one order whatever kernel computes it and however many threads: eight or four
// elements of a vector one after the other, 32 vectors by a butterfly, 16 of those groups by a tree, these in turn.
#pragma once

#include "cuda/common/pack.cuh"

namespace gqa::cuda {

constexpr int kGroupVectors = 32, kTreeGroups = 16;

// Floats of shared memory that the group sums of a row take.
__host__ __device__ constexpr int group_sums(int vectors) {
  constexpr int kTreeVectors = kGroupVectors * kTreeGroups;
  return (vectors + kTreeVectors - 1) / kTreeVectors * kTreeGroups;
}

template <typename T>
__device__ __forceinline__ float square_sum(const Vec<T> &vec) {
  const Floats<T> x = widen(vec);
  float sum = 0;
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) sum = __fmaf_rn(x.value[i], x.value[i], sum);
  return sum;
}

// Over the lanes of one group; `lanes` is 32, or a power of two where the row has no more vectors than that.
__device__ __forceinline__ float group_sum(float sum, int lanes) {
  for (int offset = lanes / 2; offset > 0; offset /= 2) sum += __shfl_xor_sync(0xffffffffu, sum, offset);
  return sum;
}

// Over all groups, their sums padded with zeros to a multiple of kTreeGroups.
__device__ __forceinline__ float sum_of_groups(const float *sums, int count) {
  const auto add = [](float4 a, float4 b) { return make_float4(a.x + b.x, a.y + b.y, a.z + b.z, a.w + b.w); };
  float total = 0;
#pragma unroll 1
  for (int i = 0; i < count; i += kTreeGroups) {
    const float4 *four = reinterpret_cast<const float4 *>(sums + i);
    const float4 tree = add(add(four[0], four[2]), add(four[1], four[3]));
    total += (tree.x + tree.z) + (tree.y + tree.w);
  }
  return total;
}

// 1 / sqrt(mean + eps), each step rounded by itself as in eager PyTorch.
__device__ __forceinline__ float reciprocal_rms(float total, float inverse_count, float eps) {
  return rsqrtf(__fadd_rn(__fmul_rn(total, inverse_count), eps));
}

}  // namespace gqa::cuda
