// Rotation of queries, and the new keys of a decode call: rotated, staged as one more tile, written to the cache.
#pragma once

#include "common/rotate.h"
#include "cuda/gqa_attention_decode_sm90/loads.cuh"
#include "cuda/gqa_attention_decode_sm90/scores.cuh"

namespace gqa::cuda::decode_sm90 {

__device__ __forceinline__ float angle(const gqa_rotary &r, const void *table, int64_t at, bool half) {
  if (r.dtype == GQA_DTYPE_FLOAT32) return static_cast<const float *>(table)[at];
  return half ? __half2float(static_cast<const __half *>(table)[at])
              : __bfloat162float(static_cast<const __nv_bfloat16 *>(table)[at]);
}

// Elements `low` and `high` of a row, rotated where they are a pair of the rotary dimensions.
struct RowPair {
  int low, high;
  Pair x;

  template <typename C>
  __device__ void load(const Args &p, const Block<C> &t, const char *row, int token, int pair) {
    using T = typename C::T;
    const gqa_rotary &rotary = p.rotary;
    const int half = rotary.cos != nullptr ? rotary.dim / 2 : 0;
    low = 2 * pair, high = low + 1;
    if (pair < half && !rotary.interleaved) low = pair, high = pair + half;
    const T *from = reinterpret_cast<const T *>(row);
    x = {0.0f, 0.0f};
    x = {to_float(from[low]), to_float(from[high])};
    if (pair >= half) return;
    const int64_t offset = rotary_offset(rotary, t.b, token, t.keys.start + token - t.keys.leftpad);
    constexpr bool kHalf = std::is_same_v<T, __half>;
    const float nan = __int_as_float(0x7fc00000);
    const float cosine = offset < 0 ? nan : angle(rotary, rotary.cos, offset + pair, kHalf);
    const float sine = offset < 0 ? nan : angle(rotary, rotary.sin, offset + pair, kHalf);
    x = rotate_pair(x.first, x.second, cosine, sine);
  }
};

// Rotates pairs first, first + step ... of `rows` rows, two at a time so that their loads overlap.
template <typename C, typename RowAt, typename TokenOf, typename Store>
__device__ void rotate_rows(const Args &p, const Block<C> &t, int rows, int first, int step, RowAt &&row_at,
                            TokenOf &&token_of, Store &&store) {
  constexpr int kPairs = C::kDim / 2;
  for (int at = first; at < rows * kPairs; at += 2 * step) {
    RowPair pairs[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = min((at + i * step) / kPairs, rows - 1);
      pairs[i].load(p, t, row_at(row), token_of(row), (at + i * step) % kPairs);
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = (at + i * step) / kPairs;
      if (row < rows) store(row, pairs[i]);
    }
  }
}

// Rotated query rows of a head to shared memory, by its team.
template <typename C>
__device__ void stage_queries(const Args &p, const Block<C> &t, typename C::T *staged) {
  using T = typename C::T;
  rotate_rows(
      p, t, p.rows, 32 * t.member + t.lane, 32 * C::kTeam, [&](int row) { return Queries<C>::row_at(p, t, row); },
      [&](int row) { return token_of_row(p, row); },
      [&](int row, const RowPair &pair) {
        staged[row * C::kQueryPitch + pair.low] = from_float<T>(pair.x.first);
        staged[row * C::kQueryPitch + pair.high] = from_float<T>(pair.x.second);
      });
}

template <typename C>
__device__ const char *new_row(const Args &p, const Block<C> &t, const char *x, const int64_t (&stride)[3], int token) {
  return x + t.b * stride[0] + token * stride[1] + t.head * stride[2];
}

// The new keys as a tile of this warp's; those of a bad page are NaN, as cached ones are.
template <typename C>
__device__ void load_new_keys(const Args &p, const Block<C> &t, const Loader<C> &loader, uint32_t stage,
                              char *stage_at) {
  using T = typename C::T;
  const char *nan = reinterpret_cast<const char *>(__cvta_generic_to_global(&nan_chunk));
  const auto is_bad = [&](int token) {
    if constexpr (C::kPaged) return Place<C>::look_up(p, t.b, t.keys.cached + token) < 0;
    return false;
  };
  const bool rotates = p.rotary.cos != nullptr;
  const auto load = [&](const char *x, const int64_t(&stride)[3], uint32_t tile) {
    loader.for_each(tile, [&](int i, int ahead, uint32_t to) {
      const int token = loader.row[i] + ahead, chunk = loader.chunk[i];
      const bool exists = token < p.seqlen_q;
      const char *from = nan;
      if (exists && !is_bad(token)) from = new_row(p, t, x, stride, token) + chunk * 16;
      copy_async16(to, from, exists ? 16 : 0);
    });
  };
  load(p.v, p.v_in, stage + C::kTileBytes);
  if (!rotates) {
    load(p.k, p.k_in, stage);
    return;
  }
  const auto at = [&](int row, int d) {
    return reinterpret_cast<T *>(stage_at + row * C::kRowBytes + ((d / 8 ^ C::swizzle(row)) << 4)) + d % 8;
  };
  rotate_rows(
      p, t, p.seqlen_q, t.lane, 32, [&](int row) { return new_row(p, t, p.k, p.k_in, row); },
      [](int row) { return row; },
      [&](int row, const RowPair &pair) {
        const bool bad = is_bad(row);
        const float nan_value = __int_as_float(0x7fc00000);
        *at(row, pair.low) = from_float<T>(bad ? nan_value : pair.x.first);
        *at(row, pair.high) = from_float<T>(bad ? nan_value : pair.x.second);
      });
}

// Writes the new rows to the cache; a bad page drops the write.
template <typename C>
__device__ void append_new_keys(const Args &p, const Block<C> &t, const char *stage_at) {
  for (int i = t.lane; i < p.seqlen_q * C::kChunks; i += 32) {
    const int token = i / C::kChunks, chunk = i % C::kChunks, row = t.keys.cached + token;
    const int page = C::kPaged ? Place<C>::look_up(p, t.b, row) : 0;
    if (page < 0) continue;
    const char *from = stage_at + token * C::kRowBytes + ((chunk ^ C::swizzle(token)) << 4);
    char *k = const_cast<char *>(t.k_head) + Place<C>::offset(p, page, row, p.k_outer, p.k_row) + chunk * 16;
    char *v = const_cast<char *>(t.v_head) + Place<C>::offset(p, page, row, p.v_outer, p.v_row) + chunk * 16;
    const uint4 new_k = *reinterpret_cast<const uint4 *>(from);
    const uint4 new_v = *reinterpret_cast<const uint4 *>(from + C::kTileBytes);
    if constexpr (C::kAligned) {
      *reinterpret_cast<uint4 *>(k) = new_k;
      *reinterpret_cast<uint4 *>(v) = new_v;
    } else {
      store_unaligned16<C::kBytes>(k, new_k);
      store_unaligned16<C::kBytes>(v, new_v);
    }
  }
}

}  // namespace gqa::cuda::decode_sm90
