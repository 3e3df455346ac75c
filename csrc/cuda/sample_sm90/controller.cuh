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
                        const Tally *tally, Top top, uint32_t least_key, bool needs_total)
      : least_key_(least_key),
        exchange_(exchange),
        part_(part),
        shared_(*shared),
        cells_(*cells),
        top_(top),
        bins_(shared),
        orders_(exchange, shared, cells, tally),
        needs_total_(needs_total),
        writes_(exchange.rank == 0) {}

  __device__ __forceinline__ Top top() const { return top_; }

  __device__ __forceinline__ void weigh(float, float, bool) const {}  // the workers did

  __device__ __forceinline__ void receive_bins(float max, float scale) {
    max_ = max == INFINITY ? 0.0f : max;
    scale_ = scale;
    orders_.set_scale(max_, scale, key_to_logit(least_key_));
    exchange_.receive(kGather);
    meet<kThreads + 32>(kWeighed);
    bins_.add_up();
  }

  __device__ __forceinline__ Drawn decide(const Settings &s, int64_t vocab) {
    if (is_drawn(top_, s)) {
      receive_bins(key_to_logit(top_.key), s.scale);
      least_bin_ = sampling::weigh(s.least_exponent).bin;
      const bool limited = s.top_k > 0 && s.top_k < vocab;
      Span span{{0, 0}, kBins - 1, 0};
      if (limited) {
        span = bins_.span_of_count(s.top_k);
      } else if (s.top_p < kTopPOff) {
        span = bins_.span_of_share({}, s.top_p);
      }
      shared_.span = span;
      __syncwarp();
      if (bins_.before(shared_.span.last_bin).sum + bins_.sum(shared_.span.last_bin) <= kFew * uint64_t{kLeastM}) {
        return draw_from_few(s, limited);
      }
    }
    return draw(*this, s, shared_.random, vocab);
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
      const Kept most{span.from.bin, 0, -64.0f, bins_.sum(span.from.bin)};
      if (!by_count && top_k == 0 && is_settled(span, most)) return most;
      const auto selected = orders_.select(span.from.bin, span.last_bin, by_count, span.wanted);
      if (!selected.found) continue;
      kept.key = selected.key;
      kept.bin = span.from.bin;
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
    shared_.order.kind = Order::kFirst;
    shared_.order.key = of;
    orders_.give();
    meet<kThreads + 32>(kPassed);
    const uint32_t of_warp = lane() < kThreads / 32 ? static_cast<uint32_t>(shared_.of_warp[lane()]) : kAll;
    const uint32_t index = __reduce_min_sync(kAll, of_warp);
    const u64 *indices = tell(index);
    return __reduce_min_sync(kAll, lane() < exchange_.blocks ? static_cast<uint32_t>(indices[lane()]) : kAll);
  }

  // In the block that holds the token; the others are not to store what they return.
  __device__ __forceinline__ Picked pick(const Kept &kept, uint32_t bin, uint64_t need) {
    Order &order = shared_.order;
    orders_.write(Order::kPick, bin, bin);
    if (bin == kept.bin) {
      order.least = fmaxf(order.least, kept.exponent);
      if (has_key(kept)) order.lowest = fmaxf(order.lowest, key_to_logit(kept.key));
    }
    // What a whole bin weighs here is known, and what min-p keeps of one.
    order.told = bin != kept.bin || !has_key(kept);
    const u64 own = shared_.own[bin == kept.bin ? kLeastEntry : bin];
    if (order.told && lane() < exchange_.blocks) {
      exchange_.send(lane(), shared_.parts + exchange_.rank, kParts, own);
    }
    orders_.give();
    exchange_.receive(kParts);
    const u64 part = lane() < exchange_.blocks ? shared_.parts[lane()] : 0, parts = running_sum<kMaxBlocks>(part);
    const uint32_t of_block = __ffs(__ballot_sync(kAll, lane() < exchange_.blocks && parts >= need)) - 1;
    writes_ = of_block == exchange_.rank;
    meet<kThreads + 32>(kPassed);
    if (!writes_) return {0, 0};

    return find_token(part_, shared_, cells_, need - __shfl_sync(kAll, parts - part, of_block), max_, scale_);
  }

  // Whether this block is the one to store the result.
  __device__ __forceinline__ bool writes() const { return writes_; }

 private:
  // Few tokens can be kept: the first block has them sent and draws; the others are not to store what they return.
  __device__ __forceinline__ Drawn draw_from_few(const Settings &s, bool limited) {
    orders_.write(Order::kCollect, 0, shared_.span.last_bin);
    shared_.order.highest = INFINITY;
    orders_.give();
    meet<kThreads + 32>(kPassed);
    if (lane() == 0) exchange_.send(0, shared_.parts + exchange_.rank, kParts, u64{shared_.listed});
    writes_ = exchange_.rank == 0;
    if (!writes_) return {};
    exchange_.receive(kParts);
    const uint32_t count = __shfl_sync(kAll, running_counts(exchange_, shared_), exchange_.blocks - 1);
    if (lane() == 0) exchange_.expect(kList, count * sizeof(u64));
    meet<kThreads + 32>(kPassed);
    return draw_from_list(&cells_, count, s, limited, mass_of({}), shared_.random, max_);
  }

  __device__ __forceinline__ static bool has_key(const Kept &kept) { return kept.key != 0 && kept.key != ~0u; }

  // Whether the token's bin is the same, and none that a filter cuts, for all that top-p may keep: then it matters no
  // more how much it keeps. most: the most that top-p may keep, of which min-p may take some.
  __device__ __forceinline__ bool is_settled(const Span &span, const Kept &most) const {
    if (least_bin_ < most.bin) return true;  // min-p's bin comes first
    if (needs_total_) return false;
    uint64_t of_bin = bin_mass(most.sum, most.bin);
    if (least_bin_ == most.bin) of_bin = ::min(of_bin, bin_mass(shared_.bins[kBinEntries].sum, least_bin_));
    const uint64_t before = span.from.before, fewest = before + ::min(of_bin, span.wanted);
    const uint64_t first = mul_high(shared_.random.bin, fewest) + 1;
    const uint64_t last = mul_high(shared_.random.bin, before + of_bin) + 1;
    return last <= before && bins_.find_kept({}, first).bin == bins_.find_kept({}, last).bin;
  }

  // Every block's value, by rank. Once a row.
  __device__ __forceinline__ const u64 *tell(u64 value) {
    if (lane() < exchange_.blocks) exchange_.send(lane(), shared_.parts + exchange_.rank, kParts, value);
    exchange_.receive(kParts);
    return shared_.parts;
  }

  const uint32_t least_key_;
  const Exchange &exchange_;
  const Part<T, kThreads> &part_;
  Shared &shared_;
  Cells &cells_;
  const Top top_;
  Bins bins_;
  Orders<T, kThreads> orders_;
  float max_ = 0, scale_ = 0;
  uint32_t least_bin_ = kBins;  // where min-p ends
  bool needs_total_, writes_;
};

}  // namespace gqa::cuda
