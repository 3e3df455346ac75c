// The warps that hold the logits: they load and weigh them, then pass over them as the controller orders.
#pragma once

#include "cuda/sample_sm90/bins.cuh"
#include "cuda/sample_sm90/digits.cuh"
#include "cuda/sample_sm90/few.cuh"
#include "cuda/sample_sm90/histogram.cuh"

namespace gqa::cuda {

template <int kThreads, int kRows>
__device__ __forceinline__ void clear_cells(uint32_t (&cells)[kRows][kColumns]) {
  uint4 *quads = reinterpret_cast<uint4 *>(cells);
#pragma unroll 2
  for (int i = threadIdx.x; i < kRows * kColumns / 4; i += kThreads) quads[i] = make_uint4(0, 0, 0, 0);
}

template <typename T, int kThreads>
class Worker {
  static constexpr int kWarps = kThreads / 32;
  static constexpr std::bool_constant<true> kYes{};
  static constexpr std::bool_constant<false> kNo{};
  static_assert(kWarps >= kGroups && kThreads >= kRows && kThreads >= kDigits * 8);

 public:
  __device__ Worker(const Exchange &exchange, const Part<T, kThreads> &part, Shared *shared, Cells *cells)
      : exchange_(exchange), part_(part), shared_(*shared), cells_(*cells) {}

  // Leaves the largest and least key of each warp.
  __device__ __forceinline__ void tell_ends(u64 ends) {
    ends = max_of_halves(ends);
    if (lane() == 0) shared_.of_warp[warp()] = ends;
  }

  // The same, NaN aside.
  __device__ __forceinline__ void find_numbers() {
    uint32_t largest = 0;
    for_each_token([&](int, float z) { largest = max(largest, key(z)); });
    tell_ends(ends_of(largest, 0));
  }

  // The histogram, summed over the cluster.
  __device__ __forceinline__ void weigh_all(const Settings &s, float max, float least_logit) {
    scale_ = s.scale;
    max_ = max;
    if (max == INFINITY) {
      settle_infinities(&part_);
      max_ = 0.0f;
    }
    const float least = s.least_exponent;
    const Scale by = Scale::down_to(exponent_of(least_logit, max_, scale_));
    const auto add = [&](auto is_fine, auto has_least) {
      add_weights<is_fine, has_least>(part_, &cells_, max_, scale_, least, by);
    };
    if (least > -64.0f) {
      by.is_fine() ? add(kYes, kYes) : add(kNo, kYes);
    } else {
      by.is_fine() ? add(kYes, kNo) : add(kNo, kNo);
    }
    meet<kThreads>(kWorkers);
    scatter_sums(exchange_, least >= -43.75f ? by.row_of(least) : kRows, &shared_, cells_);
    announce<kThreads + 32>(kWeighed);
    // The last warps are the first to be done.
    const uint32_t groups = exchange_.groups(), of_each = groups * 4 <= kWarps ? 4 : 1, from_last = kWarps - 1 - warp();
    if (from_last < groups * of_each) {
      gather_rows(exchange_, from_last / of_each, from_last % of_each, of_each, by.shift, &shared_);
    }
    clear_cells<kThreads>(cells_.sums);
    clear_cells<kThreads>(cells_.counts);
  }

  __device__ __forceinline__ void serve() {
    for (uint32_t round = 0;; ++round) {
      meet<kThreads + 32>(kOrdered);
      const Order order = shared_.order;
      if (order.kind == Order::kSelect) {
        add_digits(part_, order, shared_.scale, max_, scale_, &cells_);
        meet<kThreads + 32>(kPassed);
        share_digits(exchange_, round % 2, &cells_);
        continue;
      }
      if (order.kind == Order::kDone) return;
      if (order.kind == Order::kCollect) {
        collect(order);
        announce<kThreads + 32>(kPassed);
        if (exchange_.rank != 0) return;
        receive_list<kThreads>(exchange_, &shared_, &cells_, max_, scale_);
      } else if (order.kind == Order::kFirst) {
        find_first(order.key);
      } else if constexpr (kPicks<kThreads>) {
        weigh_stretch(part_, order, max_, scale_, &shared_);
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
    part_.template for_each_near<Many::kInTurn>(part_.walk(), find, list);
    part_.for_each_extra([&](float z, int v, int i, uint32_t) { list(z, v, i); });
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
    part_.for_each_extra([&](float z, int v, int i, uint32_t) { f(part_.token(v, i), z); });
  }

  const Exchange &exchange_;
  Part<T, kThreads> part_;
  Shared &shared_;
  Cells &cells_;
  float max_ = 0, scale_ = 0;
};

}  // namespace gqa::cuda
