// Elementwise ops of two inputs, swiglu and residual_add: checks, layout and launch over [rows[0], rows[1], hidden].
#pragma once

#include <algorithm>

#include "plan/plan.h"

namespace gqa {

struct Operand {
  const void *data;
  const int64_t *stride;
};

// The two inputs and the output.
struct Operands {
  Operand first, second, out;
};

inline Operands operands(const gqa_swiglu_params &p) {
  return {{p.gate, p.gate_stride}, {p.up, p.up_stride}, {p.out, p.out_stride}};
}

inline Operands operands(const gqa_residual_add_params &p) {
  return {{p.x, p.x_stride}, {p.residual, p.residual_stride}, {p.out, p.out_stride}};
}

template <typename Params>
gqa_status check_pointwise(const Params *p) {
  GQA_RETURN_IF_ERROR(check_struct(p));
  if (!is_float_dtype(p->dtype)) return GQA_STATUS_UNSUPPORTED;
  if (p->rows[0] < 0 || p->rows[1] < 0 || p->hidden < 0) return GQA_STATUS_INVALID_ARGUMENT;
  if (p->rows[0] * p->rows[1] * p->hidden == 0) return GQA_STATUS_OK;
  const Operands all = operands(*p);
  const bool complete = all.first.data != nullptr && all.second.data != nullptr && all.out.data != nullptr;
  return complete ? GQA_STATUS_OK : GQA_STATUS_NULL_POINTER;
}

template <typename Params>
bool is_dense(const Params &p, const Operand &operand) {
  return (p.rows[1] == 1 || operand.stride[1] == p.hidden) &&
         (p.rows[0] == 1 || operand.stride[0] == p.rows[1] * p.hidden);
}

// Tensors without gaps are one long row, so that narrow rows cost no more than wide ones.
template <typename Params>
Params flattened(const Params &p) {
  Params flat = p;
  const Operands all = operands(p);
  if (!is_dense(p, all.first) || !is_dense(p, all.second) || !is_dense(p, all.out)) return flat;
  flat.hidden = p.rows[0] * p.rows[1] * p.hidden;
  flat.rows[0] = flat.rows[1] = 1;
  return flat;
}

// The CPU twins divide each row into spans of this many elements.
constexpr int64_t kCpuSpan = 8192;

template <typename Params>
int64_t cpu_spans(const Params &p) {
  const Params flat = flattened(p);
  return flat.rows[0] * flat.rows[1] * ceil_div(flat.hidden, kCpuSpan);
}

inline bool aligned16(const Operand &operand, const int64_t *rows, int64_t element) {
  bool all = reinterpret_cast<uintptr_t>(operand.data) % 16 == 0;
  for (int i = 0; i < 2; ++i) all = all && (rows[i] == 1 || operand.stride[i] * element % 16 == 0);
  return all;
}

// Instances of the kernel: what a thread takes of each tensor.
enum PointwiseVariant { kScalar, kVector };

// `flat` is flattened(). x walks a row, y takes several rows where they are short; blocks of 256 threads.
template <typename Params>
gqa_status plan_pointwise(const char *op, const Params &flat, gqa_plan *plan) {
  GQA_RETURN_IF_ERROR(check_pointwise(&flat));
  *plan = {};
  const int64_t rows = flat.rows[0] * flat.rows[1];
  if (rows * flat.hidden == 0) return GQA_STATUS_OK;
  const int64_t element = dtype_size(flat.dtype);
  const Operands all = operands(flat);
  const bool aligned = aligned16(all.first, flat.rows, element) && aligned16(all.second, flat.rows, element) &&
                       aligned16(all.out, flat.rows, element);
  const int64_t runs = ceil_div(flat.hidden, aligned ? 16 / element : 1);
  const int32_t variant = aligned ? kVector : kScalar;
  int64_t x = 256;
  while (x > 1 && x / 2 >= runs) x /= 2;
  const int64_t y = 256 / x;
  const int64_t grid = ceil_div(rows, y) * ceil_div(runs, x);
  if (grid > INT32_MAX) return GQA_STATUS_UNSUPPORTED;
  const char *kernel = variant == kScalar ? "pointwise_scalar" : "pointwise_vector";
  add_launch(plan, make_launch(op, kernel, flat.dtype, {grid}, {x, y}, 0, variant));
  plan->reason = aligned ? "rows are 16-byte aligned" : "rows are not 16-byte aligned";
  return GQA_STATUS_OK;
}

}  // namespace gqa
