// rmsnorm and add_rmsnorm of rows without gaps whose weights have their dtype: what models call.
// norm_dense_rows: a block, or a cluster of them, takes a row, kHeld vectors a thread.
// norm_dense_narrow_rows: up to 32 lanes take a row of as many vectors; a thread holds a vector of two rows.
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

// A warp takes kHeld times 32 vectors side by side.
template <int kChunk, int kHeld, bool kCluster, bool kAdds, typename T>
__global__ void __launch_bounds__(512, kAdds &&kHeld == 2 ? 2 : 3)
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
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      x[i] = Vec<T>{};
      if (i * kStep < left) x[i] = load<kChunk, true>(p.x + at, i * kStep, left);
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      residual[i] = Vec<T>{};
      if (kAdds && i * kStep < left) residual[i] = load<kChunk, true>(p.residual + at, i * kStep, left);
    }
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (i * kStep < left) weight[i] = load<kChunk>(weights, i * kStep, left);
    }
    float part[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if constexpr (kAdds) {
        x[i] = sum_of(x[i], residual[i]);
        if (i * kStep < left) store<kChunk>(p.residual_out + at, i * kStep, left, x[i], p.past_cache);
      }
      part[i] = square_sum(x[i]);
    }
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
    for (int i = 0; i < kHeld; ++i) {
      if (i * kStep < left) {
        store<kChunk>(p.out + at, i * kStep, left, scaled<T, T>(anew(x[i], p.zero), weight[i], rstd, p), p.past_cache);
      }
    }
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
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if constexpr (kAdds) {
      x[i] = sum_of(x[i], residual[i]);
      if (active[i]) store<kVector>(p.residual_out + at + i * step, 0, 0, x[i], p.past_cache);
    }
    const float rstd = reciprocal_rms(group_sum(square_sum(x[i]), blockDim.x), p.inverse_hidden, p.eps);
    if (active[i]) store<kVector>(p.out + at + i * step, 0, 0, scaled<T, T>(x[i], weight, rstd, p), p.past_cache);
  }
}

}  // namespace gqa::cuda
