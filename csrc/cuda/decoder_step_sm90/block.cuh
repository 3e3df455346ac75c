// What the computing warps of a block share.
#pragma once

#include "cuda/common/pack.cuh"
#include "cuda/decoder_step_sm90/exchange.cuh"
#include "cuda/decoder_step_sm90/ring.cuh"

namespace gqa::cuda::decoder_step {

__device__ __forceinline__ void sync_consumers() { asm volatile("bar.sync 1, %0;" ::"n"(kConsumers) : "memory"); }

struct Block {
  char *shared;
  uint32_t address;
  int warp, lane, thread;
  int flip = 0;         // which of two buffers of sums comes next
  int rotary_row = -1;  // whose angles are in shared memory
  uint32_t tag = 0;     // of the layer
  int tiles_together;   // tiles whose sums meet at once

  __device__ Block(const Args &p, char *shared_)
      : shared(shared_),
        address(shared_address(shared_)),
        warp(threadIdx.x / 32),
        lane(threadIdx.x % 32),
        thread(threadIdx.x),
        tiles_together(kStepSums / (kWarps * kTileRows * 4) / p.rows) {}

  __device__ float *words() const { return reinterpret_cast<float *>(shared + kStepWordsAt); }
  __device__ float *sums() const { return reinterpret_cast<float *>(shared + kStepSumsAt + flip * kStepSums); }
  __device__ float *angles() const { return reinterpret_cast<float *>(shared + kStepRotaryAt); }
  template <typename T>
  __device__ T *residual() const {
    return reinterpret_cast<T *>(shared + kStepResidualAt);
  }
  template <typename T>
  __device__ T *biases() const {
    return reinterpret_cast<T *>(shared + kStepBiasesAt);
  }
};

}  // namespace gqa::cuda::decoder_step
