// Plans: which kernel serves which params. Pure functions of integers, built with or without CUDA.
#pragma once

#include <cstring>

#include "common/status.h"

namespace gqa {

struct Dim3 {
  int64_t x = 1, y = 1, z = 1;
};

inline gqa_launch make_launch(const char *op, const char *kernel, int32_t dtype, Dim3 grid, Dim3 block,
                              int64_t shared_memory = 0, int32_t variant = 0) {
  return {op,
          kernel,
          dtype_name(dtype),
          {static_cast<int32_t>(grid.x), static_cast<int32_t>(grid.y), static_cast<int32_t>(grid.z)},
          {static_cast<int32_t>(block.x), static_cast<int32_t>(block.y), static_cast<int32_t>(block.z)},
          static_cast<int32_t>(shared_memory),
          1,
          variant};
}

// The same of a launch that reads or writes quantised caches.
inline void name_quantized(int32_t cache_dtype, gqa_launch *launch) {
  const bool half = std::strcmp(launch->dtype, "float16") == 0, int8 = cache_dtype == GQA_DTYPE_INT8;
  if (cache_dtype == 0) return;
  launch->dtype = half ? (int8 ? "float16, int8 cache" : "float16, float8_e4m3fn cache")
                       : (int8 ? "bfloat16, int8 cache" : "bfloat16, float8_e4m3fn cache");
}

// Quantised caches serve the 16-bit types.
inline gqa_status check_quantization(const gqa_kv_quantization &q, int32_t dtype, int32_t head_dim) {
  if (q.dtype == 0) {
    return q.k_scale == nullptr && q.v_scale == nullptr ? GQA_STATUS_OK : GQA_STATUS_INVALID_ARGUMENT;
  }
  if (!is_quantized_dtype(q.dtype) || dtype == GQA_DTYPE_FLOAT32 || head_dim > 256) return GQA_STATUS_UNSUPPORTED;
  return q.k_scale_stride >= 0 && q.v_scale_stride >= 0 ? GQA_STATUS_OK : GQA_STATUS_INVALID_ARGUMENT;
}

// Bytes moved by a call from which on nothing of its outputs would still be in L2 for the next kernel.
constexpr int64_t kPastCache = int64_t{64} << 20;

// Whether this library's kernels for sm_90 hold code. A library without CUDA plans for one with all of it.
inline bool has_sm90_code() {
  const char *archs = gqa_cuda_archs();
  return archs[0] == '\0' || std::strstr(archs, "90") != nullptr;
}

// gqa_set_kernel_override: the portable kernels, and no others.
bool is_portable_asked_for();

inline void add_launch(gqa_plan *plan, const gqa_launch &launch) { plan->launches[plan->num_launches++] = launch; }

// Whether a tensor of these strides, in elements, is made of 16-byte vectors.
inline bool has_aligned_rows(const void *data, const int64_t *stride, int count, int64_t element) {
  bool all = reinterpret_cast<uintptr_t>(data) % 16 == 0;
  for (int i = 0; i < count; ++i) all = all && stride[i] * element % 16 == 0;
  return all;
}

}  // namespace gqa
