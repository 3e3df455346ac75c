// The warps that hold the logits: they load and weigh them, then pass over them as the controller orders.
#pragma once

#include "cuda/sample_sm90/bins.cuh"
#include "cuda/sample_sm90/digits.cuh"
#include "cuda/sample_sm90/few.cuh"
#include "cuda/sample_sm90/histogram.cuh"
#include "cuda/sample_sm90/pick.cuh"

namespace gqa::cuda {

template <typename T, int kThreads>
class Worker {
  static constexpr int kWarps = kThreads / 32;
  static_assert(kWarps >= kGroups && kThreads >= kBinEntries && kThreads >= kDigits * 8);

 public:
  __device__ Worker(const Exchange &exchange, const Part<T, kThreads> &part, Shared *shared, Cells *cells, Tally *tally)
      : exchange_(exchange), part_(part), shared_(*shared), cells_(*cells), tally_(tally) {}

  // Leaves the largest and least key of each warp. read(meanwhile) fills the part.
  template <typename F>
  __device__ __forceinline__ void load(F &&read) {
    const auto clear = [&] {
      uint4 *cells = reinterpret_cast<uint4 *>(&cells_);
#pragma unroll 1
      for (int i = threadIdx.x; i < static_cast<int>(sizeof(Cells) / 16); i += kThreads) {
        cells[i] = make_uint4(0, 0, 0, 0);
      }
      if constexpr (kTallies<T, kThreads>) {
        uint4 *counts = reinterpret_cast<uint4 *>(tally_->counts);
#pragma unroll 1
        for (int i = threadIdx.x; i < static_cast<int>(sizeof(tally_->counts) / 16); i += kThreads) {
          counts[i] = make_uint4(0, 0, 0, 0);
        }
        if (threadIdx.x == 0) tally_->others = 0;
        meet<kThreads>(kWorkers);
      }
    };
    const u64 ends = max_of_halves(read(clear).ends());
    if (lane() == 0) shared_.of_warp[warp()] = ends;
  }

  // The same, NaN aside.
  __device__ __forceinline__ void find_numbers() {
    uint32_t largest = 0;
    for_each_token([&](int, float z) { largest = max(largest, key(z)); });
    const u64 ends = max_of_halves(ends_of(largest, 0));
    if (lane() == 0) shared_.of_warp[warp()] = ends;
  }

  // The histogram, summed over the cluster.
  __device__ __forceinline__ void weigh_all(const Settings &s, float max) {
    scale_ = s.scale;
    Histogram<T, kThreads> histogram(&part_, &cells_, tally_, max, s.scale, s.least_exponent);
    const bool counted = histogram.add_up();
    max_ = histogram.max();
    meet<kThreads>(kWorkers);
    scatter_sums(exchange_, s.least_exponent > -64.0f ? weigh(s.least_exponent).bin : kBinEntries, counted ? kLimb : 0,
                 &shared_, &cells_);
    if (counted && warp() == 0) histogram.count_edges();
    announce<kThreads + 32>(kWeighed);
    if (warp() < exchange_.groups()) gather_bins(exchange_, warp(), &shared_);
  }

  __device__ __forceinline__ void serve() {
    for (uint32_t round = 0;; ++round) {
      meet<kThreads + 32>(kOrdered);
      const Order order = shared_.order;
      if (order.kind == Order::kSelect) {
        const auto add = [&](auto by_exponent, auto counts) {
          add_digits<by_exponent, counts>(part_, order, max_, scale_, &cells_);
        };
        constexpr std::bool_constant<true> yes;
        constexpr std::bool_constant<false> no;
        if (order.counts) {
          order.by_exponent ? add(yes, yes) : add(no, yes);
        } else {
          order.by_exponent ? add(yes, no) : add(no, no);
        }
        meet<kThreads>(kWorkers);
        share_digits(exchange_, round % 2, &cells_);
        continue;
      }
      if (order.kind == Order::kPick) {
        weigh_chunks(order);
        if (!order.told) {
          meet<kThreads>(kWorkers);
          if (warp() == kWarps - 1) tell_picked();
        }
      } else if (order.kind == Order::kCollect) {
        collect(order);
        announce<kThreads + 32>(kPassed);
        if (exchange_.rank != 0) return;
        receive_list<kThreads>(exchange_, &shared_, &cells_, max_, scale_);
      } else {
        find_first(order.key);
      }
      announce<kThreads + 32>(kPassed);
      return;
    }
  }

 private:
  // Sends the tokens asked for to the first block.
  __device__ __forceinline__ void collect(const Order &order) {
    const auto list = [&](float z, int v, int i) {
      if (exponent_of(z, max_, scale_) < order.least) return;
      const uint32_t at = atomicAdd(&shared_.listed, 1);
      exchange_.send(0, &cells_.few.sent[exchange_.rank][at], kList, listed_as(key(z), part_.token(v, i)));
    };
    const Window<T> window(order.lowest, order.highest);
    const auto find = [&](const Vec<T> &vec) { return window.find(vec); };
    part_.template for_each_near<Many::kInTurn>(find, list, [](int, auto) {});
  }

  // The weights of each 32 vectors and of each warp.
  __device__ __forceinline__ void weigh_chunks(const Order &order) {
    const uint32_t chunks = static_cast<uint32_t>(__cvta_generic_to_shared(cells_.select.chunks));
    const Window<T> window(order.lowest, order.highest);
    uint32_t sum = 0;
    const auto find = [&](const Vec<T> &vec) { return window.find(vec); };
    const auto add = [&](float z, int, int) { sum += weight_in(order, z, max_, scale_); };
    part_.template for_each_near<Many::kUnrolled>(find, add, [&](int chunk, auto all) {
      if (all) sum = __reduce_add_sync(kAll, sum);
      if (!all || lane() == 0) add_shared(chunks + chunk * sizeof(uint32_t), sum);
      sum = 0;
    });
    __syncwarp();
    const uint32_t at = warp() * part_.chunks_per_warp + lane();
    sum = __reduce_add_sync(kAll, lane() < part_.chunks_per_warp ? cells_.select.chunks[at] : 0);
    if (lane() == 0) shared_.of_warp[warp()] = sum;
  }

  // To all blocks, what may be picked here weighs.
  __device__ __forceinline__ void tell_picked() const {
    const u64 sum = sum_of_lanes(lane() < kWarps ? static_cast<uint32_t>(shared_.of_warp[lane()]) : 0);
    if (lane() < exchange_.blocks) exchange_.send(lane(), shared_.parts + exchange_.rank, kParts, sum);
  }

  // Leaves the lowest index that holds the key, of each warp.
  __device__ __forceinline__ void find_first(uint32_t of) {
    uint32_t index = kAll;
    for_each_token([&](int token, float z) {
      if (key(z) == of) index = min(index, static_cast<uint32_t>(token));
    });
    index = __reduce_min_sync(kAll, index);
    if (lane() == 0) shared_.of_warp[warp()] = index;
  }

  template <typename F>
  __device__ __forceinline__ void for_each_token(F &&f) const {
    part_.for_each_vector([&](int v, const Vec<T> &) {
#pragma unroll 1
      for (int i = 0; i < Vec<T>::kSize; ++i) {
        const int token = part_.token(v, i);
        if (part_.is_token(token)) f(token, part_.logit(v, i));
      }
    });
  }

  const Exchange &exchange_;
  Part<T, kThreads> part_;
  Shared &shared_;
  Cells &cells_;
  Tally *tally_;
  float max_ = 0, scale_ = 0;
};

}  // namespace gqa::cuda
