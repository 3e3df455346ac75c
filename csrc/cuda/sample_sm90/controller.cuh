// One warp of each block, the row as draw() wants it: from sums over the cluster it decides what to keep and which
// token to take, and orders passes over the logits. The controllers of a cluster come to the same conclusions.
#pragma once

#include "cuda/sample_sm90/select.cuh"
#include "cuda/sample_sm90/worker.cuh"

namespace gqa::cuda {

template <typename T, int kThreads>
class Controller {
 public:
  __device__ Controller(const Exchange &exchange, const Part<T, kThreads> &part, Shared *shared, Cells *cells, Top top,
                        uint32_t least_key)
      : least_key_(least_key),
        exchange_(exchange),
        part_(part),
        shared_(*shared),
        cells_(*cells),
        top_(top),
        bins_(shared),
        orders_(exchange, shared, cells),
        writes_(exchange.rank == 0) {}

  __device__ __forceinline__ Top top() const { return top_; }

  __device__ __forceinline__ void weigh(float, float, bool) const {}  // the workers did

  __device__ __forceinline__ void receive_bins(float max, float scale) {
    max_ = max == INFINITY ? 0.0f : max;
    scale_ = scale;
    orders_.set_scale(max_, scale, key_to_logit(least_key_));
    exchange_.receive(kGather);
    bins_.add_up();
  }

  __device__ __forceinline__ Drawn decide(const Settings &s, int64_t vocab) {
    if (is_drawn(top_, s)) {
      receive_bins(key_to_logit(top_.key), s.scale);
      const bool limited = s.top_k > 0 && s.top_k < vocab;
      shared_.span = {{0, 0}, kBins - 1, 0};
      if (limited) {
        shared_.span = bins_.span_of_count(s.top_k);
      } else if (s.top_p < kTopPOff) {
        shared_.span = bins_.span_of_share({}, s.top_p);
      }
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
      if (!by_count && top_k != 0) shared_.span = bins_.span_of_share(kept, top_p);
      if (shared_.span.from.bin == kBins) continue;
      const auto selected = orders_.select(shared_.span.from.bin, shared_.span.last_bin, by_count, shared_.span.wanted);
      if (!selected.found) continue;
      kept.key = selected.key;
      kept.bin = shared_.span.from.bin;
      kept.sum = sum_of(selected.kept);
      if (!by_count) continue;
      kept.bin = sampling::weigh(exponent_of(key_to_logit(selected.key), max_, scale_)).bin;
      kept.sum += shared_.span.from.before - bins_.before(kept.bin).sum;
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
    orders_.give();
    meet<kThreads + 32>(kPassed);
    // Lanes take stretches of the chunks' sums.
    const int chunks = (part_.vectors + 31) / 32, stretch = (chunks + 31) / 32;
    u64 mine = 0;
#pragma unroll 1
    for (int i = 0; i < stretch; ++i) {
      const int chunk = static_cast<int>(lane()) * stretch + i;
      mine += chunk < chunks ? cells_.chunk_sums[chunk] : 0;
    }
    const u64 running = running_sum(mine), of_block = __shfl_sync(kAll, running, 31);
    const u64 *parts = tell(of_block);
    const u64 part = lane() < exchange_.blocks ? parts[lane()] : 0;
    const u64 before = __shfl_sync(kAll, running_sum<kMaxBlocks>(part) - part, exchange_.rank);
    writes_ = before < need && need - before <= of_block;
    if (!writes_) return {0, 0};

    u64 left = need - before;
    const int of_lane = __ffs(__ballot_sync(kAll, running >= left)) - 1;
    left -= __shfl_sync(kAll, running - mine, of_lane);
    int chunk = of_lane * stretch;
    for (u64 sum; left > (sum = cells_.chunk_sums[chunk]); ++chunk) left -= sum;
    const int v = chunk * 32 + static_cast<int>(lane());
    uint32_t weight = 0;
    if (v < part_.vectors) {
      const Vec<T> vec = part_.vector(v);
#pragma unroll
      for (const T element : vec.value) weight += weight_in(order, to_float(element), max_, scale_);
    }
    const uint32_t within = running_part<32>(weight);
    const int owner = __ffs(__ballot_sync(kAll, within >= left)) - 1;
    left -= __shfl_sync(kAll, within - weight, owner);
    // The vector's elements, one a lane.
    const int at = __shfl_sync(kAll, v, owner);
    const uint32_t m = weight_in(order, part_.logit(at, lane() % Vec<T>::kSize), max_, scale_);
    const int element = __ffs(__ballot_sync(kAll, running_part<Vec<T>::kSize>(m) >= left)) - 1;
    return {part_.token(at, element), __shfl_sync(kAll, m, element)};
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

  template <uint32_t kOf>
  __device__ __forceinline__ static uint32_t running_part(uint32_t value) {
#pragma unroll
    for (uint32_t offset = 1; offset < kOf; offset <<= 1) {
      const uint32_t below = __shfl_up_sync(kAll, value, offset, kOf);
      if (lane() % kOf >= offset) value += below;
    }
    return value;
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
  bool writes_;
};

}  // namespace gqa::cuda
