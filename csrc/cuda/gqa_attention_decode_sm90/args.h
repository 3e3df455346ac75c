// Arguments of the Hopper decode kernels: what they read of the params, resolved on the host.
#pragma once

#include <vector_types.h>

#include "common/attention.h"
#include "plan/gqa_attention_decode_sm90.h"

namespace gqa::cuda::decode_sm90 {

constexpr float kLog2e = 1.4426950408889634f;

// What the kernel reads of the params, in the order of its first use; distances in bytes.
struct Args {
  gqa_index cache_seqlens;
  const char *q, *k_cache, *v_cache;
  int64_t q_batch, q_token, q_head;
  int64_t k_outer, v_outer, k_head, v_head;  // outer: batch or page
  int32_t k_row, v_row;
  int32_t group, rows, seqlen_q, capacity, window_left;
  uint32_t group_inverse;  // ceil(2^20 / group)
  int32_t zero;            // 0: makes a value differ between lanes in the compiler's eyes
  int32_t units;           // of 32 dimensions of a query row
  int32_t share;           // tiles of keys below which a sequence is not shared out among twice the blocks
  int32_t early;           // load ahead of the length
  int32_t batch;
  int32_t static_prefix;   // read it before earlier kernels have ended
  int32_t triggers_early;  // let the next kernel's blocks start while all of ours still run
  float fair;              // turns: part of all tiles that a block gets; else 0
  float scale, softcap;    // scale: of log2 units, or before the softcap
  gqa_index cache_leftpad, block_table;
  uint32_t page_size, page_magic, page_shift;  // row / page_size == row * page_magic >> page_shift
  int32_t num_pages, paged_tiles;              // paged_tiles: no 16 rows cross a page
  const char *k, *v;
  int64_t k_in[3], v_in[3];
  char *out;
  int64_t out_stride[3];
  float *lse;
  const void *sinks;
  int32_t sinks_float, num_q_heads, num_kv_heads;
  gqa_rotary rotary;
  int32_t cache_dtype;  // of a quantised cache
  const float *k_scale, *v_scale;
  int64_t k_scale_stride, v_scale_stride;
};

// row / size == (row * magic) >> shift for 0 <= row < 2^31.
inline void set_page_size(uint32_t size, Args *args) {
  uint32_t bits = 0;
  while ((1u << bits) < size) ++bits;
  args->page_size = size;
  args->page_shift = 31 + bits;
  args->page_magic = static_cast<uint32_t>(((uint64_t{1} << args->page_shift) + size - 1) / size);
}

inline Args make_args(const gqa_attention_params &p, const DecodePlan &plan) {
  Args a{};
  const auto bytes = [](const int64_t *from, int64_t *to) {
    for (int i = 0; i < 3; ++i) to[i] = 2 * from[i];
  };
  const auto pointer = [](const void *x) { return static_cast<const char *>(x); };
  a.cache_seqlens = p.cache_seqlens;
  a.q = pointer(p.q), a.k_cache = pointer(p.k_cache), a.v_cache = pointer(p.v_cache);
  const int64_t element = p.quantization.dtype != 0 ? 1 : 2;  // bytes, in the cache
  a.q_batch = 2 * p.q_stride[0], a.q_token = 2 * p.q_stride[1], a.q_head = 2 * p.q_stride[2];
  a.k_outer = element * p.k_cache_stride[0], a.v_outer = element * p.v_cache_stride[0];
  a.k_row = static_cast<int32_t>(element * p.k_cache_stride[1]);
  a.v_row = static_cast<int32_t>(element * p.v_cache_stride[1]);
  a.k_head = element * p.k_cache_stride[2], a.v_head = element * p.v_cache_stride[2];
  a.num_q_heads = p.num_q_heads, a.num_kv_heads = p.num_kv_heads;
  a.group = p.num_q_heads / p.num_kv_heads;
  a.seqlen_q = static_cast<int32_t>(p.seqlen_q);
  a.rows = a.group * a.seqlen_q;
  a.capacity = static_cast<int32_t>(p.cache_capacity);
  a.window_left = p.window_left < p.cache_capacity ? p.window_left : -1;  // wider than any sequence: no limit
  a.group_inverse = ((1u << 20) + a.group - 1) / a.group;
  a.units = a.rows * (p.head_dim / 32) * plan.heads;
  a.share = plan.share;
  a.early = plan.early;
  a.static_prefix = p.static_prefix;
  a.triggers_early = plan.triggers_early;
  a.batch = static_cast<int32_t>(p.batch);
  a.fair = plan.fair;
  a.scale = p.softcap > 0 ? p.softmax_scale / p.softcap : p.softmax_scale * kLog2e;
  a.softcap = p.softcap;
  a.cache_leftpad = p.cache_leftpad;
  a.block_table = p.block_table;
  if (p.block_table.data != nullptr) {
    set_page_size(static_cast<uint32_t>(p.page_size), &a);
    a.num_pages = static_cast<int32_t>(p.num_pages);
    a.paged_tiles = p.page_size % 16 == 0;
  } else {
    set_page_size(1u << 31, &a);  // one page holds every row
  }
  a.k = pointer(p.k), a.v = pointer(p.v);
  bytes(p.k_stride, a.k_in);
  bytes(p.v_stride, a.v_in);
  a.out = static_cast<char *>(p.out);
  bytes(p.out_stride, a.out_stride);
  a.lse = p.lse;
  a.sinks = p.sinks;
  a.sinks_float = p.sinks_dtype == GQA_DTYPE_FLOAT32;
  a.rotary = p.rotary;
  a.cache_dtype = p.quantization.dtype;
  a.k_scale = p.quantization.k_scale, a.v_scale = p.quantization.v_scale;
  a.k_scale_stride = p.quantization.k_scale_stride, a.v_scale_stride = p.quantization.v_scale_stride;
  return a;
}

}  // namespace gqa::cuda::decode_sm90
