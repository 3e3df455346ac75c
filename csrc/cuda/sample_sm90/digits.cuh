// The workers' half of a round of select: the digits of the tokens asked for, added up and told to the cluster.
#pragma once

#include "cuda/sample_sm90/exchange.cuh"
#include "cuda/sample_sm90/part.cuh"

namespace gqa::cuda {

// Tokens that the order does not ask for go to a row that nobody reads.
template <typename T, int kThreads>
__device__ __forceinline__ void add_digits(const Part<T, kThreads> &part, const Order &order, const Scale &by,
                                           float max, float scale, Cells *cells) {
  const uint32_t column = static_cast<uint32_t>(__cvta_generic_to_shared(&cells->sums[0][lane()]));
  const auto add = [&](float z, uint32_t sums, uint32_t counted) {
    const float t = exponent_of(z, max, scale);
    const uint32_t by_exponent = to_bits(sampling::add(mul(sub(order.most, t), order.steps), order.first)) - kUnits;
    const uint32_t by_key = (order.digits.high - key(z)) >> order.digits.shift;
    const bool is_above = by.row_of(t) < order.first_row;
    bool in = t >= order.least;
    uint32_t digit = order.by_exponent ? by_exponent : by_key, m = weigh_unchecked(t).m;
    if (is_above) {
      digit = m = 0;
      in = in && order.counts_above;
    } else {
      in = in && by_exponent >= order.within;
    }
    digit = in ? min(digit, 0u + kDigits) : kDigits;
    add_shared(sums + digit * kRow, m);
    if (counted != 0) add_shared(sums + digit * kRow + sizeof(cells->sums), counted);
  };
  const uint32_t counted = order.counts;
  const Window<T> window(order.lowest, order.highest);
  const auto find = [&](const Vec<T> &vec) { return window.find(vec); };
  part.template for_each_near<Many::kRolled>(part.walk(), find, [&](float z, int, int) { add(z, column, counted); });
  part.for_each_extra([&](float z, int, int, uint32_t stretch) {
    if (z >= order.lowest) add(z, column + (stretch - lane()) * sizeof(uint32_t), kExtraFlag + counted);
  });
}

// Eight threads a digit add its columns and tell the blocks.
__device__ __forceinline__ void share_digits(const Exchange &exchange, uint32_t slot, Cells *cells) {
  const uint32_t digit = threadIdx.x / 8, quad = threadIdx.x % 8;
  if (digit >= kDigits) return;
  const uint4 m = reinterpret_cast<const uint4 *>(cells->sums[digit])[quad];
  const uint4 n = reinterpret_cast<const uint4 *>(cells->counts[digit])[quad];
  const uint32_t count = (n.x & kCountOfCell) + (n.y & kCountOfCell) + (n.z & kCountOfCell) + (n.w & kCountOfCell);
  u64 word = u64{m.x} + m.y + (u64{m.z} + m.w) + (u64{count} << kCountShift);
  word |= u64{(n.x | n.y | n.z | n.w) >= kExtraFlag} << kFlagShift;
#pragma unroll
  for (int offset = 4; offset > 0; offset >>= 1) word += __shfl_xor_sync(kAll, word, offset);
  word = (word & ((u64{1} << kFlagShift) - 1)) | (u64{word >> kFlagShift != 0} << kFlagShift);
  // Neighbours send their two words at once, each to half of the blocks.
  const u64 other = __shfl_xor_sync(kAll, word, 8);
  const uint32_t odd = digit % 2, to = quad + odd * 8;
  if (to >= exchange.blocks) return;
  exchange.send(to, cells->told(slot, exchange.blocks, exchange.rank) + digit - odd, kRound + slot, odd ? other : word,
                odd ? word : other);
}

}  // namespace gqa::cuda
