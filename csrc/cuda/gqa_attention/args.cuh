// What the attention kernels are told, which part of the work a block has, and where a row's results go.
#pragma once

#include <cmath>

#include "common/attention.h"
#include "common/quantize.h"
#include "cuda/common/vec.cuh"

namespace gqa::cuda {

struct AttentionArgs {
  gqa_attention_params p;
  const void *k, *v;  // what keys are read from: the cache, or without one the new k, rotated, and v
  int64_t k_stride[3], v_stride[3];
  int32_t paged;
  int32_t per_sequence;  // stride[0] of k and v steps over sequences
  int32_t quantized;     // 0, or the dtype of k and v, whose scales are left to scores and outputs
  int32_t direct;        // rows start at multiples of 16 bytes, and at the same offsets in paged k and v
  int32_t row_blocks, num_splits, divisor, min_chunk;  // AttentionPlan's
  int32_t transforms;                                  // scores are not just scaled by a positive number
  float multiplier;                                    // of scores, to log2 units; 1 with `transforms`
  float before_tanh, after_tanh;                       // transforms: factors; without a softcap just the first
  int64_t rows;                                        // of the partial results: (token, head) pairs
  float *partial_out;                                  // [num_splits, rows, D], not divided by the sum
  float2 *partial_sum;                                 // [num_splits, rows] highest score in log2 units, sum of weights
};

// The kernel of kAttentionShapes[kIndex]; defined in one file per dtype and width.
using AttendKernel = void (*)(AttentionArgs);
template <typename T, int kIndex>
AttendKernel attend_kernel();

// Sums are >= 0 or NaN; this one marks a row that belongs to no sequence.
constexpr float kNobody = -1.0f;
constexpr float kLog2e = 1.44269504088896341f;
constexpr float kLn2 = 0.693147180559945309f;

struct BlockWork {
  int64_t b;
  int row_block, split, kv_head;
};

// KV heads run fastest, so that neighbours in memory are read at one time; then splits; then row blocks, last ones
// first, as under a causal mask they have most to do.
__device__ __forceinline__ BlockWork find_work(const AttentionArgs &a) {
  uint32_t x = blockIdx.x;
  const uint32_t heads = a.p.num_kv_heads, splits = a.num_splits, blocks = a.row_blocks;
  const int kv_head = x % heads;
  x /= heads;
  const int split = x % splits;
  x /= splits;
  return {x / blocks, static_cast<int>(blocks - 1 - x % blocks), split, kv_head};
}

// The rows of one sequence and KV head: row r is query r / group, head r % group of the KV head's.
struct Queries {
  Sequence sequence;
  int64_t b;
  int kv_head, group;
  int rows;
  bool ragged;

  Queries() = default;
  __device__ Queries(const gqa_attention_params &p, const BlockWork &work) {
    b = work.b;
    kv_head = work.kv_head;
    group = p.num_q_heads / p.num_kv_heads;
    ragged = p.cu_seqlens_q.data != nullptr;
    if (b == p.batch) {
      const int64_t start = ragged_tail(p);
      sequence = {true, start, p.total_q - start, 0, 0, 0, 0};
    } else {
      sequence = load_sequence(p, b);
    }
    rows = static_cast<int>(sequence.q_len) * group;
  }

  __device__ int64_t query(int row) const { return row / group; }
  __device__ int head(int row) const { return kv_head * group + row % group; }
  __device__ int64_t offset(const int64_t *stride, int row) const {
    return (ragged ? 0 : b * stride[0]) + (sequence.q_start + query(row)) * stride[1] + head(row) * stride[2];
  }
  __device__ int64_t lse(const gqa_attention_params &p, int row) const {
    return ragged ? head(row) * p.total_q + sequence.q_start + query(row)
                  : (b * p.num_q_heads + head(row)) * p.seqlen_q + query(row);
  }
  // Row of the partial results: heads of a token side by side, tokens in order.
  __device__ int64_t flat(const gqa_attention_params &p, int row) const {
    return ((ragged ? 0 : b * p.seqlen_q) + sequence.q_start + query(row)) * p.num_q_heads + head(row);
  }
};

// A row's factor of its weighted sum, and its lse, with the sink added.
struct Finish {
  float factor, lse;

  template <typename T>
  __device__ static Finish of(const gqa_attention_params &p, int head, float highest, float sum) {
    float scale = 1.0f;
    if (p.sinks != nullptr) {
      const bool wide = sizeof(T) == 4 || p.sinks_dtype == GQA_DTYPE_FLOAT32;
      const float logit =
          wide ? static_cast<const float *>(p.sinks)[head] : to_float(static_cast<const T *>(p.sinks)[head]);
      const float sink = logit * kLog2e, together = fmaxf(highest, sink);
      const float base = together == -INFINITY ? 0.0f : together;
      scale = exp2f(highest - base);
      sum = sum * scale + exp2f(sink - base);
      highest = together;
    }
    if (sum == 0) return {0.0f, -INFINITY};
    return {__fdividef(scale, sum), highest * kLn2 + logf(sum)};
  }
};

// What a query head's outputs are to be multiplied by.
__device__ __forceinline__ float value_scale(const gqa_attention_params &p, int head) {
  return p.quantization.v_scale == nullptr ? 1.0f : v_scale_of(p.quantization, head / (p.num_q_heads / p.num_kv_heads));
}

// Rows without attention: those of an invalid sequence are NaN, those of no sequence 0. The grid's row blocks of one
// sequence share them, as there may be more than a valid sequence can have.
template <typename T>
__device__ void fill_rows(const AttentionArgs &a, const Queries &queries, const BlockWork &work, int block_rows) {
  const bool nobody = queries.b == a.p.batch;
  const float nan = __int_as_float(0x7fffffff);
  const int warp = threadIdx.x / 32, warps = blockDim.x / 32, lane = threadIdx.x % 32;
  for (int first = work.row_block * block_rows; first < queries.rows; first += a.row_blocks * block_rows) {
    for (int row = first + warp; row < min(first + block_rows, queries.rows); row += warps) {
      if (a.num_splits > 1) {
        if (lane == 0) {
          const int64_t flat = queries.flat(a.p, row);
          a.partial_sum[work.split * a.rows + flat] = nobody ? make_float2(-INFINITY, kNobody) : make_float2(nan, nan);
        }
        continue;
      }
      T *out = static_cast<T *>(a.p.out) + queries.offset(a.p.out_stride, row);
      for (int d = lane; d < a.p.head_dim; d += 32) out[d] = from_float<T>(nobody ? 0.0f : nan);
      if (lane == 0 && a.p.lse != nullptr) a.p.lse[queries.lse(a.p, row)] = nobody ? -INFINITY : nan;
    }
  }
}

}  // namespace gqa::cuda
