// Launches the instances of decode_ring of one dtype and width. Included by one small file each.
#pragma once

#include "cuda/common/programmatic_launch.cuh"
#include "cuda/gqa_attention_decode_sm90/decode_ring.cuh"

namespace gqa::cuda::decode_sm90 {

template <typename T, int kShape, DecodeCache kCache, bool kPlain>
gqa_status launch_instance(const DecodePlan &decode, const Args &args, const gqa_launch &plan, cudaStream_t stream) {
  constexpr auto kKernel = &decode_ring<Config<T, kShape, kCache, kPlain>>;
  const auto *function = reinterpret_cast<const void *>(kKernel);
  log_launch(plan);
  GQA_RETURN_IF_ERROR(
      check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeMaxDynamicSharedMemorySize, plan.shared_memory)));
  if (plan.num_splits > 8) {
    GQA_RETURN_IF_ERROR(check_cuda(cudaFuncSetAttribute(function, cudaFuncAttributeNonPortableClusterSizeAllowed, 1)));
  }
  cudaLaunchAttribute attributes[3] = {};
  attributes[0].id = cudaLaunchAttributeClusterDimension;
  attributes[0].val.clusterDim = {static_cast<unsigned>(plan.num_splits), 1, 1};
  int count = 1;
  if (decode.balanced) {
    attributes[count].id = cudaLaunchAttributeClusterSchedulingPolicyPreference;
    attributes[count++].val.clusterSchedulingPolicyPreference = cudaClusterSchedulingPolicyLoadBalancing;
  }
  if (decode.programmatic) attributes[count++] = programmatic_attribute();
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(plan.grid[0], plan.grid[1], plan.grid[2]);
  config.blockDim = dim3(plan.block[0]);
  config.dynamicSmemBytes = plan.shared_memory;
  config.stream = stream;
  config.attrs = attributes;
  config.numAttrs = count;
  return check_cuda(cudaLaunchKernelEx(&config, kKernel, args));
}

template <typename T, int kShape, DecodeCache kCache>
gqa_status launch_cache(const DecodePlan &decode, const Args &args, const gqa_launch &plan, cudaStream_t stream) {
  if constexpr (kCache != DecodeCache::kAny) {
    if (decode.plain) return launch_instance<T, kShape, kCache, true>(decode, args, plan, stream);
  }
  return launch_instance<T, kShape, kCache, false>(decode, args, plan, stream);
}

template <typename T, int kBytes, int kDim, int kShape = 0>
gqa_status launch_width(const DecodePlan &decode, const Args &args, const gqa_launch &plan, cudaStream_t stream) {
  if constexpr (kShape == kDecodeShapeCount) {
    return GQA_STATUS_UNSUPPORTED;
  } else if constexpr (kDecodeShapes[kShape].dim != kDim || kDecodeShapes[kShape].bytes != kBytes) {
    return launch_width<T, kBytes, kDim, kShape + 1>(decode, args, plan, stream);
  } else {
    if (decode.shape != kShape) return launch_width<T, kBytes, kDim, kShape + 1>(decode, args, plan, stream);
    switch (decode.cache) {
      case DecodeCache::kContiguous:
        return launch_cache<T, kShape, DecodeCache::kContiguous>(decode, args, plan, stream);
      case DecodeCache::kPaged: return launch_cache<T, kShape, DecodeCache::kPaged>(decode, args, plan, stream);
      case DecodeCache::kAny: return launch_cache<T, kShape, DecodeCache::kAny>(decode, args, plan, stream);
    }
    return GQA_STATUS_UNSUPPORTED;
  }
}

}  // namespace gqa::cuda::decode_sm90

#define GQA_DECODE_INSTANCE(T, bytes, dim, name)                                                              \
  gqa_status gqa::cuda::decode_sm90::name(const DecodePlan &decode, const Args &args, const gqa_launch &plan, \
                                          cudaStream_t stream) {                                              \
    return launch_width<T, bytes, dim>(decode, args, plan, stream);                                           \
  }
