// The warps that hold the logits: they load and weigh them, then pass over them as the controller orders.
#pragma once

#include "cuda/sample_sm90/bins.cuh"
#include "cuda/sample_sm90/part.cuh"

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

  // Leaves the largest key of each warp. read(meanwhile) fills the part.
  template <typename F>
  __device__ __forceinline__ void load(F &&read) {
    const auto clear = [&] {
      uint4 *cells = reinterpret_cast<uint4 *>(&cells_);
#pragma unroll 1
      for (int i = threadIdx.x; i < static_cast<int>(sizeof(Cells) / 16); i += kThreads) {
        cells[i] = make_uint4(0, 0, 0, 0);
      }
    };
    const uint32_t largest = __reduce_max_sync(kAll, read(clear).key());
    if (lane() == 0) shared_.of_warp[warp()] = largest;
  }

  // The same, NaN aside.
  __device__ __forceinline__ void find_numbers() {
    uint32_t largest = 0;
    for_each_token([&](int, float z) { largest = max(largest, key(z)); });
    largest = __reduce_max_sync(kAll, largest);
    if (lane() == 0) shared_.of_warp[warp()] = largest;
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
        add_digits(order);
        meet<kThreads>(kWorkers);
        share_digits(round % 2);
        continue;
      }
      if (order.kind == Order::kPick) {
        sum_chunks(order);
      } else {
        find_first(order.high);
      }
      announce<kThreads + 32>(kPassed);
      return;
    }
  }

 private:
  // Adds up the histogram. With kLeast the tokens below `least` in its bin go to a row of their own.
  template <bool kLeast>
  __device__ __forceinline__ void add_weights(float least) {
    uint32_t *column = &cells_.histogram[0][lane()];
    const uint32_t least_bin = kLeast ? weigh(least).bin : 0;
    part_.for_each_vector([&](int, const Vec<T> &vec) {
#pragma unroll
      for (const T element : vec.value) {
        const float t = mul(sub(to_float(element), max_), scale_);
        const Weight weight = weigh_unchecked(t);
        uint32_t row = t >= -43.75f ? weight.bin : kNoRow;
        if (kLeast) row = weight.bin == least_bin && t < least ? kLeastEntry : row;
        atomicAdd(column + row * kColumns, weight.m);
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

  __device__ __forceinline__ void add_digits(const Order &order) {
    uint32_t *sums = &cells_.select.sums[0][lane()], *counts = &cells_.select.counts[0][lane()];
    uint32_t one = 1;
    asm("" : "+r"(one));  // a known 1 becomes an atomic that is slow where lanes' addresses differ
    const auto add = [&](float z) {
      const float t = exponent_of(z, max_, scale_);
      if (t > order.most) {
        if (order.counts_above) atomicAdd(counts, one);
      } else if (t >= order.least) {
        const uint32_t digit = (order.high - (key(z) >> kConstantBits<T>)) >> order.shift;
        if (digit >= kDigits) return;
        atomicAdd(sums + digit * kColumns, weigh_unchecked(t).m);
        if (order.counts) atomicAdd(counts + digit * kColumns, one);
      }
    };
    part_.for_each_near({order.lowest, order.highest}, shared_.noted[warp()], add, [](int) {});
  }

  // Eight threads a digit add its columns, leave zeros and tell the blocks.
  __device__ __forceinline__ void share_digits(uint32_t slot) {
    const uint32_t digit = threadIdx.x / 8, quad = threadIdx.x % 8;
    if (digit >= kDigits) return;
    uint4 *of_sums = reinterpret_cast<uint4 *>(cells_.select.sums[digit]) + quad;
    uint4 *of_counts = reinterpret_cast<uint4 *>(cells_.select.counts[digit]) + quad;
    const uint4 m = *of_sums, n = *of_counts;
    *of_sums = *of_counts = make_uint4(0, 0, 0, 0);
    u64 word = u64{m.x} + m.y + (u64{m.z} + m.w) + (u64{n.x + n.y + n.z + n.w} << kCountShift);
#pragma unroll
    for (int offset = 4; offset > 0; offset >>= 1) word += __shfl_xor_sync(kAll, word, offset);
#pragma unroll 1
    for (uint32_t to = quad; to < exchange_.blocks; to += 8) {
      exchange_.send(to, cells_.select.slots[slot][exchange_.rank] + digit, kRound + slot, word);
    }
  }

  // The weights of each 32 vectors.
  __device__ __forceinline__ void sum_chunks(const Order &order) {
    uint32_t sum = 0;
    const auto add = [&](float z) { sum += weight_in(order, z, max_, scale_); };
    part_.for_each_near({order.lowest, order.highest}, shared_.noted[warp()], add, [&](int chunk) {
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
