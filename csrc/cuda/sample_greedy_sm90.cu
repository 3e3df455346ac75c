// sample on Hopper at temperature 0: the lowest index of the largest logit.
// One cluster of 1 to 16 blocks per row; a block takes a stretch of the row's aligned 16-byte vectors, threads stride.
// Memory order: the row once, eight loads of a thread under way at once; then a word a block to the cluster's first.
// Limits: sm_90; vocab <= 2^18; any alignment and row stride.
// Determinism: maxima of keys and minima of indices, so any order gives the same bytes.
#include "common/sampling.h"
#include "cuda/common/cluster.cuh"
#include "cuda/common/mbarrier.cuh"
#include "cuda/common/pair_max.cuh"
#include "cuda/common/sample_sm90.cuh"
#include "cuda/common/vec.cuh"
#include "plan/sample.h"

namespace gqa::cuda {
namespace {

using namespace gqa::sampling;

constexpr int kThreads = kSampleGreedyThreads;
// Code for older devices uses none of the following.
[[maybe_unused]] constexpr int kWarps = kThreads / 32;
[[maybe_unused]] constexpr int kBatch = 8;
constexpr uint32_t kAll = 0xffffffffu, kNowhere = kAll >> 1;

// The largest key of tokens, the first place that holds it, and whether any token is a NaN.
struct Best {
  uint32_t key, index, nan;
};

[[maybe_unused]] __device__ __forceinline__ unsigned long long word_of(const Best &best) {
  return static_cast<unsigned long long>(best.key) << 32 | best.nan << 31 | best.index;
}

__device__ __forceinline__ Best best_of_warp(const Best &mine) {
  const uint32_t largest = __reduce_max_sync(kAll, mine.key);
  return {largest, __reduce_min_sync(kAll, mine.key == largest ? mine.index : kNowhere),
          static_cast<uint32_t>(__any_sync(kAll, mine.nan))};
}

[[maybe_unused]] __device__ __forceinline__ Best best_of_words(const unsigned long long *words, uint32_t count) {
  const unsigned long long word = words[min(threadIdx.x % 32, count - 1)];
  const uint32_t low = static_cast<uint32_t>(word);
  return best_of_warp({static_cast<uint32_t>(word >> 32), low & kNowhere, low >> 31});
}

struct VecMax {
  uint32_t key;
  bool nan;
};

// The largest key of a vector, and whether it holds a NaN.
template <typename T>
__device__ __forceinline__ VecMax vec_max(const Vec<T> &vec) {
  if constexpr (sizeof(T) == 4) {
    const float *z = vec.value;
    const float nan = (z[0] + z[1]) + (z[2] + z[3]);  // also of inf - inf
    const bool has_nan = nan != nan && (z[0] != z[0] || z[1] != z[1] || z[2] != z[2] || z[3] != z[3]);
    return {sampling::key(fmaxf(fmaxf(z[0], z[1]), fmaxf(z[2], z[3]))), has_nan};
  } else {
    const uint4 w = *reinterpret_cast<const uint4 *>(&vec);
    const uint32_t largest = pair_max<T>(pair_max<T>(w.x, w.y), pair_max<T>(w.z, w.w));
    const uint32_t of_both = pair_max<T>(largest, __byte_perm(largest, 0, 0x1032));
    const uint32_t nans = pair_max_nan<T>(pair_max_nan<T>(w.x, w.y), pair_max_nan<T>(w.z, w.w));
    const T *nan = reinterpret_cast<const T *>(&nans);
    const float a = to_float(nan[0]), b = to_float(nan[1]);
    return {sampling::key(to_float(*reinterpret_cast<const T *>(&of_both))), a != a || b != b};
  }
}

template <typename T>
__global__ void __launch_bounds__(kThreads, 2) sample_greedy(const __grid_constant__ gqa_sample_params p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  constexpr int kSize = Vec<T>::kSize;
  __shared__ unsigned long long of_warp[kWarps], of_block[16], barrier;
  launch_dependents();
  const uint32_t rank = cluster_rank(), blocks = cluster_size();
  const uint32_t arrived = static_cast<uint32_t>(__cvta_generic_to_shared(&barrier));
  if (threadIdx.x == 0) {
    mbarrier_init(arrived, 1);
    mbarrier_arrive_expect(arrived, blocks * 8);
    mbarrier_fence_init();
  }
  cluster_arrive_relaxed();
  wait_for_prerequisites();

  // Vectors of the aligned row around the tokens; those at its ends that hold more than tokens are read apart.
  const uint32_t log_blocks = (blocks > 1) + (blocks > 2) + (blocks > 4) + (blocks > 8);
  const int64_t at = blockIdx.x >> log_blocks;
  const T *z = static_cast<const T *>(p.logits) + at * p.logits_stride;
  const int vocab = static_cast<int>(p.vocab), lead = reinterpret_cast<uintptr_t>(z) % 16 / sizeof(T);
  const int vectors = (lead + vocab + kSize - 1) / kSize, share = (vectors + (1 << log_blocks) - 1) >> log_blocks;
  const int first = min(static_cast<int>(rank) * share, vectors), last = min(first + share, vectors);
  const int whole_from = max(first, lead != 0), whole_to = min(last, (lead + vocab) / kSize);

  Best best{0, kNowhere, 0};
#pragma unroll 1
  for (int begin = whole_from + static_cast<int>(threadIdx.x); begin < whole_to; begin += kBatch * kThreads) {
    Vec<T> batch[kBatch];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int v = begin + i * kThreads;
      if (v < whole_to) batch[i] = load_vec(z - lead + v * kSize);
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int v = begin + i * kThreads;
      if (v >= whole_to) break;
      const VecMax of_vec = vec_max(batch[i]);
      best.nan |= of_vec.nan;
      if (of_vec.key > best.key || best.index == kNowhere) best = {of_vec.key, static_cast<uint32_t>(v), best.nan};
    }
  }
  best = best_of_warp(best);
  if (best.index != kNowhere) {
    const int token = static_cast<int>(best.index) * kSize - lead + static_cast<int>(threadIdx.x % kSize);
    best.index = __reduce_min_sync(kAll, key(to_float(z[token])) == best.key ? token : kNowhere);
  }
  if (threadIdx.x / 32 == kWarps - 1) {
    const int lane = threadIdx.x % 32, v = lane < kSize ? first : last - 1, token = v * kSize - lead + lane % kSize;
    Best edge{0, kNowhere, 0};
    if (lane < 2 * kSize && v >= first && (v < whole_from || v >= whole_to) && token >= 0 && token < vocab) {
      edge = {key(to_float(z[token])), static_cast<uint32_t>(token), 0};
      edge.nan = edge.key == 0;
    }
    edge = best_of_warp(edge);
    edge.nan |= best.nan;
    best.nan = edge.nan;
    if (edge.key > best.key || (edge.key == best.key && edge.index < best.index)) best = edge;
  }
  if (threadIdx.x % 32 == 0) of_warp[threadIdx.x / 32] = word_of(best);
  __syncthreads();
  cluster_wait();
  if (threadIdx.x >= 32) return;
  best = best_of_words(of_warp, kWarps);
  if (threadIdx.x == 0) {
    push(map_to_rank(static_cast<uint32_t>(__cvta_generic_to_shared(of_block + rank)), 0), word_of(best),
         map_to_rank(arrived, 0));
  }
  if (rank != 0) return;
  mbarrier_wait_cluster(arrived, 0);
  best = best_of_words(of_block, blocks);
  if (threadIdx.x != 0) return;
  const bool valid = best.nan == 0 && best.key > kLowestKey;
  p.ids[at] = best.index;
  if (p.valid != nullptr) p.valid[at] = valid;
  if (p.logprob != nullptr) p.logprob[at] = valid ? 0.0f : from_bits(0x7fc00000u);
#else
  __trap();
#endif
}

}  // namespace

gqa_status launch_sample_greedy(const gqa_sample_params &p, const gqa_launch &plan, cudaStream_t stream) {
  return dispatch_float(
      p.dtype, [&](auto tag) { return launch_clusters(sample_greedy<typename decltype(tag)::type>, plan, stream, p); });
}

}  // namespace gqa::cuda
