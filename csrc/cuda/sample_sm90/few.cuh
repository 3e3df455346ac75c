// Where few tokens can be kept: one block has them sent to it, sorts them and decides alone.
#pragma once

#include "cuda/sample_sm90/exchange.cuh"

namespace gqa::cuda {

// A larger word comes first: by key, and of equal keys the lower token.
__device__ __forceinline__ u64 listed_as(uint32_t key, int token) {
  return u64{key} << 32 | ~static_cast<uint32_t>(token);
}
__device__ __forceinline__ uint32_t key_of(u64 word) { return static_cast<uint32_t>(word >> 32); }
__device__ __forceinline__ uint32_t token_of(u64 word) { return ~static_cast<uint32_t>(word); }

// How many tokens the blocks listed, up to this lane's.
__device__ __forceinline__ uint32_t running_counts(const Exchange &exchange, const Shared &shared) {
  return static_cast<uint32_t>(running_sum<kMaxBlocks>(lane() < exchange.blocks ? own_word(shared.parts) : 0));
}

// One warp tells the first block how many tokens this one listed; there, of all blocks, once the list is opened.
__device__ __forceinline__ uint32_t count_list(const Exchange &exchange, Shared *shared) {
  if (lane() == 0) exchange.send(0, shared->parts + exchange.rank, kParts, u64{shared->listed});
  if (exchange.rank != 0) return 0;
  exchange.receive(kParts);
  const uint32_t count = __shfl_sync(kAll, running_counts(exchange, *shared), exchange.blocks - 1);
  if (lane() == 0) exchange.expect(kList, count * sizeof(u64));
  return count;
}

// The workers of the first block put the list in order and weigh it.
template <int kThreads>
__device__ __forceinline__ void receive_list(const Exchange &exchange, Shared *shared, Cells *cells, float max,
                                             float scale) {
  constexpr int kShares = 4;  // threads that find a token's place
  static_assert(kThreads >= kFew * kShares && kThreads >= 32 * kMaxBlocks);
  auto &few = cells->few;
  exchange.receive(kParts);
  const uint32_t running = running_counts(exchange, *shared), count = __shfl_sync(kAll, running, exchange.blocks - 1);
  exchange.receive(kList);
  if (warp() < exchange.blocks) {
    const uint32_t own = static_cast<uint32_t>(shared->parts[warp()]), end = __shfl_sync(kAll, running, warp());
    for (uint32_t i = lane(); i < own; i += 32) few.list[end - own + i] = few.sent[warp()][i];
  }
  meet<kThreads>(kWorkers);
  const uint32_t at = threadIdx.x / kShares;
  if (at >= kFew) return;
  const u64 word = at < count ? few.list[at] : 0;
  uint32_t place = 0;
#pragma unroll 4
  for (uint32_t i = threadIdx.x % kShares; i < count; i += kShares) place += few.list[i] > word;
  place += __shfl_xor_sync(kAll, place, 1);
  place += __shfl_xor_sync(kAll, place, 2);
  if (at >= count || threadIdx.x % kShares != 0) return;
  const Weight weight = weigh_unchecked(exponent_of(key_to_logit(key_of(word)), max, scale));
  few.sorted[place] = word;
  few.m[place] = weight.m;
  few.bins[place] = weight.bin;
}

// One warp decides on the sorted list; four neighbours a lane. total: the mass that top-p is a share of, where top-k
// does not limit it.
__device__ __forceinline__ Drawn draw_from_list(Cells *cells, uint32_t count, const Settings &s, bool limited,
                                                uint64_t total, const Random &random, float max) {
  constexpr int kOwn = kFew / 32;
  auto &few = cells->few;
  uint32_t keys[kOwn], bins[kOwn], sums[kOwn], own = 0;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const uint32_t at = lane() * kOwn + i;
    const bool is = at < count;
    keys[i] = is ? key_of(few.sorted[at]) : 0;
    bins[i] = is ? few.bins[at] : kBins;
    own += is ? few.m[at] : 0;
    sums[i] = own;
  }
  // How many of the list's tokens it is true for.
  const auto number = [&](auto &&f) {
    uint32_t n = 0;
#pragma unroll
    for (int i = 0; i < kOwn; ++i) n += __popc(__ballot_sync(kAll, lane() * kOwn + i < count && f(i)));
    return n;
  };

