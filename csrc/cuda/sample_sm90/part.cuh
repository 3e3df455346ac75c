// A block's part of a row of logits: read once from memory into shared memory, in whole aligned 16-byte vectors.
#pragma once

#include "cuda/sample_sm90/extras.cuh"

namespace gqa::cuda {

// How lanes take the logits of their vectors where many vectors hold what is looked for; where few do, one by one.
enum class Many { kInTurn, kRolled, kUnrolled };

// Vectors of a stretch, and what divides by it.
struct Stretch {
  uint32_t vectors, inverse;  // at least 2; 2^32 / vectors, rounded up: exact for quotients of numbers below 2^18
};

// The part is cut in 32 stretches. After the load each lane has its own, of which the warps take turns at vectors: what
// a lane adds up is a stretch's. An odd number of vectors from stretch to stretch keeps lanes in banks of their own.
template <typename T, int kThreads>
class Part {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kSize = Vec<T>::kSize;
  static constexpr int kBatch = kThreads > kSampleClusterFew ? 6 : 4;  // vectors a thread has under way
  static constexpr int kAtOnce = 4;  // vectors a lane looks at before it evaluates what it found in them
  static constexpr int kMany = 8;    // of the logits that those hold

 public:
  using Apart = std::conditional_t<kHasExtras<T, kThreads>, Extras<T>, NoExtras>;

  __device__ Part(const T *z, int vocab, const Exchange &exchange, const Stretch &stretch, void *held,
                  const Apart &apart)
      : extras(apart),
        lead_(reinterpret_cast<uintptr_t>(z) % 16 / sizeof(T)),
        vocab_(vocab),
        held_(static_cast<Vec<T> *>(held)),
        stretch_(stretch.vectors),
        pitch_(stretch.vectors | 1),
        inverse_(stretch.inverse) {
    const int all = (lead_ + vocab + kSize - 1) / kSize, share = stretch_ * kColumns;
    first_ = min(static_cast<int>(exchange.rank) * share, all);
    vectors = min(share, all - first_);
    turns = (stretch_ + kWarps - 1) / kWarps;
    z_ = z - lead_ + first_ * kSize;
    whole_from_ = first_ == 0 && lead_ != 0;
    whole_to_ = first_ + vectors == all && (lead_ + vocab) % kSize != 0 ? vectors - 1 : vectors;
  }

  // The workers read the part; meanwhile() runs while the first loads are under way.
  template <typename F>
  __device__ __forceinline__ Extent<T> load(F &&meanwhile) {
    Extent<T> extent;
    Vec<T> batch[kBatch];
    fetch(0, batch);
    meanwhile();
#pragma unroll 1
    for (int i = 0;;) {
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int v = place(i + j);
        if (v < whole_from_ || v >= whole_to_) continue;
        replace(v, batch[j]);
        extent.add(batch[j]);
      }
      i += kBatch;
      if (i >= turns) return extent;
      fetch(i, batch);
    }
  }

  // One warp reads the vectors at the ends of the row that are not all tokens; what is no token becomes -inf.
  __device__ __forceinline__ Extent<T> load_edges() {
    Extent<T> extent;
    const int v = threadIdx.x % 32 < kSize ? 0 : vectors - 1, i = threadIdx.x % kSize;
    if (threadIdx.x % 32 >= 2 * kSize || v < 0 || v >= vectors || (v >= whole_from_ && v < whole_to_)) return extent;
    const bool is_one = is_token(token(v, i));
    const T value = is_one ? z_[v * kSize + i] : from_float<T>(-INFINITY);
    held_[slot(v)].value[i] = value;
    if (is_one) extent.add(value);
    return extent;
  }

  // The vector that the thread loads in its i-th turn, which may lie past the part.
  __device__ __forceinline__ int place(int i) const {
    return (static_cast<int>(threadIdx.x / 32) + i * kWarps) * 32 + static_cast<int>(threadIdx.x % 32);
  }

  __device__ __forceinline__ void replace(int v, const Vec<T> &by) {
    store_vec(reinterpret_cast<T *>(held_ + slot(v)), by);
  }
  __device__ float logit(int v, int i) const { return to_float(held_[slot(v)].value[i]); }
  __device__ int token(int v, int i) const { return (first_ + v) * kSize + i - lead_; }
  __device__ bool is_token(int token) const { return static_cast<uint32_t>(token) < static_cast<uint32_t>(vocab_); }

