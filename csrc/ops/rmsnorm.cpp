// rmsnorm and add_rmsnorm: checks, then params for the CPU twin or the CUDA kernel.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/rows.h"
#include "ops/run.h"

namespace gqa::ops {
namespace {

void check_norm(const char *op, const Tensor &x, const Tensor &weight, double eps) {
  check_device(op, "x", x);
  check_float_dtype(op, "x", x);
  if (x.dim() < 1) fail(op, "x must be [..., hidden], got shape " + shape_string(x));
  check_value(op, x.size(x.dim() - 1) > 0, "x", "[..., hidden] with hidden at least 1", "shape " + shape_string(x));
  check_shape(op, "weight", weight, {x.size(x.dim() - 1)}, "[hidden]");
  check_weight_dtype(op, "weight", weight, "x", x);
  check_same_device(op, "weight", weight, "x", x);
  check_value(op, eps >= 0, "eps", "0 or more", std::to_string(eps));
}

template <typename Params>
void fill_norm(Params *p, const Tensor &x, const Tensor &weight, const Rows &rows, const Rows &out, double eps,
               double weight_offset, bool cast_before_weight) {
  p->struct_size = sizeof(Params);
  p->dtype = gqa_dtype_of(x);
  p->weight_dtype = gqa_dtype_of(weight);
  p->x = rows.tensor.data_ptr();
  p->weight = weight.data_ptr();
  p->out = out.tensor.data_ptr();
  p->hidden = rows.width;
  for (int i = 0; i < 2; ++i) {
    p->rows[i] = rows.count[i];
    p->x_stride[i] = rows.stride[i];
    p->out_stride[i] = out.stride[i];
  }
  p->eps = static_cast<float>(eps);
  p->weight_offset = static_cast<float>(weight_offset);
  p->cast_before_weight = cast_before_weight;
}

Tensor rmsnorm(const Tensor &x, const Tensor &weight, double eps, double weight_offset, bool cast_before_weight) {
  constexpr auto kOp = "rmsnorm";
  check_norm(kOp, x, weight, eps);
  const Tensor scale = torch::stable::contiguous(weight);
  Tensor out = new_contiguous(x);
  const auto rows = as_rows({x, out});
  gqa_rmsnorm_params p{};
  fill_norm(&p, x, scale, rows[0], rows[1], eps, weight_offset, cast_before_weight);
  if (x.numel() != 0) run(GQA_ENTRY(kOp, rmsnorm, gqa_rmsnorm_params), p, x, p.hidden);
  return out;
}

std::tuple<Tensor, Tensor> add_rmsnorm(const Tensor &x, const Tensor &residual, const Tensor &weight, double eps,
                                       double weight_offset, bool cast_before_weight) {
  constexpr auto kOp = "add_rmsnorm";
  check_norm(kOp, x, weight, eps);
  check_same_shape(kOp, "residual", residual, "x", x);
  check_same_dtype(kOp, "residual", residual, "x", x);
  check_same_device(kOp, "residual", residual, "x", x);
  const Tensor scale = torch::stable::contiguous(weight);
  Tensor out = new_contiguous(x);
  Tensor sum = new_contiguous(x);
  const auto rows = as_rows({x, out, residual, sum});
  gqa_add_rmsnorm_params p{};
  fill_norm(&p, x, scale, rows[0], rows[1], eps, weight_offset, cast_before_weight);
  p.residual = rows[2].tensor.data_ptr();
  p.residual_out = rows[3].tensor.data_ptr();
  for (int i = 0; i < 2; ++i) {
    p.residual_stride[i] = rows[2].stride[i];
    p.residual_out_stride[i] = rows[3].stride[i];
  }
  if (x.numel() != 0) run(GQA_ENTRY(kOp, add_rmsnorm, gqa_add_rmsnorm_params), p, x, p.hidden);
  return {out, sum};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CPU, m) {
  m.impl("rmsnorm", TORCH_BOX(&rmsnorm));
  m.impl("add_rmsnorm", TORCH_BOX(&add_rmsnorm));
}

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CUDA, m) {
  m.impl("rmsnorm", TORCH_BOX(&rmsnorm));
  m.impl("add_rmsnorm", TORCH_BOX(&add_rmsnorm));
}

}  // namespace gqa::ops
