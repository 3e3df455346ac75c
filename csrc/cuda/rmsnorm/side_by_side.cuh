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
  uint32_t zero;
};

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

// The halves of a vector as words of 8 bytes.
template <typename T>
__device__ __forceinline__ uint2 &half_of(Vec<T> &vec, int half) {
  return reinterpret_cast<uint2 *>(vec.value)[half];
}

// What a thread takes of a row: kHeld vectors, 32 apart, from `row` on, where the first of them lies; `left` is what is
// left of the row from there. Zeros past its end. kWhole: rows are whole aligned vectors. Else `row` may lie between
// two vectors and the row may end with half of one: a warp then moves the aligned vectors that its own straddle, and
// each lane has its first half from the lane before it.
template <int kHeld, bool kWhole, bool kOnce, typename T>
__device__ __forceinline__ void load_side_by_side(const T *row, int left, Vec<T> (&vecs)[kHeld]) {
  constexpr int kVector = Vec<T>::kSize, kHalf = kVector / 2, kStep = kGroupVectors * kVector;
  if constexpr (!kWhole) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
      const int lane = threadIdx.x % 32;
      Vec<T> moved[kHeld];
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        vecs[i] = moved[i] = Vec<T>{};
        const int end = left - i * kStep;  // elements from the vector to the end of the row
        const T *at = row + i * kStep;
        const bool both = lane < 31 && end > kVector;
        if (both) moved[i] = kOnce ? load_vec_once(at + kHalf) : load_vec(at + kHalf);
        if (!both && end >= kVector) half_of(moved[i], 0) = *reinterpret_cast<const uint2 *>(at + kHalf);
        if (lane == 0 && end > 0) half_of(vecs[i], 0) = *reinterpret_cast<const uint2 *>(at);
      }
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        const uint2 mine = half_of(moved[i], 1);
        const uint2 before = {__shfl_up_sync(0xffffffffu, mine.x, 1), __shfl_up_sync(0xffffffffu, mine.y, 1)};
        if (lane != 0) half_of(vecs[i], 0) = before;
        half_of(vecs[i], 1) = half_of(moved[i], 0);
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    vecs[i] = Vec<T>{};
    const T *at = row + i * kStep;
    if (i * kStep + (kWhole ? 0 : kHalf) < left) vecs[i] = kOnce ? load_vec_once(at) : load_vec(at);
    if (!kWhole && i * kStep + kHalf == left) half_of(vecs[i], 0) = *reinterpret_cast<const uint2 *>(at);
  }
}

template <int kHeld, bool kWhole, typename T>
__device__ __forceinline__ void store_side_by_side(T *row, int left, Vec<T> (&vecs)[kHeld], bool past_cache) {
  constexpr int kVector = Vec<T>::kSize, kHalf = kVector / 2, kStep = kGroupVectors * kVector;
  if constexpr (!kWhole) {
    if (reinterpret_cast<uintptr_t>(row) % 16 != 0) {
      const int lane = threadIdx.x % 32;
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        T *at = row + i * kStep;
        const int end = left - i * kStep;
        const uint2 mine = half_of(vecs[i], 0);
        const uint2 after = {__shfl_down_sync(0xffffffffu, mine.x, 1), __shfl_down_sync(0xffffffffu, mine.y, 1)};
        const bool both = lane < 31 && end > kVector;
        Vec<T> moved;
        half_of(moved, 0) = half_of(vecs[i], 1);
        half_of(moved, 1) = after;
        if (both) store<kVector>(at + kHalf, 0, 0, moved, past_cache);
        if (!both && end >= kVector) *reinterpret_cast<uint2 *>(at + kHalf) = half_of(moved, 0);
        if (lane == 0 && end > 0) *reinterpret_cast<uint2 *>(at) = mine;
      }
      return;
    }
  }
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    T *at = row + i * kStep;
    if (i * kStep + (kWhole ? 0 : kHalf) < left) store<kVector>(at, 0, 0, vecs[i], past_cache);
    if (!kWhole && i * kStep + kHalf == left) *reinterpret_cast<uint2 *>(at) = half_of(vecs[i], 0);
  }
}

}  // namespace gqa::cuda
