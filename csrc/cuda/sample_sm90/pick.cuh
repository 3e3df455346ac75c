// From the weights of blocks, stretches and tokens to one token: the first, by index, at which their running sum
// reaches a number.
#pragma once

#include "cuda/sample_sm90/part.cuh"

namespace gqa::cuda {

// What may be picked: exponents and logits, both included.
struct Pickable {
  float least, most, lowest, highest;
};

template <uint32_t kOf>
__device__ __forceinline__ uint32_t running_part(uint32_t value) {
#pragma unroll
  for (uint32_t offset = 1; offset < kOf; offset <<= 1) {
    const uint32_t below = __shfl_up_sync(kAll, value, offset, kOf);
    if (lane() % kOf >= offset) value += below;
  }
  return value;
}

// The weights of the tokens of the vectors that a thread walks over.
template <typename T, int kThreads, typename Walk, typename F>
__device__ __forceinline__ uint32_t weight_of_walk(const Walk &walk, const Pickable &of, F &&weight_of) {
  const Window<T> window(of.lowest, of.highest);
  uint32_t weight = 0;
  Part<T, kThreads>::template for_each_near<Many::kUnrolled>(
      walk, [&](const Vec<T> &vec) { return window.find(vec); }, [&](float z, int, int) { weight += weight_of(z); });
  return weight;
}

__device__ __forceinline__ auto weights_of(const Pickable &of, float max, float scale) {
  return [=](float z) {
    const float t = exponent_of(z, max, scale);
    const uint32_t m = weigh_unchecked(t).m;
    return t >= of.least && t <= of.most && z >= of.lowest ? m : 0;
  };
}

// The workers of the block that holds the token add up neighbouring vectors of its stretch, each a few.
template <typename T, int kThreads>
__device__ __forceinline__ void weigh_stretch(const Part<T, kThreads> &part, const Order &order, float max, float scale,
                                              Shared *shared) {
  const Pickable of{order.least, order.most, order.lowest, order.highest};
  const uint32_t weight = weight_of_walk<T, kThreads>(part.template walk_along<kThreads>(order.key, threadIdx.x), of,
                                                      weights_of(of, max, scale));
  reinterpret_cast<uint32_t *>(shared->slots)[threadIdx.x] = weight;
  const uint32_t of_warp = __reduce_add_sync(kAll, weight);
  if (lane() == 0) shared->of_warp[warp()] = of_warp;
}

struct Share {
  uint32_t owner, left;
};

// The first lane at which the running sum of the weights reaches `left`, and what is left for its own.
__device__ __forceinline__ Share find_share(uint32_t weight, uint32_t left) {
  const uint32_t running = running_part<32>(weight);
  const uint32_t owner = __ffs(__ballot_sync(kAll, running >= left)) - 1;
  return {owner, left - __shfl_sync(kAll, running - weight, owner)};
}

// One warp, in the block that holds the token; left: of the sum, what this stretch has to reach. kShared: the workers
// have weighed it; else each lane adds up a few neighbouring vectors. Then the logits of one thread's are looked at.
template <bool kShared, typename T, int kThreads>
__device__ __forceinline__ Picked find_token(const Part<T, kThreads> &part, int stretch, uint32_t left,
                                             const Pickable &of, float max, float scale, Shared *shared) {
  constexpr int kSize = Vec<T>::kSize;
  constexpr bool kExtras = kHasExtras<T, kThreads>;
  static_assert(!kShared || (!kExtras && sizeof(shared->slots) >= kThreads * sizeof(uint32_t)));
  uint32_t *scratch = reinterpret_cast<uint32_t *>(shared->slots);
  const auto weight_of = weights_of(of, max, scale);
  auto walk = part.template walk_along < kShared ? kThreads : 32 > (stretch, lane());
  const uint32_t from = walk.v * kSize, of_lane = walk.turns * kSize;
  uint32_t owner = 0;
  if constexpr (kShared) {
    const Share of_warp =
        find_share(lane() < kThreads / 32 ? static_cast<uint32_t>(own_word(shared->of_warp)) : 0, left);
    const Share of_thread = find_share(scratch[of_warp.owner * 32 + lane()], of_warp.left);
    owner = of_warp.owner * 32 + of_thread.owner;
    left = of_thread.left;
  } else {
    uint32_t weight = weight_of_walk<T, kThreads>(walk, of, weight_of);
    if constexpr (kExtras) {
      scratch[lane()] = 0;
      __syncwarp();
      part.extras.for_each(lane(), 32, from, from + 32 * of_lane, [&](float z, uint32_t at) {
        if (at - from < static_cast<uint32_t>(walk.end * kSize)) {
          atomicAdd(scratch + (at - from) / of_lane, weight_of(z));
        }
      });
      __syncwarp();
      weight += scratch[lane()];
    }
    const Share of_thread = find_share(weight, left);
    owner = of_thread.owner;
    left = of_thread.left;
  }
  const int first = static_cast<int>(owner) * walk.turns, end = min(walk.turns, walk.end - first) * kSize;
  if constexpr (kExtras) {
    __syncwarp();
    for (uint32_t i = lane(); i < of_lane; i += 32) scratch[i] = 0;
    __syncwarp();
    const uint32_t at_first = from + first * kSize;
    part.extras.for_each(lane(), 32, at_first, at_first + end,
                         [&](float z, uint32_t at) { scratch[at - at_first] = weight_of(z); });
    __syncwarp();
  }
#pragma unroll 1
  for (int i = static_cast<int>(lane());; i += 32) {
    const int at = first + i / kSize;
    uint32_t m = i < end ? weight_of(to_float(walk.held[at].value[i % kSize])) : 0;
    if (kExtras && i < end) m += scratch[i];
    const uint32_t sum = running_part<32>(m);
    const uint32_t reached = __ballot_sync(kAll, sum >= left);
    const int by = reached != 0 ? __ffs(reached) - 1 : 31;
    if (reached != 0 || i - static_cast<int>(lane()) + 32 >= end) {
      return {__shfl_sync(kAll, part.token(walk.v + at, i % kSize), by), __shfl_sync(kAll, m, by)};
    }
    left -= __shfl_sync(kAll, sum, 31);
  }
}

// To all blocks, what may be picked here; own: in the lane's stretch.
__device__ __forceinline__ void tell_picked(const Exchange &exchange, Shared *shared, uint32_t own) {
  const u64 sum = sum_of_lanes(own);
  if (lane() < exchange.blocks) exchange.send(lane(), shared->parts + exchange.rank, kParts, sum);
}

// Where a stretch lies that has to reach `left`; in one block, which `writes`.
struct Stretched {
  bool writes;
  int stretch;
  uint32_t left;
};

// One warp a block, once all have told: the block, the stretch.
__device__ __forceinline__ Stretched find_stretch(const Exchange &exchange, Shared *shared, uint32_t own, u64 need) {
  const u64 stretches = running_sum(u64{own});
  exchange.receive(kParts);
  const u64 of_block = lane() < exchange.blocks ? own_word(shared->parts) : 0,
            blocks = running_sum<kMaxBlocks>(of_block);
  const uint32_t block = __ffs(__ballot_sync(kAll, lane() < exchange.blocks && blocks >= need)) - 1;
  if (block != exchange.rank) return {false, 0, 0};
  const u64 left = need - __shfl_sync(kAll, blocks - of_block, block);
  const int stretch = __ffs(__ballot_sync(kAll, stretches >= left)) - 1;
  return {true, stretch, static_cast<uint32_t>(left - __shfl_sync(kAll, stretches - own, stretch))};
}

}  // namespace gqa::cuda
