// Who is who in a sampling cluster, and the messages between its blocks: one-way stores that complete a barrier of the
// receiver. A block leaves only when everything addressed to it has arrived.
#pragma once

#include "cuda/common/cluster.cuh"
#include "cuda/common/mbarrier.cuh"
#include "cuda/sample_sm90/cluster_shared.cuh"

namespace gqa::cuda {

class Exchange {
 public:
  __device__ Exchange(Shared *shared, uint32_t inverse)
      : rank(cluster_rank()), blocks(cluster_size()), inverse_(inverse), shared_(*shared) {}

  __device__ __forceinline__ uint32_t divided(uint32_t n) const {
    return static_cast<uint32_t>(u64{n} * inverse_ >> kSampleInverseBits);
  }

  // The n-th group of rows is summed by block n % blocks as its n / blocks-th.
  __device__ __forceinline__ uint32_t place_of(uint32_t group) const { return divided(group); }
  __device__ __forceinline__ uint32_t most_groups() const { return place_of(kGroups - 1) + 1; }
  __device__ __forceinline__ uint32_t groups() const { return place_of(kGroups - 1 + blocks - rank); }

  // For one warp; the cluster's barrier must come between it and the first push.
  __device__ __forceinline__ void open() const {
    const uint32_t word = blocks * 8, i = threadIdx.x % 32;
    uint32_t bytes = i < kRound ? word : kDigits * word;  // of ends, numbers and parts
    bytes = i == kScatter ? groups() * kGroupRows * word : (i == kGather ? (kRows + 1) * 16 : bytes);
    if (i < kMessages) mbarrier_init(barrier(i), 1);
    if (i < kList) mbarrier_arrive_expect(barrier(i), bytes);
    mbarrier_fence_init();
  }

  template <typename... Values>
  __device__ __forceinline__ void send(uint32_t to, const void *at, int message, Values... values) const {
    push(map_to_rank(static_cast<uint32_t>(__cvta_generic_to_shared(at)), to), values...,
         map_to_rank(barrier(message), to));
  }

  // Shared memory is all that is read of others: no cache has to forget what it holds, as for an acquire by the
  // cluster.
  __device__ __forceinline__ void receive(int message, uint32_t parity = 0) const {
    mbarrier_wait(barrier(message), parity);
  }

  // For one thread.
  __device__ void expect(int message, uint32_t bytes) const { mbarrier_arrive_expect(barrier(message), bytes); }

  const uint32_t rank, blocks;

 private:
  __device__ uint32_t barrier(int message) const {
    return static_cast<uint32_t>(__cvta_generic_to_shared(shared_.barriers + message));
  }

  const uint32_t inverse_;  // of blocks, rounded up: exact for quotients of numbers below 2^20
  Shared &shared_;
};

}  // namespace gqa::cuda
