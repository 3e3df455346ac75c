// Eight consecutive elements of a vector, loaded by whatever width their alignment allows, and rotated if asked.
#pragma once

#include "common/rotate.h"
#include "cuda/common/vec.cuh"

namespace gqa::cuda {

constexpr int kChunk = 8;

template <typename T>
__device__ __forceinline__ void load_chunk(const T *from, float (&x)[kChunk]) {
  if (is_aligned16(from)) {
#pragma unroll
    for (int i = 0; i < kChunk; i += Vec<T>::kSize) {
      const Vec<T> part = load_vec(from + i);
#pragma unroll
      for (int j = 0; j < Vec<T>::kSize; ++j) x[i + j] = to_float(part.value[j]);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = to_float(from[i]);
  }
}

template <typename T>
__device__ __forceinline__ void store_chunk(T *to, const float (&x)[kChunk]) {
  if (is_aligned16(to)) {
#pragma unroll
    for (int i = 0; i < kChunk; i += Vec<T>::kSize) {
      Vec<T> part;
#pragma unroll
      for (int j = 0; j < Vec<T>::kSize; ++j) part.value[j] = from_float<T>(x[i + j]);
      store_vec(to + i, part);
    }
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) to[i] = from_float<T>(x[i]);
  }
}

// Bytes as they are: a NaN keeps its payload.
template <typename T>
__device__ __forceinline__ void copy_chunk(const T *from, T *to) {
  if (is_aligned16(from) && is_aligned16(to)) {
#pragma unroll
    for (int i = 0; i < kChunk; i += Vec<T>::kSize) store_vec(to + i, load_vec(from + i));
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) to[i] = from[i];
  }
}

// One element of a pair, the second one if `upper`.
__device__ __forceinline__ float rotated(float x, float partner, bool upper, float cosine, float sine) {
  return upper ? rotate_pair(partner, x, cosine, sine).second : rotate_pair(x, partner, cosine, sine).first;
}

// Replaces elements first ... first + 7 of `row`, given in x, by the rotated ones. `offset` is rotary_offset's.
template <typename T, typename Table>
__device__ __forceinline__ void rotate_chunk_by(const T *row, int first, const gqa_rotary &r, int64_t offset,
                                                float (&x)[kChunk]) {
  const Table *cos = static_cast<const Table *>(r.cos) + offset, *sin = static_cast<const Table *>(r.sin) + offset;
  const int half = r.dim / 2;
  if (!r.interleaved && half % kChunk == 0) {
    const bool upper = first >= half;
    float partner[kChunk], c[kChunk], s[kChunk];
    load_chunk(row + (upper ? first - half : first + half), partner);
    load_chunk(cos + (upper ? first - half : first), c);
    load_chunk(sin + (upper ? first - half : first), s);
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = rotated(x[i], partner[i], upper, c[i], s[i]);
    return;
  }
#pragma unroll
  for (int i = 0; i < kChunk; ++i) {
    const int d = first + i;
    if (d >= r.dim) continue;
    const bool upper = r.interleaved ? d % 2 == 1 : d >= half;
    const int distance = r.interleaved ? 1 : half;
    const float partner = to_float(row[upper ? d - distance : d + distance]);
    const int angle = r.interleaved ? d / 2 : (upper ? d - half : d);
    const float c = to_float(cos[angle]), s = to_float(sin[angle]);
    x[i] = rotated(x[i], partner, upper, c, s);
  }
}

// Elements first ... first + 7 of the rotated row, in float32; NaN where the position has no row in the tables.
template <typename T>
__device__ __forceinline__ void load_rotated_chunk(const T *row, int first, const gqa_rotary &r, int64_t offset,
                                                   float (&x)[kChunk]) {
  if (offset < 0) {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) x[i] = __int_as_float(0x7fffffff);
    return;
  }
  load_chunk(row + first, x);
  if (first >= r.dim) return;
  if (sizeof(T) == 4 || r.dtype == GQA_DTYPE_FLOAT32) {
    rotate_chunk_by<T, float>(row, first, r, offset, x);
  } else {
    rotate_chunk_by<T, T>(row, first, r, offset, x);
  }
}

}  // namespace gqa::cuda
