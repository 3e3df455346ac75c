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
};

constexpr int kDecodeShapeCount = 14;
constexpr DecodeShape kDecodeShapes[kDecodeShapeCount] = {
    {2, 64, 4, 3, 32, 1, 2},  {2, 96, 8, 4, 16, 1, 1},  {2, 128, 8, 2, 16, 1, 1}, {2, 128, 4, 2, 16, 1, 3},
    {2, 256, 3, 2, 16, 1, 2}, {2, 64, 8, 3, 16, 2, 2},  {2, 128, 4, 3, 16, 2, 2}, {1, 64, 8, 3, 32, 1, 2},
    {1, 96, 8, 4, 32, 1, 1},  {1, 128, 8, 3, 16, 1, 2}, {1, 128, 4, 2, 32, 1, 3}, {1, 256, 4, 2, 16, 1, 3},
    {1, 64, 4, 4, 32, 2, 3},  {1, 128, 4, 3, 32, 2, 2},
};

// How cached rows are found: all read the same keys in the same order, so the bytes of the result are the same.
enum class DecodeCache { kContiguous, kPaged, kAny };  // kAny: rows that do not start at multiples of 16 bytes

// A unit is 32 dimensions of a row of the output, with its maximum and sum.
constexpr int kDecodeUnitBytes = 32 * 4 + 8;

// Shared memory of a block without the units it joins: rings, rotated queries, a barrier.
constexpr int decode_fixed_memory(int bytes, int dim, int warps, int stages, int tile, int row_tiles) {
  return warps * stages * 2 * tile * dim * bytes + 8 * row_tiles * (dim + 8) * 2 + 16;
}

struct DecodePlan {
  int shape;        // index into kDecodeShapes
  int32_t cluster;  // blocks that share the keys of a sequence and KV head, at most
  int32_t share;    // tiles that a block gets before a sequence is shared out among more
  float fair;       // the same as a part of the tiles of all sequences, 0 where those do not count
  bool balanced;    // clusters go where there is most room
  DecodeCache cache;
  bool plain;  // the instance without new keys, rotation, window, padding, softcap and further query tokens
  int64_t shared_memory;
};

// nullptr where the kernel serves the params, which the checks of the op have passed; else the reason why not.
const char *refuse_decode_sm90(const gqa_attention_params *p, const gqa_device *device);

// `keys`: the most keys a row attends to, rounded so that caches of nearly the same capacity are divided alike.
DecodePlan plan_decode_sm90(const gqa_attention_params *p, const gqa_device *device, int64_t keys);

}  // namespace gqa
