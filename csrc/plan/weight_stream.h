// The kernel that streams weights past a few tokens: the shapes that it is built for, and the shared memory they take.
#pragma once

#include <algorithm>

#include "plan/plan.h"

namespace gqa {

constexpr int kStreamMaxTokens = 16;
constexpr int kStreamWarps = 8;
constexpr int kStreamRows = 32;   // weight rows at a time: two tiles of 16; of the gated kernel one of each matrix
constexpr int kStreamChunk = 64;  // columns in a stage

// How many tokens an instance of the kernel takes. Its rings are as deep as an SM's shared memory allows.
enum StreamVariant { kStreamFour, kStreamEight, kStreamSixteen };

constexpr int stream_stages(int variant) { return variant == kStreamFour ? 6 : variant == kStreamEight ? 5 : 4; }

constexpr StreamVariant stream_variant(int64_t tokens) {
  return tokens <= 4 ? kStreamFour : tokens <= 8 ? kStreamEight : kStreamSixteen;
}

// The most tokens of a variant.
constexpr int stream_tokens(int variant) { return variant == kStreamFour ? 4 : variant == kStreamEight ? 8 : 16; }

// Columns of a warp's sums: the tokens of its tiles, and one more against bank conflicts.
constexpr int stream_sum_columns(int token_tiles) { return 8 * token_tiles + 1; }
constexpr int stream_sums_size(int token_tiles) {
  return 4 * kStreamWarps * kStreamRows * stream_sum_columns(token_tiles);
}

// A block for each SM, where there is an output for each.
constexpr int64_t stream_blocks(int64_t features, int64_t num_sms) { return std::min(num_sms, features); }

// Outputs of a block, at most.
constexpr int64_t stream_outputs(int64_t features, int64_t num_sms) {
  const int64_t blocks = stream_blocks(features, num_sms);
  return (features + blocks - 1) / blocks;
}

// Rows of weights in a stage. A small one leaves room on the SM for the kernel after it.
constexpr int64_t stream_rows(bool gated, int64_t features, int64_t num_sms) {
  const int64_t rows = (stream_outputs(features, num_sms) + 7) / 8 * 8;
  return gated ? kStreamRows : std::min<int64_t>(kStreamRows, rows);
}

// The stages that a warp's ring needs: no more than the chunks that the warp gets.
constexpr int64_t stream_ring(bool gated, int64_t tokens, int64_t features, int64_t columns, int64_t num_sms) {
  const int64_t group = gated ? kStreamRows / 2 : kStreamRows;
  const int64_t groups = (stream_outputs(features, num_sms) + group - 1) / group;
  const int64_t rounds = (columns + kStreamChunk * kStreamWarps - 1) / (kStreamChunk * kStreamWarps);
  return std::min<int64_t>(stream_stages(stream_variant(tokens)), groups * rounds);
}

constexpr int64_t stream_shared_memory(int64_t tokens, int64_t rows, int64_t ring) {
  return stream_sums_size(tokens > 8 ? 2 : 1) + kStreamWarps * ring * (rows + tokens) * 2 * kStreamChunk;
}

inline gqa_launch stream_launch(const char *op, const char *kernel, int32_t dtype, bool gated, int64_t tokens,
                                int64_t features, int64_t columns, const gqa_device &device) {
  const int64_t ring = stream_ring(gated, tokens, features, columns, device.num_sms);
  const int64_t size = stream_shared_memory(tokens, stream_rows(gated, features, device.num_sms), ring);
  const Dim3 grid{stream_blocks(features, device.num_sms)}, block{32 * kStreamWarps};
  return make_launch(op, kernel, dtype, grid, block, size, stream_variant(tokens));
}

// Whether rows begin at multiples of 16 bytes.
inline bool streams_rows(const void *data, int64_t stride, int64_t rows) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (rows == 1 || stride % 8 == 0);
}

}  // namespace gqa
