// What the kernel that streams weights past a few tokens is given: up to three matrices side by side, or gate and up;
// and its instances.
#pragma once

#include "cuda/common/launch.cuh"
#include "plan/weight_stream.h"

namespace gqa::cuda {

struct WeightStream {
  const void *weights[3];    // [outputs of each, columns], of x's dtype or e4m3
  int64_t weight_stride[3];  // in elements
  const float *scale[2];     // of e4m3: [features], of weights[0] alone where they are gate and up, and of weights[1]
  const void *bias;          // [features] or nullptr
  const void *residual;      // [tokens, features] or nullptr
  int64_t residual_stride;
  const void *x;  // [tokens, columns]
  int64_t x_stride;
  void *out;  // [tokens, features]
  int64_t out_stride;
  int32_t ends[2];  // outputs of the first matrix, and of the first two: features where there are no more
  int32_t features, columns, tokens;
  int32_t rows, ring;  // of weights in a stage, and stages of a team: the launch sets them
  bool gated;          // out = swiglu of the products with weights[0] and weights[1]
  bool early;          // the weights may be read before the kernel before has ended
};

struct E4m3 {
  uint8_t bits;
};

// An instance of the kernel. Warps work in teams: of one warp, or of two with 16 of the 32 rows each.
template <typename Input, typename Weight, bool kIsGated, int kMostTokens, int kNumStages>
struct StreamConfig {
  using T = Input;
  using W = Weight;
  static constexpr bool kGated = kIsGated, kE4m3 = sizeof(W) == 1;
  static constexpr int kTokens = kMostTokens, kTokenTiles = kMostTokens > 8 ? 2 : 1, kStages = kNumStages;
  static constexpr int kTeam = 32 * stream_team(kE4m3), kThreads = kStreamTeams * kTeam;
  static constexpr int kChunk = kStreamRowBytes / static_cast<int>(sizeof(W));  // columns in a stage
  static constexpr int kLines = kE4m3 ? 2 : 1;                                  // of 128 bytes, of a token in a stage
  static constexpr int kGroup = kGated ? kStreamRows / 2 : kStreamRows;         // outputs at a time
};

gqa_status launch_weight_stream(const gqa_launch &plan, int32_t dtype, const WeightStream &p, cudaStream_t stream);
gqa_status launch_e4m3_stream(const gqa_launch &plan, int32_t dtype, const WeightStream &p, cudaStream_t stream);

}  // namespace gqa::cuda
