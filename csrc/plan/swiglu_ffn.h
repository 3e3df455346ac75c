// swiglu_ffn's two kernels: the shapes they are built for, and the shared memory that these take.
#pragma once

#include "plan/plan.h"

namespace gqa {

gqa_status check_params(const gqa_swiglu_ffn_params *p);

constexpr int kFfnMaxTokens = 16;
constexpr int kFfnWarps = 8;
constexpr int kFfnRows = 32;   // weight rows at a time: two tiles of 16, in the first kernel one of each matrix
constexpr int kFfnChunk = 64;  // columns in a stage

// How many tokens an instance of the kernels takes. Its rings are as deep as an SM's shared memory allows.
enum FfnVariant { kFfnFour, kFfnEight, kFfnSixteen };

constexpr int ffn_stages(int variant) { return variant == kFfnFour ? 6 : variant == kFfnEight ? 5 : 4; }

constexpr FfnVariant ffn_variant(int64_t tokens) {
  return tokens <= 4 ? kFfnFour : tokens <= 8 ? kFfnEight : kFfnSixteen;
}

// Columns of a warp's sums: the tokens of its tiles, and one more against bank conflicts.
constexpr int ffn_sum_columns(int token_tiles) { return 8 * token_tiles + 1; }
constexpr int ffn_sums_size(int token_tiles) { return 4 * kFfnWarps * kFfnRows * ffn_sum_columns(token_tiles); }

constexpr int64_t ffn_shared_memory(int64_t tokens) {
  const int64_t stage = (kFfnRows + tokens) * 2 * kFfnChunk;
  return ffn_sums_size(tokens > 8 ? 2 : 1) + kFfnWarps * ffn_stages(ffn_variant(tokens)) * stage;
}

}  // namespace gqa
