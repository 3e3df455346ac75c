// Arguments of the kernel that takes one token of each row through all layers of a decoder.
#pragma once

#include "plan/decoder_step.h"

namespace gqa::cuda::decoder_step {

constexpr int kWarps = kStepWarps, kConsumers = 32 * kWarps, kCopiers = 32 * kStepCopyWarps, kThreads = kStepThreads;
constexpr int kTileRows = kStepTileRows, kKeys = kStepKeys, kMaxGroup = kStepGroup;
constexpr float kLog2e = 1.4426950408889634f;

struct Layer {
  const char *q, *k, *v, *o, *gate, *up, *down;
  const char *input_norm, *mlp_norm;
  const char *q_bias, *k_bias, *v_bias;  // or nullptr
  const char *q_norm, *k_norm;           // of a head, or nullptr
  char *k_cache, *v_cache;               // [rows, capacity, kv_heads, head_dim]
  int64_t window_left;                   // keys before its own that a query sees; negative: all
};

struct Args {
  int32_t rows, layers, hidden, intermediate, q_heads, kv_heads, vocabulary, capacity;
  int32_t group, head_dim;          // query heads of a KV head
  int32_t inputs_at, ring_at;       // in shared memory
  int32_t ring_bytes, stage_bytes;  // of the ring, and of a stage at most
  int32_t ahead;                    // stages that are on their way at once
  int32_t splits, min_keys;         // most parts of a row's keys, and the fewest keys worth a part
  float eps, scale;                 // scale: of log2 units
  const char *input;                // [rows, hidden]
  // What blocks hand to each other (exchange.cuh): [rows, outputs of a phase] of the first layer, and from layer to
  // layer.
  uint16_t *after_attention, *after_layer, *qkv, *attention, *activated;
  int64_t of_layer;
  uint64_t *parts;  // [rows * kv_heads, splits, group * (head_dim + 2)]
  const char *norm, *head;
  char *logits;  // [rows, vocabulary]
  gqa_index cache_seqlens, cache_leftpad;
  gqa_rotary rotary;
  Layer layer[kStepLayers];
};

}  // namespace gqa::cuda::decoder_step
