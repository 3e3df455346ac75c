// A block's part of a row of logits: read once from memory into shared memory, in whole aligned 16-byte vectors.
#pragma once

#include "cuda/sample_sm90/exchange.cuh"
#include "cuda/sample_sm90/vectors.cuh"

namespace gqa::cuda {

// How lanes take the logits of their vectors where many vectors hold what is looked for; where few do, one by one.
enum class Many { kInTurn, kRolled, kUnrolled };

// Warp w holds the w-th stretch of the part, lanes one vector each of every 32.
template <typename T, int kThreads>
class Part {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kSize = Vec<T>::kSize;
  static constexpr int kBatch = kThreads > kSampleClusterFew ? 6 : 4;  // vectors a thread has under way
  static constexpr int kAtOnce = 4;  // vectors a lane looks at before it evaluates what it found in them
  static constexpr int kMany = 8;    // of the logits that those hold

 public:
  __device__ Part(const T *z, int vocab, const Exchange &exchange, void *held)
      : lead_(reinterpret_cast<uintptr_t>(z) % 16 / sizeof(T)), vocab_(vocab), held_(static_cast<Vec<T> *>(held)) {
    const int all = (lead_ + vocab + kSize - 1) / kSize,
              share = static_cast<int>(exchange.divided(all + exchange.blocks - 1));
    first_ = min(static_cast<int>(exchange.rank) * share, all);
    vectors = min(share, all - first_);
    chunks_per_warp = (share + kThreads - 1) / kThreads;
    z_ = z - lead_ + first_ * kSize;
    whole_from_ = first_ == 0 && lead_ != 0;
    whole_to_ = first_ + vectors == all && (lead_ + vocab) % kSize != 0 ? vectors - 1 : vectors;
  }

  // The workers read the part; meanwhile() runs while the first loads are under way, seen(v, vector) after each.
  template <typename F, typename G>
  __device__ __forceinline__ Extent<T> load(F &&meanwhile, G &&seen) {
    Extent<T> extent;
    Vec<T> batch[kBatch];
    fetch(0, batch);
    meanwhile();
#pragma unroll 1
    for (int i = 0;;) {
#pragma unroll
      for (int j = 0; j < kBatch; ++j) {
        const int v = place(i + j);
        if (i + j >= chunks_per_warp || v < whole_from_ || v >= whole_to_) continue;
        replace(v, batch[j]);
        extent.add(batch[j]);
        seen(v, batch[j]);
      }
      i += kBatch;
      if (i >= chunks_per_warp) return extent;
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
    held_[v].value[i] = value;
    if (is_one) extent.add(value);
    return extent;
  }

  // f(v, i) for the elements of the vectors that load_edges() read, by one warp.
  template <typename F>
  __device__ __forceinline__ void for_each_edge(F &&f) const {
    const int v = threadIdx.x % 32 < kSize ? 0 : vectors - 1;
    if (threadIdx.x % 32 >= 2 * kSize || v < 0 || v >= vectors || (v >= whole_from_ && v < whole_to_)) return;
    if (threadIdx.x % 32 < kSize || vectors > 1) f(v, static_cast<int>(threadIdx.x % kSize));
  }

  // The thread's i-th vector, which may lie past the part.
  __device__ __forceinline__ int place(int i) const {
    return (static_cast<int>(threadIdx.x / 32) * chunks_per_warp + i) * 32 + static_cast<int>(threadIdx.x % 32);
  }

  __device__ __forceinline__ Vec<T> vector(int v) const { return load_vec(reinterpret_cast<const T *>(held_ + v)); }
  __device__ __forceinline__ void replace(int v, const Vec<T> &by) { store_vec(reinterpret_cast<T *>(held_ + v), by); }
  __device__ float logit(int v, int i) const { return to_float(held_[v].value[i]); }
  __device__ int token(int v, int i) const { return (first_ + v) * kSize + i - lead_; }
  __device__ bool is_token(int token) const { return static_cast<uint32_t>(token) < static_cast<uint32_t>(vocab_); }

  // f(z, v, i) for the logits that find(vector) has bits for, as a window's find(). Then done(chunk, all) with the 32
  // vectors among which they were: after each of a lane's, or once for all of the warp's.
  template <Many kIfMany, typename Find, typename F, typename G>
  __device__ __forceinline__ void for_each_near(Find &&find, F &&f, G &&done) const {
    constexpr std::bool_constant<true> all;
    constexpr std::bool_constant<false> one;
#pragma unroll 1
    for (int i = 0; i < chunks_per_warp; i += kAtOnce) {
      const int first = place(i);
      uint32_t found = 0;
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int v = first + k * 32;
        if (i + k < chunks_per_warp && v < vectors) found |= find(vector(v)) << k * 4;
      }
      if constexpr (kIfMany != Many::kInTurn) {
        if (__reduce_max_sync(0xffffffffu, __popc(found)) > kMany) {
#pragma unroll 1
          for (int k = 0; k < kAtOnce; ++k, found >>= 4) {
            const int v = first + k * 32;
            if ((found & 0xf000fu) != 0 && kIfMany == Many::kUnrolled) {
              const Vec<T> vec = vector(v);
#pragma unroll
              for (int j = 0; j < kSize; ++j) f(to_float(vec.value[j]), v, j);
            } else if ((found & 0xf000fu) != 0) {
#pragma unroll 2
              for (int j = 0; j < kSize; ++j) f(logit(v, j), v, j);
            }
            __syncwarp();
            done(v / 32, all);
          }
          continue;
        }
      }
      for (; found != 0; found &= found - 1) {
        const int bit = __ffs(found) - 1, v = first + bit % 16 / 4 * 32, j = Window<T>::element(bit);
        f(logit(v, j), v, j);
        done(v / 32, one);
      }
      __syncwarp();
    }
  }

  // f(v, vector) over the thread's vectors.
  template <typename F>
  __device__ __forceinline__ void for_each_vector(F &&f) const {
#pragma unroll 1
    for (int i = 0; i < chunks_per_warp; ++i) {
      const int v = place(i);
      if (v < vectors) f(v, vector(v));
    }
  }

  int vectors, chunks_per_warp;

 private:
  __device__ __forceinline__ void fetch(int i, Vec<T> (&batch)[kBatch]) const {
#pragma unroll
    for (int j = 0; j < kBatch; ++j) {
      const int v = place(i + j);
      if (i + j < chunks_per_warp && v >= whole_from_ && v < whole_to_) batch[j] = load_vec(z_ + v * kSize);
    }
  }

  int lead_, vocab_, first_;   // lead_: places of the aligned row before its first token
  int whole_from_, whole_to_;  // vectors that hold nothing but tokens
  const T *z_;
  Vec<T> *held_;
};

}  // namespace gqa::cuda
