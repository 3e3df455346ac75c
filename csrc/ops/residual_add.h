// The op residual_add, for the ops that end with it.
#pragma once

#include "ops/checks.h"

namespace gqa::ops {

Tensor residual_add(const Tensor &x, const Tensor &residual);

}  // namespace gqa::ops
