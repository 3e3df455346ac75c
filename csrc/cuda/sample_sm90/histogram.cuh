// The weights of a block's tokens, summed by bin, or finer, and by stretch: by the workers, once the row's largest
// logit is known.
#pragma once

#include "cuda/sample_sm90/part.cuh"

namespace gqa::cuda {

// With kLeast the tokens below `least` in its row go to a row of their own, and so do those without mass.
template <bool kFine, bool kLeast, typename T, int kThreads>
__device__ __forceinline__ void add_weights(const Part<T, kThreads> &part, Cells *cells, float max, float scale,
                                            float least, const Scale &by) {
  const uint32_t column = static_cast<uint32_t>(__cvta_generic_to_shared(&cells->histogram[0][lane()]));
  const uint32_t of_bin = kRow << by.shift, zero = column + kZero * of_bin - kUnits * kRow;
  uint32_t nowhere = column + kNoRow * kRow, below = column + kLeastRow * kRow;
  asm("" : "+r"(nowhere), "+r"(below));  // else a row is chosen first and the column added after
  const uint32_t least_row = kLeast ? column + by.row_of(fmaxf(least, -43.75f)) * kRow : 0;
  const auto add = [&](float z, uint32_t further) {
    const float t = mul(sub(z, max), scale);
    const Weight weight = weigh_unchecked(t);
    uint32_t row = column + weight.bin * kRow;
    if (kFine) row = zero - (kZero - weight.bin) * of_bin + by.units_within(t) * kRow;
    if (kLeast) row = row == least_row && t < least ? below : row;
    add_shared((t >= -43.75f ? row : nowhere) + further, weight.m);
  };
  part.for_each_vector([&](int, const Vec<T> &vec) {
#pragma unroll
    for (const T element : vec.value) add(to_float(element), 0);
  });
  part.for_each_extra([&](float z, int, int, uint32_t stretch) { add(z, (stretch - lane()) * sizeof(uint32_t)); });
}

// +inf becomes 0 and all else -inf: the same distribution.
template <typename T, int kThreads>
__device__ __forceinline__ void settle_infinities(Part<T, kThreads> *part) {
  part->for_each_vector([&](int v, Vec<T> vec) {
#pragma unroll
    for (T &element : vec.value) element = from_float<T>(to_float(element) == INFINITY ? 0.0f : -INFINITY);
    part->replace(v, vec);
  });
  if constexpr (kHasExtras<T, kThreads>) {
    if (threadIdx.x == 0) part->extras.drop();
    meet<kThreads>(kWorkers);
  }
}

}  // namespace gqa::cuda
