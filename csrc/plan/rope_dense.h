// Where rope_dense serves: whole heads of aligned vectors that lie side by side in evenly spaced tokens.
#pragma once

#include <algorithm>

#include "plan/plan.h"
#include "plan/rope.h"

namespace gqa {

// Elements from a token to the next, of all in the batch, where they are evenly spaced.
template <typename Params>
int64_t token_stride(const Params &p, const int64_t *stride) {
  return p.seqlen == 1 ? stride[0] : stride[1];
}

// Tokens of a batch follow each other as those of one sequence do, heads of a token lie side by side.
template <typename Params>
bool has_dense_heads(const Params &p, const int64_t *stride, int64_t heads) {
  const int64_t token = token_stride(p, stride);
  return (heads == 1 || stride[2] == p.head_dim) &&
         (p.batch == 1 || p.seqlen == 1 || stride[0] == p.seqlen * stride[1]) && token >= 0 && token <= INT32_MAX;
}

// Rows of the tables where row t is that of token t; 0 where it is not, or may not be.
template <typename Params>
int32_t rows_by_token(const Params &p) {
  const gqa_rotary &r = p.rotary;
  if (p.batch != 1 || (!r.gathered && r.positions.data != nullptr) || r.stride_row < 0 || r.stride_row > INT32_MAX) {
    return 0;
  }
  return static_cast<int32_t>(std::min<int64_t>(r.gathered ? p.seqlen : r.num_positions, INT32_MAX));
}

// `vectors`: every run of a head that a thread touches is made of whole, aligned 16-byte vectors.
template <typename Params>
bool is_dense_rope(const Params &p, bool vectors) {
  const int64_t kv_heads = p.k != nullptr ? p.num_kv_heads : 0, heads = p.num_q_heads + kv_heads;
  const bool dense =
      (p.num_q_heads == 0 ||
       (has_dense_heads(p, p.q_stride, p.num_q_heads) && has_dense_heads(p, p.q_out_stride, p.num_q_heads))) &&
      (kv_heads == 0 || (has_dense_heads(p, p.k_stride, kv_heads) && has_dense_heads(p, p.k_out_stride, kv_heads)));
  return vectors && dense && p.rotary.dim == p.head_dim && heads * p.head_dim <= INT32_MAX &&
         p.batch * p.seqlen <= INT32_MAX / 2;
}

// Of a block. Registers allow an SM more warps in small blocks than in large ones.
constexpr int kRopeThreads = 160;

// x lanes take a head; a block takes as many heads as leave the fewest warps idle. Blocks of one token run side by
// side.
inline void plan_rope_dense(const char *op, const char *kernel, int32_t dtype, int64_t tokens, int64_t heads, int64_t x,
                            const RopeVariant &variant, gqa_plan *plan) {
  constexpr int64_t kMaxGridY = 32768;
  const int64_t in_warp = 32 % x == 0 ? 32 / x : 1;
  const auto warps = [&](int64_t y) { return ceil_div(heads, y) * ceil_div(x * y, int64_t{32}); };
  int64_t y = in_warp;
  for (int64_t more = in_warp; more <= kRopeThreads / x && more < heads + in_warp; more += in_warp) {
    if (warps(more) <= warps(y)) y = more;
  }
  const int64_t z = std::min(std::max<int64_t>(kRopeThreads / (x * y), 1), std::min<int64_t>(tokens, 64));
  const int64_t blocks = ceil_div(tokens, z), grid_y = std::min(blocks, kMaxGridY);
  add_launch(plan, make_launch(op, kernel, dtype, {ceil_div(heads, y), grid_y, ceil_div(blocks, grid_y)}, {x, y, z}, 0,
                               variant.encode()));
  plan->reason = "heads are whole, aligned and side by side in a token";
}

}  // namespace gqa
