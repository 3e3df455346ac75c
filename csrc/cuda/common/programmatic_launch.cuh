// Programmatic dependent launch: a kernel's blocks start while the kernel before it in the stream still runs, and wait
// on the device for its end. The rules for a kernel launched this way:
//   - every block calls wait_for_prerequisites() before it ends, or "the kernel before has ended" would not mean the
//     same of the one before that;
//   - before the wait it reads nothing and writes nothing that another kernel touches. Prefetching into L2 is safe: L2
//     is where the GPU's memory is coherent;
//   - launch_dependents() may come first of all: the next kernel's wait is for our end, not for this call.
#pragma once

#include <type_traits>

#include "cuda/common/launch.cuh"
#include "plan/plan.h"

namespace gqa::cuda {

__device__ __forceinline__ void launch_dependents() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Until every earlier kernel has ended and its writes are visible; returns at once where the launch was ordinary.
__device__ __forceinline__ void wait_for_prerequisites() {
#if defined(__CUDA_ARCH__) && __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Has the compiler work a value out here, before a wait, and not after it.
template <typename T>
__device__ __forceinline__ void have_ready(T value) {
  if constexpr (sizeof(T) == 8) {
    asm volatile("" ::"l"(value));
  } else if constexpr (std::is_same_v<T, float>) {
    asm volatile("" ::"f"(value));
  } else {
    asm volatile("" ::"r"(value));
  }
}

__device__ __forceinline__ void prefetch_l2(const void *address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Whether the device runs this library's sm_90 code: other code does not wait, so it must be launched the ordinary way.
inline bool launches_programmatically() {
  static const bool has_code = has_sm90_code();
  gqa_device device;
  return has_code && current_device(&device) == GQA_STATUS_OK && device.compute_capability == 90;
}

inline cudaLaunchAttribute programmatic_attribute() {
  cudaLaunchAttribute attribute{};
  attribute.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  attribute.val.programmaticStreamSerializationAllowed = 1;
  return attribute;
}

// As launch(), but programmatically where the device allows it, and in clusters of so many blocks. `kernel` follows the
// rules above.
template <typename... Args, typename... Given>
gqa_status launch_programmatic_clusters(void (*kernel)(Args...), const gqa_launch &plan, int blocks,
                                        cudaStream_t stream, Given &&...args) {
  log_launch(plan);
  GQA_RETURN_IF_ERROR(allow_shared_memory(reinterpret_cast<const void *>(kernel), plan.shared_memory));
  cudaLaunchAttribute attributes[2] = {};
  int count = 0;
  if (launches_programmatically()) attributes[count++] = programmatic_attribute();
  if (blocks > 1) {
    attributes[count].id = cudaLaunchAttributeClusterDimension;
    attributes[count].val.clusterDim.x = blocks;
    attributes[count].val.clusterDim.y = attributes[count].val.clusterDim.z = 1;
    ++count;
  }
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.grid[0], plan.grid[1], plan.grid[2]);
  config.blockDim = dim3(plan.block[0], plan.block[1], plan.block[2]);
  config.dynamicSmemBytes = plan.shared_memory;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Given &&>(args)...));
}

template <typename... Args, typename... Given>
gqa_status launch_programmatic(void (*kernel)(Args...), const gqa_launch &plan, cudaStream_t stream, Given &&...args) {
  return launch_programmatic_clusters(kernel, plan, 1, stream, static_cast<Given &&>(args)...);
}

}  // namespace gqa::cuda