  // Of each token: the sum of its bin's m up to it, and the mass of all tokens up to it. Running sums never fall, so
  // where a token's bin begins is the last beginning up to it: a maximum.
  const uint32_t bin_before = __shfl_up_sync(kAll, bins[kOwn - 1], 1), bin_after = __shfl_down_sync(kAll, bins[0], 1);
  uint32_t before = own, begin = 0, begins[kOwn];
#pragma unroll
  for (uint32_t offset = 1; offset < 32; offset <<= 1) {
    const uint32_t below = __shfl_up_sync(kAll, before, offset);
    before += lane() >= offset ? below : 0;
  }
  before -= own;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    const uint32_t previous = i == 0 ? bin_before : bins[i == 0 ? 0 : i - 1];
    if (bins[i] != previous && lane() + i != 0) begin = before + (i == 0 ? 0 : sums[i == 0 ? 0 : i - 1]);
    begins[i] = begin;
  }
#pragma unroll
  for (uint32_t offset = 1; offset < 32; offset <<= 1) begin = ::max(begin, __shfl_up_sync(kAll, begin, offset));
  const uint32_t earlier = __shfl_up_sync(kAll, begin, 1);
  u64 whole = 0, masses[kOwn];
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    sums[i] += before - (lane() == 0 ? begins[i] : ::max(begins[i], earlier));
    masses[i] = whole + bin_mass(sums[i], bins[i]);
    if (bins[i] != (i + 1 == kOwn ? bin_after : bins[i + 1 == kOwn ? i : i + 1])) whole = masses[i];
  }
  const u64 masses_before = running_sum(whole) - whole;
#pragma unroll
  for (int i = 0; i < kOwn; ++i) {
    masses[i] += masses_before;
    few.sums[lane() * kOwn + i] = sums[i];
    few.masses[lane() * kOwn + i] = masses[i];
  }
  __syncwarp();

  const auto up_to_ties = [&](uint32_t place) {
    const uint32_t least = key_of(few.sorted[place]);
    return number([&](int i) { return keys[i] >= least; });
  };
  const auto first_to_reach = [&](uint64_t mass) {
    return min(number([&](int i) { return masses[i] < mass; }), count - 1);
  };
  uint32_t kept = limited && s.top_k < count ? up_to_ties(static_cast<uint32_t>(s.top_k) - 1) : count;
  if (limited) total = few.masses[kept - 1];
  if (s.top_p < kTopPOff) kept = min(kept, up_to_ties(first_to_reach(share_of(total, s.top_p))));
  if (s.least_exponent > -64.0f) {
    const auto is_likely = [&](int i) { return exponent_of(key_to_logit(keys[i]), max, s.scale) >= s.least_exponent; };
    kept = min(kept, number(is_likely));
  }
  total = few.masses[kept - 1];
  const uint32_t bin = few.bins[first_to_reach(mul_high(random.bin, total) + 1)];
  const uint32_t first = number([&](int i) { return bins[i] < bin; });
  const uint32_t last = min(kept, number([&](int i) { return bins[i] <= bin; }));
  const uint64_t sum = few.sums[last - 1], need = mul_high(random.token, sum) + 1;
  // By index: the first token at which the running sum reaches need.
  uint32_t chosen = 0;
#pragma unroll 1
  for (uint32_t at = first + lane(); at - lane() < last; at += 32) {
    const uint64_t word = few.sorted[min(at, last - 1)];
    uint32_t until = 0;
#pragma unroll 4
    for (uint32_t i = first; i < last; ++i) until += token_of(few.sorted[i]) <= token_of(word) ? few.m[i] : 0;
    if (at < last && until >= need && until - few.m[at] < need) chosen = at;
  }
  chosen = __reduce_max_sync(kAll, chosen);
  return {token_of(few.sorted[chosen]), true, bin_mass(sum, bin), total, few.m[chosen], sum};
}

}  // namespace gqa::cuda
