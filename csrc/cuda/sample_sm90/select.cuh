// Orders to the workers, and the search for a threshold within bins that they make possible.
#pragma once

#include "cuda/sample_sm90/bins.cuh"
#include "cuda/sample_sm90/part.cuh"

namespace gqa::cuda {

// The exponents of a bin, ends included: halves go to the even bin.
__device__ __forceinline__ float least_of_bin(uint32_t bin) {
  const float edge = mul(static_cast<float>(bin) + 0.5f, -0.125f);
  return bin + 1 == kBins ? -43.75f : (bin % 2 == 0 ? edge : from_bits(to_bits(edge) - 1));
}

__device__ __forceinline__ float most_of_bin(uint32_t bin) {
  const float edge = mul(static_cast<float>(bin) - 0.5f, -0.125f);
  return bin == 0 ? 0.0f : (bin % 2 == 0 ? edge : from_bits(to_bits(edge) + 1));
}

template <typename T, int kThreads>
class Orders {
 public:
  __device__ Orders(const Exchange &exchange, Shared *shared, Cells *cells)
      : exchange_(exchange), shared_(*shared), cells_(*cells) {}

  __device__ void set_scale(float max, float scale) {
    max_ = max;
    eighth_ = div(0.125f, scale);
  }

  __device__ void give(const Order &order) {
    if (lane() == 0) shared_.order = order;
    announce<kThreads + 32>(kOrdered);
  }

  // For the tokens of bins [from, to]: their exponents, and logits a little beyond those that have them.
  __device__ Order order_for(Order::Kind kind, uint32_t from, uint32_t to) const {
    Order order{};
    order.kind = kind;
    order.most = most_of_bin(from);
    order.least = least_of_bin(to);
    const float highest = sub(max_, mul(mul(static_cast<float>(from) - 0.5f, eighth_), 0.999998f));
    const float lowest = sub(max_, mul(mul(static_cast<float>(to) + 0.5f, eighth_), 1.000002f));
    order.highest = key_to_logit(min(key(highest) + 2, kInfinityKey));
    order.lowest = key_to_logit(max(key(lowest) - 2, kLowestKey));
    return order;
  }

  struct Selected {
    bool found;
    uint32_t key;
    u64 kept;  // count and sum of the tokens from key up in the bins; the count, if asked for, with those above
  };

  // The largest key such that the tokens of bins [from, to] from it up count at least as wanted, those of earlier bins
  // with them; or, not by count, have at least the mass. Six bits of the key a round: a histogram of the digit,
  // summed over the cluster and walked down from its largest key.
  __device__ __forceinline__ Selected select(uint32_t from, uint32_t to, bool by_count, uint64_t wanted) {
    constexpr int kBits = kConstantBits<T>;
    const auto reaches = [&](u64 word) { return (by_count ? count_of(word) : bin_mass(sum_of(word), from)) >= wanted; };
    Order order = order_for(Order::kSelect, from, to);
    order.high = key(order.highest) >> kBits;
    const uint32_t range = order.high - (key(order.lowest) >> kBits);
    order.shift = max(32 - __clz(range) - kDigitBits, 0);
    order.counts_above = by_count;
    if (by_count) {
      order.highest = INFINITY;
      if (range >> order.shift == kDigits - 1) ++order.shift;
      order.high += 1u << order.shift;  // the first digit is for those above
    }
    u64 kept = 0;
    for (;;) {
      order.counts = by_count || order.shift > 0;
      give(order);
      const uint32_t slot = rounds_ % 2;
      exchange_.receive(kRound + slot, rounds_ / 2 % 2);
      if (lane() == 0) exchange_.expect_again(kRound + slot);
      ++rounds_;
      u64 first = 0, second = 0;
#pragma unroll
      for (uint32_t i = 0; i < kMaxBlocks; ++i) {
        if (i >= exchange_.blocks) continue;
        const ulonglong2 both = *reinterpret_cast<const ulonglong2 *>(cells_.select.slots[slot][i] + 2 * lane());
        first += both.x;
        second += both.y;
      }
      const u64 end = kept + running_sum(first + second), middle = end - second;
      const uint32_t lanes = __ballot_sync(kAll, reaches(end)), firsts = __ballot_sync(kAll, reaches(middle));
      if (lanes == 0) return {false, 0, 0};
      const int at = __ffs(lanes) - 1;
      const bool in_first = firsts >> at & 1;
      const uint32_t digit = 2 * at + (in_first ? 0 : 1);
      const u64 with = __shfl_sync(kAll, in_first ? middle : end, at);
      const u64 of_digit = __shfl_sync(kAll, in_first ? first : second, at);
      order.high -= digit << order.shift;
      if (order.shift == 0 || count_of(of_digit) == 1) {
        return {true, (order.high - (1u << order.shift) + 1) << kBits, with};
      }
      kept = with - of_digit;
      order.counts_above = false;
      order.shift = max(static_cast<int>(order.shift) - kDigitBits, 0);
    }
  }

 private:
  const Exchange &exchange_;
  Shared &shared_;
  Cells &cells_;
  float max_ = 0, eighth_ = 0;
  uint32_t rounds_ = 0;
};

}  // namespace gqa::cuda
