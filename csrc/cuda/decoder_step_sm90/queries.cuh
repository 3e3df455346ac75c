// The new token's heads in shared memory: normed if asked, rotated, and its key and value in the cache.
#pragma once

#include "common/rotate.h"
#include "cuda/common/square_sum.cuh"
#include "cuda/decoder_step_sm90/block.cuh"

namespace gqa::cuda::decoder_step {

constexpr int kNewKey = kMaxGroup, kNewValue = kMaxGroup + 1;  // rows after those of the queries

template <int kDim>
constexpr int kHeadPitch = 2 * kDim + 16;

__device__ __forceinline__ char *head_at(const Block &t, int row, int pitch) {
  return t.shared + kStepHeadsAt + row * pitch;
}

// A row's cosines, then its sines: the same for all layers. NaN where its position has no row in the tables.
template <typename T>
__device__ __forceinline__ void load_angles(const Args &p, Block &t, int row, const Lengths &lengths) {
  const gqa_rotary &r = p.rotary;
  if (r.cos == nullptr || t.rotary_row == row) return;
  sync_consumers();
  const int64_t position = lengths.cached > lengths.leftpad ? lengths.cached - lengths.leftpad : 0;
#pragma unroll 1
  for (int i = t.thread; i < r.dim; i += kConsumers) {
    const bool sine = i >= r.dim / 2;
    const int64_t at = position * r.stride_row + i - (sine ? r.dim / 2 : 0);
    const void *table = sine ? r.sin : r.cos;
    float angle = __int_as_float(0x7fffffff);
    if (position < r.num_positions) {
      angle = r.dtype == GQA_DTYPE_FLOAT32 ? static_cast<const float *>(table)[at]
                                           : to_float(static_cast<const T *>(table)[at]);
    }
    t.angles()[i] = angle;
  }
  t.rotary_row = row;
  sync_consumers();
}

template <typename T, int kDim>
__device__ __forceinline__ void norm_head(T *row, const T *weight, float eps, int lane) {
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
__device__ __forceinline__ void rotate_head(T *row, const gqa_rotary &r, const float *angles, int lane) {
#pragma unroll 1
  for (int i = lane; i < r.dim / 2; i += 32) {
    const int high = i + r.dim / 2;
    const Pair pair = rotate_pair(to_float(row[i]), to_float(row[high]), angles[i], angles[high]);
    row[i] = from_float<T>(pair.first), row[high] = from_float<T>(pair.second);
  }
  __syncwarp();
}

// A warp has up to two heads: they come together.
template <typename T, int kDim>
__device__ __forceinline__ void stage_heads(const Args &p, const Layer &layer, Block &t, const Part &part,
                                            const uint16_t *qkv) {
  const int group = p.group, rows = group + (part.last ? 2 : 0);
  const uint16_t *from = qkv + static_cast<int64_t>(part.row) * (p.q_heads + 2 * p.kv_heads) * kDim + 8 * t.lane;
  const auto head_of = [&](int j) {
    return j < group ? part.head * group + j : p.q_heads + (j == group ? 0 : p.kv_heads) + part.head;
  };
  uint4 w[2] = {};
  const bool first = t.warp < rows && t.lane < kDim / 8, second = t.warp + kWarps < rows && t.lane < kDim / 8;
  do {
    if (first) w[0] = look(from + head_of(t.warp) * kDim);
    if (second) w[1] = look(from + head_of(t.warp + kWarps) * kDim);
  } while ((first && !is_there(w[0])) || (second && !is_there(w[1])));
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    const int j = t.warp + i * kWarps;
    if (j >= rows) continue;
    const bool key = j == group, value = j > group;
    T *row = reinterpret_cast<T *>(head_at(t, key ? kNewKey : value ? kNewValue : j, kHeadPitch<kDim>));
    if (t.lane < kDim / 8) reinterpret_cast<uint4 *>(row)[t.lane] = w[i];
    __syncwarp();
    const char *norm = key ? layer.k_norm : layer.q_norm;
    if (!value && norm != nullptr) norm_head<T, kDim>(row, reinterpret_cast<const T *>(norm), p.eps, t.lane);
    if (!value && p.rotary.cos != nullptr) rotate_head(row, p.rotary, t.angles(), t.lane);
    if (j >= group && part.valid && t.lane < kDim / 8) {
      char *cache = value ? layer.v_cache : layer.k_cache;
      const int64_t at =
          ((static_cast<int64_t>(part.row) * p.capacity + part.length) * p.kv_heads + part.head) * kDim * 2;
      reinterpret_cast<uint4 *>(cache + at)[t.lane] = reinterpret_cast<const uint4 *>(row)[t.lane];
    }
  }
  sync_consumers();
}

}  // namespace gqa::cuda::decoder_step
