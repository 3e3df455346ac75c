// Orders to the workers, and the search for a threshold within bins that they make possible.
#pragma once

#include "cuda/sample_sm90/bins.cuh"
#include "cuda/sample_sm90/pick.cuh"

namespace gqa::cuda {

template <typename T, int kThreads>
class Orders {
  static constexpr int kBits = kConstantBits<T>;

 public:
  __device__ Orders(const Exchange &exchange, Shared *shared, Cells *cells)
      : exchange_(exchange), shared_(*shared), cells_(*cells) {}

  // All lanes write an order, the same values, and then give it: what they change they keep in registers.
  __device__ __forceinline__ void give() const {
    __syncwarp();
    announce<kThreads + 32>(kOrdered);
  }

  // For the tokens of bins up to this one.
  __device__ __forceinline__ void write_all(Order::Kind kind, uint32_t to) const {
    Order &order = shared_.order;
    order.kind = kind;
    order.least = least_of_bin(to);
    order.highest = INFINITY;
    order.lowest = lowest_for(order.least);
  }

  // To add up a stretch.
  __device__ __forceinline__ void write_pick(int stretch, const Pickable &of) const {
    Order &order = shared_.order;
    order.kind = Order::kPick;
    order.key = stretch;
    order.least = of.least;
    order.most = of.most;
    order.lowest = of.lowest;
    order.highest = of.highest;
  }

  struct Selected {
    bool found;
    uint32_t key;
    u64 kept;  // count and sum of the tokens from key up in the rows; the count, if asked for, with those above
  };

  // The largest key such that the tokens of rows [from, to] from it up count at least as wanted, those of earlier rows
  // with them; or, not by count, have with `base`, the sum of the bin's earlier rows, at least the mass. A histogram of
  // 64 digits a round, summed over the cluster and walked down from its largest key. Digits are six bits of the key;
  // where the rows hold many keys, near zero, the first are equal steps of the exponent, down to the row's least.
  // Tokens below `to` in its bin are after those asked for, so it does no harm that some are seen.
  __device__ __forceinline__ void begin(uint32_t from, uint32_t to, bool by_count) {
    Order &order = shared_.order;
    const Scale &by = shared_.scale;
    const uint32_t first_bin = from >> by.shift, last_bin = to >> by.shift;
    order.kind = Order::kSelect;
    order.first_row = from;
    order.least = least_of_bin(last_bin);
    float most = most_of_bin(first_bin), least = order.least;
    if (by.is_fine()) {
      most = fminf(most, by.edge_of(from, -0.515625f));
      least = fmaxf(least, by.edge_of(to, 0.515625f));
    }
    order.most = most;
    order.highest = highest_for(most);
    order.lowest = lowest_for(least);
    order.counts = order.counts_above = by_count;
    order.within = 0;
    order.steps = 0;
    order.first = kUnit;
    const Digits digits = by_key(by_count);
    const float range = sub(most, fmaxf(least, by.least));
    order.by_exponent = digits.shift > kBits && range > 0x1p-40f;
    if (order.by_exponent) {
      order.steps = div(by_count ? kDigits - 2.0f : kDigits - 1.0f, range);
      order.first = by_count ? kUnit + 1.0f : kUnit;
    }
    order.digits = digits;
    __syncwarp();  // all have read the limits
    if (by_count) order.highest = INFINITY;
    shared_.selected[lane()] = 0;
    if (rounds_ != 0) clear_digits();
    give();
  }

