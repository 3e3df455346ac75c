// The kernel that takes a token of each row through all layers: its limits, and where things lie in shared memory and
// in the workspace.
#pragma once

#include <algorithm>

#include "plan/plan.h"
#include "plan/tensors.h"

namespace gqa {

constexpr int kStepWarps = 8, kStepCopyWarps = 4, kStepThreads = 32 * (kStepWarps + kStepCopyWarps);
constexpr int kStepRows = 8, kStepGroup = 8, kStepLayers = 100, kStepHidden = 8192, kStepSlots = 16;
constexpr int kStepTileRows = 16;                     // weight rows multiplied at a time
constexpr int kStepKeys = 16 * kStepWarps;            // keys of a stage
constexpr int kStepAhead = 2;                         // stages on their way at once: more make others' values late
constexpr int kStepStage = 29184;                     // bytes of a stage of weights at most
constexpr int kStepPart = 64;                         // keys below which a row's are not divided further
constexpr int kStepParts = 32;                        // most parts of a row's keys
constexpr int kStepWeightPitch = 2 * kStepKeys + 16;  // of the weights of a stage's keys, in bytes
constexpr int kStepSums = 2 * kStepWarps * kStepTileRows * kStepRows * 4;  // bytes of the sums of two tiles of 8 rows
constexpr int kStepOwned = 128;   // hidden dimensions that a block keeps, at most
constexpr int kStepBiases = 512;  // biases that a block keeps, at most

// Rows in shared memory are an odd number of 16 bytes, so that ldmatrix meets no bank twice.
constexpr int64_t step_pitch(int64_t columns) { return 2 * columns + 16; }

// Shared memory: barriers and words; the residual stream and the biases of the block's outputs; a row of
// the rotary tables; two buffers of sums; the new token's heads; inputs of a product; the ring.
constexpr int kStepWordsAt = 16 * kStepSlots, kStepResidualAt = kStepWordsAt + 256;
constexpr int kStepBiasesAt = kStepResidualAt + 2 * kStepOwned * kStepRows;
constexpr int kStepRotaryAt = kStepBiasesAt + 2 * kStepBiases, kStepSumsAt = kStepRotaryAt + 1024;
constexpr int kStepHeadsAt = kStepSumsAt + 2 * kStepSums;

struct DecoderStepPlan {
  int64_t inputs_at, ring_at, ring_bytes, stage_bytes, shared_memory;
  int64_t splits;  // most parts of a row's keys
  // In the workspace: what blocks hand to each other, to be filled with ones. All but the parts: of the first layer,
  // and bytes from layer to layer.
  int64_t after_attention, after_layer, qkv, attention, activated, of_layer, parts, workspace_size;
};

inline DecoderStepPlan plan_decoder_step(const gqa_decoder_step_params &p, const gqa_device &device) {
  DecoderStepPlan plan{};
  const int64_t dim = p.head_dim, q = p.num_q_heads * dim, kv = p.num_kv_heads * dim;
  const int64_t group = p.num_q_heads / p.num_kv_heads, pairs = p.batch * p.num_kv_heads;
  plan.splits = std::clamp<int64_t>(device.num_sms / pairs, 1, kStepParts);
  const int64_t widest = std::max({p.hidden_size, p.intermediate, q});
  const int64_t products = p.batch * step_pitch(widest) + 32;
  const int64_t weights = kStepGroup * (kStepWeightPitch + 8 * kStepWarps);
  plan.inputs_at = kStepHeadsAt + round_up((kStepGroup + 2) * step_pitch(dim), 128);
  plan.ring_at = plan.inputs_at + round_up(std::max(products, weights), 128);
  plan.stage_bytes = kStepStage;
  plan.shared_memory = device.max_shared_memory / 128 * 128;
  plan.ring_bytes = plan.shared_memory - plan.ring_at;
  int64_t at = 0;
  const auto place = [&](int64_t bytes) {
    const int64_t before = at;
    at += round_up(bytes, 128);
    return before;
  };
  plan.after_attention = place(2 * p.batch * p.hidden_size);
  plan.after_layer = place(2 * p.batch * p.hidden_size);
  plan.qkv = place(2 * p.batch * (q + 2 * kv));
  plan.attention = place(2 * p.batch * q);
  plan.activated = place(2 * p.batch * p.intermediate);
  plan.of_layer = at;
  at *= p.num_layers;
  plan.parts = place(8 * pairs * plan.splits * group * (dim + 2));
  plan.workspace_size = at;
  return plan;
}

gqa_status check_params(const gqa_decoder_step_params *p);

}  // namespace gqa
