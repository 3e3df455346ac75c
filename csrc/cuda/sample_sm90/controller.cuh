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
  __device__ Controller(const Exchange &exchange, const Part<T, kThreads> &part, Shared *shared, Cells *cells, Top top,
                        uint32_t least_key, bool needs_total)
      : least_key_(least_key),
        exchange_(exchange),
        part_(part),
        shared_(*shared),
        cells_(*cells),
        top_(top),
        bins_(shared),
        orders_(exchange, shared, cells),
        needs_total_(needs_total),
        writes_(exchange.rank == 0) {}

  __device__ __forceinline__ Drawn decide(const Settings &s, int64_t vocab) {
    if (!is_drawn(top_, s)) return {first(top_.key), !top_.has_nan && top_.key > kLowestKey};
    const bool limited = s.top_k > 0 && s.top_k < vocab;
    const uint32_t least_bin = sampling::weigh(s.least_exponent).bin;
    receive_bins(key_to_logit(top_.key), s.scale);
    Span span{{0, 0}, kBins - 1, 0};
    Place end{kBins - 1, 0, bins_.mass()};  // where top-p ends
    Choice choice{{}, 0, end.end, 0};       // top-p keeps at least this total
    const bool is_cut = s.top_p < kTopPOff && least_key_ != top_.key;
    if (limited) {
      span = bins_.span_of_count(s.top_k);
    } else if (is_cut) {
      choice.total = share_of(end.end, s.top_p);
      end = bins_.find_mass(choice.total);
      span = {{end.bin, end.before}, end.bin, choice.total - end.before};
    }
    shared_.span = span;
    __syncwarp();
    if (bins_.sum_to(span.last_bin) <= kFew * uint64_t{kLeastM}) return draw_from_few(s, limited);
    if (!limited && least_bin > end.bin) {
      choice = is_cut ? choose_by_share(choice.total, end) : choose_in(bins_.find_mass(number(choice.total)), choice);
    } else {
      choice = choose(*this, s, shared_.random, limited ? s.top_k : 0);
    }
    return take(*this, choice, shared_.random);
  }

  __device__ __forceinline__ Kept keep(uint64_t top_k, uint64_t top_p) {
    Kept kept;
    if (least_key_ == top_.key) return kept;  // all the row's logits are the same
#pragma unroll 1
    for (int step = 0; step < 2; ++step) {
      const bool by_count = step == 0;
      if (by_count ? top_k == 0 : top_p >= kTopPOff) continue;
      if (!by_count && top_k != 0) {
        __syncwarp();
        shared_.span = bins_.span_of_share(kept, top_p);
        __syncwarp();
      }
      const Span &span = shared_.span;
      if (span.from.bin == kBins) continue;
      orders_.begin(span.from.bin, span.last_bin, by_count);
      const auto selected = orders_.finish(span.from.bin, by_count, span.wanted);
      if (!selected.found) continue;
      kept.key = selected.key;
      kept.bin = selected_from_ = span.from.bin;
      kept.sum = sum_of(selected.kept);
      if (!by_count) continue;
      kept.bin = sampling::weigh(exponent_of(key_to_logit(selected.key), max_, scale_)).bin;
      kept.sum += span.from.before - bins_.before(kept.bin).sum;
    }
    return kept;
  }

  __device__ __forceinline__ uint64_t sum(uint32_t bin) const { return bins_.sum(bin); }
  __device__ __forceinline__ uint64_t mass_of(const Kept &kept) const { return bins_.mass_of(kept); }
  __device__ __forceinline__ Found find_kept(const Kept &kept, uint64_t mass) const {
    return bins_.find_kept(kept, mass);
  }

  // Min-p's share of its bin; where another filter ends there too, the smaller of what they keep is what both keep.
  __device__ __forceinline__ uint64_t kept_sum(const Kept &kept) const {
    const uint64_t least = shared_.bins[kBinEntries].sum;
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
    uint32_t own = cells_.histogram[bin][lane()];
    // Where min-p keeps less, the histogram says so.
    if (by_key && (kept.exponent == -64.0f || kept.sum != shared_.bins[kBinEntries].sum)) {
      own = orders_.selected();
#pragma unroll 1
      for (uint32_t i = selected_from_; i < bin; ++i) own -= cells_.histogram[i][lane()];
    }
    tell_picked(exchange_, &shared_, own);
    if (!is_skipped_) dismiss();
    Pickable of = orders_.pickable(bin);
    if (is_cut) of.least = fmaxf(of.least, kept.exponent);
    if (by_key) of.lowest = fmaxf(of.lowest, key_to_logit(kept.key));
    return pick_token(exchange_, part_, &shared_, own, need, of, max_, scale_, &writes_);
  }

  // Whether this block is the one to store the result.
  __device__ __forceinline__ bool writes() const { return writes_; }

  // Once more where a round of select is still to come in: the block must not leave before.
  __device__ __forceinline__ void dismiss() {
    if (is_dismissed_) return;
    if (is_skipped_) orders_.skip();
    shared_.order.kind = Order::kDone;
    orders_.give();
    is_dismissed_ = true;
  }

 private:
  __device__ __forceinline__ uint64_t number(uint64_t total) const { return mul_high(shared_.random.bin, total) + 1; }

  // All of the place's bin is kept.
  __device__ __forceinline__ Choice choose_in(const Place &place, Choice choice) const {
    choice.bin = place.bin;
    choice.sum = bins_.sum(place.bin);
    return choice;
  }

  // Under top-p alone, which keeps at least `fewest` and ends in `end`. The drawn number grows with the mass kept:
  // where its bin is the same for the least and the most that may be kept, and none that is cut, the threshold does not
  // matter. The workers look for it meanwhile where rows are many, as then it matters to some.
  __device__ __forceinline__ Choice choose_by_share(uint64_t fewest, const Place &end) {
    const bool is_ahead = exchange_.blocks < kMaxBlocks;
    if (is_ahead) orders_.begin(end.bin, end.bin, false);
    Choice choice{{}, end.bin, fewest, 0};
    Place place = bins_.find_mass(number(fewest));
    const uint64_t last = number(end.end);
    if (fewest == end.end || (!needs_total_ && last <= min(place.end, end.before))) {
      is_skipped_ = is_ahead;
      return choose_in(place, choice);
    }
    if (!is_ahead) orders_.begin(end.bin, end.bin, false);
    const auto selected = orders_.finish(end.bin, false, fewest - end.before);
    choice.kept = {end.bin, selected.key, -64.0f, sum_of(selected.kept)};
    choice.total = end.before + bin_mass(choice.kept.sum, end.bin);
    choice.sum = choice.kept.sum;
    selected_from_ = end.bin;
    const uint64_t drawn = number(choice.total);
    if (drawn > end.before) return choice;
    if (drawn > place.end) place = bins_.find_mass(drawn);
    return choose_in(place, choice);
  }

  __device__ __forceinline__ void receive_bins(float max, float scale) {
    max_ = max == INFINITY ? 0.0f : max;
    scale_ = scale;
    orders_.set_scale(max_, scale, key_to_logit(least_key_));
    exchange_.receive(kGather);
    meet<kThreads + 32>(kWeighed);
    bins_.add_up();
  }

  // Few tokens can be kept: the first block has them sent and draws; the others are not to store what they return.
  __device__ __forceinline__ Drawn draw_from_few(const Settings &s, bool limited) {
    is_dismissed_ = true;
    orders_.write(Order::kCollect, 0, shared_.span.last_bin);
    shared_.order.highest = INFINITY;
    orders_.give();
    meet<kThreads + 32>(kPassed);
    const uint32_t count = count_list(exchange_, &shared_);
    if (!writes_) return {};
    meet<kThreads + 32>(kPassed);
    return draw_from_list(&cells_, count, s, limited, bins_.mass(), shared_.random, max_);
  }

  __device__ __forceinline__ static bool has_key(const Kept &kept) { return kept.key != 0 && kept.key != ~0u; }

  const uint32_t least_key_;
  const Exchange &exchange_;
  const Part<T, kThreads> &part_;
  Shared &shared_;
  Cells &cells_;
  const Top top_;
  Bins bins_;
  Orders<T, kThreads> orders_;
  float max_ = 0, scale_ = 0;
  uint32_t selected_from_ = 0;  // the first bin of the last select
  bool needs_total_, writes_, is_skipped_ = false, is_dismissed_ = false;
};

}  // namespace gqa::cuda
