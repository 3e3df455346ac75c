// swiglu_ffn: checks, then params for the fused kernels; what they don't serve runs as torch's products and our swiglu.
#include <torch/csrc/stable/library.h>

#include <array>

#include "ops/products.h"
#include "ops/rows.h"
#include "ops/swiglu.h"

namespace gqa::ops {
namespace {

constexpr auto kOp = "swiglu_ffn";

void check_weight(const char *name, const Tensor &weight, const Tensor &x, int64_t hidden) {
  if (weight.dim() != 2 || weight.size(1) != hidden) {
    fail(kOp, std::string(name) + " must have shape [intermediate, " + std::to_string(hidden) + "] to match x, got " +
                  shape_string(weight));
  }
  check_same_dtype(kOp, name, weight, "x", x);
  check_same_device(kOp, name, weight, "x", x);
}

// The intermediate size.
int64_t check(const Tensor &x, const Tensor &w_gate, const std::optional<Tensor> &w_up, const Tensor &w_down) {
  check_device(kOp, "x", x);
  check_float_dtype(kOp, "x", x);
  if (x.dim() < 1) fail(kOp, "x must be [..., hidden], got shape " + shape_string(x));
  const int64_t hidden = x.size(x.dim() - 1);
  check_weight(w_up.has_value() ? "w_gate" : "w_gate_up", w_gate, x, hidden);
  int64_t intermediate = w_gate.size(0);
  if (w_up.has_value()) {
    check_weight("w_up", *w_up, x, hidden);
    check_same_shape(kOp, "w_up", *w_up, "w_gate", w_gate);
  } else if (intermediate % 2 != 0) {
    fail(kOp, "w_gate_up must have an even number of rows, got " + std::to_string(intermediate));
  } else {
    intermediate /= 2;
  }
  if (w_down.dim() != 2 || w_down.size(1) != intermediate) {
    fail(kOp, "w_down must have shape [any, " + std::to_string(intermediate) + "], got " + shape_string(w_down));
  }
  check_same_dtype(kOp, "w_down", w_down, "x", x);
  check_same_device(kOp, "w_down", w_down, "x", x);
  return intermediate;
}

// Everything but x, the scratch and the output.
gqa_swiglu_ffn_params weights(const Tensor &w_gate, const std::optional<Tensor> &w_up, const Tensor &w_down,
                              int64_t intermediate) {
  gqa_swiglu_ffn_params p{};
  p.struct_size = sizeof(p);
  p.dtype = gqa_dtype_of(w_down);
  p.hidden = w_gate.size(1);
  p.intermediate = intermediate;
  p.out_features = w_down.size(0);
  p.w_gate_stride = w_gate.stride(0);
  p.w_up_stride = w_up.has_value() ? w_up->stride(0) : p.w_gate_stride;
  p.w_down_stride = w_down.stride(0);
  p.w_gate = w_gate.data_ptr();
  const int64_t half = intermediate * p.w_gate_stride * static_cast<int64_t>(w_gate.element_size());
  p.w_up = w_up.has_value() ? w_up->data_ptr() : static_cast<const char *>(p.w_gate) + half;
  p.w_down = w_down.data_ptr();
  return p;
}

Tensor by_products(const Tensor &x, const Tensor &w_gate, const std::optional<Tensor> &w_up, const Tensor &w_down,
                   const char *reason) {
  std::optional<Tensor> up;
  if (w_up.has_value()) up = product(x, *w_up, std::nullopt);
  const Tensor activation = swiglu(product(x, w_gate, std::nullopt), up);
  explain_why(reason);
  return product(activation, w_down, std::nullopt);
}

Tensor swiglu_ffn(const Tensor &x, const Tensor &w_gate, const std::optional<Tensor> &w_up, const Tensor &w_down,
                  bool static_weights) {
  const int64_t intermediate = check(x, w_gate, w_up, w_down);
  if (x.numel() == 0 || intermediate == 0 || w_down.size(0) == 0) return by_products(x, w_gate, w_up, w_down, nullptr);
  gqa_swiglu_ffn_params p = weights(w_gate, w_up, w_down, intermediate);
  Rows rows;
  const bool strided = collapse(x, &rows) && rows.count[0] == 1;
  p.tokens = strided ? rows.count[1] : x.numel() / p.hidden;
  p.x = x.data_ptr();
  p.x_stride = strided ? rows.stride[1] : p.hidden;
  p.activation = p.out = x.data_ptr();  // until the plan has accepted the call
  p.static_weights = static_weights;
  constexpr auto kEntry = GQA_ENTRY(kOp, swiglu_ffn, gqa_swiglu_ffn_params);
  const char *reason = on_cuda(x) ? refusal(kEntry, p, x) : "on the CPU: torch's matrix products around swiglu";
  if (!strided || !has_rows(w_gate) || (w_up.has_value() && !has_rows(*w_up)) || !has_rows(w_down)) {
    reason = "rows are not contiguous: torch's matrix products around swiglu";
  }
  if (reason != nullptr) return by_products(x, w_gate, w_up, w_down, reason);
  std::vector<int64_t> sizes(x.sizes().begin(), x.sizes().end());
  sizes.back() = p.out_features;
  const Tensor out = torch::stable::new_empty(x, {sizes.data(), sizes.size()});
  const std::array<int64_t, 2> scratch{p.tokens, p.intermediate};
  const Tensor activation = torch::stable::new_empty(x, {scratch.data(), scratch.size()});
  p.activation = activation.data_ptr();
  p.out = out.data_ptr();
  run(kEntry, p, x, p.hidden * p.intermediate);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CPU, m) { m.impl("swiglu_ffn", TORCH_BOX(&swiglu_ffn)); }

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CUDA, m) { m.impl("swiglu_ffn", TORCH_BOX(&swiglu_ffn)); }

}  // namespace gqa::ops
