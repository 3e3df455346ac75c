// Which prefill calls the Hopper kernel serves, and how one is divided: pure host functions.
#pragma once

#include "gqa_kernels.h"

namespace gqa {

constexpr int kPrefillWorkBytes = 144;  // what the loading warp tells the others

// A tile of gqa_attention_prefill_sm90: `groups` warpgroups of 64 query rows of one head, one more that loads, and
// rings of two blocks of `keys` keys and values.
struct PrefillShape {
  int dim, keys, groups;

  constexpr int rows() const { return 64 * groups; }
  constexpr int threads() const { return 128 * (groups + 1); }
  constexpr int shared_memory() const { return 2 * dim * (rows() + 4 * keys) + 96 + kPrefillWorkBytes; }
};

// By width; a head_dim between two takes the wider one. Of one width short blocks come first: they waste less where a
// mask cuts them.
constexpr int kPrefillShapeCount = 5;
constexpr PrefillShape kPrefillShapes[kPrefillShapeCount] = {
    {64, 128, 3}, {96, 96, 3}, {128, 128, 2}, {128, 176, 2}, {256, 80, 2}};

struct PrefillPlan {
  int shape;          // index into kPrefillShapes
  int32_t row_tiles;  // of one head
  int32_t tiles;
  int32_t page_rows;  // of a page that are copied at once
  int32_t blocks;     // in the grid; they take tiles in turns
  int32_t section;    // heads whose keys and values stay in L2 together
};

// nullptr where the kernel serves the params, which the checks of the op have passed; else the reason why not.
const char *refuse_prefill_sm90(const gqa_attention_params *p, const gqa_device *device);

// A row's bytes depend on the rows of its own tile alone, never on how tiles are shared out.
PrefillPlan plan_prefill_sm90(const gqa_attention_params *p, const gqa_device *device);

}  // namespace gqa
