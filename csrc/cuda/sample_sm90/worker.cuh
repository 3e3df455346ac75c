// The warps that hold the logits: they load and weigh them, then pass over them as the controller orders.
#pragma once

#include "cuda/sample_sm90/bins.cuh"
#include "cuda/sample_sm90/digits.cuh"
#include "cuda/sample_sm90/few.cuh"

namespace gqa::cuda {

// m of a token that the order asks for, else 0.
__device__ __forceinline__ uint32_t weight_in(const Order &order, float z, float max, float scale) {
  const float t = exponent_of(z, max, scale);
  const uint32_t m = weigh_unchecked(t).m;
  return t >= order.least && t <= order.most && z >= order.lowest ? m : 0;
}

template <typename T, int kThreads>
class Worker {
  static constexpr int kWarps = kThreads / 32;
  static_assert(kWarps >= kGroups && kThreads >= kBinEntries && kThreads >= kDigits * 8);

 public:
  __device__ Worker(const Exchange &exchange, const Part<T, kThreads> &part, Shared *shared, Cells *cells)
      : exchange_(exchange), part_(part), shared_(*shared), cells_(*cells) {}

  // Leaves the largest and least key of each warp. read(meanwhile) fills the part.
  template <typename F>
  __device__ __forceinline__ void load(F &&read) {
    const auto clear = [&] {
      uint4 *cells = reinterpret_cast<uint4 *>(&cells_);
#pragma unroll 1
      for (int i = threadIdx.x; i < static_cast<int>(sizeof(Cells) / 16); i += kThreads) {
        cells[i] = make_uint4(0, 0, 0, 0);
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
    max_ = max;
    scale_ = s.scale;
    if (max == INFINITY) settle_infinities();
    if (s.least_exponent > -64.0f) {
      add_weights<true>(s.least_exponent);
    } else {
      add_weights<false>(-64.0f);
    }
    meet<kThreads>(kWorkers);
    scatter_sums(exchange_, s.least_exponent > -64.0f ? weigh(s.least_exponent).bin : kBinEntries, &shared_, &cells_);
    const uint32_t groups = kGroups >> exchange_.log_blocks();
    if (warp() < groups) gather_bins(exchange_, warp(), groups, &shared_);
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
        sum_chunks(order);
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
  // Adds up the histogram. With kLeast the tokens below `least` in its bin go to a row of their own.
  template <bool kLeast>
  __device__ __forceinline__ void add_weights(float least) {
    const uint32_t column = static_cast<uint32_t>(__cvta_generic_to_shared(&cells_.histogram[0][lane()]));
    uint32_t nowhere = column + kNoRow * kRow, at_least = column + kLeastEntry * kRow;
    asm("" : "+r"(nowhere), "+r"(at_least));  // else a row is chosen first and the column added after
    const uint32_t least_row = kLeast ? column + weigh(least).bin * kRow : 0;
    part_.for_each_vector([&](int, const Vec<T> &vec) {
#pragma unroll
      for (const T element : vec.value) {
        const float t = mul(sub(to_float(element), max_), scale_);
        const Weight weight = weigh_unchecked(t);
        uint32_t row = column + weight.bin * kRow;
        if (kLeast) row = row == least_row && t < least ? at_least : row;
        add_shared(t >= -43.75f ? row : nowhere, weight.m);
      }
    });
  }

  // +inf becomes 0 and all else -inf: the same distribution.
  __device__ __forceinline__ void settle_infinities() {
    max_ = 0.0f;
    part_.for_each_vector([&](int v, Vec<T> vec) {
#pragma unroll
      for (T &element : vec.value) element = from_float<T>(to_float(element) == INFINITY ? 0.0f : -INFINITY);
      part_.replace(v, vec);
    });
  }

  // Sends the tokens asked for to the first block.
  __device__ __forceinline__ void collect(const Order &order) {
    const auto list = [&](float z, int v, int i) {
      if (exponent_of(z, max_, scale_) < order.least) return;
      const uint32_t at = atomicAdd(&shared_.listed, 1);
      exchange_.send(0, &cells_.few.sent[exchange_.rank][at], kList, listed_as(key(z), part_.token(v, i)));
    };
    part_.template for_each_near<Many::kInTurn>({order.lowest, order.highest}, list, [](int) {});
  }

  // The weights of each 32 vectors.
  __device__ __forceinline__ void sum_chunks(const Order &order) {
    uint32_t sum = 0;
    const auto add = [&](float z, int, int) { sum += weight_in(order, z, max_, scale_); };
    part_.template for_each_near<Many::kUnrolled>({order.lowest, order.highest}, add, [&](int chunk) {
      sum = __reduce_add_sync(kAll, sum);
      if (lane() == 0) cells_.chunk_sums[chunk] = sum;
      sum = 0;
    });
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
  float max_ = 0, scale_ = 0;
};

}  // namespace gqa::cuda