  __device__ __forceinline__ Selected finish(uint32_t bin, bool by_count, uint64_t wanted, uint64_t base) {
    const auto reaches = [&](u64 word) {
      return (by_count ? count_of(word) : bin_mass(base + sum_of(word), bin)) >= wanted;
    };
    Order &order = shared_.order;
    u64 kept = 0;
    for (;;) {
      const uint32_t slot = rounds_ % 2;
      meet<kThreads + 32>(kPassed);
      exchange_.receive(kRound + slot, rounds_ / 2 % 2);
      if (lane() == 0) exchange_.expect(kRound + slot, exchange_.blocks * kDigits * 8);
      ++rounds_;
      u64 first = 0, second = 0;
#pragma unroll 4
      for (uint32_t i = 0; i < exchange_.blocks; ++i) {
        const ulonglong2 both =
            *reinterpret_cast<const ulonglong2 *>(cells_.told(slot, exchange_.blocks, i) + 2 * lane());
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
      const bool by_exponent = order.by_exponent;
      Digits digits = order.digits;
      const bool is_value = digits.shift <= kBits && of_digit >> kFlagShift == 0;  // one of the row's type
      const bool ends = !by_exponent && (is_value || digits.shift == 0 || sum_of(of_digit) < 2 * kLeastM);
      digits.high -= digit << digits.shift;
      if (ends) {
        order.last = digit;
        const uint32_t least_key = digits.high - (1u << digits.shift) + 1;
        return {true, ::max(least_key, key(order.lowest)), with};  // some below may not have been seen
      }
      shared_.selected[lane()] += sum_of_digits(digit);
      if (by_exponent) {
        const float step = div(1.0f, order.steps), steps = static_cast<float>(digit) - (order.first - kUnit);
        const float most = fminf(order.most, sub(order.most, mul(steps - 0.5f, step)));
        const float least = fmaxf(shared_.scale.least, sub(order.most, mul(steps + 0.5f, step)));
        __syncwarp();
        order.highest = highest_for(most);
        order.lowest = lowest_for(least);
        order.within = digit;
        digits = by_key(false);
      } else {
        digits.shift = max(static_cast<int>(digits.shift) - kDigitBits, digits.shift > kBits ? kBits : 0);
      }
      order.counts_above = order.by_exponent = false;
      order.digits = digits;
      clear_digits();
      give();
    }
  }

  // What the last select found, of the lane's stretch of this block.
  __device__ __forceinline__ uint32_t selected() const {
    return shared_.selected[lane()] + sum_of_digits(shared_.order.last + 1);
  }

  // What may be picked of a bin.
  __device__ __forceinline__ Pickable pickable(uint32_t bin) const {
    const float most = most_of_bin(bin), least = least_of_bin(bin);
    return {least, most, lowest_for(least), highest_for(most)};
  }

 private:
  // What this block added to the digits before `end`, of the lane's stretch.
  __device__ __forceinline__ uint32_t sum_of_digits(uint32_t end) const {
    uint32_t sum = 0;
#pragma unroll 4
    for (uint32_t digit = 0; digit < end; ++digit) sum += cells_.sums[digit][lane()];
    return sum;
  }

  __device__ __forceinline__ void clear_digits() const {
    uint4 *cells = reinterpret_cast<uint4 *>(cells_.sums);
    __syncwarp();
#pragma unroll 4
    for (uint32_t i = lane(); i < 2 * (kDigits + 1) * kColumns / 4; i += 32) cells[i] = make_uint4(0, 0, 0, 0);
  }

  // Logits a little beyond all that have an exponent up to `most`, or from `least`.
  __device__ __forceinline__ float highest_for(float most) const {
    return key_to_logit(
        min(key(add(shared_.scale.max, mul(mul(most, shared_.scale.inverse), 0.999998f))) + 2, kInfinityKey));
  }

  __device__ __forceinline__ float lowest_for(float least) const {
    return key_to_logit(
        max(key(add(shared_.scale.max, mul(mul(least, shared_.scale.inverse), 1.000002f))) - 2, kLowestKey));
  }

  // For the order's logits; the first digit for those above, where they count.
  __device__ __forceinline__ Digits by_key(bool counts_above) const {
    const uint32_t high = key(shared_.order.highest) | ((1u << kBits) - 1);
    const uint32_t range = high - (key(shared_.order.lowest) & ~((1u << kBits) - 1));
    uint32_t shift = max(32 - __clz(range) - kDigitBits, kBits + 0);
    if (!counts_above) return {high, shift};
    if (range >> shift == kDigits - 1) ++shift;
    return {high + (1u << shift), shift};
  }

  const Exchange &exchange_;
  Shared &shared_;
  Cells &cells_;
  uint32_t rounds_ = 0;
};

}  // namespace gqa::cuda
