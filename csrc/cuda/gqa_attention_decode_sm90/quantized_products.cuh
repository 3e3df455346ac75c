// Products of the query with 8-bit keys.
#pragma once

#include "cuda/gqa_attention_decode_sm90/tiles.cuh"

namespace gqa::cuda::decode_sm90 {

// Scores of the keys of a tile, without the scales.
template <typename C, bool kInt8>
__device__ __forceinline__ void score_keys(const Queries<C> &queries, Words<C> (&keys)[C::kSteps], Scores<C> *scores) {
#pragma unroll
  for (int step = 0; step < C::kSteps; ++step) {
    float odd[C::kRowTiles][4] = {};  // two chains halve the latency; several row tiles have them anyway
#pragma unroll
    for (int n = 0; n < C::kRowTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores->x[step][n][e] = 0;
    }
    keys[step].template each_key<kInt8>([&](int d, const uint32_t(&k)[4]) {
#pragma unroll
      for (int n = 0; n < C::kRowTiles; ++n) {
        multiply_add<__half>(C::kRowTiles == 1 && d % 2 ? odd[n] : scores->x[step][n], k, queries.x[n][d][0],
                             queries.x[n][d][1]);
      }
    });
#pragma unroll
    for (int n = 0; n < C::kRowTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 4; ++e) scores->x[step][n][e] += odd[n][e];
    }
  }
}

}  // namespace gqa::cuda::decode_sm90
