// How rows of queries, keys and values lie in shared memory.
#pragma once

#include <cstdint>

namespace gqa::cuda {

// Rows of kDim halves in shared memory, their 16-byte columns permuted so that eight rows of one column lie in
// different banks. The permutation is an exclusive or with a function of the row modulo 8.
template <int kDim>
constexpr uint32_t kPermuted = kDim % 64 == 0 ? 8 : 4;  // columns among which it moves one

template <int kDim>
__device__ __forceinline__ uint32_t permutation(uint32_t row) {
  static_assert(kDim % 64 == 0 || kDim == 96, "other widths need another permutation");
  return kDim % 64 == 0 ? row & 7 : (row >> 1) & 3;
}

template <int kDim>
__device__ __forceinline__ uint32_t shared_offset(uint32_t row, uint32_t column) {
  return row * (kDim * 2) + ((column ^ permutation<kDim>(row)) << 4);
}

// Four 8 x 8 matrices of a 16 x 16 tile as load_matrices wants them. kAcross: the second matrix is to the right of the
// first (keys as the b operand), else below it (queries, and values transposed).
template <int kDim, bool kAcross>
struct LaneAddress {
  uint32_t row_bytes, column;

  __device__ explicit LaneAddress(int lane) {
    const uint32_t matrix = lane / 8, right = kAcross ? matrix & 1 : matrix >> 1,
                   down = kAcross ? matrix >> 1 : matrix & 1;
    row_bytes = (down * 8 + lane % 8) * (kDim * 2);
    column = right ^ permutation<kDim>(lane % 8);
  }

  // Of the tile at row `row`, a multiple of 8, and elements 16 pair ... 16 pair + 15.
  __device__ uint32_t at(uint32_t base, int row, int pair) const {
    constexpr uint32_t kPart = kPermuted<kDim>;
    return base + row_bytes + ((2 * pair % kPart ^ column) << 4) + (row * (kDim * 2) + 2 * pair / kPart * kPart * 16);
  }
};

}  // namespace gqa::cuda
