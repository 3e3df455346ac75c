// The query rows of a KV head's group, as the operand of S^T = K Q^T.
#pragma once

#include "common/quantize.h"
#include "cuda/common/mma.cuh"
#include "cuda/gqa_attention_decode_sm90/block.cuh"
#include "cuda/gqa_attention_decode_sm90/quantized_tiles.cuh"

namespace gqa::cuda::decode_sm90 {

// Query rows as the second operand: row 8 n + r, dimensions 16 d + 2 c and 16 d + 8 + 2 c, two of each; over a
// quantised cache dimensions 16 d + 4 c and 16 d + 4 c + 2, as float16.
template <typename C>
struct Queries {
  uint32_t x[C::kRowTiles][C::kDim / 16][2];
  float scale[C::kRowTiles][2];  // quantised cache: of the scores of rows 8 n + 2 c and the next

  __device__ static int pair_at(int e, int c) {
    return C::kBytes == 1 ? 16 * (e / 2) + 4 * c + 2 * (e % 2) : 8 * e + 2 * c;
  }

  __device__ static const char *row_at(const Args &p, const Block<C> &t, int row) {
    const int token = C::kPlain ? 0 : token_of_row(p, row);
    return p.q + t.b * p.q_batch + token * p.q_token +
           (static_cast<int64_t>(t.head) * p.group + row - token * p.group) * p.q_head;
  }
  // Rows past the last repeat it: what comes of them is not used.
  __device__ void load(const Args &p, const Block<C> &t) {
#pragma unroll
    for (int n = 0; n < C::kRowTiles; ++n) {
      const char *row = row_at(p, t, min(8 * n + t.r, p.rows - 1));
#pragma unroll
      for (int e = 0; e < C::kDim / 8; ++e) {
        x[n][e / 2][e % 2] = *reinterpret_cast<const uint32_t *>(row + 2 * pair_at(e, t.c));
      }
    }
  }
  __device__ void load_staged(const Args &p, const Block<C> &t, const typename C::T *staged) {
#pragma unroll
    for (int n = 0; n < C::kRowTiles; ++n) {
      const typename C::T *row = staged + min(8 * n + t.r, p.rows - 1) * C::kQueryPitch;
#pragma unroll
      for (int e = 0; e < C::kDim / 8; ++e) {
        x[n][e / 2][e % 2] = *reinterpret_cast<const uint32_t *>(row + pair_at(e, t.c));
      }
    }
  }

  // To float16, each row by a power of two that brings its largest finite number to 2^14 or more.
  __device__ void suit_quantized(const Args &p, const Block<C> &t) {
    const float k_scale = scale_of(p.k_scale, p.k_scale_stride, t.head) * p.scale;
#pragma unroll
    for (int n = 0; n < C::kRowTiles; ++n) {
      float back = 1;
      if constexpr (!std::is_same_v<typename C::T, __half>) back = to_half(x[n]);
#pragma unroll
      for (int e = 0; e < 2; ++e) scale[n][e] = k_scale * __shfl_sync(~0u, back, 4 * (2 * t.c + e));
    }
  }

 private:
  // Returns the factor that undoes the row's.
  __device__ static float to_half(uint32_t (&row)[C::kDim / 16][2]) {
    uint32_t top = 0;
#pragma unroll
    for (int e = 0; e < C::kDim / 4; ++e) {
      const uint32_t magnitude = row[e / 4][e / 2 % 2] >> 16 * (e % 2) & 0x7fffu;
      if (magnitude < 0x7f80u) top = max(top, magnitude);
    }
    top = max(top, __shfl_xor_sync(~0u, top, 1));
    top = max(top, __shfl_xor_sync(~0u, top, 2));
    const int exponent = max(top >> 7, 15u);
    const float factor = __int_as_float((268 - exponent) << 23);
#pragma unroll
    for (int e = 0; e < C::kDim / 8; ++e) {
      const float2 pair = unpack<__nv_bfloat16>(row[e / 2][e % 2]);
      row[e / 2][e % 2] = pack<__half>(pair.x * factor, pair.y * factor);
    }
    return __int_as_float((exponent - 14) << 23);
  }
};

}  // namespace gqa::cuda::decode_sm90
