// rmsnorm and add_rmsnorm of rows without gaps whose weights have their dtype: what models call.
// norm_dense_rows: a block, or a cluster of them, takes a row, kHeld vectors a thread.
// Memory order: x (and residual) once, weight, the sum out, out; all loads of a thread are under way before the first
// is used. Limits: plan/rmsnorm.cpp. Determinism: the order of square_sum.cuh; a block of a cluster sums whole trees of
// it, which every block adds up in the order of the row, so the bytes are those of the other kernels.
#pragma once

#include "cuda/common/cluster.cuh"
#include "cuda/common/mbarrier.cuh"
#include "cuda/rmsnorm/side_by_side.cuh"

namespace gqa::cuda {

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

// Threads of a block, and blocks of an SM that registers are to allow.
constexpr int dense_threads(int held) { return held == 4 ? 256 : 512; }
constexpr int dense_blocks(int held, bool late, bool adds) {
  if (held == 4) return late ? 5 : 4;
  return held == 2 && adds ? 2 : held == 1 && !adds ? 4 : 3;
}

// What a warp will have to read of a later row, whole vectors from `row` on.
template <int kHeld, typename T>
__device__ __forceinline__ void bring_into_l2(const T *row, int left) {
  const uint32_t bytes = min(left, kHeld * kGroupVectors * Vec<T>::kSize) * static_cast<int>(sizeof(T));
  asm volatile("cp.async.bulk.prefetch.L2.global [%0], %1;" ::"l"(row), "r"(bytes) : "memory");
}

// A warp takes kHeld times 32 vectors side by side. kLate: weights only once the sum is there, in registers for more
// blocks; L1 would not keep them for the next block, as each exchange of a cluster empties it. kUsual:
// NormVariant::usual. Of a cluster each warp then has its part of a later row brought into L2: while blocks exchange
// sums they ask for nothing else.
template <int kHeld, bool kCluster, bool kLate, bool kAdds, typename T, bool kUsual = false>
__global__ void __launch_bounds__(dense_threads(kHeld), dense_blocks(kHeld, kLate, kAdds))
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
    int first = (threadIdx.x / 32 * kHeld * 32 + threadIdx.x % 32) * kVector;
    uint32_t row = blockIdx.x;
    if constexpr (kCluster) {
      first += cluster_rank() * blockDim.x * kHeld * kVector;
      row = cluster_index();
      of_cluster.begin();
    }
    const T *weights = p.weight + first;
    if (!kUsual && p.few_rows) {
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
    load_side_by_side<kHeld, true>(p.x + at, left, x);
    if constexpr (kAdds) load_side_by_side<kHeld, true>(p.residual + at, left, residual);
    if constexpr (!kLate) load_side_by_side<kHeld, false>(weights, left, weight);
    if constexpr (kUsual && kCluster) {
      if (threadIdx.x % 32 == 0 && left > 0 && row + p.ahead < cluster_count()) {
        const int64_t later = at + static_cast<int64_t>(p.ahead) * p.hidden;
        bring_into_l2<kHeld>(p.x + later, left);
        if constexpr (kAdds) bring_into_l2<kHeld>(p.residual + later, left);
      }
    }
    const bool past_cache = kUsual || p.past_cache;
    if constexpr (kAdds) {
#pragma unroll
      for (int i = 0; i < kHeld; ++i) x[i] = sum_of(x[i], residual[i]);
      store_side_by_side<kHeld>(p.residual_out + at, left, x, past_cache);
    }
    float part[kHeld];
#pragma unroll
    for (int i = 0; i < kHeld; ++i) part[i] = square_sum(x[i]);
    const int groups = share_groups(part, sums);
    float total;
    if constexpr (kCluster) {
      total = of_cluster.finish(sums, groups);
    } else {
      total = sum_of_groups(sums, groups);
    }
    if constexpr (kLate) load_side_by_side<kHeld, false>(weights, left, weight);
    const float rstd = reciprocal_rms(total, p.inverse_hidden, p.eps);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) x[i] = scaled_row<kUsual>(x[i], weight[i], rstd, p);
    store_side_by_side<kHeld>(p.out + at, left, x, past_cache);
  }
}

}  // namespace gqa::cuda
