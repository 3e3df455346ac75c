// What a warp reads of a tile of keys: scores of its keys, and its values in registers.
#pragma once

#include "cuda/common/async_copy.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/gqa_attention_decode_sm90/queries.cuh"

namespace gqa::cuda::decode_sm90 {

// Of a tile, for each of its 16 keys: key r and 8 + r of rows 8 n + 2 c and the next.
template <typename C>
struct Scores {
  float x[C::kSteps][C::kRowTiles][4];
};

// Of a tile, as the first operand of O^T = V^T P^T.
template <typename C>
struct Values {
  uint32_t x[C::kSteps][C::kDim / 16][4];
};

// Scores of the tile's keys for each row, and the tile's values, out of shared memory: the stage is free after.
template <typename C>
__device__ __forceinline__ void read_tile(const Block<C> &t, const Queries<C> &queries, uint32_t stage, Scores<C> *s,
                                          Values<C> *values) {
#pragma unroll
  for (int step = 0; step < C::kSteps; ++step) {
    float odd[C::kRowTiles][4] = {};  // two chains halve the latency
#pragma unroll
    for (int n = 0; n < C::kRowTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s->x[step][n][e] = 0;
    }
    const uint32_t at = stage + t.key_offset + step * 16 * C::kRowBytes;
#pragma unroll
    for (int d = 0; d < C::kDim / 16; ++d) {
      uint32_t k[4];
      load_matrices(k, chunk_address<C>(at, d));
#pragma unroll
      for (int n = 0; n < C::kRowTiles; ++n) {
        multiply_add<typename C::T>(d % 2 ? odd[n] : s->x[step][n], k, queries.x[n][d][0], queries.x[n][d][1]);
      }
    }
#pragma unroll
    for (int n = 0; n < C::kRowTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) s->x[step][n][e] += odd[n][e];
    }
  }
#pragma unroll
  for (int step = 0; step < C::kSteps; ++step) {
    const uint32_t at = stage + C::kTileBytes + t.value_offset + step * 16 * C::kRowBytes;
#pragma unroll
    for (int d = 0; d < C::kDim / 16; ++d) load_matrices_transposed(values->x[step][d], chunk_address<C>(at, d));
  }
}

}  // namespace gqa::cuda::decode_sm90
