// Which prefill calls the Hopper kernel serves, and how one is divided: pure host functions.
#pragma once

#include "gqa_kernels.h"

namespace gqa {

constexpr int kPrefillSequences = 256;  // of a ragged batch, with the rows of none, whose tiles are counted ahead
constexpr int kPrefillWorkBytes = 304 + 4 * kPrefillSequences;  // what is known of four tiles, and of sequences
constexpr int kPrefillBarrierBytes = 192;
constexpr int kPrefillMaxShared = 227 * 1024;

// A tile of gqa_attention_prefill_sm90: `groups` warpgroups of 64 query rows of one head, one more that loads, and
// rings of two blocks of `keys` keys and values.
struct PrefillShape {
  int dim, keys, groups;

  constexpr int rows() const { return 64 * groups; }
  constexpr int threads() const { return 128 * (groups + 1); }
  // Tiles of queries on their way: two where there is room, so that one tile's end overlaps with the next one's start.
  constexpr int queries() const { return with_queries(2) <= kPrefillMaxShared ? 2 : 1; }
  constexpr int shared_memory() const { return with_queries(queries()); }
  constexpr int with_queries(int tiles) const {
    return 2 * dim * (tiles * rows() + 4 * keys) + kPrefillBarrierBytes + kPrefillWorkBytes;
  }
};

// By width; a head_dim between two takes the wider one. Of one width the second is for calls that fill it: more rows
// for many tiles, longer blocks where no mask cuts them.
constexpr int kPrefillShapeCount = 6;
constexpr PrefillShape kPrefillShapes[kPrefillShapeCount] = {{64, 128, 2},  {64, 128, 3},  {96, 96, 3},
                                                             {128, 128, 2}, {128, 160, 2}, {256, 80, 2}};

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
