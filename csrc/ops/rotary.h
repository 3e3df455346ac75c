// Rotary tables as an argument of an op: checked and put into gqa_rotary.
#pragma once

#include <torch/csrc/stable/ops.h>

#include "ops/checks.h"

namespace gqa::ops {

// What the op calls them, the tensor they rotate, and whether tokens without positions count from 0.
struct RotaryNames {
  const char *cos = "cos", *sin = "sin", *positions = "position_ids", *like = "q";
  bool from_zero = true;
};

struct Rotary {
  Tensor cos, sin;  // keeps a copy alive
  gqa_rotary params{};
};

// cos and sin for `batch` x `seqlen` tokens like `q`: a table [positions, R/2], or gathered [batch or 1, seqlen, R/2].
Rotary as_rotary(const char *op, const Tensor &q, int64_t batch, int64_t seqlen, const Tensor &cos, const Tensor &sin,
                 const std::optional<Tensor> &positions, bool interleaved, const RotaryNames &names = {});

// An int32 or int64 tensor [batch, seqlen], [1, seqlen] or [seqlen].
gqa_index as_index(const char *op, const char *name, const Tensor &index, int64_t batch, int64_t seqlen,
                   const char *like_name, const Tensor &like);

}  // namespace gqa::ops
