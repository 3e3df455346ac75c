// An 8 x 8 matrix of 16-bit numbers across a warp, transposed.
#pragma once

#include <cstdint>

namespace gqa::cuda {

__device__ __forceinline__ uint32_t transpose_matrix(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

}  // namespace gqa::cuda
