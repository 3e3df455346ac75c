// residual_add: checks, then params for the CPU twin or the CUDA kernel.
#include "ops/residual_add.h"

#include <torch/csrc/stable/library.h>

#include <algorithm>

#include "ops/rows.h"
#include "ops/run.h"
#include "plan/pointwise.h"

namespace gqa::ops {

Tensor residual_add(const Tensor &x, const Tensor &residual) {
  constexpr auto kOp = "residual_add";
  check_device(kOp, "x", x);
  check_float_dtype(kOp, "x", x);
  if (x.dim() < 1) fail(kOp, "x must be [..., hidden], got shape " + shape_string(x));
  check_same_shape(kOp, "residual", residual, "x", x);
  check_same_dtype(kOp, "residual", residual, "x", x);
  check_same_device(kOp, "residual", residual, "x", x);
  const auto rows = as_rows({x, residual, new_contiguous(x)});
  gqa_residual_add_params p{};
  p.struct_size = sizeof(p);
  p.dtype = gqa_dtype_of(x);
  p.x = rows[0].tensor.data_ptr();
  p.residual = rows[1].tensor.data_ptr();
  p.out = rows[2].tensor.data_ptr();
  p.hidden = rows[2].width;
  for (int i = 0; i < 2; ++i) {
    p.rows[i] = rows[2].count[i];
    p.x_stride[i] = rows[0].stride[i];
    p.residual_stride[i] = rows[1].stride[i];
    p.out_stride[i] = rows[2].stride[i];
  }
  if (x.numel() != 0) {
    run(GQA_ENTRY(kOp, residual_add, gqa_residual_add_params), p, x, std::min(p.hidden, kCpuSpan));
  }
  return rows[2].tensor;
}

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CPU, m) { m.impl("residual_add", TORCH_BOX(&residual_add)); }

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CUDA, m) { m.impl("residual_add", TORCH_BOX(&residual_add)); }

}  // namespace gqa::ops
