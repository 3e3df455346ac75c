// Thread block clusters: ranks, the barrier, whole or in two halves, and stores into another block's shared memory.
#pragma once

#include <cstdint>

namespace gqa::cuda {

__device__ __forceinline__ uint32_t cluster_rank() {
  uint32_t rank;
  asm("mov.u32 %0, %%cluster_ctarank;" : "=r"(rank));
  return rank;
}

__device__ __forceinline__ uint32_t cluster_size() {
  uint32_t size;
  asm("mov.u32 %0, %%cluster_nctarank;" : "=r"(size));
  return size;
}

// Orders nothing by itself: what the others must see is published by a fence of its own.
__device__ __forceinline__ void cluster_arrive_relaxed() { asm volatile("barrier.cluster.arrive.relaxed.aligned;"); }
__device__ __forceinline__ void cluster_wait() { asm volatile("barrier.cluster.wait.acquire.aligned;" ::: "memory"); }

// Every thread of the cluster arrives, then waits; what it wrote before, anywhere, all see after.
__device__ __forceinline__ void cluster_arrive_release() {
  __syncwarp();  // the aligned forms want the whole warp at once
  asm volatile("barrier.cluster.arrive.release.aligned;" ::: "memory");
}

__device__ __forceinline__ void cluster_wait_acquire() {
  __syncwarp();
  cluster_wait();
}

__device__ __forceinline__ void cluster_sync() {
  cluster_arrive_release();
  cluster_wait_acquire();
}

// The address, in the shared memory of block `rank`, of what lies at `address` in ours.
__device__ __forceinline__ uint32_t map_to_rank(uint32_t address, uint32_t rank) {
  uint32_t mapped;
  asm("mapa.shared::cluster.u32 %0, %1, %2;" : "=r"(mapped) : "r"(address), "r"(rank));
  return mapped;
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

// Stores that complete 16 or 8 bytes of the receiving block's mbarrier.
__device__ __forceinline__ void push(uint32_t address, float a, float b, float c, float d, uint32_t barrier) {
  asm volatile(
      "st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v4.f32 [%0], {%1, %2, %3, %4}, [%5];" ::"r"(address),
      "f"(a), "f"(b), "f"(c), "f"(d), "r"(barrier)
      : "memory");
}

__device__ __forceinline__ void push(uint32_t address, float a, float b, uint32_t barrier) {
  asm volatile("st.async.weak.shared::cluster.mbarrier::complete_tx::bytes.v2.f32 [%0], {%1, %2}, [%3];" ::"r"(address),
               "f"(a), "f"(b), "r"(barrier)
               : "memory");
}

}  // namespace gqa::cuda
