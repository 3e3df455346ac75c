// The dot product of the CPU twins with matrices.
#pragma once

#include "cpu/math.h"
#include "cpu/types.h"

namespace gqa::cpu {

// Sixteen running sums, so that the loop vectorises.
template <typename T>
GQA_INLINE float dot(const T *a, const T *b, int64_t count) {
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

}  // namespace gqa::cpu
