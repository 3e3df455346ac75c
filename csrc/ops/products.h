// For the ops around matrix products: torch's own, and why a call gets them.
#pragma once

#include <array>

#include "ops/run.h"

namespace gqa::ops {

inline bool has_rows(const Tensor &tensor) { return tensor.size(1) <= 1 || tensor.stride(1) == 1; }

inline bool on_cuda(const Tensor &x) { return explaining() ? explain_as_cuda(x.is_cuda()) : x.is_cuda(); }

// Whether the kernels take a call on CUDA, and their plan; if not, the reason.
template <typename Params>
const char *refusal(const Entry<Params> &entry, const Params &p, const Tensor &x, gqa_plan *plan) {
  gqa_device device = explain_device();
  if (!explaining()) {
    const torch::stable::accelerator::DeviceGuard guard(x.get_device_index());
    if (const gqa_status status = gqa_current_device(&device); status != GQA_STATUS_OK) fail_status(entry.name, status);
  }
  const gqa_status status = entry.plan(&p, &device, plan);
  if (status == GQA_STATUS_OK) return nullptr;
  if (status != GQA_STATUS_UNSUPPORTED) fail_status(entry.name, status);
  return plan->reason;
}

template <typename Params>
const char *refusal(const Entry<Params> &entry, const Params &p, const Tensor &x) {
  gqa_plan plan{};
  return refusal(entry, p, x, &plan);
}

// torch's x weight^T + bias; while explaining, a tensor of its shape.
inline Tensor product(const Tensor &x, const Tensor &weight, const std::optional<Tensor> &bias) {
  if (explaining()) {
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = weight.size(0);
    return torch::stable::new_empty(x, {sizes.data(), sizes.size()});
  }
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace gqa::ops
