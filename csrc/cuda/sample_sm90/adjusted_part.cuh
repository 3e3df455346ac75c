// Loading a block's part of a row with penalties, a bias or a bitmask: it holds what sampling sees, as float32.
#pragma once

#include "common/sampling_logits.h"
#include "cuda/sample_sm90/part.cuh"

namespace gqa::cuda {

// What there is to know of four tokens, the first a multiple of four. kWhole: all are there and lie aligned in memory;
// else those from `end` on are forbidden.
template <typename T, bool kWhole>
struct FourTokens {
  Run<T, 4> z;
  Run<int32_t, 4> counts;
  Run<float, 4> bias;
  uint32_t allowed;

  template <typename V>
  __device__ __forceinline__ static Run<V, 4> four(const V *row, int first, int end) {
    if constexpr (kWhole) {
      return load_run<4>(row + first);
    } else {
      Run<V, 4> run;
#pragma unroll
      for (int i = 0; i < 4; ++i) run.value[i] = row[min(first + i, end - 1)];
      return run;
    }
  }

  __device__ __forceinline__ void load(const T *row, const sampling::Adjustments<T> &by, int first, int end) {
    z = four(row, first, end);
    if (by.counts != nullptr) counts = four(by.counts, first, end);
    if (by.bias != nullptr) {
      by.with_bias([&](auto *of) {
        const auto values = four(of, first, end);
#pragma unroll
        for (int i = 0; i < 4; ++i) bias.value[i] = to_float(values.value[i]);
      });
    }
    if (by.allowed != nullptr) allowed = static_cast<uint32_t>(by.allowed[first / 32]);
  }

  __device__ __forceinline__ Vec<float> adjusted(const sampling::Adjustments<T> &by, int first, int end) const {
    Vec<float> vec;
#pragma unroll
    for (int i = 0; i < 4; ++i) vec.value[i] = to_float(z.value[i]);
    if (by.counts != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (counts.value[i] != 0) vec.value[i] = sampling::penalize(vec.value[i], counts.value[i], by.penalties);
      }
    }
    if (by.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < 4; ++i) vec.value[i] = sampling::add(vec.value[i], bias.value[i]);
    }
    uint32_t bits = by.allowed == nullptr ? 15 : allowed >> first % 32;
    if (!kWhole) bits &= (1u << (end - first)) - 1;
#pragma unroll
    for (int i = 0; i < 4; ++i) vec.value[i] = (bits >> i & 1) != 0 ? vec.value[i] : sampling::kForbidden;
    return vec;
  }
};

// Whether every four tokens of the row, the first a multiple of four, can be read at once.
template <typename T>
__device__ __forceinline__ bool are_fours_aligned(const T *row, const sampling::Adjustments<T> &by) {
  const uintptr_t of_bias = reinterpret_cast<uintptr_t>(by.bias) % (by.bias_is_float ? 16 : 4 * sizeof(T));
  return reinterpret_cast<uintptr_t>(row) % (4 * sizeof(T)) == 0 && is_aligned16(by.counts) && of_bias == 0;
}

// The workers read the part of `row`; meanwhile() runs while the first loads are under way.
template <typename T, int kThreads, typename F>
__device__ __forceinline__ Extent<float> load_adjusted(Part<float, kThreads> *part, const T *row,
                                                       const sampling::Adjustments<T> &by, int vocab, F &&meanwhile) {
  constexpr int kBatch = 2;  // fours a thread has under way
  const int chunks = part->chunks_per_warp, vectors = part->vectors;
  const int whole = are_fours_aligned(row, by) ? min((vocab - part->token(0, 0)) / 4, vectors) : 0;
  Extent<float> extent;
  const auto keep = [&](int v, const Vec<float> &vec) {
    part->replace(v, vec);
    extent.add(vec);
  };
#pragma unroll 1
  for (int i = 0; i < chunks; i += kBatch) {
    FourTokens<T, true> batch[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int v = part->place(i + j);
      if (i + j < chunks && v < whole) batch[j].load(row, by, part->token(v, 0), vocab);
    }
    if (i == 0) meanwhile();
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int v = part->place(i + j);
      if (i + j < chunks && v < whole) keep(v, batch[j].adjusted(by, part->token(v, 0), vocab));
    }
  }
#pragma unroll 1
  for (int i = whole == vectors ? chunks : 0; i < chunks; ++i) {
    const int v = part->place(i), first = part->token(v, 0);
    if (v < whole || v >= vectors) continue;
    FourTokens<T, false> tokens;
    tokens.load(row, by, first, vocab);
    keep(v, tokens.adjusted(by, first, min(vocab, first + 4)));
  }
  return extent;
}

}  // namespace gqa::cuda
