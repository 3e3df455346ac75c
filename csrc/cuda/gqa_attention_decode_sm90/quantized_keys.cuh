// The new keys and values of a decode call over a quantised cache: rotated, quantised, staged as one more tile.
#pragma once

#include "common/quantize.h"
#include "cuda/gqa_attention_decode_sm90/new_keys.cuh"

namespace gqa::cuda::decode_sm90 {

// Rows of the tile that no new key fills are zeros.
template <typename C>
__device__ void stage_quantized_keys(const Args &p, const Block<C> &t, char *stage_at) {
  using T = typename C::T;
#pragma unroll 1
  for (int i = p.seqlen_q * C::kChunks + t.lane; i < C::kTile * C::kChunks; i += 32) {
    *reinterpret_cast<uint4 *>(stage_at + 16 * i) = {};
    *reinterpret_cast<uint4 *>(stage_at + C::kTileBytes + 16 * i) = {};
  }
  const auto at = [&](int row, int d) {
    return reinterpret_cast<uint8_t *>(stage_at + row * C::kRowBytes + ((d / 16 ^ C::swizzle(row)) << 4) + d % 16);
  };
  const float k_scale = scale_of(p.k_scale, p.k_scale_stride, t.head);
  const float v_scale = scale_of(p.v_scale, p.v_scale_stride, t.head);
  rotate_rows(
      p, t, p.seqlen_q, t.lane, 32, [&](int row) { return new_row(p, t, p.k, p.k_in, row); },
      [](int row) { return row; },
      [&](int row, const RowPair &pair) {
        *at(row, pair.low) = quantize(p.cache_dtype, to_float(from_float<T>(pair.x.first)), k_scale);
        *at(row, pair.high) = quantize(p.cache_dtype, to_float(from_float<T>(pair.x.second)), k_scale);
      });
  constexpr int kFours = C::kDim / 4;
#pragma unroll 1
  for (int i = t.lane; i < p.seqlen_q * kFours; i += 32) {
    const int row = i / kFours, d = i % kFours * 4;
    const T *from = reinterpret_cast<const T *>(new_row(p, t, p.v, p.v_in, row)) + d;
    uint32_t word = 0;
#pragma unroll
    for (int e = 0; e < 4; ++e) word |= uint32_t{quantize(p.cache_dtype, to_float(from[e]), v_scale)} << 8 * e;
    *reinterpret_cast<uint32_t *>(at(row, d) + C::kTileBytes) = word;
  }
}

}  // namespace gqa::cuda::decode_sm90
