// Launching a planned kernel and dispatching over dtypes.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_runtime.h>

#include "common/index.h"
#include "common/status.h"

namespace gqa::cuda {

inline gqa_status check_cuda(cudaError_t error) {
  if (error == cudaSuccess) return GQA_STATUS_OK;
  set_cuda_error(cudaGetErrorString(error));
  return GQA_STATUS_CUDA_ERROR;
}

// Kernels with more than 48 KB of dynamic shared memory need an attribute.
inline gqa_status allow_shared_memory(const void *kernel, int32_t bytes) {
  if (bytes <= 48 * 1024) return GQA_STATUS_OK;
  return check_cuda(cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes));
}

// Logs and launches.
template <typename... Args, typename... Given>
gqa_status launch(void (*kernel)(Args...), const gqa_launch &plan, cudaStream_t stream, Given &&...args) {
  log_launch(plan);
  GQA_RETURN_IF_ERROR(allow_shared_memory(reinterpret_cast<const void *>(kernel), plan.shared_memory));
  const dim3 grid(plan.grid[0], plan.grid[1], plan.grid[2]);
  const dim3 block(plan.block[0], plan.block[1], plan.block[2]);
  kernel<<<grid, block, plan.shared_memory, stream>>>(static_cast<Given &&>(args)...);
  return check_cuda(cudaGetLastError());
}

gqa_status current_device(gqa_device *device);

template <typename T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}), which returns a status, for the dtype.
template <typename F>
gqa_status dispatch_float(int32_t dtype, F &&f) {
  switch (dtype) {
    case GQA_DTYPE_FLOAT32: return f(Type<float>{});
    case GQA_DTYPE_FLOAT16: return f(Type<__half>{});
    case GQA_DTYPE_BFLOAT16: return f(Type<__nv_bfloat16>{});
    default: return GQA_STATUS_UNSUPPORTED;
  }
}

}  // namespace gqa::cuda
