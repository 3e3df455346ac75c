// Rotating one head of one token: the bytes of the op rope.
#pragma once

#include <cstdint>

#include "gqa_kernels.h"

namespace gqa::cpu {

// x and out hold head_dim elements and do not overlap. `offset` is rotary_offset's: -1 makes the rotated part NaN.
template <typename T>
void rotate_head(const gqa_rotary &rotary, int64_t offset, const T *x, T *out, int64_t head_dim);

}  // namespace gqa::cpu
