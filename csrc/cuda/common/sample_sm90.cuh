// The Hopper kernels of sample; plan/sample.h says when they serve.
#pragma once

#include "cuda/common/programmatic_launch.cuh"

namespace gqa::cuda {

gqa_status launch_sample_cluster(const gqa_sample_params &p, const gqa_launch &plan, cudaStream_t stream);
gqa_status launch_sample_greedy(const gqa_sample_params &p, const gqa_launch &plan, cudaStream_t stream);

// Logs and launches, by the rules of programmatic_launch.cuh, in clusters of plan.variant blocks.
template <typename... Args, typename... Given>
gqa_status launch_clusters(void (*kernel)(Args...), const gqa_launch &plan, cudaStream_t stream, Given &&...args) {
  const void *function = reinterpret_cast<const void *>(kernel);
  log_launch(plan);
  if (plan.shared_memory > 0) {
    GQA_RETURN_IF_ERROR(
        check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_memory)));
  }
  if (plan.variant > 8) {
    GQA_RETURN_IF_ERROR(check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)));
  }
  cudaLaunchAttribute attributes[2] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim.x = plan.variant;
  attributes[0].val.clusterDim.y = attributes[0].val.clusterDim.z = 1;
  attributes[1] = programmatic_attribute();
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.grid[0]);
  config.blockDim = dim3(plan.block[0]);
  config.dynamicSmemBytes = plan.shared_memory;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = 2;
  return check_cuda(cudaLaunchKernelEx(&config, kernel, static_cast<Given &&>(args)...));
}

}  // namespace gqa::cuda
