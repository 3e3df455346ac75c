// q and k of an op that works on heads: their shapes, checked and seen as four dimensions.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "ops/checks.h"

namespace gqa::ops {

// [batch, tokens, heads, head_dim], or [tokens, heads, head_dim] as a batch of one.
struct Heads {
  Tensor tensor;
  int64_t size[4];
  int64_t stride[4];
};

inline Heads as_heads(const Tensor &tensor) {
  Heads heads{tensor, {1, 0, 0, 0}, {0, 0, 0, 0}};
  const int64_t skip = 4 - tensor.dim();
  for (int64_t i = skip; i < 4; ++i) {
    heads.size[i] = tensor.size(i - skip);
    heads.stride[i] = heads.size[i] == 1 ? 0 : tensor.stride(i - skip);
  }
  return heads;
}

inline Heads with_unit_stride(const Tensor &tensor) {
  const Heads heads = as_heads(tensor);
  return heads.size[3] <= 1 || heads.stride[3] == 1 ? heads : as_heads(torch::stable::contiguous(tensor));
}

inline void check_heads(const char *op, const Tensor &q, const std::optional<Tensor> &k) {
  constexpr auto kLayout = "[batch, tokens, heads, head_dim] or [tokens, heads, head_dim]";
  check_device(op, "q", q);
  check_float_dtype(op, "q", q);
  check_rank(op, "q", q, {3, 4}, kLayout);
  if (!k.has_value()) return;
  check_rank(op, "k", *k, {3, 4}, kLayout);
  const Heads a = as_heads(q), b = as_heads(*k);
  if (q.dim() != k->dim() || a.size[0] != b.size[0] || a.size[1] != b.size[1] || a.size[3] != b.size[3]) {
    fail(op, "k must have the shape of q " + shape_string(q) + " but for the number of heads, got " + shape_string(*k));
  }
  check_same_dtype(op, "k", *k, "q", q);
  check_same_device(op, "k", *k, "q", q);
}

}  // namespace gqa::ops
