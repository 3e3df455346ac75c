// rmsnorm and add_rmsnorm of rows without gaps whose weights have their dtype: what models call.
// norm_dense_rows: a block, or a cluster of them, takes a row, kHeld vectors a thread.
// norm_dense_narrow_rows: up to 32 lanes take a row of as many vectors; a thread holds a vector of two rows.
// norm_dense_warp_rows: a warp takes a row of up to 128 vectors.
// Memory order: x (and residual) once, weight, the sum out, out; all loads of a thread are under way before the first
// is used. Limits: plan/rmsnorm.cpp. Determinism: the order of square_sum.cuh; a block of a cluster sums whole trees of
// it, which every block adds up in the order of the row, so the bytes are those of the other kernels.
#pragma once

#include "cuda/common/cluster.cuh"
#include "cuda/common/mbarrier.cuh"
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

__device__ __forceinline__ uint32_t shared_address(const void *at) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(at));
}

// Sums the blocks' trees, two of them each at most, in the order of the blocks.
struct ClusterSum {
  float2 trees[8];
  unsigned long long barrier;

  __device__ __forceinline__ void begin() {
    if (threadIdx.x == 0) {
      mbarrier_init(shared_address(&barrier), 1);
      mbarrier_arrive_expect(shared_address(&barrier), cluster_size() * sizeof(float2));
      mbarrier_fence_init();
    }
    cluster_arrive_relaxed();
  }

  // `sums` are the block's groups, visible to the block.
  __device__ __forceinline__ float finish(const float *sums, int groups) {
    const uint32_t blocks = cluster_size();
    cluster_wait();
    if (threadIdx.x < blocks) {
      const float second = groups > kTreeGroups ? sum_of_groups(sums + kTreeGroups, kTreeGroups) : 0.0f;
      push(map_to_rank(shared_address(trees + cluster_rank()), threadIdx.x), sum_of_groups(sums, kTreeGroups), second,
           map_to_rank(shared_address(&barrier), threadIdx.x));
    }
    mbarrier_wait_cluster(shared_address(&barrier), 0);
    float total = 0;
#pragma unroll 1
    for (uint32_t i = 0; i < blocks; ++i) total = total + trees[i].x + trees[i].y;
    return total;
  }
};

__device__ __forceinline__ uint32_t cluster_index() {
  uint32_t index;
  asm("mov.u32 %0, %%clusterid.x;" : "=r"(index));
  return index;
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

// Threads of a block, and blocks of an SM that registers are to allow.
constexpr int dense_threads(int held) { return held == 4 ? 256 : 512; }
constexpr int dense_blocks(bool whole, int held, bool adds) {
  if (held == 4) return 4;
  return held == 2 && (adds || !whole) ? 2 : held == 1 && !adds ? 4 : 3;
}

// A warp takes kHeld times 32 vectors side by side.
template <bool kWhole, int kHeld, bool kCluster, bool kAdds, typename T>
__global__ void __launch_bounds__(dense_threads(kHeld), dense_blocks(kWhole, kHeld, kAdds))
    norm_dense_rows(const __grid_constant__ DenseNorm<T> p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  constexpr bool kHasCode = true;
#else
  constexpr bool kHasCode = !kCluster;
#endif
  if constexpr (kHasCode) {
    constexpr int kVector = Vec<T>::kSize, kStep = kGroupVectors * kVector;
    __shared__ __align__(16) float sums[2 * kTreeGroups];
    __shared__ std::conditional_t<kCluster, ClusterSum, char> of_cluster;
    launch_dependents();
    const int warp = threadIdx.x / 32;
    int first = (warp * kHeld * 32 + threadIdx.x % 32) * kVector;
    uint32_t row = blockIdx.x;
    if constexpr (kCluster) {
      first += cluster_rank() * blockDim.x * kHeld * kVector;
      row = cluster_index();
      of_cluster.begin();
    }
    const T *weights = p.weight + first;
    if (p.few_rows) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) {
        if (first + i * kStep < p.hidden) prefetch_l2(weights + i * kStep);
      }
    }
    const int64_t at = static_cast<int64_t>(row) * p.hidden + first;
    const int left = p.hidden - first;
    have_dense_ready<kAdds>(p, at);
    wait_for_prerequisites();
    Vec<T> x[kHeld], residual[kHeld], weight[kHeld];
    load_side_by_side<kHeld, kWhole, true>(p.x + at, left, x);
    if constexpr (kAdds) load_side_by_side<kHeld, kWhole, true>(p.residual + at, left, residual);
    load_side_by_side<kHeld, kWhole, false>(weights, left, weight);
    if constexpr (kAdds) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) x[i] = sum_of(x[i], residual[i]);
      store_side_by_side<kHeld, kWhole>(p.residual_out + at, left, x, p.past_cache);
    }
    float part[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) part[i] = square_sum(x[i]);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      part[i] = group_sum(part[i], 32);
      if (threadIdx.x % 32 == 0) sums[warp * kHeld + i] = part[i];
    }
    const int held = kHeld * (blockDim.x / 32), groups = held > kTreeGroups ? 2 * kTreeGroups : kTreeGroups;
    if (static_cast<int>(threadIdx.x) < groups - held) sums[held + threadIdx.x] = 0;
    __syncthreads();
    float total;
    if constexpr (kCluster) {
      total = of_cluster.finish(sums, groups);
    } else {
      total = sum_of_groups(sums, groups);
    }
    const float rstd = reciprocal_rms(total, p.inverse_hidden, p.eps);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) x[i] = scaled<T, T>(anew(x[i], p.zero), weight[i], rstd, p);
    store_side_by_side<kHeld, kWhole>(p.out + at, left, x, p.past_cache);
  }
}

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
  load_side_by_side<4, true, true>(p.x + at, left, x);
  if constexpr (kAdds) load_side_by_side<4, true, true>(p.residual + at, left, residual);
  load_side_by_side<4, true, false>(p.weight + first, left, weight);
  if constexpr (kAdds) {
#pragma unroll
    for (int i = 0; i < 4; ++i) x[i] = sum_of(x[i], residual[i]);
    store_side_by_side<4, true>(p.residual_out + at, left, x, p.past_cache);
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
  store_side_by_side<4, true>(p.out + at, left, x, p.past_cache);
}

}  // namespace gqa::cuda
