// A thread block cluster's ranks, its barrier in two halves, and plain stores into another block's shared memory.
#pragma once

#include <cstdint>

namespace gqa::cuda {

__device__ __forceinline__ uint32_t cluster_block_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ uint32_t cluster_blocks() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// Every thread of the cluster arrives, then waits; what it wrote before, anywhere, all see after.
__device__ __forceinline__ void cluster_arrive_release() {
  __syncwarp();  // the aligned forms want the whole warp at once
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait_acquire() {
  __syncwarp();
  asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_sync() {
  cluster_arrive_release();
  cluster_wait_acquire();
}

// Stores to what lies, in the shared memory of block `rank`, where `at` does in ours.
__device__ __forceinline__ void store_at_rank(unsigned long long *at, uint32_t rank, unsigned long long value) {
  asm volatile(
      "{\n.reg .u32 mapped;\n"
      "mapa.shared::cluster.u32 mapped, %0, %1;\n"
      "st.shared::cluster.u64 [mapped], %2;\n}" ::"r"(static_cast<uint32_t>(__cvta_generic_to_shared(at))),
      "r"(rank), "l"(value)
      : "memory");
}

}  // namespace gqa::cuda
