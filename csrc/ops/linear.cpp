// linear: checks, then params for the streaming kernel; what it doesn't serve runs as torch's products.
#include <torch/csrc/stable/library.h>

#include "ops/products.h"
#include "ops/residual_add.h"
#include "ops/rows.h"

namespace gqa::ops {
namespace {

constexpr auto kOp = "linear";
constexpr const char *kNames[3] = {"w1", "w2", "w3"};

// The weights given, in order.
std::vector<Tensor> check(const Tensor &x, const Tensor &w1, const std::optional<Tensor> &w2,
                          const std::optional<Tensor> &w3, const std::optional<Tensor> &bias,
                          const std::optional<Tensor> &weight_scale, const std::optional<Tensor> &residual) {
  check_device(kOp, "x", x);
  check_float_dtype(kOp, "x", x);
  if (x.dim() < 1) fail(kOp, "x must be [..., in_features], got shape " + shape_string(x));
  const int64_t in_features = x.size(x.dim() - 1);
  std::vector<Tensor> weights{w1};
  if (w2.has_value()) weights.push_back(*w2);
  if (w3.has_value()) {
    if (!w2.has_value()) fail(kOp, "w3 must come with a w2, got none");
    weights.push_back(*w3);
  }
  int64_t features = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    if (weights[i].dim() != 2 || weights[i].size(1) != in_features) {
      fail(kOp, std::string(kNames[i]) + " must have shape [out_features, " + std::to_string(in_features) +
                    "] to match x, got " + shape_string(weights[i]));
    }
    check_weight_and_scale(kOp, kNames[i], weights[i], x, "weight_scale", weight_scale);
    features += weights[i].size(0);
  }
  if (bias.has_value()) {
    if (bias->dim() != 1 || bias->size(0) != features) {
      fail(kOp, "bias must have shape [" + std::to_string(features) + "], one value for each output, got " +
                    shape_string(*bias));
    }
    check_same_dtype(kOp, "bias", *bias, "x", x);
    check_same_device(kOp, "bias", *bias, "x", x);
  }
  check_scale(kOp, "weight_scale", weight_scale, features, x);
  check_residual(kOp, residual, x, features);
  return weights;
}

// What the launch log and explain see of torch's product.
void say_torch(const Tensor &x, const char *reason) {
  gqa_plan plan{};
  plan.num_launches = 1;
  plan.launches[0] = {kOp, on_cuda(x) ? "torch" : "cpu", dtype_name_of(gqa_dtype_of(x)), {1, 1, 1}, {1, 1, 1}, 0, 1, 0};
  plan.reason = reason;
  explaining() ? record_plan(plan) : log_launch(plan.launches[0]);
}

Tensor new_output(const Tensor &x, int64_t features) {
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = features;
  return new_tensor(x, {sizes.data(), sizes.size()});
}

// Values [at, at + count) of a vector that may be absent.
std::optional<Tensor> part_of(const std::optional<Tensor> &vector, int64_t at, int64_t count) {
  if (!vector.has_value()) return std::nullopt;
  Tensor whole = *vector;
  return torch::stable::narrow(whole, 0, at, count);
}

Tensor by_products(const Tensor &x, const std::vector<Tensor> &weights, const std::optional<Tensor> &bias,
                   const std::optional<Tensor> &weight_scale, int64_t features) {
  if (weights.size() == 1) return product(x, weights[0], bias, weight_scale);
  Tensor out = new_output(x, features);
  int64_t at = 0;
  for (const Tensor &weight : weights) {
    const int64_t count = weight.size(0);
    Tensor to = torch::stable::narrow(out, out.dim() - 1, at, count);
    const Tensor part = product(x, weight, part_of(bias, at, count), part_of(weight_scale, at, count));
    if (!explaining()) torch::stable::copy_(to, part);
    at += count;
  }
  return out;
}

Tensor linear(const Tensor &x, const Tensor &w1, const std::optional<Tensor> &w2, const std::optional<Tensor> &w3,
              const std::optional<Tensor> &bias, const std::optional<Tensor> &weight_scale,
              const std::optional<Tensor> &residual, bool static_weights) {
  const std::vector<Tensor> weights = check(x, w1, w2, w3, bias, weight_scale, residual);
  gqa_linear_params p{};
  p.struct_size = sizeof(p);
  p.dtype = gqa_dtype_of(x);
  p.in_features = x.size(x.dim() - 1);
  bool in_rows = has_elements(bias) && has_elements(weight_scale);
  for (size_t i = 0; i < weights.size(); ++i) {
    p.weights[i] = weights[i].data_ptr();
    p.weight_stride[i] = weights[i].stride(0);
    p.out_features[i] = weights[i].size(0);
    p.out_stride += p.out_features[i];
    in_rows = in_rows && has_rows(weights[i]);
  }
  if (x.numel() == 0 || p.out_features[0] == 0) {
    const Tensor out = by_products(x, weights, bias, weight_scale, p.out_stride);
    return residual.has_value() ? residual_add(out, *residual) : out;
  }
  Rows rows, added;
  const bool strided = collapse(x, &rows) && rows.count[0] == 1;
  p.tokens = strided ? rows.count[1] : x.numel() / p.in_features;
  p.x = x.data_ptr();
  p.x_stride = strided ? rows.stride[1] : p.in_features;
  p.weight_scale = static_cast<const float *>(data_of(weight_scale));
  p.bias = data_of(bias);
  if (residual.has_value()) {
    in_rows = in_rows && collapse(*residual, &added) && added.count[0] == 1;
    p.residual = residual->data_ptr();
    p.residual_stride = added.stride[1];
  }
  p.out = x.data_ptr();  // until the plan has accepted the call
  p.static_weights = static_weights;
  constexpr auto kEntry = GQA_ENTRY(kOp, linear, gqa_linear_params);
  const char *reason = on_cuda(x) ? refusal(kEntry, p, x) : "on the CPU: torch's matrix product";
  if (!strided || !in_rows) reason = "rows are not contiguous: torch's matrix product";
  if (reason == nullptr) {
    const Tensor out = new_output(x, p.out_stride);
    p.out = out.data_ptr();
    run(kEntry, p, x, p.in_features * p.out_stride);
    return out;
  }
  say_torch(x, reason);
  const Tensor out = by_products(x, weights, bias, weight_scale, p.out_stride);
  return residual.has_value() ? residual_add(out, *residual) : out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CPU, m) { m.impl("linear", TORCH_BOX(&linear)); }

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CUDA, m) { m.impl("linear", TORCH_BOX(&linear)); }

}  // namespace gqa::ops
