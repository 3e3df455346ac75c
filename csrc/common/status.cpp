#include "common/status.h"

#include <cstdio>

namespace gqa {
namespace {
thread_local char cuda_error[256];
}

LaunchLog &launch_log() {
  static LaunchLog log;
  return log;
}

void set_cuda_error(const char *message) { std::snprintf(cuda_error, sizeof(cuda_error), "%s", message); }

}  // namespace gqa

extern "C" {

const char *gqa_status_string(gqa_status status) {
  switch (status) {
    case GQA_STATUS_OK: return "ok";
    case GQA_STATUS_STRUCT_SIZE: return "struct_size is not the size this library was built with";
    case GQA_STATUS_NULL_POINTER: return "a required pointer is NULL";
    case GQA_STATUS_INVALID_ARGUMENT: return "a size or setting is out of range";
    case GQA_STATUS_UNSUPPORTED: return "no kernel serves these params";
    case GQA_STATUS_WORKSPACE_TOO_SMALL: return "the workspace is smaller than the plan's workspace_size";
    case GQA_STATUS_NOT_BUILT: return "this library was built without CUDA";
    case GQA_STATUS_CUDA_ERROR: return "the CUDA runtime reported an error";
  }
  return "unknown status";
}

const char *gqa_last_cuda_error(void) { return gqa::cuda_error; }

const char *gqa_version(void) { return GQA_KERNELS_VERSION; }

void gqa_set_launch_log(gqa_launch_log log, void *user) {
  gqa::launch_log().user.store(user, std::memory_order_relaxed);
  gqa::launch_log().function.store(log, std::memory_order_release);
}

}  // extern "C"
