// Which decode calls the Hopper kernels serve, and how the keys of one are shared out: pure host functions.
#pragma once

#include "gqa_kernels.h"

namespace gqa {

// A kernel of gqa_attention_decode_sm90.cuh: `blocks` of them fit an SM.
struct DecodeShape {
  int dim, warps, stages, row_tiles, blocks;
};

constexpr DecodeShape kDecodeShapes[] = {
    {64, 8, 3, 1, 2}, {96, 4, 4, 1, 2}, {128, 4, 3, 1, 2}, {256, 3, 2, 1, 2},
    {64, 8, 3, 2, 2}, {96, 4, 4, 2, 2}, {128, 4, 3, 2, 2}, {256, 6, 2, 2, 1},
};

struct DecodeChoice {
  int shape;      // index into kDecodeShapes
  int32_t parts;  // blocks that share the keys of a sequence and KV head
  bool cluster;   // they form a cluster; otherwise a second kernel joins their sums
};

// Whether the kernels serve the params, which the checks of the op have passed.
bool decode_sm90_supports(const gqa_attention_params *p, const gqa_device *device);

// From sizes and the capacity alone: lengths are known to the device only.
DecodeChoice choose_decode_sm90(const gqa_attention_params *p, const gqa_device *device);

}  // namespace gqa
