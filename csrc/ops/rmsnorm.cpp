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

constexpr auto kNorm = "rmsnorm", kAddNorm = "add_rmsnorm";

void norm_into(const Tensor &x, const Tensor &weight, double eps, double weight_offset, bool cast_before_weight,
               const Tensor &out) {
  const Tensor scale = torch::stable::contiguous(weight);
  const auto rows = as_rows({x, out});
  gqa_rmsnorm_params p{};
  fill_norm(&p, x, scale, rows[0], rows[1], eps, weight_offset, cast_before_weight);
  if (x.numel() != 0) run(GQA_ENTRY(kNorm, rmsnorm, gqa_rmsnorm_params), p, x, p.hidden);
}

Tensor rmsnorm(const Tensor &x, const Tensor &weight, double eps, double weight_offset, bool cast_before_weight) {
  check_norm(kNorm, x, weight, eps);
  const Tensor out = new_contiguous(x);
  norm_into(x, weight, eps, weight_offset, cast_before_weight, out);
  return out;
}

void rmsnorm_out(const Tensor &x, const Tensor &weight, double eps, double weight_offset, bool cast_before_weight,
                 const Tensor &out) {
  check_norm(kNorm, x, weight, eps);
  check_out(kNorm, "out", out, sizes_of(x), "x", x);
  check_apart(kNorm, "out", out, "x", x, true);
  check_apart(kNorm, "out", out, "weight", weight, false);
  norm_into(x, weight, eps, weight_offset, cast_before_weight, out);
}

void check_add_norm(const Tensor &x, const Tensor &residual, const Tensor &weight, double eps) {
  check_norm(kAddNorm, x, weight, eps);
  check_same_shape(kAddNorm, "residual", residual, "x", x);
  check_same_dtype(kAddNorm, "residual", residual, "x", x);
  check_same_device(kAddNorm, "residual", residual, "x", x);
}

void add_norm_into(const Tensor &x, const Tensor &residual, const Tensor &weight, double eps, double weight_offset,
                   bool cast_before_weight, const Tensor &out, const Tensor &sum) {
  const Tensor scale = torch::stable::contiguous(weight);
  const auto rows = as_rows({x, out, residual, sum});
  gqa_add_rmsnorm_params p{};
  fill_norm(&p, x, scale, rows[0], rows[1], eps, weight_offset, cast_before_weight);
  p.residual = rows[2].tensor.data_ptr();
  p.residual_out = rows[3].tensor.data_ptr();
  for (int i = 0; i < 2; ++i) {
    p.residual_stride[i] = rows[2].stride[i];
    p.residual_out_stride[i] = rows[3].stride[i];
  }
  if (x.numel() != 0) run(GQA_ENTRY(kAddNorm, add_rmsnorm, gqa_add_rmsnorm_params), p, x, p.hidden);
}

std::tuple<Tensor, Tensor> add_rmsnorm(const Tensor &x, const Tensor &residual, const Tensor &weight, double eps,
                                       double weight_offset, bool cast_before_weight) {
  check_add_norm(x, residual, weight, eps);
  const Tensor out = new_contiguous(x), sum = new_contiguous(x);
  add_norm_into(x, residual, weight, eps, weight_offset, cast_before_weight, out, sum);
  return {out, sum};
}

void add_rmsnorm_out(const Tensor &x, const Tensor &residual, const Tensor &weight, double eps, double weight_offset,
                     bool cast_before_weight, const Tensor &out, const Tensor &residual_out) {
  check_add_norm(x, residual, weight, eps);
  for (const auto &[name, result] : {std::pair{"out", &out}, {"residual_out", &residual_out}}) {
    check_out(kAddNorm, name, *result, sizes_of(x), "x", x);
    check_apart(kAddNorm, name, *result, "x", x, true);
    check_apart(kAddNorm, name, *result, "residual", residual, true);
    check_apart(kAddNorm, name, *result, "weight", weight, false);
  }
  check_apart(kAddNorm, "residual_out", residual_out, "out", out, false);
  add_norm_into(x, residual, weight, eps, weight_offset, cast_before_weight, out, residual_out);
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CPU, m) {
  m.impl(kNorm, TORCH_BOX(&rmsnorm));
  m.impl("rmsnorm.out", TORCH_BOX(&rmsnorm_out));
  m.impl(kAddNorm, TORCH_BOX(&add_rmsnorm));
  m.impl("add_rmsnorm.out", TORCH_BOX(&add_rmsnorm_out));
}

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CUDA, m) {
  m.impl(kNorm, TORCH_BOX(&rmsnorm));
  m.impl("rmsnorm.out", TORCH_BOX(&rmsnorm_out));
  m.impl(kAddNorm, TORCH_BOX(&add_rmsnorm));
  m.impl("add_rmsnorm.out", TORCH_BOX(&add_rmsnorm_out));
}

}  // namespace gqa::ops
