// swiglu: checks, then params for the CPU twin or the CUDA kernel.
#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "ops/rows.h"
#include "ops/run.h"
#include "ops/swiglu.h"
#include "plan/pointwise.h"

namespace gqa::ops {
namespace {

constexpr auto kOp = "swiglu";

// `up` is the tensor of that name, or the second half of each row of `gate`.
void apply(const Rows &gate, const Rows &up, int64_t up_offset, const Rows &out) {
  gqa_swiglu_params p{};
  p.struct_size = sizeof(p);
  p.dtype = gqa_dtype_of(out.tensor);
  p.gate = gate.tensor.data_ptr();
  p.up = static_cast<const char *>(up.tensor.data_ptr()) + up_offset * static_cast<int64_t>(up.tensor.element_size());
  p.out = out.tensor.data_ptr();
  p.hidden = out.width;
  for (int i = 0; i < 2; ++i) {
    p.rows[i] = out.count[i];
    p.gate_stride[i] = gate.stride[i];
    p.up_stride[i] = up.stride[i];
    p.out_stride[i] = out.stride[i];
  }
  if (out.tensor.numel() != 0) {
    run(GQA_ENTRY(kOp, swiglu, gqa_swiglu_params), p, out.tensor, std::min(p.hidden, kCpuSpan));
  }
}

// Checks the inputs; the sizes of the result.
std::vector<int64_t> check_inputs(const Tensor &gate, const std::optional<Tensor> &up) {
  check_device(kOp, "gate", gate);
  check_float_dtype(kOp, "gate", gate);
  if (up.has_value()) {
    if (gate.dim() < 1) fail(kOp, "gate must be [..., hidden], got shape " + shape_string(gate));
    check_same_shape(kOp, "up", *up, "gate", gate);
    check_same_dtype(kOp, "up", *up, "gate", gate);
    check_same_device(kOp, "up", *up, "gate", gate);
    return sizes_of(gate);
  }
  const int64_t width = gate.dim() < 1 ? 1 : gate.size(gate.dim() - 1);
  if (width % 2 != 0) {
    fail(kOp,
         "gate must be [..., 2 * hidden], gate and up side by side, where up is None; got shape " + shape_string(gate));
  }
  std::vector<int64_t> sizes = sizes_of(gate);
  sizes.back() = width / 2;
  return sizes;
}

void swiglu_into(const Tensor &gate, const std::optional<Tensor> &up, const Tensor &out) {
  if (up.has_value()) {
    const auto rows = as_rows({gate, *up, out});
    apply(rows[0], rows[1], 0, rows[2]);
  } else {
    const auto rows = as_rows({gate, out});
    apply(rows[0], rows[0], rows[1].width, rows[1]);
  }
}

void swiglu_out(const Tensor &gate, const std::optional<Tensor> &up, const Tensor &out) {
  check_out(kOp, "out", out, check_inputs(gate, up), "gate", gate);
  check_apart(kOp, "out", out, "gate", gate, up.has_value());
  if (up.has_value()) check_apart(kOp, "out", out, "up", *up, true);
  swiglu_into(gate, up, out);
}

}  // namespace

Tensor swiglu(const Tensor &gate, const std::optional<Tensor> &up) {
  const std::vector<int64_t> sizes = check_inputs(gate, up);
  const Tensor out = new_tensor(gate, {sizes.data(), sizes.size()});
  swiglu_into(gate, up, out);
  return out;
}

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CPU, m) {
  m.impl(kOp, TORCH_BOX(&swiglu));
  m.impl("swiglu.out", TORCH_BOX(&swiglu_out));
}

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CUDA, m) {
  m.impl(kOp, TORCH_BOX(&swiglu));
  m.impl("swiglu.out", TORCH_BOX(&swiglu_out));
}

}  // namespace gqa::ops
