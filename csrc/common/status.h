// What every entry point shares: the struct_size check, the launch log, dtype names.
#pragma once

#include <atomic>
#include <cstdint>

#include "gqa_kernels.h"

namespace gqa {

struct LaunchLog {
  std::atomic<gqa_launch_log> function{nullptr};
  std::atomic<void *> user{nullptr};
};
LaunchLog &launch_log();
void set_cuda_error(const char *message);

inline void log_launch(const gqa_launch &launch) {
  if (auto *function = launch_log().function.load(std::memory_order_acquire)) {
    function(launch_log().user.load(std::memory_order_relaxed), &launch);
  }
}

template <typename Params>
gqa_status check_struct(const Params *p) {
  if (p == nullptr) return GQA_STATUS_NULL_POINTER;
  return p->struct_size == sizeof(Params) ? GQA_STATUS_OK : GQA_STATUS_STRUCT_SIZE;
}

constexpr bool is_float_dtype(int32_t dtype) {
  return dtype == GQA_DTYPE_FLOAT32 || dtype == GQA_DTYPE_FLOAT16 || dtype == GQA_DTYPE_BFLOAT16;
}

constexpr bool is_quantized_dtype(int32_t dtype) { return dtype == GQA_DTYPE_FLOAT8_E4M3 || dtype == GQA_DTYPE_INT8; }

constexpr int64_t dtype_size(int32_t dtype) {
  if (is_quantized_dtype(dtype)) return 1;
  return dtype == GQA_DTYPE_INT64 ? 8 : (dtype == GQA_DTYPE_FLOAT32 || dtype == GQA_DTYPE_INT32) ? 4 : 2;
}

constexpr const char *dtype_name(int32_t dtype) {
  switch (dtype) {
    case GQA_DTYPE_FLOAT32: return "float32";
    case GQA_DTYPE_FLOAT16: return "float16";
    case GQA_DTYPE_BFLOAT16: return "bfloat16";
    case GQA_DTYPE_INT32: return "int32";
    case GQA_DTYPE_INT64: return "int64";
    case GQA_DTYPE_FLOAT8_E4M3: return "float8_e4m3fn";
    case GQA_DTYPE_INT8: return "int8";
    default: return "unknown";
  }
}

template <typename T>
constexpr T ceil_div(T a, T b) {
  return (a + b - 1) / b;
}

}  // namespace gqa

// Leaves the calling function with any status but OK.
#define GQA_RETURN_IF_ERROR(expression)                                                    \
  do {                                                                                     \
    if (const gqa_status status_ = (expression); status_ != GQA_STATUS_OK) return status_; \
  } while (0)
