// rmsnorm and add_rmsnorm of rows without gaps that are whole vectors of 16 bytes and half of one, as those of 4100
// bfloat16 are: every other row begins between two vectors of memory. A block takes a row; a thread holds kHeld aligned
// vectors of memory, and the first the half before or after them.
// Memory order: x (and residual) once, weight, the sum out, out; all loads of a thread are under way before the first
// is used. Limits: plan/rmsnorm.cpp. Determinism: the order of square_sum.cuh. Where the row begins with the half, its
// vectors are halves of two of memory: a lane sums the first, and the next lane goes on from there.
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

// `sum` and then the squares of one half of a vector.
template <typename T>
__device__ __forceinline__ float add_squares(float sum, const Vec<T> &vec, int half) {
  constexpr int kHalf = Vec<T>::kSize / 2;
  const Floats<T> x = widen(vec);
#pragma unroll
  for (int i = 0; i < kHalf; ++i) sum = __fmaf_rn(x.value[half * kHalf + i], x.value[half * kHalf + i], sum);
  return sum;
}

// Where a thread's vectors lie: from element `first` of the row on, 32 vectors apart.
template <typename T>
struct OfRow {
  static constexpr int kVector = Vec<T>::kSize, kHalf = kVector / 2, kStep = kGroupVectors * kVector;
  int first, hidden;
  bool takes_spare;  // the half before its first vector, or after the last of the row
  int spare;

  __device__ __forceinline__ int at(int i) const { return first + i * kStep; }
  __device__ __forceinline__ bool has(int i) const { return at(i) + kVector <= hidden; }
  __device__ __forceinline__ bool has_half(int i) const { return at(i) + kHalf == hidden; }

  template <int kHeld>
  __device__ __forceinline__ void load(const T *row, Vec<T> (&vecs)[kHeld], Vec<T> &half) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      vecs[i] = Vec<T>{};
      if (has(i)) vecs[i] = load_vec_once(row + at(i));
      if (has_half(i)) half_of(vecs[i], 0) = load_half(row + at(i));
    }
    half = Vec<T>{};
    if (takes_spare) half_of(half, 0) = load_half(row + spare);
  }

  // From where vectors may begin at halves of those of memory.
  template <int kHeld>
  __device__ __forceinline__ void load_weights(const T *row, Vec<T> (&vecs)[kHeld]) const {
    const bool whole = is_aligned16(row + first);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      vecs[i] = Vec<T>{};
      if (whole && has(i)) vecs[i] = load_vec(row + at(i));
      if (has_half(i) || (!whole && has(i))) half_of(vecs[i], 0) = load_half(row + at(i));
      if (!whole && has(i)) half_of(vecs[i], 1) = load_half(row + at(i) + kHalf);
    }
  }

  template <int kHeld>
  __device__ __forceinline__ void store(T *row, Vec<T> (&vecs)[kHeld], Vec<T> &half, bool past_cache) const {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (has(i)) gqa::cuda::store<kVector>(row + at(i), 0, 0, vecs[i], past_cache);
      if (has_half(i)) *reinterpret_cast<uint2 *>(row + at(i)) = half_of(vecs[i], 0);
    }
    if (takes_spare && threadIdx.x == 0) *reinterpret_cast<uint2 *>(row + spare) = half_of(half, 0);
  }
};

// Threads of a block, and blocks of an SM that registers are to allow.
constexpr int half_threads(int held) { return held == 4 ? 256 : 512; }
constexpr int half_blocks(int held, bool adds) { return held == 4 ? 4 : adds ? 2 : 3; }

template <int kHeld, bool kAdds, typename T, bool kUsual = false>
__global__ void __launch_bounds__(half_threads(kHeld), half_blocks(kHeld, kAdds))
    norm_dense_half_rows(const __grid_constant__ DenseNorm<T> p) {
  constexpr int kVector = Vec<T>::kSize, kHalf = kVector / 2;
  // Weights only when they are needed: registers for more blocks count for more.
  constexpr bool kLate = kHeld == 4 || kUsual;
  __shared__ __align__(16) float sums[2 * kTreeGroups];
  launch_dependents();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, held = kHeld * (blockDim.x / 32);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * p.hidden;
  const bool shifted = reinterpret_cast<uintptr_t>(p.x + row) % 16 != 0;  // the row begins with the half
  // Whether a row's last vector, a half, is past the last one held.
  const bool beyond = p.hidden == held * kGroupVectors * kVector + kHalf;
  OfRow<T> mine;
  mine.first = (warp * kHeld * 32 + lane) * kVector + (shifted ? kHalf : 0);
  mine.hidden = p.hidden;
  mine.spare = shifted ? mine.first - kHalf : p.hidden - kHalf;
  mine.takes_spare = shifted ? lane == 0 && mine.spare < p.hidden : beyond && threadIdx.x == 0;
  if (!kUsual && p.few_rows) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (mine.has(i)) prefetch_l2(p.weight + mine.at(i));
    }
  }
  have_dense_ready<kAdds>(p, row + mine.first);
  wait_for_prerequisites();
  Vec<T> x[kHeld], residual[kHeld], weight[kHeld], spare, residual_spare;
  mine.load(p.x + row, x, spare);
  if constexpr (kAdds) mine.load(p.residual + row, residual, residual_spare);
  if constexpr (!kLate) mine.load_weights(p.weight, weight);
  if constexpr (kAdds) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) x[i] = sum_of(x[i], residual[i]);
    spare = sum_of(spare, residual_spare);
  }
  const bool past_cache = kUsual || p.past_cache;
  const float of_spare = add_squares(0.0f, spare, 0);
  float part[kHeld], last = of_spare;
  if (shifted) {
    float begun[kHeld];  // the first half of a row's vector, in the last of memory's
#pragma unroll
    for (int i = 0; i < kHeld; ++i) begun[i] = add_squares(0.0f, x[i], 1);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      const float given = i > 0 && lane == 31 ? begun[i > 0 ? i - 1 : 0] : begun[i];
      const float before = __shfl_sync(0xffffffffu, given, (lane + 31) % 32);
      part[i] = add_squares(i == 0 && lane == 0 ? of_spare : before, x[i], 0);
    }
    last = begun[kHeld - 1];
  } else {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) part[i] = square_sum(x[i]);
  }
  if (beyond && threadIdx.x == (shifted ? blockDim.x - 1 : 0)) sums[held] = last;
  const int groups = share_groups(part, sums, beyond ? 1 : 0);
  // Only now has every warp the half that it shares with the one before, should the sum replace an input.
  if constexpr (kAdds) mine.store(p.residual_out + row, x, spare, past_cache);
  const float rstd = reciprocal_rms(sum_of_groups(sums, groups), p.inverse_hidden, p.eps);
  if constexpr (kLate) mine.load_weights(p.weight, weight);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) x[i] = scaled_row<kUsual>(x[i], weight[i], rstd, p);
  if (mine.takes_spare && threadIdx.x == 0) {
    Vec<T> of_spare_weight{};
    half_of(of_spare_weight, 0) = load_half(p.weight + mine.spare);
    spare = scaled_row<kUsual>(spare, of_spare_weight, rstd, p);
  }
  mine.store(p.out + row, x, spare, past_cache);
}

}  // namespace gqa::cuda
