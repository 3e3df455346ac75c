// The weights of a block's tokens, summed by bin: by the workers, once the row's largest logit is known.
#pragma once

#include "cuda/sample_sm90/tally.cuh"

namespace gqa::cuda {

template <typename T, int kThreads>
class Histogram {
 public:
  __device__ Histogram(Part<T, kThreads> *part, Cells *cells, Tally *tally, float max, float scale, float least)
      : part_(part), cells_(cells), tally_(tally), max_(max), scale_(scale), least_(least) {}

  // Whether from counts: then its second half of columns holds upper parts of products.
  __device__ __forceinline__ bool add_up() {
    if constexpr (kTallies<T, kThreads>) {
      if (is_counted(*tally_, max_)) {
        add_counts();
        return true;
      }
    }
    if (max_ == INFINITY) settle_infinities();
    least_ > -64.0f ? add_weights<true>() : add_weights<false>();
    return false;
  }

  // The largest logit, or what stands for it.
  __device__ __forceinline__ float max() const { return max_; }

  // Counts the tokens of the vectors that were read apart; one warp, after add_up().
  __device__ __forceinline__ void count_edges() {
    part_->for_each_edge([&](int v, int i) {
      const uint32_t offset = tally_offset(to_bits(part_->logit(v, i)) >> 16);
      if (has_cell(offset)) atomicAdd(&tally_->counts[cell_of(offset)], 1);
    });
  }

 private:
  // Adds up the histogram. With kLeast the tokens below `least` in its bin go to a row of their own.
  template <bool kLeast>
  __device__ __forceinline__ void add_weights() {
    const uint32_t column = static_cast<uint32_t>(__cvta_generic_to_shared(&cells_->histogram[0][lane()]));
    uint32_t nowhere = column + kNoRow * kRow, at_least = column + kLeastEntry * kRow;
    asm("" : "+r"(nowhere), "+r"(at_least));  // else a row is chosen first and the column added after
    const uint32_t least_row = kLeast ? column + weigh(least_).bin * kRow : 0;
    part_->for_each_vector([&](int, const Vec<T> &vec) {
#pragma unroll
      for (const T element : vec.value) {
        const float t = mul(sub(to_float(element), max_), scale_);
        const Weight weight = weigh_unchecked(t);
        uint32_t row = column + weight.bin * kRow;
        if (kLeast) row = row == least_row && t < least_ ? at_least : row;
        add_shared(t >= -43.75f ? row : nowhere, weight.m);
      }
    });
  }

  // The histogram of what was counted while it was loaded: products of count and m, in two parts, each in half of the
  // columns, and the m of other tokens. Tokens below `least` in its bin go to a row of their own.
  __device__ __forceinline__ void add_counts() {
    const uint32_t least_bin = weigh(least_).bin;
    const auto column = static_cast<uint32_t>(__cvta_generic_to_shared(&cells_->histogram[0][lane() % (kColumns / 2)]));
    const auto add = [&](float z, uint32_t count) {
      const float t = mul(sub(z, max_), scale_);
      if (!(t >= -43.75f)) return;
      const Weight weight = weigh_unchecked(t);
      const uint32_t row = column + (weight.bin == least_bin && t < least_ ? kLeastEntry : weight.bin) * kRow;
      const u64 product = u64{weight.m} * count;
      add_shared(row, static_cast<uint32_t>(product) & ((1u << kLimb) - 1));
      add_shared(row + kRow / 2, static_cast<uint32_t>(product >> kLimb));
    };
#pragma unroll 2
    for (uint32_t cell = threadIdx.x; cell < kTallyCells; cell += kThreads) {
      const uint32_t count = tally_->counts[cell];
      if (count != 0) add(value_of(cell), count);
    }
    const auto add_element = [&](int v, int i, bool tallied) {
      const float z = part_->logit(v, i);
      if (!tallied || !has_cell(tally_offset(to_bits(z) >> 16))) add(z, 1);
    };
    const uint32_t elements = tally_->others * Vec<T>::kSize;
#pragma unroll 1
    for (uint32_t i = threadIdx.x; i < elements; i += kThreads) {
      add_element(tally_->listed[i / Vec<T>::kSize], i % Vec<T>::kSize, true);
    }
    if (warp() == 0) part_->for_each_edge([&](int v, int i) { add_element(v, i, false); });
  }

  // +inf becomes 0 and all else -inf: the same distribution.
  __device__ __forceinline__ void settle_infinities() {
    max_ = 0.0f;
    part_->for_each_vector([&](int v, Vec<T> vec) {
#pragma unroll
      for (T &element : vec.value) element = from_float<T>(to_float(element) == INFINITY ? 0.0f : -INFINITY);
      part_->replace(v, vec);
    });
  }

  Part<T, kThreads> *part_;
  Cells *cells_;
  Tally *tally_;
  float max_, scale_, least_;
};

}  // namespace gqa::cuda
