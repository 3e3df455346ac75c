// For the ops around matrix products: weights with scales, torch's own products, and why a call gets them.
#pragma once

#include <torch/csrc/stable/ops.h>

#include <array>

#include "ops/run.h"

namespace gqa::ops {

inline bool has_rows(const Tensor &tensor) { return tensor.size(1) <= 1 || tensor.stride(1) == 1; }
inline bool has_elements(const std::optional<Tensor> &tensor) {
  return !tensor.has_value() || tensor->size(0) <= 1 || tensor->stride(0) == 1;
}
inline void *data_of(const std::optional<Tensor> &tensor) { return tensor.has_value() ? tensor->data_ptr() : nullptr; }

inline bool on_cuda(const Tensor &x) { return explaining() ? explain_as_cuda(x.is_cuda()) : x.is_cuda(); }

// Of x's dtype, or of float8_e4m3fn with a scale.
inline void check_weight_and_scale(const char *op, const char *name, const Tensor &weight, const Tensor &x,
                                   const char *scale_name, const std::optional<Tensor> &scale) {
  check_same_device(op, name, weight, "x", x);
  const bool e4m3 = weight.scalar_type() == ScalarType::Float8_e4m3fn;
  if (!scale.has_value() && e4m3) {
    fail(op, std::string(scale_name) + " must come with " + name + " of float8_e4m3fn, got none");
  }
  if (!scale.has_value()) return check_same_dtype(op, name, weight, "x", x);
  if (!e4m3) {
    fail(op, std::string(name) + " must be float8_e4m3fn to go with " + scale_name + ", got " + dtype_string(weight));
  }
}

inline void check_scale(const char *op, const char *name, const std::optional<Tensor> &scale, int64_t count,
                        const Tensor &x) {
  if (!scale.has_value()) return;
  check_same_device(op, name, *scale, "x", x);
  check_value(op, scale->scalar_type() == ScalarType::Float, name, "float32", dtype_string(*scale));
  check_value(op, scale->dim() == 1 && scale->size(0) == count, name,
              "one value for each output, [" + std::to_string(count) + "]", shape_string(*scale));
}

// Like the result, [..., features].
inline void check_residual(const char *op, const std::optional<Tensor> &residual, const Tensor &x, int64_t features) {
  if (!residual.has_value()) return;
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = features;
  check_shape(op, "residual", *residual, sizes, "the shape of the result");
  check_same_dtype(op, "residual", *residual, "x", x);
  check_same_device(op, "residual", *residual, "x", x);
}

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

// The float8 weights times their scales, rounded to x's dtype once; they are themselves numbers of that dtype.
inline Tensor dequantised(const Tensor &weight, const Tensor &scale, const Tensor &x) {
  const std::array<int64_t, 2> sizes{weight.size(0), weight.size(1)};
  Tensor result = new_tensor(x, {sizes.data(), sizes.size()});
  if (explaining()) return result;
  torch::stable::copy_(result, weight);
  std::array<StableIValue, 2> stack{torch::stable::detail::from(result),
                                    torch::stable::detail::from(torch::stable::unsqueeze(scale, 1))};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::mul_", "Tensor", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

// torch's x weight^T + bias; while explaining, a tensor of its shape.
inline Tensor product(const Tensor &x, const Tensor &weight, const std::optional<Tensor> &bias,
                      const std::optional<Tensor> &scale = std::nullopt) {
  if (scale.has_value()) return product(x, dequantised(weight, *scale, x), bias);
  if (explaining()) {
    std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
    sizes.back() = weight.size(0);
    return new_tensor(x, {sizes.data(), sizes.size()});
  }
  std::array<StableIValue, 3> stack{torch::stable::detail::from(x), torch::stable::detail::from(weight),
                                    torch::stable::detail::from(bias)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::linear", "", stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace gqa::ops
