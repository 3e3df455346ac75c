// The op swiglu, for the op that has one inside.
#pragma once

#include <optional>

#include "ops/checks.h"

namespace gqa::ops {

Tensor swiglu(const Tensor &gate, const std::optional<Tensor> &up);

}  // namespace gqa::ops
