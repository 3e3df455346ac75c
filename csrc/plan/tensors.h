// What plans ask of a call's tensors.
#pragma once

#include "common/status.h"

namespace gqa {

constexpr int64_t round_up(int64_t value, int64_t unit) { return ceil_div(value, unit) * unit; }

// Absent, or of a dtype that indices have.
inline bool is_index(const gqa_index &index) {
  return index.data == nullptr || index.dtype == GQA_DTYPE_INT32 || index.dtype == GQA_DTYPE_INT64;
}

inline bool is_aligned(const void *data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// Absent, or made of aligned vectors of 16 bytes. Strides of dimensions with one element say nothing.
inline bool is_aligned(const void *data, const int64_t *stride, const int64_t (&size)[3], int64_t element = 2) {
  if (data == nullptr) return true;
  for (int i = 0; i < 3; ++i) {
    if (size[i] > 1 && stride[i] * element % 16 != 0) return false;
  }
  return is_aligned(data);
}

}  // namespace gqa
