// A tensor [..., width] seen as rows[0] x rows[1] strided rows, or copied once where its strides do not fit that.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "ops/checks.h"

namespace gqa::ops {

struct Rows {
  Tensor tensor;  // keeps a copy alive
  int64_t count[2] = {1, 1};
  int64_t stride[2] = {0, 0};
  int64_t width = 0;
};

// Collapses the leading dimensions into at most two; false where that takes more.
inline bool collapse(const Tensor &tensor, Rows *rows) {
  const auto sizes = tensor.sizes();
  const auto strides = tensor.strides();
  const int64_t last = tensor.dim() - 1;
  rows->tensor = tensor;
  rows->width = sizes[last];
  if (sizes[last] > 1 && strides[last] != 1) return false;
  std::vector<std::pair<int64_t, int64_t>> dims;  // (size, stride), innermost first
  for (int64_t i = last - 1; i >= 0; --i) {
    if (sizes[i] == 1) continue;
    if (!dims.empty() && strides[i] == dims.back().first * dims.back().second) {
      dims.back().first *= sizes[i];
    } else {
      dims.emplace_back(sizes[i], strides[i]);
    }
  }
  if (dims.size() > 2) return false;
  for (size_t i = 0; i < dims.size(); ++i) {
    rows->count[1 - i] = dims[i].first;
    rows->stride[1 - i] = dims[i].second;
  }
  return true;
}

// Rows of several tensors of one shape, all divided alike.
inline std::vector<Rows> as_rows(const std::vector<Tensor> &tensors) {
  std::vector<Rows> all(tensors.size());
  bool alike = true;
  for (size_t i = 0; i < tensors.size(); ++i) {
    if (!collapse(tensors[i], &all[i])) {
      all[i] = Rows{};
      collapse(torch::stable::contiguous(tensors[i]), &all[i]);
    }
    alike = alike && all[i].count[0] == all[0].count[0] && all[i].count[1] == all[0].count[1];
  }
  if (alike) return all;
  // Different factorisations: a contiguous tensor can take any, so follow the one that is not flat.
  int64_t outer = 1, inner = 1;
  for (const Rows &rows : all) {
    if (rows.count[0] > 1) outer = rows.count[0], inner = rows.count[1];
  }
  for (size_t i = 0; i < all.size(); ++i) {
    if (all[i].count[0] == outer && all[i].count[1] == inner) continue;
    if (all[i].count[0] != 1) {
      const Tensor copy = torch::stable::contiguous(tensors[i]);
      all[i] = Rows{};
      collapse(copy, &all[i]);
    }
    all[i].count[0] = outer;
    all[i].count[1] = inner;
    all[i].stride[0] = inner * all[i].stride[1];
  }
  return all;
}

}  // namespace gqa::ops
