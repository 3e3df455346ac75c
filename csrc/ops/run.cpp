#include "ops/run.h"

#include <dlfcn.h>

namespace gqa::ops {

// torch's stable API has no call for the current stream; its C shim has, in libtorch_cuda alone. Looking it up at run
// time lets one binary load beside a torch without CUDA.
CUstream_st *current_cuda_stream(int32_t device_index) {
  using Get = int (*)(int32_t, void **);
  static const Get get = [] {
    void *library = dlopen("libtorch_cuda.so", RTLD_NOW | RTLD_NOLOAD);
    return reinterpret_cast<Get>(library ? dlsym(library, "aoti_torch_get_current_cuda_stream") : nullptr);
  }();
  void *stream = nullptr;
  if (get == nullptr || get(device_index, &stream) != 0) {
    throw std::runtime_error("gqa_kernels: this torch has no CUDA, so there is no current stream to launch on");
  }
  return static_cast<CUstream_st *>(stream);
}

void fail_status(const char *op, gqa_status status) {
  std::string message = gqa_status_string(status);
  if (status == GQA_STATUS_CUDA_ERROR) message += std::string(": ") + gqa_last_cuda_error();
  if (status == GQA_STATUS_NOT_BUILT) {
    message = "gqa_kernels was built without CUDA: reinstall with nvcc on PATH or CUDA_HOME set";
  }
  fail(op, message);
}

}  // namespace gqa::ops
