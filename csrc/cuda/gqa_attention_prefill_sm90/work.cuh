// What a block does next: one tile of queries of one head, and the keys that it attends to.
#pragma once

#include "common/attention.h"
#include "cuda/gqa_attention_prefill_sm90/tile.cuh"

namespace gqa::cuda::prefill_sm90 {

enum class PrefillTask : int32_t { kAttend, kZeros, kNaN, kDone };

// Written by the loading warp into one of two places by turns; read there by all others.
struct PrefillWork {
  PrefillTask task;
  int32_t head, batch;
  int32_t q_batch, q_start;        // where query 0 is: in dense tensors `batch` and 0
  int32_t k_batch, k_start;        // and key 0
  int32_t row0, queries;           // the tile's first query; how many the sequence has
  int32_t first_key, keys;         // keys [first_key, keys) exist
  int32_t shift;                   // query i is at key position shift + i
  int32_t first_block, end_block;  // blocks of keys that some row sees; at least one, which may be masked altogether
  int32_t first_sure, end_sure;    // blocks that every row sees
  int32_t care;                    // set where inspectors made zeros of infinite values or NaN
};
static_assert(2 * sizeof(PrefillWork) <= kPrefillWorkBytes);

// Keys [begin, end) that query i of the sequence sees.
__device__ __forceinline__ int seen_begin(const PrefillArgs &a, const PrefillWork &work, int i) {
  return max(work.first_key, work.shift + i - a.window_left);
}
__device__ __forceinline__ int seen_end(const PrefillArgs &a, const PrefillWork &work, int i) {
  return min(work.keys, work.shift + i + 1 + a.window_right);
}

__device__ __forceinline__ int64_t lse_at(const gqa_attention_params &p, const PrefillWork &work, int row) {
  return p.cu_seqlens_q.data != nullptr
             ? static_cast<int64_t>(work.head) * p.total_q + work.q_start + row
             : (static_cast<int64_t>(work.batch) * p.num_q_heads + work.head) * p.seqlen_q + row;
}

// Where a key or value is that exists. A page that does not is taken for page 0: such rows are NaN already.
template <typename T>
__device__ __forceinline__ const T *key_row(const PrefillArgs &a, const PrefillWork &work, const void *base,
                                            const int64_t *stride, int key) {
  const T *head = static_cast<const T *>(base) + work.head / a.group * stride[2];
  if (a.page_rows == 0) return head + work.k_batch * stride[0] + static_cast<int64_t>(work.k_start + key) * stride[1];
  const int64_t wanted = load_index(a.p.block_table, work.batch, key / a.p.page_size);
  const int64_t page = wanted >= 0 && wanted < a.p.num_pages ? wanted : 0;
  return head + page * stride[0] + key % a.p.page_size * stride[1];
}

// Known to the compiler to be the same in all lanes.
__device__ __forceinline__ int uniform(int x) { return __shfl_sync(0xffffffffu, x, 0); }

// Unknown to the compiler: what is computed from it is computed here, not kept in a register since long before.
__device__ __forceinline__ int afresh(int x) {
  asm volatile("" : "+r"(x));
  return x;
}

// Tiles of a section in order of their height, and of one height all heads, those of one KV head side by side. Sections
// go up and down by turns and the last one down, so that heights never jump. Blocks take tiles to and fro: each gets as
// much as the others, and what is left to the end is short.
template <typename Tile>
__device__ __forceinline__ void find_work(const PrefillArgs &a, int turn, PrefillWork &work) {
  const gqa_attention_params &p = a.p;
  const int grid = gridDim.x, block = blockIdx.x;
  const int tile = turn * grid + (turn % 2 == 0 ? block : grid - 1 - block);
  work.task = PrefillTask::kDone;
  if (tile >= a.tiles) return;
  const int section = tile / (a.section * a.row_tiles), within = tile - section * (a.section * a.row_tiles);
  const int heads = min(a.section, a.all_heads - section * a.section);
  const int head = section * a.section + within % heads;
  const bool down = ((a.all_heads - 1) / a.section - section) % 2 == 0;
  work.row0 = (down ? a.row_tiles - 1 - within / heads : within / heads) * Tile::kRows;
  work.batch = head / p.num_q_heads;
  work.head = head - work.batch * p.num_q_heads;
  const bool ragged = p.cu_seqlens_q.data != nullptr;
  work.q_batch = ragged ? 0 : work.batch;
  if (work.batch == p.batch) {
    work.q_start = static_cast<int>(ragged_tail(p));
    work.queries = static_cast<int>(p.total_q) - work.q_start;
    work.task = PrefillTask::kZeros;
    return;
  }
  const Sequence s = load_sequence(p, work.batch);
  work.q_start = static_cast<int>(s.q_start);
  work.queries = static_cast<int>(s.q_len);
  work.task = s.valid ? PrefillTask::kAttend : PrefillTask::kNaN;
  const bool packed = p.k_cache == nullptr && p.cu_seqlens_k.data != nullptr;
  work.k_batch = packed ? 0 : work.batch;
  work.k_start = packed ? static_cast<int>(s.k_start) : 0;
  work.first_key = static_cast<int>(s.leftpad);
  work.keys = static_cast<int>(s.keys());
  work.shift = work.keys - work.queries;
  const int last_row = min(work.row0 + Tile::kRows, work.queries) - 1;
  work.first_block = max(0, seen_begin(a, work, work.row0)) / Tile::kKeys;
  work.end_block = (max(0, seen_end(a, work, last_row)) + Tile::kKeys - 1) / Tile::kKeys;
  work.end_block = max(work.first_block + 1, work.end_block);
  work.first_sure = (max(0, seen_begin(a, work, last_row)) + Tile::kKeys - 1) / Tile::kKeys;
  work.end_sure = max(0, seen_end(a, work, work.row0)) / Tile::kKeys;
}

}  // namespace gqa::cuda::prefill_sm90
