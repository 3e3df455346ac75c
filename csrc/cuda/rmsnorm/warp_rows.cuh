// rmsnorm and add_rmsnorm of rows without gaps that one warp takes, or a part of one.
// norm_dense_narrow_rows: up to 32 lanes take a row of as many vectors; a thread holds a vector of two rows.
// norm_dense_warp_rows: a warp takes a row of up to 128 vectors, four a lane.
// norm_dense_warp_pairs: a warp takes two rows of up to 64 vectors, two of each a lane.
// Memory order: x (and residual) once, weight, the sum out, out; all loads before the first use. Limits: whole vectors.
// Determinism: the order of square_sum.cuh; no barrier.
#pragma once

#include "cuda/rmsnorm/side_by_side.cuh"

namespace gqa::cuda {

template <bool kAdds, typename T>
__global__ void __launch_bounds__(256, 6) norm_dense_narrow_rows(const __grid_constant__ DenseNorm<T> p, int rows) {
  constexpr int kVector = Vec<T>::kSize;
  launch_dependents();
  const int lane = threadIdx.x * kVector, first = blockIdx.x * 2 * blockDim.y + threadIdx.y;
  const bool inside = lane < p.hidden;
  const bool active[2] = {inside && first < rows, inside && first < rows - static_cast<int>(blockDim.y)};
  const int64_t at = static_cast<int64_t>(first) * p.hidden + lane, step = static_cast<int64_t>(blockDim.y) * p.hidden;
  if (p.few_rows && inside) prefetch_l2(p.weight + lane);
  have_dense_ready<kAdds>(p, at);
  wait_for_prerequisites();
  Vec<T> x[2], residual[2], weight;
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    x[i] = residual[i] = Vec<T>{};
    if (active[i]) x[i] = load_vec_once(p.x + at + i * step);
    if (kAdds && active[i]) residual[i] = load_vec_once(p.residual + at + i * step);
  }
  if (inside) weight = load_vec(p.weight + lane);
  float sum[2];
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if constexpr (kAdds) {
      x[i] = sum_of(x[i], residual[i]);
      if (active[i]) store<kVector>(p.residual_out + at + i * step, 0, 0, x[i], p.past_cache);
    }
    sum[i] = square_sum(x[i]);
  }
  for (int offset = blockDim.x / 2; offset > 0; offset /= 2) {
    const float other = __shfl_xor_sync(0xffffffffu, sum[0], offset);
    sum[1] += __shfl_xor_sync(0xffffffffu, sum[1], offset);
    sum[0] += other;
  }
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const float rstd = reciprocal_rms(sum[i], p.inverse_hidden, p.eps);
    if (active[i]) {
      store<kVector>(p.out + at + i * step, 0, 0, scaled<T, T>(anew(x[i], p.zero), weight, rstd, p), p.past_cache);
    }
  }
}

template <bool kAdds, typename T>
__global__ void __launch_bounds__(256, kAdds ? 3 : 5)
    norm_dense_warp_rows(const __grid_constant__ DenseNorm<T> p, int rows) {
  constexpr int kVector = Vec<T>::kSize;
  launch_dependents();
  const int first = threadIdx.x * kVector, row = blockIdx.x * blockDim.y + threadIdx.y;
  const int64_t at = static_cast<int64_t>(row) * p.hidden + first;
  const int left = row < rows ? p.hidden - first : 0;
  if (p.few_rows) {
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      if (i * 32 * kVector < left) prefetch_l2(p.weight + first + i * 32 * kVector);
    }
  }
  have_dense_ready<kAdds>(p, at);
  wait_for_prerequisites();
  Vec<T> x[4], residual[4], weight[4];
  load_side_by_side<4, true>(p.x + at, left, x);
  if constexpr (kAdds) load_side_by_side<4, true>(p.residual + at, left, residual);
  load_side_by_side<4, false>(p.weight + first, left, weight);
  if constexpr (kAdds) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = sum_of(x[i], residual[i]);
    store_side_by_side<4>(p.residual_out + at, left, x, p.past_cache);
  }
  float sum[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] = square_sum(x[i]);
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] = group_sum(sum[i], 32);
  // A tree of four groups.
  const float rstd = reciprocal_rms((sum[0] + sum[2]) + (sum[1] + sum[3]), p.inverse_hidden, p.eps);
#pragma unroll
  for (int i = 0; i < 4; ++i) x[i] = scaled<T, T>(anew(x[i], p.zero), weight[i], rstd, p);
  store_side_by_side<4>(p.out + at, left, x, p.past_cache);
}

template <bool kAdds, typename T>
__global__ void __launch_bounds__(256, kAdds ? 3 : 5)
    norm_dense_warp_pairs(const __grid_constant__ DenseNorm<T> p, int rows) {
  constexpr int kVector = Vec<T>::kSize;
  launch_dependents();
  const int first = threadIdx.x * kVector, row = blockIdx.x * 2 * blockDim.y + threadIdx.y;
  const int64_t at = static_cast<int64_t>(row) * p.hidden + first, step = static_cast<int64_t>(blockDim.y) * p.hidden;
  const int left[2] = {row < rows ? p.hidden - first : 0,
                       row < rows - static_cast<int>(blockDim.y) ? p.hidden - first : 0};
  if (p.few_rows) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      if (i * 32 * kVector < left[0]) prefetch_l2(p.weight + first + i * 32 * kVector);
    }
  }
  have_dense_ready<kAdds>(p, at);
  wait_for_prerequisites();
  Vec<T> x[2][2], residual[2][2], weight[2];
#pragma unroll
  for (int r = 0; r < 2; ++r) load_side_by_side<2, true>(p.x + at + r * step, left[r], x[r]);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if constexpr (kAdds) load_side_by_side<2, true>(p.residual + at + r * step, left[r], residual[r]);
  }
  load_side_by_side<2, false>(p.weight + first, left[0], weight);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    if constexpr (kAdds) {
#pragma unroll
      for (int i = 0; i < 2; ++i) x[r][i] = sum_of(x[r][i], residual[r][i]);
      store_side_by_side<2>(p.residual_out + at + r * step, left[r], x[r], p.past_cache);
    }
  }
  float sum[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] = square_sum(x[i / 2][i % 2]);
#pragma unroll
  for (int i = 0; i < 4; ++i) sum[i] = group_sum(sum[i], 32);
#pragma unroll
  for (int r = 0; r < 2; ++r) {
    const float rstd = reciprocal_rms(sum[2 * r] + sum[2 * r + 1], p.inverse_hidden, p.eps);
#pragma unroll
    for (int i = 0; i < 2; ++i) x[r][i] = scaled<T, T>(anew(x[r][i], p.zero), weight[i], rstd, p);
    store_side_by_side<2>(p.out + at + r * step, left[r], x[r], p.past_cache);
  }
}

}  // namespace gqa::cuda
