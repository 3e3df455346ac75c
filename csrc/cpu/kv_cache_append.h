// Appending one head of one token to its cache, for kv_cache_append and for attention over new keys.
#pragma once

#include "common/attention.h"
#include "common/quantize.h"
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

// A row as a quantised cache holds it.
template <typename T>
GQA_INLINE void quantize_row(int32_t dtype, const T *x, float scale, uint8_t *to, int64_t n) {
  for (int64_t i = 0; i < n; ++i) to[i] = quantize(dtype, to_float(x[i]), scale);
}

constexpr int64_t kMaxQuantizedDim = 256;

template <typename T, typename Params>
GQA_INLINE void append_quantized(const Params &p, const T *k, const T *v, int64_t rotary, int64_t to_k, int64_t to_v,
                                 int64_t head) {
  const gqa_kv_quantization &q = p.quantization;
  T rotated[kMaxQuantizedDim];
  if (p.rotary.cos != nullptr) {
    rotate_head(p.rotary, rotary, k, rotated, p.head_dim);
    k = rotated;
  }
  quantize_row(q.dtype, k, k_scale_of(q, head), static_cast<uint8_t *>(p.k_cache) + to_k, p.head_dim);
  quantize_row(q.dtype, v, v_scale_of(q, head), static_cast<uint8_t *>(p.v_cache) + to_v, p.head_dim);
}

// Writes new token i under one head, rotated where there are tables; dropped where its page does not exist.
template <typename T, typename Params>
GQA_INLINE void append_row(const Params &p, bool ragged, const Sequence &s, int64_t b, int64_t i, int64_t head) {
  const int64_t to_k = cache_offset(p, p.k_cache_stride, b, s.cached + i, head);
  if (to_k < 0) return;
  const int64_t to_v = cache_offset(p, p.v_cache_stride, b, s.cached + i, head);
  const T *k = new_row<T>(p.k, p.k_stride, ragged, s, b, i, head);
  const T *v = new_row<T>(p.v, p.v_stride, ragged, s, b, i, head);
  const int64_t rotary = p.rotary.cos != nullptr ? new_rotary_offset(p, ragged, s, b, i) : 0;
  if (p.quantization.dtype != 0) return append_quantized(p, k, v, rotary, to_k, to_v, head);
  if (p.rotary.cos != nullptr) {
    rotate_head(p.rotary, rotary, k, static_cast<T *>(p.k_cache) + to_k, p.head_dim);
  } else {
    std::memcpy(static_cast<T *>(p.k_cache) + to_k, k, p.head_dim * sizeof(T));
  }
  std::memcpy(static_cast<T *>(p.v_cache) + to_v, v, p.head_dim * sizeof(T));
}

}  // namespace gqa::cpu
