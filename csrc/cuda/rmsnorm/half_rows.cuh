// rmsnorm and add_rmsnorm of rows without gaps that are whole vectors of 16 bytes and half of one, as those of 4100
// bfloat16 are: every other row begins between two vectors of memory. A block takes a row; a thread holds kHeld aligned
// vectors of memory, and some a half: that with which a row begins, or ends.
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

// As the first half of a vector, the second is zero.
template <typename T>
__device__ __forceinline__ Vec<T> load_half(const T *at) {
  Vec<T> vec{};
  half_of(vec, 0) = *reinterpret_cast<const uint2 *>(at);
  return vec;
}

template <typename T>
__device__ __forceinline__ void store_half(T *at, Vec<T> &vec) {
  *reinterpret_cast<uint2 *>(at) = half_of(vec, 0);
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

// From where vectors may begin at halves of those of memory; `left` as in load_side_by_side.
template <int kHeld, typename T>
__device__ __forceinline__ void load_weights_at_halves(const T *at, int left, Vec<T> (&vecs)[kHeld]) {
  constexpr int kHalf = Vec<T>::kSize / 2, kStep = kGroupVectors * Vec<T>::kSize;
  if (is_aligned16(at)) return load_side_by_side<kHeld, false>(at, left, vecs);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (i * kStep >= left) continue;
    half_of(vecs[i], 0) = *reinterpret_cast<const uint2 *>(at + i * kStep);
    half_of(vecs[i], 1) = *reinterpret_cast<const uint2 *>(at + i * kStep + kHalf);
  }
}

// Threads of a block, and blocks of an SM that registers are to allow.
constexpr int half_threads(int held) { return held == 4 ? 256 : 512; }
constexpr int half_blocks(int held, bool adds) { return held == 4 ? (adds ? 3 : 4) : adds ? 2 : 3; }

template <int kHeld, bool kAdds, typename T, bool kUsual = false>
__global__ void __launch_bounds__(half_threads(kHeld), half_blocks(kHeld, kAdds))
    norm_dense_half_rows(const __grid_constant__ DenseNorm<T> p) {
  constexpr int kVector = Vec<T>::kSize, kHalf = kVector / 2, kStep = kGroupVectors * kVector;
  // Weights only when they are needed: registers for more blocks count for more.
  constexpr bool kLate = kHeld == 4 || kUsual;
  __shared__ __align__(16) float sums[2 * kTreeGroups];
  launch_dependents();
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32, held = kHeld * (blockDim.x / 32);
  const int64_t row = static_cast<int64_t>(blockIdx.x) * p.hidden;
  const bool shifted = reinterpret_cast<uintptr_t>(p.x + row) % 16 != 0;  // the row begins with the half
  const int first = (warp * kHeld * 32 + lane) * kVector + (shifted ? kHalf : 0), end = p.hidden - first;
  const int left = end - kVector + 1;  // vectors that begin before it are whole
  // Whether a row's last vector, a half, is past the last one held, and else which of ours it is.
  const bool beyond = p.hidden == held * kStep + kHalf;
  const int last = !shifted && end > 0 && (end - kHalf) % kStep == 0 ? (end - kHalf) / kStep : kHeld;
  const int half = shifted ? first - kHalf : p.hidden - kHalf;
  const bool has_half = shifted ? lane == 0 && half < p.hidden : beyond ? threadIdx.x == 0 : last < kHeld;
  const bool stores_half = has_half && (!shifted || warp == 0);
  const T *weights = p.weight + first;
  if (!kUsual && p.few_rows) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (i * kStep < left) prefetch_l2(weights + i * kStep);
    }
  }
  const int64_t at = row + first;
  have_dense_ready<kAdds>(p, at);
  wait_for_prerequisites();
  Vec<T> x[kHeld], residual[kHeld], weight[kHeld], spare{}, spare_residual{};
  load_side_by_side<kHeld, true>(p.x + at, left, x);
  if (has_half) spare = load_half(p.x + row + half);
  if constexpr (kAdds) {
    load_side_by_side<kHeld, true>(p.residual + at, left, residual);
    if (has_half) spare_residual = load_half(p.residual + row + half);
  }
  if constexpr (!kLate) load_weights_at_halves(weights, left, weight);
  if constexpr (kAdds) {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) x[i] = sum_of(x[i], residual[i]);
    spare = sum_of(spare, spare_residual);
  }
  const bool past_cache = kUsual || p.past_cache;
  const float of_spare = add_squares(0.0f, spare, 0);
  float part[kHeld], of_last = of_spare;
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
    of_last = begun[kHeld - 1];
  } else {
#pragma unroll
    for (int i = 0; i < kHeld; ++i) part[i] = i == last ? of_spare : square_sum(x[i]);
  }
  if (beyond && threadIdx.x == (shifted ? blockDim.x - 1 : 0)) sums[held] = of_last;
  const int groups = share_groups(part, sums, beyond ? 1 : 0);
  // Only now has every warp the half that it shares with the one before, should the sum replace an input.
  if constexpr (kAdds) {
    store_side_by_side<kHeld>(p.residual_out + at, left, x, past_cache);
    if (stores_half) store_half(p.residual_out + row + half, spare);
  }
  const float rstd = reciprocal_rms(sum_of_groups(sums, groups), p.inverse_hidden, p.eps);
  if constexpr (kLate) load_weights_at_halves(weights, left, weight);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) x[i] = scaled_row<kUsual>(x[i], weight[i], rstd, p);
  store_side_by_side<kHeld>(p.out + at, left, x, past_cache);
  if (stores_half) {
    spare = scaled_row<kUsual>(spare, load_half(p.weight + half), rstd, p);
    store_half(p.out + row + half, spare);
  }
}

}  // namespace gqa::cuda
