// The query rows of a KV head's group, as the operand of S^T = K Q^T.
#pragma once

#include "cuda/gqa_attention_decode_sm90/block.cuh"

namespace gqa::cuda::decode_sm90 {

// Query rows as the second operand: row 8 n + r, dimensions 16 d + 2 c and 16 d + 8 + 2 c, two of each.
template <typename C>
struct Queries {
  uint32_t x[C::kRowTiles][C::kDim / 16][2];

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
        const int d = 8 * e + 2 * t.c;
        x[n][e / 2][e % 2] = *reinterpret_cast<const uint32_t *>(row + 2 * d);
      }
    }
  }
  __device__ void load_staged(const Args &p, const Block<C> &t, const typename C::T *staged) {
#pragma unroll
    for (int n = 0; n < C::kRowTiles; ++n) {
      const typename C::T *row = staged + min(8 * n + t.r, p.rows - 1) * C::kQueryPitch + 2 * t.c;
#pragma unroll
      for (int e = 0; e < C::kDim / 8; ++e) x[n][e / 2][e % 2] = *reinterpret_cast<const uint32_t *>(row + 8 * e);
    }
  }
};

}  // namespace gqa::cuda::decode_sm90
