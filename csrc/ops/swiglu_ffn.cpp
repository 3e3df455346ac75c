// swiglu_ffn: checks, then params for the fused kernels; what they don't serve runs as torch's products and our swiglu.
#include <torch/csrc/stable/library.h>

#include <array>

#include "ops/products.h"
#include "ops/residual_add.h"
#include "ops/rows.h"
#include "ops/swiglu.h"

namespace gqa::ops {
namespace {

constexpr auto kOp = "swiglu_ffn";

// The op's arguments, but for the promise.
struct Call {
  const Tensor &x, &w_gate;  // or gate and up
  const std::optional<Tensor> &w_up;
  const Tensor &w_down;
  const std::optional<Tensor> &gate_up_scale, &down_scale, &residual;
};

void check_weight(const char *name, const Tensor &weight, const Tensor &x, int64_t hidden,
                  const std::optional<Tensor> &scale) {
  if (weight.dim() != 2 || weight.size(1) != hidden) {
    fail(kOp, std::string(name) + " must have shape [intermediate, " + std::to_string(hidden) + "] to match x, got " +
                  shape_string(weight));
  }
  check_weight_and_scale(kOp, name, weight, x, "gate_up_scale", scale);
}

// The intermediate size.
int64_t check(const Call &call) {
  const auto &[x, w_gate, w_up, w_down, gate_up_scale, down_scale, residual] = call;
  check_device(kOp, "x", x);
  check_float_dtype(kOp, "x", x);
  if (x.dim() < 1) fail(kOp, "x must be [..., hidden], got shape " + shape_string(x));
  const int64_t hidden = x.size(x.dim() - 1);
  check_weight(w_up.has_value() ? "w_gate" : "w_gate_up", w_gate, x, hidden, gate_up_scale);
  int64_t intermediate = w_gate.size(0);
  if (w_up.has_value()) {
    check_weight("w_up", *w_up, x, hidden, gate_up_scale);
    check_same_shape(kOp, "w_up", *w_up, "w_gate", w_gate);
  } else if (intermediate % 2 != 0) {
    fail(kOp, "w_gate_up must have an even number of rows, got " + std::to_string(intermediate));
  } else {
    intermediate /= 2;
  }
  if (w_down.dim() != 2 || w_down.size(1) != intermediate) {
    fail(kOp, "w_down must have shape [any, " + std::to_string(intermediate) + "], got " + shape_string(w_down));
  }
  check_weight_and_scale(kOp, "w_down", w_down, x, "down_scale", down_scale);
  check_scale(kOp, "gate_up_scale", gate_up_scale, 2 * intermediate, x);
  check_scale(kOp, "down_scale", down_scale, w_down.size(0), x);
  check_residual(kOp, residual, x, w_down.size(0));
  return intermediate;
}

// Everything but x, the residual, the scratch and the output.
gqa_swiglu_ffn_params weights(const Call &call, int64_t intermediate) {
  gqa_swiglu_ffn_params p{};
  p.struct_size = sizeof(p);
  p.dtype = gqa_dtype_of(call.x);
  p.hidden = call.w_gate.size(1);
  p.intermediate = intermediate;
  p.out_features = call.w_down.size(0);
  p.w_gate_stride = call.w_gate.stride(0);
  p.w_up_stride = call.w_up.has_value() ? call.w_up->stride(0) : p.w_gate_stride;
  p.w_down_stride = call.w_down.stride(0);
  p.w_gate = call.w_gate.data_ptr();
  const int64_t half = intermediate * p.w_gate_stride * static_cast<int64_t>(call.w_gate.element_size());
  p.w_up = call.w_up.has_value() ? call.w_up->data_ptr() : static_cast<const char *>(p.w_gate) + half;
  p.w_down = call.w_down.data_ptr();
  p.w_gate_scale = static_cast<const float *>(data_of(call.gate_up_scale));
  p.w_up_scale = p.w_gate_scale == nullptr ? nullptr : p.w_gate_scale + intermediate;
  p.w_down_scale = static_cast<const float *>(data_of(call.down_scale));
  return p;
}

Tensor by_products(const Call &call, int64_t intermediate, const char *reason) {
  std::optional<Tensor> up, gate_scale = call.gate_up_scale;
  if (call.w_up.has_value()) {
    std::optional<Tensor> up_scale;
    if (gate_scale.has_value()) {
      Tensor both = *gate_scale;
      gate_scale = torch::stable::narrow(both, 0, 0, intermediate);
      up_scale = torch::stable::narrow(both, 0, intermediate, intermediate);
    }
    up = product(call.x, *call.w_up, std::nullopt, up_scale);
  }
  const Tensor activation = swiglu(product(call.x, call.w_gate, std::nullopt, gate_scale), up);
  explain_why(reason);
  const Tensor out = product(activation, call.w_down, std::nullopt, call.down_scale);
  return call.residual.has_value() ? residual_add(out, *call.residual) : out;
}

Tensor swiglu_ffn(const Tensor &x, const Tensor &w_gate, const std::optional<Tensor> &w_up, const Tensor &w_down,
                  const std::optional<Tensor> &gate_up_scale, const std::optional<Tensor> &down_scale,
                  const std::optional<Tensor> &residual, bool static_weights) {
  const Call call{x, w_gate, w_up, w_down, gate_up_scale, down_scale, residual};
  const int64_t intermediate = check(call);
  if (x.numel() == 0 || intermediate == 0 || w_down.size(0) == 0) return by_products(call, intermediate, nullptr);
  gqa_swiglu_ffn_params p = weights(call, intermediate);
  Rows rows, added;
  const bool strided = collapse(x, &rows) && rows.count[0] == 1;
  bool in_rows = has_rows(w_gate) && (!w_up.has_value() || has_rows(*w_up)) && has_rows(w_down);
  in_rows = in_rows && has_elements(gate_up_scale) && has_elements(down_scale);
  p.tokens = strided ? rows.count[1] : x.numel() / p.hidden;
  p.x = x.data_ptr();
  p.x_stride = strided ? rows.stride[1] : p.hidden;
  if (residual.has_value()) {
    in_rows = in_rows && collapse(*residual, &added) && added.count[0] == 1;
    p.residual = residual->data_ptr();
    p.residual_stride = added.stride[1];
  }
  p.activation = p.out = x.data_ptr();  // until the plan has accepted the call
  p.static_weights = static_weights;
  constexpr auto kEntry = GQA_ENTRY(kOp, swiglu_ffn, gqa_swiglu_ffn_params);
  const char *reason = on_cuda(x) ? refusal(kEntry, p, x) : "on the CPU: torch's matrix products around swiglu";
  if (!strided || !in_rows) reason = "rows are not contiguous: torch's matrix products around swiglu";
  if (reason != nullptr) return by_products(call, intermediate, reason);
  std::vector<int64_t> sizes = sizes_of(x);
  sizes.back() = p.out_features;
  const Tensor out = new_tensor(x, {sizes.data(), sizes.size()});
  const std::array<int64_t, 2> scratch{p.tokens, p.intermediate};
  const Tensor activation = new_tensor(x, {scratch.data(), scratch.size()});
  p.activation = activation.data_ptr();
  p.out = out.data_ptr();
  run(kEntry, p, x, p.hidden * p.intermediate);
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CPU, m) { m.impl("swiglu_ffn", TORCH_BOX(&swiglu_ffn)); }

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CUDA, m) { m.impl("swiglu_ffn", TORCH_BOX(&swiglu_ffn)); }

}  // namespace gqa::ops
