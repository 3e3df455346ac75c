// swiglu_ffn's two kernels: how each divides weight rows over blocks and a row over the stages of a block's ring.
#pragma once

#include "plan/plan.h"

namespace gqa {

gqa_status check_params(const gqa_swiglu_ffn_params *p);

constexpr int kFfnMaxTokens = 16;
constexpr int kFfnConsumers = 4;  // warps that multiply; one more fills the ring
constexpr int kFfnRows = 32;      // weight rows in a stage: two tiles of 16, in the first kernel one of each matrix

// One kernel: `features` outputs for each token, each a dot product over `columns`; two of them where gated.
struct FfnStream {
  int64_t blocks;
  int64_t chunk;  // columns in a stage
  int64_t stages;
  int64_t shared_memory;
};

constexpr int64_t ffn_pitch(int64_t chunk) { return 2 * chunk + 16; }  // bytes; ldmatrix meets no bank twice

// Partial sums of each consumer, of two groups of rows in turn; a column more than tokens against bank conflicts.
constexpr int64_t ffn_sums(int64_t tokens) { return 4 * 2 * kFfnConsumers * kFfnRows * ((tokens > 8 ? 16 : 8) + 1); }

FfnStream ffn_stream(int64_t features, int64_t columns, int64_t tokens, const gqa_device &device);

}  // namespace gqa
