// Checks, work division and tile choice of attention: pure host functions, shared by the CPU twin and the CUDA kernels.
#pragma once

#include "gqa_kernels.h"
#include "plan/gqa_attention_decode_sm90.h"
#include "plan/gqa_attention_prefill_sm90.h"

namespace gqa {

// Everything the launchers and the CPU twins rely on; the torch layer says the same in sentences.
gqa_status check_attention_prefill(const gqa_attention_params *p);
gqa_status check_attention_decode(const gqa_attention_params *p);

// True where the op has nothing to do: no query rows, and no rows to append to the cache.
bool is_empty(const gqa_attention_params *p);

// Query tokens in one row of the CPU twin. Row r is block r % blocks of KV head r / blocks % Hkv of sequence
// r / blocks / Hkv, where blocks = cpu_query_blocks(p). A ragged batch has one more sequence, number `batch`: the rows
// of q past the last offset. The last block of a sequence also takes the tokens beyond seqlen_q, which only an
// invalid sequence and the tail can have.
constexpr int64_t kCpuQueryBlock = 32;
int64_t cpu_query_blocks(const gqa_attention_params *p);

// A tensor-core tile. Its rows are (query token, head) pairs of one KV head. `groups` groups of `warps` warps share the
// rows and take turns over blocks of `keys` keys, which a ring of `stages` buffers per group holds.
struct AttentionShape {
  int dim;    // columns; a head_dim below it is filled up with zeros
  int warps;  // per group
  int tiles;  // of 16 rows, per warp
  int groups;
  int keys;
  int stages;    // 1: keys and values are loaded in turns
  int held;      // the first 16 * held columns of a warp's queries stay in registers
  int resident;  // blocks per SM that registers are rationed for

  constexpr int rows() const { return 16 * tiles * warps; }
  constexpr int threads() const { return 32 * warps * groups; }
  constexpr int block_bytes() const { return keys * dim * 2; }
  constexpr int ring_bytes() const { return stages * 2 * block_bytes(); }
  // The query tile, each row's range of keys, the rings.
  constexpr int shared_memory() const { return rows() * (dim * 2 + 8) + groups * ring_bytes(); }
};

// Up to 16 or 32 rows: memory-bound, so every warp streams keys of its own. More: every warp has rows of its own.
constexpr int kAttentionDims = 4, kAttentionShapeCount = 11;
constexpr AttentionShape kAttentionShapes[kAttentionShapeCount] = {
    {64, 1, 1, 4, 32, 2, 4, 3}, {96, 1, 1, 4, 16, 3, 6, 3}, {128, 1, 1, 4, 16, 2, 8, 3}, {256, 1, 1, 2, 16, 2, 0, 3},
    {64, 4, 2, 1, 64, 2, 0, 2}, {96, 4, 2, 1, 64, 2, 0, 2}, {128, 4, 2, 1, 64, 1, 0, 2}, {256, 4, 1, 1, 32, 2, 0, 2},
    {64, 1, 2, 4, 32, 2, 0, 3}, {96, 1, 2, 4, 16, 3, 0, 2}, {128, 1, 2, 4, 16, 2, 0, 2},
};

// Rows of a block of the float32 kernel, one warp each.
constexpr int kFloatRows = 4;

// Rows of a block of the kernel that joins splits: a row's warps share out its splits.
constexpr int kCombineWarps = 4;
constexpr int combine_rows(int32_t num_splits) { return num_splits > 4 ? 1 : kCombineWarps; }

// Blocks of keys start at multiples of this many keys after the sequence's first one, and so do splits.
constexpr int kSplitUnit = 64;

// Capacities that differ by less are divided alike, as far as they lie between the same multiples of it.
constexpr int kCapacityUnit = 256;

// How one call is divided. Pure integers: nothing here depends on lengths that only the device knows.
struct AttentionPlan {
  gqa_plan plan;
  int shape;            // index into kAttentionShapes; unused for float32
  int64_t row_blocks;   // per sequence and KV head
  int32_t num_splits;   // parts of the keys in the grid
  int32_t divisor;      // a split is 1 / divisor of the row's own keys ...
  int32_t min_chunk;    // ... but not fewer keys than this
  bool appends;         // first launch: new k and v go to the cache
  bool rotates;         // first launch: new k, rotated, goes to the workspace
  int64_t partial_sum;  // byte offsets in the workspace; rotated k is at 0
  int64_t partial_out;
  bool clusters;      // decode_ring serves the call by itself, and of the above nothing but `plan` counts
  DecodePlan decode;  // with `clusters`
  bool wgmma;         // the same of prefill_wgmma
  PrefillPlan prefill;
};
enum class AttentionOp { kPrefill, kDecode };
gqa_status plan_attention(AttentionOp op, const gqa_attention_params *p, const gqa_device *device, AttentionPlan *plan);

// The fewest splits that fill whole waves of `slots` resident blocks nearly as well as the best count does.
int32_t choose_splits(int64_t blocks, int64_t slots, int64_t max_keys);

}  // namespace gqa
