// A norm of rows without gaps: its parameters, and how a warp moves its part of a row, whole vectors side by side.
#pragma once

#include "cuda/common/norm_scale.cuh"
#include "cuda/common/programmatic_launch.cuh"
#include "cuda/common/square_sum.cuh"

namespace gqa::cuda {

// Parameters lie in memory, 64 bytes a line, and a line first touched late in a kernel is a miss late in it: few, and
// in the order of their use.
template <typename T>
struct DenseNorm {
  const T *weight, *x, *residual;
  T *out, *residual_out;
  int32_t hidden;
  float inverse_hidden, eps, weight_offset;
  bool cast_before_weight, few_rows, past_cache;
  uint8_t ahead;  // of a cluster: rows from its own to the one whose inputs it has brought into L2
  uint32_t zero;
};

// How rows are scaled: as Llama does it where the call is NormVariant::usual, else as the parameters say.
template <bool kUsual, typename T>
__device__ __forceinline__ Vec<T> scaled_row(const Vec<T> &x, const Vec<T> &weight, float rstd, const DenseNorm<T> &p) {
  if constexpr (kUsual) {
    return scaled<T, T>(anew(x, p.zero), weight, rstd, LlamaScale{});
  } else {
    return scaled<T, T>(anew(x, p.zero), weight, rstd, p);
  }
}

template <bool kAdds, typename T>
__device__ __forceinline__ void have_dense_ready(const DenseNorm<T> &p, int64_t at) {
  have_ready(p.x + at);
  have_ready(p.out + at);
  if constexpr (kAdds) {
    have_ready(p.residual + at);
    have_ready(p.residual_out + at);
  }
  have_ready(p.eps);
  have_ready(p.inverse_hidden);
  have_ready(p.weight_offset);
  have_ready(static_cast<int>(p.cast_before_weight));
  have_ready(static_cast<int>(p.past_cache));
}

// What a thread takes of a row of whole vectors: kHeld of them, 32 apart, from `row` on, where the first lies; `left`
// is what is left of the row from there. Zeros past its end.
template <int kHeld, bool kOnce, typename T>
__device__ __forceinline__ void load_side_by_side(const T *row, int left, Vec<T> (&vecs)[kHeld]) {
  constexpr int kStep = kGroupVectors * Vec<T>::kSize;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    vecs[i] = Vec<T>{};
    if (i * kStep < left) vecs[i] = kOnce ? load_vec_once(row + i * kStep) : load_vec(row + i * kStep);
  }
}

template <int kHeld, typename T>
__device__ __forceinline__ void store_side_by_side(T *row, int left, Vec<T> (&vecs)[kHeld], bool past_cache) {
  constexpr int kVector = Vec<T>::kSize, kStep = kGroupVectors * kVector;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (i * kStep < left) store<kVector>(row + i * kStep, 0, 0, vecs[i], past_cache);
  }
}

// Leaves the sums of the block's groups in `sums`, up to two trees of them with zeros past the last, and says how many.
// part: of the squares of a thread's vectors; `more` groups after them are left to the caller.
template <int kHeld>
__device__ __forceinline__ int share_groups(float (&part)[kHeld], float *sums, int more = 0) {
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    part[i] = group_sum(part[i], 32);
    if (threadIdx.x % 32 == 0) sums[threadIdx.x / 32 * kHeld + i] = part[i];
  }
  const int held = kHeld * (blockDim.x / 32) + more, groups = held > kTreeGroups ? 2 * kTreeGroups : kTreeGroups;
  if (static_cast<int>(threadIdx.x) < groups - held) sums[held + threadIdx.x] = 0;
  __syncthreads();
  return groups;
}

}  // namespace gqa::cuda
