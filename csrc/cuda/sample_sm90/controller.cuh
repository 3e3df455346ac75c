// One warp of each block, the row as draw() wants it: from sums over the cluster it decides what to keep and which
// token to take, and orders passes over the logits. The controllers of a cluster come to the same conclusions.
#pragma once

#include "cuda/sample_sm90/filters.cuh"
#include "cuda/sample_sm90/pick.cuh"

namespace gqa::cuda {

template <typename T, int kThreads>
class Controller : public Filters<T, kThreads> {
  using Base = Filters<T, kThreads>;
  using Base::bins_, Base::cells_, Base::exchange_, Base::is_flat_, Base::is_skipped_, Base::orders_, Base::shared_;
  using Base::choose_by_share, Base::choose_in, Base::has_key, Base::number, Base::receive_rows, Base::row_of,
      Base::sum_of_least, Base::sum_of_rows;

 public:
  __device__ Controller(const Exchange &exchange, const Part<T, kThreads> &part, Shared *shared, Cells *cells,
                        const Top &top, uint32_t least_key, bool needs_total)
      : Base(exchange, shared, cells, least_key == top.key, needs_total), part_(part), writes_(exchange.rank == 0) {}

  __device__ __forceinline__ Drawn decide(const Settings &s, int64_t vocab, const Top &top, uint32_t least_key) {
    if (!is_drawn(top, s)) return {first(top.key), !top.has_nan && top.key > kLowestKey};
    const bool limited = s.top_k > 0 && s.top_k < vocab;
    const uint32_t least_bin = sampling::weigh(s.least_exponent).bin;
    receive_rows(key_to_logit(top.key), key_to_logit(least_key), s.scale);
    Span span{0, kBins - 1, 0};
    Place end{kBins - 1, 0, bins_.mass()};  // where top-p ends
    Choice choice{{}, 0, end.end, 0};       // top-p keeps at least this total
    const bool is_cut = s.top_p < kTopPOff && !is_flat_;
    if (limited) {
      span = bins_.span_of_count(s.top_k);
    } else if (is_cut) {
      choice.total = share_of(end.end, s.top_p);
      end = bins_.find_mass(choice.total);
      span = {end.at, end.at, choice.total};
    }
    shared_.span = span;
    __syncwarp();
    const uint32_t last_bin = bins_.bin_of(span.last);
    if (bins_.before(bins_.first_of(last_bin + 1)).sum <= kFew * uint64_t{kLeastM}) {
      return draw_from_few(s, limited, last_bin);
    }
    if (!limited && least_bin > bins_.bin_of(end.at)) {
      choice = is_cut ? choose_by_share(choice.total, end) : choose_in(bins_.find_bin(number(choice.total)), choice);
    } else {
      choice = choose(*this, s, shared_.random, limited ? s.top_k : 0);
    }
    return take(*this, choice, shared_.random);
  }

  // The lowest index that holds the key.
  __device__ __forceinline__ int64_t first(uint32_t of) {
    is_dismissed_ = true;
    shared_.order.kind = Order::kFirst;
    shared_.order.key = of;
    orders_.give();
    meet<kThreads + 32>(kPassed);
    const uint32_t of_warp = lane() < kThreads / 32 ? static_cast<uint32_t>(own_word(shared_.of_warp)) : kAll;
    const u64 index = __reduce_min_sync(kAll, of_warp);
    if (lane() < exchange_.blocks) exchange_.send(lane(), shared_.parts + exchange_.rank, kParts, index);
    exchange_.receive(kParts);
    return __reduce_min_sync(kAll, lane() < exchange_.blocks ? static_cast<uint32_t>(own_word(shared_.parts)) : kAll);
  }

  // In the block that holds the token; the others are not to store what they return. Stretches are in order of the
  // index, and what each holds of the bin is there.
  __device__ __forceinline__ Picked pick(const Kept &kept, uint32_t bin, uint64_t need) {
    const bool is_cut = bin == kept.bin, by_key = is_cut && has_key(kept);
    const uint32_t first = bins_.first_of(bin);
    uint32_t own = 0;
    if (by_key && (kept.exponent == -64.0f || kept.sum != sum_of_least(kept))) {
      own = orders_.selected();
      const uint32_t from = shared_.span.first;
      own += from > first ? sum_of_rows(first, from) : 0u - sum_of_rows(from, first);
    } else {  // where min-p keeps less, the histogram says so
      const uint32_t all = first + bins_.rows_of_bin();
      const bool is_least = is_cut && kept.exponent != -64.0f;
      own = sum_of_rows(first, is_least ? min(row_of(kept.exponent) + 1, all) : all);
    }
    tell_picked(exchange_, &shared_, own);
    if (!(kPicks<kThreads> && part_.has_long_stretches()) && !is_skipped_) dismiss();
    Pickable of = orders_.pickable(bin);
    if (is_cut) of.least = fmaxf(of.least, kept.exponent);
    if (by_key) of.lowest = fmaxf(of.lowest, key_to_logit(kept.key));
    const Stretched found = find_stretch(exchange_, &shared_, own, need);
    writes_ = found.writes;
    if (!writes_) return {0, 0};
    if constexpr (kPicks<kThreads>) {
      if (!part_.has_long_stretches()) {
        return find_token<false>(part_, found.stretch, found.left, of, shared_.scale.max, shared_.scale.factor,
                                 &shared_);
      }
      if (is_skipped_) meet<kThreads + 32>(kPassed);
      is_dismissed_ = true;
      orders_.write_pick(found.stretch, of);
      orders_.give();
      meet<kThreads + 32>(kPassed);
    }
    return find_token<kPicks<kThreads>>(part_, found.stretch, found.left, of, shared_.scale.max, shared_.scale.factor,
                                        &shared_);
  }

  // Whether this block is the one to store the result.
  __device__ __forceinline__ bool writes() const { return writes_; }

  // Once more where a round of select is still to come in: the block must not leave before.
  __device__ __forceinline__ void dismiss() {
    if (!is_dismissed_) {
      if (is_skipped_) meet<kThreads + 32>(kPassed);
      shared_.order.kind = Order::kDone;
      orders_.give();
      is_dismissed_ = true;
    }
    if (is_skipped_) exchange_.receive(kRound);
    is_skipped_ = false;
  }

 private:
  // Few tokens can be kept: the first block has them sent and draws; the others are not to store what they return.
  __device__ __forceinline__ Drawn draw_from_few(const Settings &s, bool limited, uint32_t last_bin) {
    is_dismissed_ = true;
    orders_.write_all(Order::kCollect, last_bin);
    orders_.give();
    meet<kThreads + 32>(kPassed);
    const uint32_t count = count_list(exchange_, &shared_);
    if (!writes_) return {};
    meet<kThreads + 32>(kPassed);
    return draw_from_list(&cells_, count, s, limited, bins_.mass(), shared_.random, shared_.scale.max);
  }

  const Part<T, kThreads> &part_;
  bool writes_, is_dismissed_ = false;
};

}  // namespace gqa::cuda
