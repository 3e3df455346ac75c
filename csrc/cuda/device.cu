// The current device's properties, asked once per device.
#include <mutex>

#include "cuda/common/launch.cuh"

namespace gqa::cuda {
namespace {
constexpr int kMaxDevices = 64;
gqa_device known[kMaxDevices];
std::once_flag asked[kMaxDevices];
cudaError_t answer[kMaxDevices];

cudaError_t ask(int ordinal, gqa_device *device) {
  int major = 0, minor = 0;
  const auto get = [&](int32_t *value, cudaDeviceAttr attribute) {
    return cudaDeviceGetAttribute(value, attribute, ordinal);
  };
  if (const auto e = get(&major, cudaDevAttrComputeCapabilityMajor); e != cudaSuccess) return e;
  if (const auto e = get(&minor, cudaDevAttrComputeCapabilityMinor); e != cudaSuccess) return e;
  device->compute_capability = major * 10 + minor;
  if (const auto e = get(&device->num_sms, cudaDevAttrMultiProcessorCount); e != cudaSuccess) return e;
  if (const auto e = get(&device->max_shared_memory, cudaDevAttrMaxSharedMemoryPerBlockOptin); e != cudaSuccess) {
    return e;
  }
  return get(&device->l2_size, cudaDevAttrL2CacheSize);
}
}  // namespace

gqa_status current_device(gqa_device *device) {
  int ordinal = 0;
  GQA_RETURN_IF_ERROR(check_cuda(cudaGetDevice(&ordinal)));
  if (ordinal >= kMaxDevices) return GQA_STATUS_UNSUPPORTED;
  std::call_once(asked[ordinal], [&] { answer[ordinal] = ask(ordinal, &known[ordinal]); });
  *device = known[ordinal];
  return check_cuda(answer[ordinal]);
}

}  // namespace gqa::cuda

extern "C" gqa_status gqa_current_device(gqa_device *device) {
  return device == nullptr ? GQA_STATUS_NULL_POINTER : gqa::cuda::current_device(device);
}

extern "C" const char *gqa_cuda_archs(void) { return GQA_CUDA_ARCHS; }
