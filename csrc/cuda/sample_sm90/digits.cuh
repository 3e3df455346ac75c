// The workers' half of a round of select: the digits of the tokens asked for, added up and told to the cluster.
#pragma once

#include "cuda/sample_sm90/exchange.cuh"
#include "cuda/sample_sm90/part.cuh"

namespace gqa::cuda {

// Tokens that the order does not ask for go to a row that nobody reads: no branch, so that logits overlap.
template <bool kByExponent, bool kCounts, typename T, int kThreads>
__device__ __forceinline__ void add_digits(const Part<T, kThreads> &part, const Order &order, float max, float scale,
                                           Cells *cells) {
  const uint32_t sums = static_cast<uint32_t>(__cvta_generic_to_shared(&cells->select.sums[0][lane()]));
  const auto add = [&](float z, int, int) {
    const float t = exponent_of(z, max, scale);
    const uint32_t by_exponent = to_bits(sampling::add(mul(sub(order.most, t), order.steps), order.first)) - kUnits;
    bool in = t >= order.least && t <= order.most;
    uint32_t digit = by_exponent, m = weigh_unchecked(t).m;
    if (!kByExponent) {
      digit = (order.digits.high - (key(z) >> kConstantBits<T>)) >> order.digits.shift;
      in = in && (order.within == kAll || by_exponent == order.within) && digit < kDigits;
    }
    digit = in ? digit : kDigits;
    if (kCounts && order.counts_above && t > order.most) digit = m = 0;
    add_shared(sums + digit * kRow, m);
    if (kCounts) add_shared(sums + digit * kRow + sizeof(cells->select.sums), 1);
  };
  constexpr Many kIfMany = kByExponent && !kCounts ? Many::kUnrolled : Many::kRolled;
  const Window<T> window(order.lowest, order.highest);
  const auto find = [&](const Vec<T> &vec) { return window.find(vec); };
  part.template for_each_near<kIfMany>(find, add, [](int, auto) {});
}

// Eight threads a digit add its columns, leave zeros and tell the blocks.
__device__ __forceinline__ void share_digits(const Exchange &exchange, uint32_t slot, Cells *cells) {
  const uint32_t digit = threadIdx.x / 8, quad = threadIdx.x % 8;
  if (digit >= kDigits) return;
  uint4 *of_sums = reinterpret_cast<uint4 *>(cells->select.sums[digit]) + quad;
  uint4 *of_counts = reinterpret_cast<uint4 *>(cells->select.counts[digit]) + quad;
  const uint4 m = *of_sums, n = *of_counts;
  *of_sums = *of_counts = make_uint4(0, 0, 0, 0);
  u64 word = u64{m.x} + m.y + (u64{m.z} + m.w) + (u64{n.x + n.y + n.z + n.w} << kCountShift);
#pragma unroll
  for (int offset = 4; offset > 0; offset >>= 1) word += __shfl_xor_sync(kAll, word, offset);
  // Neighbours send their two words at once, each to half of the blocks.
  const u64 other = __shfl_xor_sync(kAll, word, 8);
  const uint32_t odd = digit % 2, to = quad + odd * 8;
  if (to >= exchange.blocks) return;
  exchange.send(to, cells->select.slots[slot][exchange.rank] + digit - odd, kRound + slot, odd ? other : word,
                odd ? word : other);
}

}  // namespace gqa::cuda
