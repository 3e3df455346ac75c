// A block's part of a row of logits: read once from memory into shared memory, in whole aligned 16-byte vectors.
#pragma once

#include "cuda/sample_sm90/vectors.cuh"
#include "plan/sample.h"

namespace gqa::cuda {

// How lanes take the logits of their vectors where many vectors hold what is looked for; where few do, one by one.
enum class Many { kInTurn, kRolled, kUnrolled };

// Warp w holds the w-th stretch of the part, lanes one vector each of every 32.
template <typename T, int kThreads>
class Part {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kSize = Vec<T>::kSize;
  static constexpr int kBatch = kThreads > kSampleClusterFew ? 6 : 4;  // vectors a thread has under way
  static constexpr int kMany = 16;                                     // of 32 vectors

 public:
  __device__ Part(const T *z, int vocab, uint32_t rank, uint32_t log_blocks, void *held)
      : lead_(reinterpret_cast<uintptr_t>(z) % 16 / sizeof(T)), vocab_(vocab), held_(static_cast<Vec<T> *>(held)) {
    const int all = (lead_ + vocab + kSize - 1) / kSize, share = (all + (1 << log_blocks) - 1) >> log_blocks;
    first_ = min(static_cast<int>(rank) * share, all);
    vectors = min(share, all - first_);
    chunks_per_warp = (share + kThreads - 1) / kThreads;
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
        if (i + j >= chunks_per_warp || v < whole_from_ || v >= whole_to_) continue;
        replace(v, batch[j]);
        extent.add(batch[j]);
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

  // The thread's i-th vector, which may lie past the part.
  __device__ __forceinline__ int place(int i) const {
    return (static_cast<int>(threadIdx.x / 32) * chunks_per_warp + i) * 32 + static_cast<int>(threadIdx.x % 32);
  }

  __device__ __forceinline__ Vec<T> vector(int v) const { return load_vec(reinterpret_cast<const T *>(held_ + v)); }
  __device__ __forceinline__ void replace(int v, const Vec<T> &by) { store_vec(reinterpret_cast<T *>(held_ + v), by); }
  __device__ float logit(int v, int i) const { return to_float(held_[v].value[i]); }
  __device__ int token(int v, int i) const { return (first_ + v) * kSize + i - lead_; }
  __device__ bool is_token(int token) const { return static_cast<uint32_t>(token) < static_cast<uint32_t>(vocab_); }

  // f(z, v, i) for the logits that may lie in the window; after every 32 vectors that the warp has, done(chunk).
  template <Many kIfMany, typename F, typename G>
  __device__ __forceinline__ void for_each_near(const Window<T> &window, F &&f, G &&done) const {
#pragma unroll 1
    for (int i = 0; i < chunks_per_warp; ++i) {
      const int v = place(i), chunk = v / 32;
      if (chunk * 32 >= vectors) return;
      uint32_t found = v < vectors ? window.find(vector(v)) : 0;
      if (kIfMany == Many::kInTurn || __popc(__ballot_sync(0xffffffffu, found != 0)) <= kMany) {
        for (; found != 0; found &= found - 1) {
          const int j = Window<T>::element(__ffs(found) - 1);
          f(logit(v, j), v, j);
        }
      } else if (found != 0 && kIfMany == Many::kUnrolled) {
        const Vec<T> vec = vector(v);
#pragma unroll
        for (int j = 0; j < kSize; ++j) f(to_float(vec.value[j]), v, j);
      } else if (found != 0) {
#pragma unroll 2
        for (int j = 0; j < kSize; ++j) f(logit(v, j), v, j);
      }
      __syncwarp();
      done(chunk);
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
