// The kernel that streams weights past a few tokens: the shapes that it is built for, and the shared memory they take.
#pragma once

#include <algorithm>

#include "plan/plan.h"

namespace gqa {

constexpr int kStreamMaxTokens = 16;
constexpr int kStreamTeams = 8;       // of warps; each takes chunks of columns of its own
constexpr int kStreamRows = 32;       // weight rows at a time: two tiles of 16; of the gated kernel one of each matrix
constexpr int kStreamRowBytes = 128;  // of a row in a stage: 64 columns, of e4m3 weights 128
constexpr int kStreamNarrowRows = 8;

// Warps of a team. e4m3 weights have to be widened, which keeps two busy.
constexpr int stream_team(bool e4m3) { return e4m3 ? 2 : 1; }

// How many tokens an instance of the kernel takes; the narrow one takes four, and 8 rows at most.
enum StreamVariant { kStreamFour, kStreamEight, kStreamSixteen, kStreamNarrow };

// Stages of a team's ring: as many as an SM's shared memory allows. Beside e4m3 weights x takes twice the room.
constexpr int stream_stages(int variant, bool e4m3) {
  if (variant == kStreamNarrow) return 12;
  const int stages = variant == kStreamFour ? 6 : variant == kStreamEight ? 5 : 4;
  return e4m3 ? stages - 1 : stages;
}

// The most tokens of a variant.
constexpr int stream_tokens(int variant) { return variant == kStreamSixteen ? 16 : variant == kStreamEight ? 8 : 4; }

// Columns of a warp's sums: the tokens of its tiles, and one more against bank conflicts.
constexpr int stream_sum_columns(int token_tiles) { return 8 * token_tiles + 1; }
constexpr int stream_sums_size(int token_tiles) {
  return 4 * kStreamTeams * kStreamRows * stream_sum_columns(token_tiles);
}

// One launch.
struct StreamShape {
  bool gated, e4m3;
  int64_t tokens, features, columns;
};

// A block for each SM, where there is an output for each.
constexpr int64_t stream_blocks(int64_t features, int64_t num_sms) { return std::min(num_sms, features); }

// Outputs of a block, at most.
constexpr int64_t stream_outputs(int64_t features, int64_t num_sms) {
  const int64_t blocks = stream_blocks(features, num_sms);
  return (features + blocks - 1) / blocks;
}

// Rows of weights in a stage.
constexpr int64_t stream_rows(const StreamShape &shape, int64_t num_sms) {
  const int64_t rows = (stream_outputs(shape.features, num_sms) + 7) / 8 * 8;
  return shape.gated ? kStreamRows : std::min<int64_t>(kStreamRows, rows);
}

constexpr StreamVariant stream_variant(const StreamShape &shape, int64_t num_sms) {
  if (shape.tokens > 4) return shape.tokens <= 8 ? kStreamEight : kStreamSixteen;
  return stream_rows(shape, num_sms) <= kStreamNarrowRows ? kStreamNarrow : kStreamFour;
}

// The stages that a team's ring needs: no more than the chunks that the team gets.
constexpr int64_t stream_ring(const StreamShape &shape, int64_t num_sms) {
  const int64_t group = shape.gated ? kStreamRows / 2 : kStreamRows;
  const int64_t groups = (stream_outputs(shape.features, num_sms) + group - 1) / group;
  const int64_t round = kStreamTeams * kStreamRowBytes / (shape.e4m3 ? 1 : 2);  // columns of all teams
  const int64_t rounds = (shape.columns + round - 1) / round;
  return std::min<int64_t>(stream_stages(stream_variant(shape, num_sms), shape.e4m3), groups * rounds);
}

// At least half an SM's, so that there is one block to an SM. Of smaller ones several would start on the SMs that the
// kernel before leaves first, and the other SMs would stay idle.
constexpr int64_t stream_shared_memory(const StreamShape &shape, const gqa_device &device) {
  const int64_t lines = stream_rows(shape, device.num_sms) + shape.tokens * (shape.e4m3 ? 2 : 1);
  const int64_t rings = kStreamTeams * stream_ring(shape, device.num_sms) * lines * kStreamRowBytes;
  return std::max<int64_t>(stream_sums_size(shape.tokens > 8 ? 2 : 1) + rings, device.max_shared_memory / 2);
}

inline gqa_launch stream_launch(const char *op, const char *kernel, int32_t dtype, const StreamShape &shape,
                                const gqa_device &device) {
  const Dim3 grid{stream_blocks(shape.features, device.num_sms)};
  const Dim3 block{32 * kStreamTeams * stream_team(shape.e4m3)};
  const int64_t size = stream_shared_memory(shape, device);
  gqa_launch launch = make_launch(op, kernel, dtype, grid, block, size, stream_variant(shape, device.num_sms));
  const bool half = dtype == GQA_DTYPE_FLOAT16;
  if (shape.e4m3) launch.dtype = half ? "float16, float8_e4m3fn weights" : "bfloat16, float8_e4m3fn weights";
  return launch;
}

// Whether rows begin at multiples of 16 bytes.
inline bool streams_rows(const void *data, int64_t stride, int64_t rows, bool e4m3 = false) {
  return reinterpret_cast<uintptr_t>(data) % 16 == 0 && (rows == 1 || stride % (e4m3 ? 16 : 8) == 0);
}

}  // namespace gqa
