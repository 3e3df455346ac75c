// What the computing warps of a block share: where they stand, barriers among them and over the grid.
#pragma once

#include "cuda/common/pack.cuh"
#include "cuda/decoder_step_sm90/ring.cuh"

namespace gqa::cuda::decoder_step {

__device__ __forceinline__ void sync_consumers() { asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory"); }

struct Block {
  char *shared;
  uint32_t address;
  int warp, lane, thread;
  int flip = 0;           // which of two buffers of sums comes next
  uint32_t barriers = 0;  // of the grid, so far

  __device__ Block(char *shared_)
      : shared(shared_),
        address(shared_address(shared_)),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        thread(threadIdx.x) {}

  __device__ float *words() const { return reinterpret_cast<float *>(shared + kWords); }
  __device__ float *sums() const { return reinterpret_cast<float *>(shared + kSums + flip * kSumsBytes); }

#ifdef TRACE
  int layer = 0;
  __device__ void mark(const Args &p, int i) const {
    if (thread == 0 && layer == 3) {
      uint32_t now;
      asm volatile("mov.u32 %0, %%clock;" : "=r"(now));
      p.trace[blockIdx.x * 64 + i] = now;
    }
  }
#else
  __device__ void mark(const Args &, int) const {}
#endif
  // Everything that the blocks wrote before is visible to all after, to loads past L1.
  __device__ void wait_for_grid(const Args &p) {
    ++barriers;
    sync_consumers();
    if (thread == 0) {
      const uint32_t target = barriers * gridDim.x;
      asm volatile("fence.acq_rel.gpu;\nred.release.gpu.global.add.u32 [%0], 1;" ::"l"(p.arrived) : "memory");
      uint32_t arrived;
      do {
        asm volatile("ld.acquire.gpu.global.u32 %0, [%1];" : "=r"(arrived) : "l"(p.arrived) : "memory");
      } while (arrived < target);
    }
    sync_consumers();
  }
};

}  // namespace gqa::cuda::decoder_step
