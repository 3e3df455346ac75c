// Reading lengths, page ids and positions: int32 or int64 tensors, broadcast by a stride of 0.
#pragma once

#include <cstdint>

#include "gqa_kernels.h"

#if defined(__CUDACC__)
#define GQA_HOST_DEVICE __host__ __device__ __forceinline__
#else
#define GQA_HOST_DEVICE inline
#endif

namespace gqa {

GQA_HOST_DEVICE int64_t load_index(const gqa_index &index, int64_t i, int64_t j = 0) {
  const int64_t at = i * index.stride[0] + j * index.stride[1];
  return index.dtype == GQA_DTYPE_INT64 ? static_cast<const int64_t *>(index.data)[at]
                                        : static_cast<const int32_t *>(index.data)[at];
}

GQA_HOST_DEVICE int64_t load_index_or(const gqa_index &index, int64_t absent, int64_t i, int64_t j = 0) {
  return index.data == nullptr ? absent : load_index(index, i, j);
}

}  // namespace gqa
