// From the weights of a block's tokens to one of them: the first, by index, at which their running sum reaches a
// number.
#pragma once

#include "cuda/sample_sm90/part.cuh"

namespace gqa::cuda {

// m of a token that the order asks for, else 0.
__device__ __forceinline__ uint32_t weight_in(const Order &order, float z, float max, float scale) {
  const float t = exponent_of(z, max, scale);
  const uint32_t m = weigh_unchecked(t).m;
  return t >= order.least && t <= order.most && z >= order.lowest ? m : 0;
}

template <uint32_t kOf>
__device__ __forceinline__ uint32_t running_part(uint32_t value) {
#pragma unroll
  for (uint32_t offset = 1; offset < kOf; offset <<= 1) {
    const uint32_t below = __shfl_up_sync(kAll, value, offset, kOf);
    if (lane() % kOf >= offset) value += below;
  }
  return value;
}

// One warp, in the block that holds the token; left: of the sum, what this block has to reach. The warp, its 32
// vectors, the vector, the logit: whose sums are there, or are looked at again.
template <typename T, int kThreads>
__device__ __forceinline__ Picked find_token(const Part<T, kThreads> &part, const Shared &shared, const Cells &cells,
                                             u64 left, float max, float scale) {
  const uint32_t of_warp = lane() < kThreads / 32 ? static_cast<uint32_t>(shared.of_warp[lane()]) : 0;
  const u64 warps = running_sum(of_warp);
  const int in_warp = __ffs(__ballot_sync(kAll, warps >= left)) - 1;
  left -= __shfl_sync(kAll, warps - of_warp, in_warp);
  const int chunks = part.chunks_per_warp, first = in_warp * chunks;
  const uint32_t of_chunk = lane() < chunks ? cells.select.chunks[first + lane()] : 0;
  const uint32_t running = running_part<32>(of_chunk);
  const int in_chunk = __ffs(__ballot_sync(kAll, running >= left)) - 1;
  left -= __shfl_sync(kAll, running - of_chunk, in_chunk);
  const int chunk = first + in_chunk;
  const int v = chunk * 32 + static_cast<int>(lane());
  uint32_t weight = 0;
  if (v < part.vectors) {
    const Vec<T> vec = part.vector(v);
#pragma unroll
    for (const T element : vec.value) weight += weight_in(shared.order, to_float(element), max, scale);
  }
  const uint32_t within = running_part<32>(weight);
  const int owner = __ffs(__ballot_sync(kAll, within >= left)) - 1;
  left -= __shfl_sync(kAll, within - weight, owner);
  // The vector's elements, one a lane.
  const int at = __shfl_sync(kAll, v, owner);
  const uint32_t m = weight_in(shared.order, part.logit(at, lane() % Vec<T>::kSize), max, scale);
  const int element = __ffs(__ballot_sync(kAll, running_part<Vec<T>::kSize>(m) >= left)) - 1;
  return {part.token(at, element), __shfl_sync(kAll, m, element)};
}

}  // namespace gqa::cuda
