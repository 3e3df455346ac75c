// What the tensors of an attention call mean: where a sequence lies, which keys a query sees, where a cache row is.
// Shared by the CPU twins and the CUDA kernels, so that there is one statement of the conventions.
#pragma once

#include "common/index.h"

namespace gqa {

// Sequence b of the batch. Invalid metadata on the device (a length out of range, decreasing offsets) makes the whole
// sequence invalid: its outputs become NaN and nothing is written to its cache.
struct Sequence {
  bool valid;
  int64_t q_start;  // ragged: first row of q and out; dense: 0
  int64_t q_len;
  int64_t cached;   // keys read from the cache, before the new ones
  int64_t k_start;  // ragged: first row of k and v; dense: 0
  int64_t k_len;    // new keys, from k and v
  int64_t leftpad;  // keys before it do not exist

  GQA_HOST_DEVICE int64_t keys() const { return cached + k_len; }
  // Key position of query i, by bottom-right alignment; may be negative.
  GQA_HOST_DEVICE int64_t position(int64_t i) const { return keys() - q_len + i; }
};

// Where sequence b starts: the largest offset up to b that lies within the tensor. For sound offsets that is offset b;
// unsound ones still give every row one owner, so that a bad sequence never touches a row of a good one before it.
GQA_HOST_DEVICE int64_t span_start(const gqa_index &cu_seqlens, int64_t b, int64_t total) {
  int64_t start = 0;
  for (int64_t i = 1; i <= b; ++i) {
    const int64_t offset = load_index(cu_seqlens, i);
    if (offset > start && offset <= total) start = offset;
  }
  return start;
}

// Rows of sequence b in a ragged tensor of `total` rows; false where its offsets are unsound or it is too long.
GQA_HOST_DEVICE bool load_span(const gqa_index &cu_seqlens, int64_t b, int64_t total, int64_t longest, int64_t *start,
                               int64_t *length) {
  const int64_t first = load_index(cu_seqlens, b), last = load_index(cu_seqlens, b + 1);
  *start = span_start(cu_seqlens, b, total);
  const bool sound = last >= *start && last <= total;
  *length = sound ? last - *start : 0;
  return sound && first == *start && *length <= longest;
}

// Rows of q past the last sequence: they belong to nobody and get out = 0, lse = -inf. Where the last offset is unsound
// there are none: the last sequence, then invalid, takes all rows to the end.
GQA_HOST_DEVICE int64_t ragged_tail(const gqa_attention_params &p) {
  const int64_t end = span_start(p.cu_seqlens_q, p.batch, p.total_q);
  return load_index(p.cu_seqlens_q, p.batch) == end ? end : p.total_q;
}

// The cache's part of a sequence whose new keys are known.
template <typename Params>
GQA_HOST_DEVICE void load_cached(const Params &p, int64_t b, bool has_cache, Sequence *s) {
  if (has_cache) {
    s->cached = load_index(p.cache_seqlens, b);
    s->valid = s->valid && s->cached >= 0 && s->cached <= p.cache_capacity - s->k_len;
  }
  s->leftpad = load_index_or(p.cache_leftpad, 0, b);
  s->valid = s->valid && s->leftpad >= 0;
  if (!s->valid) s->cached = 0, s->k_len = 0, s->leftpad = 0;
  if (s->leftpad > s->keys()) s->leftpad = s->keys();
}

GQA_HOST_DEVICE Sequence load_sequence(const gqa_attention_params &p, int64_t b) {
  Sequence s{true, 0, p.seqlen_q, 0, 0, p.k != nullptr ? p.seqlen_k : 0, 0};
  if (p.cu_seqlens_q.data != nullptr) {
    s.valid = load_span(p.cu_seqlens_q, b, p.total_q, p.seqlen_q, &s.q_start, &s.q_len);
    if (b + 1 == p.batch) s.q_len = ragged_tail(p) - s.q_start;
  }
  if (p.k != nullptr && p.k_cache != nullptr && p.cu_seqlens_q.data != nullptr) {
    s.k_start = s.q_start;
    s.k_len = s.q_len;
  } else if (p.k != nullptr && p.cu_seqlens_k.data != nullptr) {
    s.valid = load_span(p.cu_seqlens_k, b, p.total_k, p.seqlen_k, &s.k_start, &s.k_len) && s.valid;
  }
  load_cached(p, b, p.k_cache != nullptr, &s);
  return s;
}

// An append has no queries: only the keys of the sequence are meant.
GQA_HOST_DEVICE Sequence load_sequence(const gqa_kv_cache_append_params &p, int64_t b) {
  Sequence s{true, 0, 0, 0, 0, p.seqlen, 0};
  if (p.cu_seqlens.data != nullptr) {
    s.valid = load_span(p.cu_seqlens, b, p.total_tokens, p.seqlen, &s.k_start, &s.k_len);
  }
  load_cached(p, b, true, &s);
  return s;
}

// Keys [first, last) that query i attends to; empty when first >= last.
struct KeyRange {
  int64_t first, last;
};

GQA_HOST_DEVICE KeyRange key_range(const gqa_attention_params &p, const Sequence &s, int64_t i) {
  const int64_t position = s.position(i);
  KeyRange range{s.leftpad, s.keys()};
  if (p.causal && position + 1 < range.last) range.last = position + 1;
  if (p.window_right >= 0 && position + p.window_right + 1 < range.last) range.last = position + p.window_right + 1;
  if (p.window_left >= 0 && position - p.window_left > range.first) range.first = position - p.window_left;
  return range;
}

// Element offset of (row, head) of sequence b in a cache, -1 where the block table names no page. A contiguous cache
// has no block table. Works for gqa_attention_params and gqa_kv_cache_append_params; `stride` is the cache's.
template <typename Params>
GQA_HOST_DEVICE int64_t cache_offset(const Params &p, const int64_t *stride, int64_t b, int64_t row, int64_t head) {
  if (p.block_table.data == nullptr) return b * stride[0] + row * stride[1] + head * stride[2];
  const int64_t page = load_index(p.block_table, b, row / p.page_size);
  if (page < 0 || page >= p.num_pages) return -1;
  return page * stride[0] + row % p.page_size * stride[1] + head * stride[2];
}

// Row of the rotary tables for token `token` (its index in [B, S], or in [tokens]) of sequence b: an element offset
// into cos and sin, or -1 for a position outside the table, which makes the rotated vector NaN. `position` is used
// where no positions are given; padding sits before position 0 and takes row 0, as nobody attends to it.
GQA_HOST_DEVICE int64_t rotary_offset(const gqa_rotary &r, int64_t b, int64_t token, int64_t position) {
  if (r.gathered) return b * r.stride_batch + token * r.stride_row;
  const int64_t at = r.positions.data != nullptr ? load_index(r.positions, b, token) : (position < 0 ? 0 : position);
  if (at < 0 || at >= r.num_positions) return -1;
  return at * r.stride_row;
}

}  // namespace gqa
