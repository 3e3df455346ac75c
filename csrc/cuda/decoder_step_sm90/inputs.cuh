// The inputs of a product, brought to shared memory: as they are, or normed.
#pragma once

#include "cuda/common/square_sum.cuh"
#include "cuda/decoder_step_sm90/block.cuh"

namespace gqa::cuda::decoder_step {

template <typename T>
__device__ __forceinline__ Vec<T> load_shared_by_grid(const char *from, int vector) {
  const uint4 bits = __ldcg(reinterpret_cast<const uint4 *>(from) + vector);
  return *reinterpret_cast<const Vec<T> *>(&bits);
}

__device__ __forceinline__ int input_pitch(int columns) { return 2 * columns + 16; }

template <typename T>
__device__ void load_inputs(const Args &p, const Block &t, const char *from, int columns) {
  const int vectors = columns / 8;
  for (int row = 0; row < p.rows; ++row) {
    char *to = t.shared + p.inputs_at + row * input_pitch(columns);
#pragma unroll 4
    for (int i = t.thread; i < vectors; i += kConsumers) {
      reinterpret_cast<Vec<T> *>(to)[i] = load_shared_by_grid<T>(from, row * vectors + i);
    }
  }
  sync_consumers();
}

// The weights of a norm are on their way while the grid is waited for.
template <typename T>
struct Norm {
  static constexpr int kEach = kStepHidden / 8 / kConsumers;
  Vec<T> weights[kEach];

  __device__ void load(const Args &p, const Block &t, const char *from) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int vector = t.thread + i * kConsumers;
      if (vector < p.hidden / 8) weights[i] = reinterpret_cast<const Vec<T> *>(from)[vector];
    }
  }

  __device__ void apply(const Args &p, const Block &t, const char *from) const {
    const int vectors = p.hidden / 8;
    for (int row = 0; row < p.rows; ++row) {
      Vec<T> x[kEach];
      float sum = 0;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int vector = t.thread + i * kConsumers;
        if (vector < vectors) x[i] = load_shared_by_grid<T>(from, row * vectors + vector);
      }
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        if (t.thread + i * kConsumers < vectors) sum += square_sum(x[i]);
      }
      sum = group_sum(sum, 32);
      float *words = t.words() + row % 2 * kWarps;
      if (t.lane == 0) words[t.warp] = sum;
      sync_consumers();
      sum = 0;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) sum += words[i];
      const float rstd = reciprocal_rms(sum, 1.0f / p.hidden, p.eps);
      auto *to = reinterpret_cast<Vec<T> *>(t.shared + p.inputs_at + row * input_pitch(p.hidden));
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int vector = t.thread + i * kConsumers;
        if (vector >= vectors) continue;
        Floats<T> value = widen(x[i]);
#pragma unroll
        for (int j = 0; j < 8; ++j) value.value[j] *= rstd;
        to[vector] = multiply(narrow(value), weights[i]);
      }
    }
    sync_consumers();
  }
};

}  // namespace gqa::cuda::decoder_step
