// rmsnorm and add_rmsnorm of rows without gaps that may begin or end between two vectors of 16 bytes, at multiples of
// 8, as those of 4100 bfloat16 do. A block takes a row; a thread holds kHeld aligned vectors of memory, whichever
// vectors of the row they are halves of.
// Memory order: x (and residual) once, weight, the sum out, out; all loads of a thread are under way before the first
// is used. Limits: plan/rmsnorm.cpp. Determinism: the order of square_sum.cuh, for which a lane borrows the half vector
// after its own; all else is by element.
#pragma once

#include "cuda/rmsnorm/side_by_side.cuh"

namespace gqa::cuda {

// The halves of a vector as words of 8 bytes.
template <typename T>
__device__ __forceinline__ uint2 &half_of(Vec<T> &vec, int half) {
  return reinterpret_cast<uint2 *>(vec.value)[half];
}

template <typename T>
__device__ __forceinline__ uint2 load_half(const T *at) {
  return *reinterpret_cast<const uint2 *>(at);
}

// Where a thread's vectors lie: from element `first` of the row on, 32 vectors apart. The first of a row may begin half
// a vector before it.
template <typename T>
struct Straddling {
  static constexpr int kHalf = Vec<T>::kSize / 2, kStep = kGroupVectors * Vec<T>::kSize;
  int first, hidden;

  __device__ __forceinline__ int at(int i) const { return first + i * kStep; }
  __device__ __forceinline__ bool has_low(int i) const { return at(i) >= 0 && at(i) < hidden; }
  __device__ __forceinline__ bool has_high(int i) const { return at(i) + kHalf < hidden; }

  template <int kHeld>
  __device__ __forceinline__ void load_once(const T *row, Vec<T> (&vecs)[kHeld]) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      vecs[i] = Vec<T>{};
      if (has_low(i) && has_high(i)) vecs[i] = load_vec_once(row + at(i));
      if (has_low(i) && !has_high(i)) half_of(vecs[i], 0) = load_half(row + at(i));
      if (!has_low(i) && has_high(i)) half_of(vecs[i], 1) = load_half(row + at(i) + kHalf);
    }
  }

  // Where the row begins at a vector, its weights may not.
  template <int kHeld>
  __device__ __forceinline__ void load_halves(const T *row, Vec<T> (&vecs)[kHeld]) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      vecs[i] = Vec<T>{};
      if (has_low(i)) half_of(vecs[i], 0) = load_half(row + at(i));
      if (has_high(i)) half_of(vecs[i], 1) = load_half(row + at(i) + kHalf);
    }
  }

  template <int kHeld>
  __device__ __forceinline__ void store(T *row, Vec<T> (&vecs)[kHeld], bool past_cache) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (has_low(i) && has_high(i)) gqa::cuda::store<2 * kHalf>(row + at(i), 0, 0, vecs[i], past_cache);
      if (has_low(i) && !has_high(i)) *reinterpret_cast<uint2 *>(row + at(i)) = half_of(vecs[i], 0);
      if (!has_low(i) && has_high(i)) *reinterpret_cast<uint2 *>(row + at(i) + kHalf) = half_of(vecs[i], 1);
    }
  }
};

// Threads of a block, and blocks of an SM that registers are to allow.
constexpr int half_threads(int held, bool adds) { return held == 4 ? 320 : adds ? 576 : 512; }
constexpr int half_blocks(int held, bool adds) { return held == 4 ? 4 : adds ? 2 : 3; }

template <int kHeld, bool kAdds, typename T>
__global__ void __launch_bounds__(half_threads(kHeld, kAdds), half_blocks(kHeld, kAdds))
    norm_dense_half_rows(const __grid_constant__ DenseNorm<T> p) {
  constexpr int kVector = Vec<T>::kSize, kHalf = kVector / 2;
  constexpr bool kLate = kHeld == 4;  // weights only when they are needed: registers for more blocks count for more
  __shared__ __align__(16) float sums[2 * kTreeGroups];
  launch_dependents();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * p.hidden;
  const bool shifted = reinterpret_cast<uintptr_t>(p.x + row) % 16 != 0;  // of all tensors but the weights, or of none
  const Straddling<T> part_of{(warp * kHeld * 32 + lane) * kVector - (shifted ? kHalf : 0), p.hidden};
  const int next = part_of.at(kHeld - 1) + kVector;
  const bool borrows = shifted && lane == 31 && next < p.hidden;
  if (p.few_rows) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (part_of.has_low(i)) prefetch_l2(p.weight + part_of.at(i));
    }
  }
  have_dense_ready<kAdds>(p, row + part_of.first);
  wait_for_prerequisites();
  Vec<T> x[kHeld], residual[kHeld], weight[kHeld], after{}, residual_after{};
  part_of.load_once(p.x + row, x);
  if (borrows) half_of(after, 0) = load_half(p.x + row + next);
  if constexpr (kAdds) {
    part_of.load_once(p.residual + row, residual);
    if (borrows) half_of(residual_after, 0) = load_half(p.residual + row + next);
  }
  if constexpr (!kLate) part_of.load_halves(p.weight, weight);
  if constexpr (kAdds) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) x[i] = sum_of(x[i], residual[i]);
    after = sum_of(after, residual_after);
    part_of.store(p.residual_out + row, x, p.past_cache);
  }
  float part[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    Vec<T> own = x[i];  // of the row
    if (shifted) {
      uint2 low = half_of(x[i], 0);
      if (i + 1 < kHeld && lane == 0) low = half_of(x[i + 1], 0);
      half_of(own, 0) = half_of(x[i], 1);
      half_of(own, 1) = {__shfl_sync(0xffffffffu, low.x, lane + 1), __shfl_sync(0xffffffffu, low.y, lane + 1)};
      if (i + 1 == kHeld && lane == 31) half_of(own, 1) = half_of(after, 0);
    }
    part[i] = square_sum(own);
  }
  const int groups = share_groups(part, sums);
  const float rstd = reciprocal_rms(sum_of_groups(sums, groups), p.inverse_hidden, p.eps);
  if constexpr (kLate) part_of.load_halves(p.weight, weight);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) x[i] = scaled<T, T>(anew(x[i], p.zero), weight[i], rstd, p);
  part_of.store(p.out + row, x, p.past_cache);
}

}  // namespace gqa::cuda
