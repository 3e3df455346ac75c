// The dot product of the CPU twins with matrices.
#pragma once

#include "common/quantize.h"
#include "cpu/math.h"
#include "cpu/types.h"

namespace gqa::cpu {

struct E4m3 {
  uint8_t bits;
};

GQA_INLINE float to_float(E4m3 value) { return e4m3_to_float(value.bits); }

// Sixteen running sums, so that the loop vectorises.
template <typename T, typename W>
GQA_INLINE float dot(const T *a, const W *b, int64_t count) {
  constexpr int kLanes = 16;
  float sums[kLanes] = {};
  int64_t at = 0;
  for (; at + kLanes <= count; at += kLanes) {
    for (int i = 0; i < kLanes; ++i) sums[i] += to_float(a[at + i]) * to_float(b[at + i]);
  }
  for (; at < count; ++at) sums[0] += to_float(a[at]) * to_float(b[at]);
  float total = 0.0f;
  for (float sum : sums) total += sum;
  return total;
}

// With row `row` of a matrix: of e4m3 where it has scales, one for each row.
template <typename T>
GQA_INLINE float product(const T *x, const void *weights, int64_t stride, const float *scale, int64_t row,
                         int64_t count) {
  if (scale != nullptr) return scale[row] * dot(x, static_cast<const E4m3 *>(weights) + row * stride, count);
  return dot(x, static_cast<const T *>(weights) + row * stride, count);
}

// The value, added to what is there.
template <typename T>
GQA_INLINE T with_residual(T value, const void *residual, int64_t at) {
  if (residual == nullptr) return value;
  return from_float<T>(to_float(static_cast<const T *>(residual)[at]) + to_float(value));
}

}  // namespace gqa::cpu
