// The new token's heads in shared memory: normed if asked, rotated, and its key and value in the cache.
#pragma once

#include "common/rotate.h"
#include "cuda/common/square_sum.cuh"
#include "cuda/decoder_step_sm90/block.cuh"

namespace gqa::cuda::decoder_step {

constexpr int kNewKey = kMaxGroup, kNewValue = kMaxGroup + 1;  // rows after those of the queries

template <int kDim>
constexpr int kHeadPitch = 2 * kDim + 16;

// Elements of a row that a lane has: lane, lane + 32, ...
template <typename T, int kDim>
__device__ void norm_head(T *row, const T *weight, float eps, int lane) {
  float x[kDim / 32], sum = 0;
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) x[i] = to_float(row[lane + 32 * i]), sum += x[i] * x[i];
  const float rstd = reciprocal_rms(group_sum(sum, 32), 1.0f / kDim, eps);
#pragma unroll
  for (int i = 0; i < kDim / 32; ++i) {
    const float value = to_float(from_float<T>(x[i] * rstd));
    row[lane + 32 * i] = from_float<T>(value * to_float(weight[lane + 32 * i]));
  }
  __syncwarp();
}

template <typename T>
__device__ void rotate_head(T *row, const gqa_rotary &r, int64_t position, int lane) {
  const bool known = position < r.num_positions;
  for (int i = lane; i < r.dim / 2; i += 32) {
    const int low = r.interleaved ? 2 * i : i, high = r.interleaved ? 2 * i + 1 : i + r.dim / 2;
    float cosine = __int_as_float(0x7fffffff), sine = cosine;
    if (known) {
      const int64_t at = position * r.stride_row + i;
      const bool wide = r.dtype == GQA_DTYPE_FLOAT32;
      cosine = wide ? static_cast<const float *>(r.cos)[at] : to_float(static_cast<const T *>(r.cos)[at]);
      sine = wide ? static_cast<const float *>(r.sin)[at] : to_float(static_cast<const T *>(r.sin)[at]);
    }
    const Pair pair = rotate_pair(to_float(row[low]), to_float(row[high]), cosine, sine);
    row[low] = from_float<T>(pair.first), row[high] = from_float<T>(pair.second);
  }
  __syncwarp();
}

template <typename T, int kDim>
__device__ void stage_heads(const Args &p, const Layer &layer, const Block &t, const Part &part) {
  const int group = p.q_heads / p.kv_heads, rows = group + (part.last ? 2 : 0);
  const int64_t leftpad = load_index_or(p.cache_leftpad, 0, part.row);
  const int64_t position = part.length > leftpad ? part.length - leftpad : 0;
  const int heads = p.q_heads + 2 * p.kv_heads;
  for (int j = t.warp; j < rows; j += kWarps) {
    const bool key = j == group, value = j == group + 1;
    const int head = key ? p.q_heads + part.head : value ? p.q_heads + p.kv_heads + part.head : part.head * group + j;
    const int slot = key ? kNewKey : value ? kNewValue : j;
    T *row = reinterpret_cast<T *>(t.shared + kQueries + slot * kHeadPitch<kDim>);
    const auto *from = reinterpret_cast<const uint32_t *>(p.qkv) + (part.row * heads + head) * (kDim / 2);
    for (int i = t.lane; i < kDim / 2; i += 32) reinterpret_cast<uint32_t *>(row)[i] = __ldcg(from + i);
    __syncwarp();
    const char *norm = key ? layer.k_norm : layer.q_norm;
    if (!value && norm != nullptr) norm_head<T, kDim>(row, reinterpret_cast<const T *>(norm), p.eps, t.lane);
    if (!value && p.rotary.cos != nullptr) rotate_head(row, p.rotary, position, t.lane);
    if ((key || value) && t.lane < kDim / 8) {
      char *cache = value ? layer.v_cache : layer.k_cache;
      const int64_t at =
          ((static_cast<int64_t>(part.row) * p.capacity + part.length) * p.kv_heads + part.head) * kDim * 2;
      reinterpret_cast<uint4 *>(cache + at)[t.lane] = reinterpret_cast<const uint4 *>(row)[t.lane];
    }
  }
  sync_consumers();
}

}  // namespace gqa::cuda::decoder_step
