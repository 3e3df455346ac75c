// Which decode calls the Hopper kernel serves, and how the keys of one are shared out: pure host functions.
#pragma once

#include "gqa_kernels.h"

namespace gqa {

// A kernel of csrc/cuda/gqa_attention_decode_sm90: `resident` blocks of it fit an SM.
struct DecodeShape {
  int bytes;  // of a cached element; 1: quantised
  int dim, warps, stages;
  int tile;  // keys
  int row_tiles, resident;
  int heads;  // KV heads of a block, each with a part of its warps: narrow rows are fetched with their neighbours
  int turns;  // blocks of a cluster where sequences of unlike length take turns, 0: they do not
};

constexpr int kDecodeShapeCount = 15;
constexpr DecodeShape kDecodeShapes[kDecodeShapeCount] = {
    {2, 64, 4, 3, 32, 1, 2, 1, 8},  {2, 96, 8, 2, 16, 1, 2, 2, 0},   {2, 128, 8, 2, 16, 1, 1, 1, 0},
    {2, 128, 6, 2, 16, 1, 2, 1, 0}, {2, 128, 4, 2, 16, 1, 3, 1, 16}, {2, 256, 3, 2, 16, 1, 2, 1, 8},
    {2, 64, 8, 3, 16, 2, 2, 1, 0},  {2, 128, 4, 3, 16, 2, 2, 1, 0},  {1, 64, 8, 4, 32, 1, 1, 2, 8},
    {1, 96, 8, 4, 32, 1, 1, 4, 0},  {1, 128, 8, 2, 32, 1, 1, 1, 0},  {1, 128, 4, 2, 32, 1, 3, 1, 16},
    {1, 256, 4, 2, 16, 1, 3, 1, 0}, {1, 64, 4, 4, 32, 2, 3, 1, 0},   {1, 128, 4, 6, 16, 2, 2, 1, 0},
};

// How cached rows are found: all read the same keys in the same order, so the bytes of the result are the same.
enum class DecodeCache { kContiguous, kPaged, kAny };  // kAny: rows that do not start at multiples of 16 bytes

// A unit is 32 dimensions of a row of the output, with its maximum and sum.
constexpr int kDecodeUnitBytes = 32 * 4 + 8;

// Shared memory of a block without the units it joins: rings, rotated queries, a barrier.
constexpr int decode_fixed_memory(const DecodeShape &shape) {
  const int rings = shape.warps * shape.stages * 2 * shape.tile * shape.dim * shape.bytes;
  return rings + shape.heads * 8 * shape.row_tiles * (shape.dim + 8) * 2 + 16;
}

struct DecodePlan {
  int shape;  // index into kDecodeShapes
  int heads;  // KV heads of a block
  int32_t grid[3];
  int32_t cluster;    // blocks that share the keys of a sequence and KV head, at most
  int32_t turns;      // clusters whose blocks the sequences and heads take in turn, 0: each has a cluster of its own
  int32_t share;      // tiles that a block gets before a sequence is shared out among more
  float fair;         // turns: the same as a part of the tiles of all sequences
  bool early;         // the first tiles are loaded ahead of the length
  bool balanced;      // clusters go where there is most room
  bool programmatic;  // blocks start while the kernel before runs: worth it where that does not crowd them on some SMs
  bool triggers_early;  // the next kernel's blocks may start as soon as all of ours have
  DecodeCache cache;
  bool plain;  // the instance without new keys, rotation, window, padding, softcap and further query tokens
  int64_t shared_memory;
};

// nullptr where the kernel serves the params, which the checks of the op have passed; else the reason why not.
const char *refuse_decode_sm90(const gqa_attention_params *p, const gqa_device *device);

// `keys`: the most keys a row attends to, rounded so that caches of nearly the same capacity are divided alike.
DecodePlan plan_decode_sm90(const gqa_attention_params *p, const gqa_device *device, int64_t keys);

}  // namespace gqa