  // Vectors that a thread takes of a stretch: `turns` of them from `first` on, each `step` after the one before, while
  // they lie before `end`.
  struct Walk {
    const Vec<T> *held;
    int v, first, step, turns, end;  // v: the stretch's first vector
  };

  // A worker's.
  __device__ __forceinline__ Walk walk() const {
    const int lane = threadIdx.x % 32, v = lane * stretch_;
    return {held_ + lane * pitch_, v, static_cast<int>(threadIdx.x / 32), kWarps, turns, min(stretch_, vectors - v)};
  }

  // The i-th thread's of some that take a whole stretch: neighbours, an odd number for the banks' sake.
  template <int kOf>
  __device__ __forceinline__ Walk walk_along(int stretch, int i) const {
    const int v = stretch * stretch_, turns = ((stretch_ + kOf - 1) / kOf) | 1;
    return {held_ + stretch * pitch_, v, i * turns, 1, turns, min(stretch_, vectors - v)};
  }

  // Where all workers together are sooner done with one than a warp is.
  __device__ __forceinline__ bool has_long_stretches() const { return stretch_ > 128; }

  // f(z, v, i) for the logits that find(vector) has bits for, as a window's find().
  template <Many kIfMany, typename Find, typename F>
  __device__ __forceinline__ static void for_each_near(const Walk &walk, Find &&find, F &&f) {
#pragma unroll 1
    for (int turn = 0; turn < walk.turns; turn += kAtOnce) {
      const int first = walk.first + turn * walk.step;
      uint32_t found = 0;
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int at = first + k * walk.step;
        if (turn + k < walk.turns && at < walk.end) found |= find(vector(walk, at)) << k * 4;
      }
      if constexpr (kIfMany != Many::kInTurn) {
        if (__reduce_max_sync(0xffffffffu, __popc(found)) > kMany) {
#pragma unroll 1
          for (int k = 0; k < kAtOnce; ++k, found >>= 4) {
            const int at = first + k * walk.step;
            if ((found & 0xf000fu) != 0 && kIfMany == Many::kUnrolled) {
              const Vec<T> vec = vector(walk, at);
#pragma unroll
              for (int j = 0; j < kSize; ++j) f(to_float(vec.value[j]), walk.v + at, j);
            } else if ((found & 0xf000fu) != 0) {
#pragma unroll 2
              for (int j = 0; j < kSize; ++j) f(to_float(walk.held[at].value[j]), walk.v + at, j);
            }
            __syncwarp();
          }
          continue;
        }
      }
      for (; found != 0; found &= found - 1) {
        const int bit = __ffs(found) - 1, at = first + bit % 16 / 4 * walk.step, j = Window<T>::element(bit);
        f(to_float(walk.held[at].value[j]), walk.v + at, j);
      }
      __syncwarp();
    }
  }

  // f(z, v, i, stretch) over a worker's share of what is held apart.
  template <typename F>
  __device__ __forceinline__ void for_each_extra(F &&f) const {
    extras.for_each(threadIdx.x, kThreads, 0, vectors * kSize, [&](float z, uint32_t at) {
      const int v = at / kSize;
      f(z, v, static_cast<int>(at % kSize), __umulhi(v, inverse_));
    });
  }

  // f(v, vector) over a worker's vectors.
  template <typename F>
  __device__ __forceinline__ void for_each_vector(F &&f) const {
    const Walk mine = walk();
#pragma unroll 1
    for (int at = mine.first; at < mine.end; at += kWarps) f(mine.v + at, vector(mine, at));
  }

  int vectors, turns;  // turns: of a worker, to load the part or to pass over it
  Apart extras;

 private:
  __device__ __forceinline__ static Vec<T> vector(const Walk &walk, int at) {
    return load_vec(reinterpret_cast<const T *>(walk.held + at));
  }

  // Where a vector is held.
  __device__ __forceinline__ int slot(int v) const {
    return v + (pitch_ == stretch_ ? 0 : static_cast<int>(__umulhi(v, inverse_)));
  }

  __device__ __forceinline__ void fetch(int i, Vec<T> (&batch)[kBatch]) const {
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int v = place(i + j);
      if (v >= whole_from_ && v < whole_to_) batch[j] = load_vec(z_ + v * kSize);
    }
  }

  int lead_, vocab_, first_;   // lead_: places of the aligned row before its first token
  int whole_from_, whole_to_;  // vectors that hold nothing but tokens
  const T *z_;
  Vec<T> *held_;
  int stretch_, pitch_;
  uint32_t inverse_;
};

}  // namespace gqa::cuda
