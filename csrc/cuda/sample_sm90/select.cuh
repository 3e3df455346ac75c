// Orders to the workers, and the search for a threshold within bins that they make possible.
#pragma once

#include "cuda/sample_sm90/bins.cuh"
#include "cuda/sample_sm90/tally.cuh"

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
  __device__ Orders(const Exchange &exchange, Shared *shared, Cells *cells, const Tally *tally)
      : exchange_(exchange), shared_(*shared), cells_(*cells), tally_(tally) {}

  __device__ __forceinline__ void set_scale(float max, float scale, float least) {
    max_ = max;
    scale_ = scale;
    inverse_ = div(1.0f, scale);
    least_ = exponent_of(least, max, scale);
  }

  // All lanes write an order, the same values, and then give it: what they change they keep in registers.
  __device__ __forceinline__ void give() const {
    __syncwarp();
    announce<kThreads + 32>(kOrdered);
  }

  // For the tokens of bins [from, to]: their exponents, and logits a little beyond those that have them.
  __device__ __forceinline__ void write(Order::Kind kind, uint32_t from, uint32_t to) const {
    Order &order = shared_.order;
    order.kind = kind;
    order.most = most_of_bin(from);
    order.least = least_of_bin(to);
    order.highest = highest_for(order.most);
    order.lowest = lowest_for(order.least);
  }

  struct Selected {
    bool found;
    uint32_t key;
    u64 kept;  // count and sum of the tokens from key up in the bins; the count, if asked for, with those above
  };

  // The largest key such that the tokens of bins [from, to] from it up count at least as wanted, those of earlier bins
  // with them; or, not by count, have at least the mass. A histogram of 64 digits a round, summed over the cluster and
  // walked down from its largest key. Digits are six bits of the key; where the bins hold many keys, near zero, the
  // first are equal steps of the exponent, down to the row's least.
  __device__ __forceinline__ Selected select(uint32_t from, uint32_t to, bool by_count, uint64_t wanted) {
    constexpr int kBits = kConstantBits<T>;
    const auto reaches = [&](u64 word) { return (by_count ? count_of(word) : bin_mass(sum_of(word), from)) >= wanted; };
    Order &order = shared_.order;
    write(Order::kSelect, from, to);
    order.counts = order.counts_above = by_count;
    order.within = kAll;
    Digits digits = by_key(by_count);
    const float range = sub(order.most, fmaxf(order.least, least_));
    bool by_exponent = digits.shift > 0 && range > 0x1p-40f;
    if (by_exponent) {
      order.steps = div(by_count ? kDigits - 2.0f : kDigits - 1.0f, range);
      order.first = by_count ? kUnit + 1.0f : kUnit;
    }
    __syncwarp();  // all have read the limits
    if (by_count) order.highest = INFINITY;
    u64 kept = 0;
    for (;;) {
      order.digits = digits;
      order.by_exponent = by_exponent;
      if (!by_count && digits.shift == 0 && order.within == kAll && is_counted(order)) {
        tell_counts(order, digits.high);
      } else {
        give();
      }
      const uint32_t slot = rounds_ % 2;
      exchange_.receive(kRound + slot, rounds_ / 2 % 2);
      if (lane() == 0) exchange_.expect(kRound + slot, exchange_.blocks * kDigits * 8);
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
      kept = with - of_digit;
      order.counts_above = false;
      if (by_exponent) {
        const float step = div(1.0f, order.steps), steps = static_cast<float>(digit) - (order.first - kUnit);
        order.highest = highest_for(fminf(order.most, sub(order.most, mul(steps - 0.5f, step))));
        order.lowest = lowest_for(fmaxf(order.least, sub(order.most, mul(steps + 0.5f, step))));
        order.within = digit;
        by_exponent = false;
        digits = by_key(false);
        continue;
      }
      digits.high -= digit << digits.shift;
      if (digits.shift == 0 || sum_of(of_digit) < 2 * kLeastM) {
        return {true, (digits.high - (1u << digits.shift) + 1) << kBits, with};
      }
      digits.shift = max(static_cast<int>(digits.shift) - kDigitBits, 0);
    }
  }

 private:
  // Whether the tally answers the order by itself.
  __device__ __forceinline__ bool is_counted(const Order &order) const {
    if constexpr (kTallies<T, kThreads>)
      return tally_->others <= kTallyOthers && have_cells(order.lowest, order.highest);
    return false;
  }

  // One key a digit, from `high` down, two digits a lane: this block's part of the round, without the workers.
  __device__ __forceinline__ void tell_counts(const Order &order, uint32_t high) const {
    u64 words[2];
#pragma unroll
    for (uint32_t i = 0; i < 2; ++i) {
      const uint32_t key = (high - 2 * lane() - i) << kConstantBits<T>;
      const float z =
          key_to_logit(key >> 31 != 0 ? key : key | ((1u << kConstantBits<T>)-1));  // below 0 the rest is ones
      const float t = exponent_of(z, max_, scale_);
      const uint32_t offset = tally_offset(to_bits(z) >> 16);
      const bool in = t >= order.least && t <= order.most && has_cell(offset);
      words[i] = in ? u64{weigh_unchecked(t).m} * tally_->counts[cell_of(offset)] : 0;
    }
#pragma unroll 4
    for (uint32_t to = 0; to < exchange_.blocks; ++to) {
      exchange_.send(to, cells_.select.slots[rounds_ % 2][exchange_.rank] + 2 * lane(), kRound + rounds_ % 2, words[0],
                     words[1]);
    }
  }

  // Logits a little beyond all that have an exponent up to `most`, or from `least`.
  __device__ __forceinline__ float highest_for(float most) const {
    return key_to_logit(min(key(add(max_, mul(mul(most, inverse_), 0.999998f))) + 2, kInfinityKey));
  }

  __device__ __forceinline__ float lowest_for(float least) const {
    return key_to_logit(max(key(add(max_, mul(mul(least, inverse_), 1.000002f))) - 2, kLowestKey));
  }

  // For the order's logits; the first digit for those above, where they count.
  __device__ __forceinline__ Digits by_key(bool counts_above) const {
    const uint32_t high = key(shared_.order.highest) >> kConstantBits<T>;
    const uint32_t range = high - (key(shared_.order.lowest) >> kConstantBits<T>);
    uint32_t shift = max(32 - __clz(range) - kDigitBits, 0);
    if (!counts_above) return {high, shift};
    if (range >> shift == kDigits - 1) ++shift;
    return {high + (1u << shift), shift};
  }

  const Exchange &exchange_;
  Shared &shared_;
  Cells &cells_;
  const Tally *tally_;
  float max_ = 0, scale_ = 0, inverse_ = 0, least_ = 0;
  uint32_t rounds_ = 0;
};

}  // namespace gqa::cuda
