// Loading a block's part of a row with penalties, a bias or a bitmask: it holds what sampling sees, as float32 or,
// where there is no bias, as the type of the row with what that cannot hold beside it.
#pragma once

#include "cuda/sample_sm90/part.cuh"

namespace gqa::cuda {

// What there is to know of the tokens of one vector, the first a multiple of their number. kWhole: all are there and
// lie aligned in memory; else those from `end` on are forbidden.
template <typename T, typename Held, bool kWhole>
struct Tokens {
  static constexpr int kSize = Vec<Held>::kSize;
  static constexpr bool kBiased = sizeof(Held) == 4;

  Run<T, kSize> z;
  Run<int32_t, kSize> counts;
  Run<float, kSize> bias;
  uint32_t allowed;

  template <typename V>
  __device__ __forceinline__ static Run<V, kSize> run(const V *row, int first, int end) {
    if constexpr (kWhole) {
      return load_run<kSize>(row + first);
    } else {
      Run<V, kSize> run;
#pragma unroll
      for (int i = 0; i < kSize; ++i) run.value[i] = row[min(first + i, end - 1)];
      return run;
    }
  }

  __device__ __forceinline__ void load(const T *row, const sampling::Adjustments<T> &by, int first, int end) {
    z = run(row, first, end);
    if (by.counts != nullptr) counts = run(by.counts, first, end);
    if (kBiased && by.bias != nullptr) {
      by.with_bias([&](auto *of) {
        const auto values = run(of, first, end);
#pragma unroll
        for (int i = 0; i < kSize; ++i) bias.value[i] = to_float(values.value[i]);
      });
    }
    if (by.allowed != nullptr) allowed = static_cast<uint32_t>(by.allowed[first / 32]);
  }

  __device__ __forceinline__ Run<float, kSize> adjusted(const sampling::Adjustments<T> &by, int first, int end) const {
    Run<float, kSize> run;
#pragma unroll
    for (int i = 0; i < kSize; ++i) run.value[i] = to_float(z.value[i]);
    if (by.counts != nullptr) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) {
        if (counts.value[i] != 0) run.value[i] = sampling::penalize(run.value[i], counts.value[i], by.penalties);
      }
    }
    if (kBiased && by.bias != nullptr) {
#pragma unroll
      for (int i = 0; i < kSize; ++i) run.value[i] = sampling::add(run.value[i], bias.value[i]);
    }
    uint32_t bits = by.allowed == nullptr ? kAll : allowed >> first % 32;
    if (!kWhole) bits &= (1u << (end - first)) - 1;
#pragma unroll
    for (int i = 0; i < kSize; ++i) run.value[i] = (bits >> i & 1) != 0 ? run.value[i] : sampling::kForbidden;
    return run;
  }
};

// Whether the tokens of every vector can be read at once.
template <typename T, typename Held>
__device__ __forceinline__ bool are_vectors_aligned(const T *row, const sampling::Adjustments<T> &by) {
  constexpr uintptr_t kSize = Vec<Held>::kSize;
  const uintptr_t of_bias = reinterpret_cast<uintptr_t>(by.bias) % ((by.bias_is_float ? 4 : sizeof(T)) * kSize);
  return reinterpret_cast<uintptr_t>(row) % (kSize * sizeof(T)) == 0 && of_bias == 0 &&
         reinterpret_cast<uintptr_t>(by.counts) % (kSize * 4) == 0;
}

// The workers read the part of `row`; meanwhile() runs while the first loads are under way. The ends of what the part
// holds.
template <typename T, typename Held, int kThreads, typename F>
__device__ __forceinline__ u64 load_adjusted(Part<Held, kThreads> *part, const T *row,
                                             const sampling::Adjustments<T> &by, int vocab, F &&meanwhile) {
  constexpr int kBatch = 2, kSize = Vec<Held>::kSize;  // kBatch: vectors that a thread has under way
  const int turns = part->turns, vectors = part->vectors;
  const int whole = are_vectors_aligned<T, Held>(row, by) ? min((vocab - part->token(0, 0)) / kSize, vectors) : 0;
  Extent<Held> extent;
  const auto keep = [&](int v, const Run<float, kSize> &run) {
    Vec<Held> vec;
#pragma unroll
    for (int i = 0; i < kSize; ++i) {
      float z = run.value[i];
      if constexpr (kHasExtras<Held, kThreads>) {
        if (!part->extras.holds(z)) {
          part->extras.add(z, v * kSize + i);
          z = -INFINITY;
        }
      }
      vec.value[i] = from_float<Held>(z);
    }
    part->replace(v, vec);
    extent.add(vec);
  };
#pragma unroll 1
  for (int i = 0; i < turns; i += kBatch) {
    Tokens<T, Held, true> batch[kBatch];
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int v = part->place(i + j);
      if (v < whole) batch[j].load(row, by, part->token(v, 0), vocab);
    }
    if (i == 0) meanwhile();
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int v = part->place(i + j);
      if (v < whole) keep(v, batch[j].adjusted(by, part->token(v, 0), vocab));
    }
  }
#pragma unroll 1
  for (int i = whole == vectors ? turns : 0; i < turns; ++i) {
    const int v = part->place(i), first = part->token(v, 0);
    if (v < whole || v >= vectors) continue;
    Tokens<T, Held, false> tokens;
    tokens.load(row, by, first, vocab);
    keep(v, tokens.adjusted(by, first, min(vocab, first + kSize)));
  }
  return extent.ends();
}

}  // namespace gqa::cuda
