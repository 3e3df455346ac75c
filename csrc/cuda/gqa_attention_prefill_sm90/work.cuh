// What a block does next: one tile of queries of one head, and the keys that it attends to.
#pragma once

#include "common/attention.h"
#include "cuda/gqa_attention_prefill_sm90/tile.cuh"

namespace gqa::cuda::prefill_sm90 {

enum class PrefillTask : int32_t { kAttend, kZeros, kNaN, kDone };

// Written by the finding warp into one of kWorkPlaces by turns; read there by all others.
struct PrefillWork {
  PrefillTask task;
  int32_t head, batch;
  int32_t q_batch, q_start;        // where query 0 is: in dense tensors `batch` and 0
  int32_t k_batch, k_start;        // and key 0
  int32_t row0, queries;           // the tile's first query, which may be below 0; how many the sequence has
  int32_t first_key, keys;         // keys [first_key, keys) exist
  int32_t shift;                   // query i is at key position shift + i
  int32_t first_block, end_block;  // blocks of keys that some row sees; at least one, which may be masked altogether
  int32_t first_sure, end_sure;    // blocks that every row sees
  int32_t care;                    // set where inspectors made zeros of infinite values or NaN
};

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

// Whether the page of a key does not exist: scores with it are NaN.
__device__ __forceinline__ bool lacks_page(const PrefillArgs &a, const PrefillWork &work, int key) {
  if (a.page_rows == 0) return false;
  const int64_t wanted = load_index(a.p.block_table, work.batch, key / a.p.page_size);
  return wanted < 0 || wanted >= a.p.num_pages;
}

// Where a key or value is that exists. A page that does not is taken for page 0: the scores are NaN all the same.
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

// Where the sequence of the tile is, and what it attends to.
__device__ __forceinline__ void describe_sequence(const PrefillArgs &a, PrefillWork &work) {
  const gqa_attention_params &p = a.p;
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
}

// Fills in what follows from batch, head, and row0 counted from the first tile. The last tile of a sequence ends with
// its queries: under a causal mask the tile that is not full is the one with the fewest keys.
template <typename Tile>
__device__ __forceinline__ void describe_tile(const PrefillArgs &a, PrefillWork &work) {
  work.care = 0;
  if (a.plain) {  // as a launch begins with it, its code is short
    work.task = PrefillTask::kAttend;
    work.q_batch = work.k_batch = work.batch;
    work.q_start = work.k_start = work.first_key = 0;
    work.queries = static_cast<int>(a.p.seqlen_q);
    work.keys = static_cast<int>(a.p.seqlen_k);
  } else {
    describe_sequence(a, work);
    if (work.task == PrefillTask::kZeros) return;
  }
  const int row0 = work.row0 - (Tile::kRows - 1 - (work.queries + Tile::kRows - 1) % Tile::kRows);
  const int last_row = row0 + Tile::kRows - 1;
  work.row0 = row0;
  work.shift = work.keys - work.queries;
  const int first_block = max(0, seen_begin(a, work, row0)) / Tile::kKeys;
  work.first_block = first_block;
  work.end_block = max(first_block + 1, (max(0, seen_end(a, work, last_row)) + Tile::kKeys - 1) / Tile::kKeys);
  work.first_sure = (max(0, seen_begin(a, work, last_row)) + Tile::kKeys - 1) / Tile::kKeys;
  work.end_sure = max(0, seen_end(a, work, row0)) / Tile::kKeys;
}

}  // namespace gqa::cuda::prefill_sm90
