// One warp of each block, the row as draw() wants it: from sums over the cluster it decides what to keep and which
// token to take, and orders passes over the logits. The controllers of a cluster come to the same conclusions.
#pragma once

#include "cuda/sample_sm90/pick.cuh"
#include "cuda/sample_sm90/select.cuh"
#include "cuda/sample_sm90/worker.cuh"

namespace gqa::cuda {

template <typename T, int kThreads>
class Controller {
 public:
  __device__ Controller(const Exchange &exchange, const Part<T, kThreads> &part, Shared *shared, Cells *cells,
                        const Top &top, uint32_t least_key, bool needs_total)
      : exchange_(exchange),
        part_(part),
        shared_(*shared),
        cells_(*cells),
        bins_(shared),
        orders_(exchange, shared, cells),
        is_flat_(least_key == top.key),
        needs_total_(needs_total),
        writes_(exchange.rank == 0) {}

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

  __device__ __forceinline__ Kept keep(uint64_t top_k, uint64_t top_p) {
    Kept kept;
    if (is_flat_) return kept;
#pragma unroll 1
    for (int step = 0; step < 2; ++step) {
      const bool by_count = step == 0;
      if (by_count ? top_k == 0 : top_p >= kTopPOff) continue;
      if (!by_count && top_k != 0) {
        __syncwarp();
        shared_.span = bins_.span_of_mass(share_of(mass_of(kept), top_p));
        __syncwarp();
      }
      const Span &span = shared_.span;
      if (span.first == kBins) continue;
      orders_.begin(span.first, span.last, by_count);
      select(span.first, by_count, span.wanted, &kept);
    }
    return kept;
  }

  __device__ __forceinline__ uint64_t sum(uint32_t bin) const { return bins_.sum(bin); }
  __device__ __forceinline__ uint64_t mass_of(const Kept &kept) const { return bins_.mass_of(kept); }
  __device__ __forceinline__ Found find_kept(const Kept &, uint64_t mass) const {
    const Place place = bins_.find_bin(mass);
    return {place.at, place.before};
  }

  // Min-p's share of its bin; where another filter ends there too, the smaller of what they keep is what both keep.
  __device__ __forceinline__ uint64_t kept_sum(const Kept &kept) const {
    const uint64_t least = sum_of_least(kept);
    return has_key(kept) ? min(least, kept.sum) : least;
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
  __device__ __forceinline__ uint64_t number(uint64_t total) const { return mul_high(shared_.random.bin, total) + 1; }

  // All of the bin is kept.
  __device__ __forceinline__ Choice choose_in(const Place &bin, Choice choice) const {
    choice.bin = bin.at;
    choice.sum = bins_.sum(bin.at);
    return choice;
  }

  __device__ __forceinline__ uint32_t row_of(float t) const { return shared_.scale.row_of(fmaxf(t, -43.75f)); }

  // Of the rows [first, end), what the lane's stretch of this block has.
  __device__ __forceinline__ uint32_t sum_of_rows(uint32_t first, uint32_t end) const {
    uint32_t sum = 0;
#pragma unroll 4
    for (uint32_t i = first; i < end; ++i) sum += cells_.histogram[i][lane()];
    return sum;
  }

  // What min-p keeps of the bin in which it ends.
  __device__ __forceinline__ uint64_t sum_of_least(const Kept &kept) const {
    return bins_.before(row_of(kept.exponent)).sum - bins_.before(bins_.first_of(kept.bin)).sum +
           shared_.rows[kRows].sum;
  }

  // Ends a select that began at this row.
  __device__ __forceinline__ void select(uint32_t from, bool by_count, uint64_t wanted, Kept *kept) {
    uint32_t bin = bins_.bin_of(from);
    const Running start = bins_.before(bins_.first_of(bin)), before = bins_.before(from);
    const auto selected =
        orders_.finish(bin, by_count, by_count ? wanted : wanted - start.mass, before.sum - start.sum);
    if (!selected.found) return;
    kept->key = selected.key;
    kept->sum = before.sum - start.sum + sum_of(selected.kept);
    kept->bin = bin;
    if (by_count) {
      kept->bin = sampling::weigh(exponent_of(key_to_logit(selected.key), shared_.scale.max, shared_.scale.factor)).bin;
      kept->sum += start.sum - bins_.before(bins_.first_of(kept->bin)).sum;
    }
  }

  // Under top-p alone, which keeps at least `fewest` and ends in `end`. The drawn number grows with the mass kept:
  // where its bin is the same for the least and the most that may be kept, and none that is cut, the threshold does not
  // matter. The workers look for it meanwhile where rows are many, as then it matters to some.
  __device__ __forceinline__ Choice choose_by_share(uint64_t fewest, const Place &end) {
    constexpr bool is_ahead = kThreads != kSampleClusterFew;
    if (is_ahead) orders_.begin(end.at, end.at, false);
    const uint32_t bin = bins_.bin_of(end.at);
    const uint64_t before = bins_.before(bins_.first_of(bin)).mass, all = bins_.before(bins_.first_of(bin + 1)).mass;
    Choice choice{{}, bin, fewest, 0};
    Place place = bins_.find_bin(number(fewest));
    const uint64_t last = number(end.end);
    if (fewest == all || (!needs_total_ && last <= min(place.end, before))) {
      is_skipped_ = is_ahead;
      return choose_in(place, choice);
    }
    if (!is_ahead) orders_.begin(end.at, end.at, false);
    select(end.at, false, fewest, &choice.kept);
    choice.total = before + bin_mass(choice.kept.sum, bin);
    choice.sum = choice.kept.sum;
    const uint64_t drawn = number(choice.total);
    if (drawn > before) return choice;
    if (drawn > place.end) place = bins_.find_bin(drawn);
    return choose_in(place, choice);
  }

  __device__ __forceinline__ void receive_rows(float max, float least, float factor) {
    if (max == INFINITY) max = 0.0f;
    Scale by = Scale::down_to(exponent_of(least, max, factor));
    by.max = max;
    by.factor = factor;
    by.inverse = div(1.0f, factor);
    shared_.scale = by;
    exchange_.receive(kGather);
    meet<kThreads + 32>(kWeighed);
    bins_.add_up(by.shift);
  }

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

  __device__ __forceinline__ static bool has_key(const Kept &kept) { return kept.key != 0 && kept.key != ~0u; }

  const Exchange &exchange_;
  const Part<T, kThreads> &part_;
  Shared &shared_;
  Cells &cells_;
  Bins bins_;
  Orders<T, kThreads> orders_;
  const bool is_flat_;  // all the row's logits are the same
  bool needs_total_, writes_, is_skipped_ = false, is_dismissed_ = false;
};

}  // namespace gqa::cuda
