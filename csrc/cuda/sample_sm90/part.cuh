// A block's part of a row of logits: read once from memory into shared memory, in whole aligned 16-byte vectors.
#pragma once

#include "cuda/sample_sm90/vectors.cuh"

namespace gqa::cuda {

// Warp w holds the w-th stretch of the part, lanes one vector each of every 32.
template <typename T, int kThreads>
class Part {
  static constexpr int kWarps = kThreads / 32;
  static constexpr int kSize = Vec<T>::kSize;
  static constexpr int kBatch = 4;  // vectors a thread has under way

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
  __device__ __forceinline__ Largest<T> load(F &&meanwhile) {
    Largest<T> largest;
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
        largest.add(batch[j]);
      }
      i += kBatch;
      if (i >= chunks_per_warp) return largest;
      fetch(i, batch);
    }
  }

  // One warp reads the vectors at the ends of the row that are not all tokens; what is no token becomes -inf.
  __device__ __forceinline__ Largest<T> load_edges() {
    Largest<T> largest;
    const int v = threadIdx.x % 32 < kSize ? 0 : vectors - 1, i = threadIdx.x % kSize;
    if (threadIdx.x % 32 >= 2 * kSize || v < 0 || v >= vectors || (v >= whole_from_ && v < whole_to_)) return largest;
    const T value = is_token(token(v, i)) ? z_[v * kSize + i] : from_float<T>(-INFINITY);
    held_[v].value[i] = value;
    largest.add(value);
    return largest;
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

  // f(z) for the logits of vectors that may hold some in the window, few or all, evenly over the lanes; after every 32
  // vectors that the warp has, done(chunk). `noted` is the warp's own, for 32 places.
  template <typename F, typename G>
  __device__ __forceinline__ void for_each_near(const Window<T> &window, uint16_t *noted, F &&f, G &&done) const {
    const int lane = threadIdx.x % 32;
#pragma unroll 1
    for (int i = 0; i < chunks_per_warp; ++i) {
      const int v = place(i), chunk = v / 32;
      if (chunk * 32 >= vectors) return;
      const bool near = v < vectors && window.holds_any(vector(v));
      const uint32_t all_near = __ballot_sync(0xffffffffu, near);
      if (near) noted[__popc(all_near & ((1u << lane) - 1))] = static_cast<uint16_t>(v);
      __syncwarp();
      const int count = __popc(all_near);
#pragma unroll 1
      for (int j = lane / kSize; j - lane / kSize < count; j += 32 / kSize) {
        if (j < count) f(logit(noted[j], lane % kSize));
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
