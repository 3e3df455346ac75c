// Adjusted logits that the type of the row cannot hold: of tokens with penalties. The part holds -inf in their places.
#pragma once

#include "common/sampling_logits.h"
#include "cuda/sample_sm90/exchange.cuh"
#include "cuda/sample_sm90/vectors.cuh"

namespace gqa::cuda {

// Whether a kernel holds adjusted rows as the type they have, and what that cannot hold apart.
template <typename Held, int kThreads>
constexpr bool kHasExtras = kThreads == kSampleClusterAdjusted && sizeof(Held) == 2;

template <typename T>
struct AdjustedRow {
  const T *logits;
  sampling::Adjustments<T> by;
};

struct Extra {
  float z;
  uint32_t at;  // place in the part
};

// A row without.
struct NoExtras {
  template <typename F>
  __device__ __forceinline__ void for_each(uint32_t, uint32_t, uint32_t, uint32_t, F &&) const {}
};

template <typename T>
class Extras {
 public:
  // ends: the largest of their keys and of the keys' complements, from zero on.
  __device__ Extras(const AdjustedRow<T> *row, Extra *list, uint32_t *count, u64 *ends, uint32_t capacity, int first,
                    int end)
      : row_(row),
        list_(list),
        count_(count),
        ends_(reinterpret_cast<uint32_t *>(ends)),
        capacity_(capacity),
        first_(first),
        end_(end) {}

  __device__ __forceinline__ static bool holds(float z) { return to_float(from_float<T>(z)) == z || z != z; }

  __device__ __forceinline__ void add(float z, uint32_t at) const {
    const uint32_t i = atomicAdd(count_, 1);
    if (i < capacity_) list_[i] = {z, at};
    atomicMax(ends_, ~key(z));
    atomicMax(ends_ + 1, key(z));
  }

  // f(z, at) for those in places [from, to), of which this thread is the `turn`-th of `threads`. Where the list is too
  // short for all, they are looked for again.
  template <typename F>
  __device__ __forceinline__ void for_each(uint32_t turn, uint32_t threads, uint32_t from, uint32_t to, F &&f) const {
    const uint32_t count = *count_;
    if (count <= capacity_) {
#pragma unroll 2
      for (uint32_t i = turn; i < count; i += threads) {
        const Extra extra = list_[i];
        if (extra.at - from < to - from) f(extra.z, extra.at);
      }
      return;
    }
    const AdjustedRow<T> row = *row_;
#pragma unroll 1
    for (uint32_t at = from + turn; at < to && first_ + static_cast<int>(at) < end_; at += threads) {
      const uint32_t token = first_ + at;
      const int32_t times = row.by.counts == nullptr ? 0 : row.by.counts[token];
      if (times == 0 || !row.by.is_allowed(token)) continue;
      const float z = sampling::penalize(to_float(row.logits[token]), times, row.by.penalties);
      if (!holds(z)) f(z, at);
    }
  }

  // None is left to be found: they count for nothing beside infinity.
  __device__ void drop() const { *count_ = 0; }

 private:
  const AdjustedRow<T> *row_;
  Extra *list_;
  uint32_t *count_, *ends_;
  uint32_t capacity_;
  int first_, end_;  // tokens: of the part's first place, and after the row's last
};

}  // namespace gqa::cuda
