// Where a row's filters end, and what they keep: from sums over the cluster, and from passes over the logits that it
// orders.
#pragma once

#include "cuda/sample_sm90/select.cuh"
#include "cuda/sample_sm90/worker.cuh"

namespace gqa::cuda {

template <typename T, int kThreads>
class Filters {
 public:
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

 protected:
  __device__ Filters(const Exchange &exchange, Shared *shared, Cells *cells, bool is_flat, bool needs_total)
      : exchange_(exchange),
        shared_(*shared),
        cells_(*cells),
        bins_(shared),
        orders_(exchange, shared, cells),
        is_flat_(is_flat),
        needs_total_(needs_total) {}

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

  __device__ __forceinline__ static bool has_key(const Kept &kept) { return kept.key != 0 && kept.key != ~0u; }

  const Exchange &exchange_;
  Shared &shared_;
  Cells &cells_;
  Bins bins_;
  Orders<T, kThreads> orders_;
  const bool is_flat_;  // all the row's logits are the same
  bool needs_total_, is_skipped_ = false;
};

}  // namespace gqa::cuda
