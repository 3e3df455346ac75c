// Appending one head of one token to its cache, for kv_cache_append and for attention over new keys.
#pragma once

#include "common/attention.h"
#include "cpu/rotary.h"
#include "cpu/types.h"

namespace gqa::cpu {

// Where k and v of new token i lie. The ragged form has no batch dimension.
template <typename T>
GQA_INLINE const T *new_row(const void *base, const int64_t *stride, bool ragged, const Sequence &s, int64_t b,
                            int64_t i, int64_t head) {
  return static_cast<const T *>(base) + (ragged ? 0 : b * stride[0]) + (s.k_start + i) * stride[1] + head * stride[2];
}

// Row of the rotary tables for new token i.
template <typename Params>
GQA_INLINE int64_t new_rotary_offset(const Params &p, bool ragged, const Sequence &s, int64_t b, int64_t i) {
  return rotary_offset(p.rotary, ragged ? 0 : b, s.k_start + i, s.cached + i - s.leftpad);
}

// Writes new token i under one head, rotated where there are tables; dropped where its page does not exist.
template <typename T, typename Params>
GQA_INLINE void append_row(const Params &p, bool ragged, const Sequence &s, int64_t b, int64_t i, int64_t head) {
  const int64_t to_k = cache_offset(p, p.k_cache_stride, b, s.cached + i, head);
  if (to_k < 0) return;
  const int64_t to_v = cache_offset(p, p.v_cache_stride, b, s.cached + i, head);
  const T *k = new_row<T>(p.k, p.k_stride, ragged, s, b, i, head);
  if (p.rotary.cos != nullptr) {
    const int64_t offset = new_rotary_offset(p, ragged, s, b, i);
    rotate_head(p.rotary, offset, k, static_cast<T *>(p.k_cache) + to_k, p.head_dim);
  } else {
    std::memcpy(static_cast<T *>(p.k_cache) + to_k, k, p.head_dim * sizeof(T));
  }
  std::memcpy(static_cast<T *>(p.v_cache) + to_v, new_row<T>(p.v, p.v_stride, ragged, s, b, i, head),
              p.head_dim * sizeof(T));
}

}  // namespace gqa::cpu
