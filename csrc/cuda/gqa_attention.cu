// gqa_attention_prefill and gqa_attention_decode: new keys first, then attention, then the parts joined.
// Launches: decode_ring alone where the plan says so; else append_chunks (new k and v to the cache) or rotate_chunks
// (new k, rotated, to the workspace); prefill_wgmma where the plan says so; else attend, or for float32 attend_float32,
// one warp per row with lanes over the head's elements; combine_splits, one or four warps per row. Memory order of the
// float32 kernel: the row's keys and values in order, each once; of combine_splits: the sums, then the partial rows in
// order. Limits: as in gqa_attention/attend.cuh; float32 does not split the keys. Determinism: fixed order, no atomics.
#include <algorithm>

#include "cuda/common/kv_cache_append.cuh"
#include "cuda/common/launch.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/rotary.cuh"
#include "cuda/gqa_attention/args.cuh"
#include "cuda/gqa_attention_decode_sm90/dispatch.h"
#include "cuda/gqa_attention_prefill_sm90/dispatch.h"
#include "plan/gqa_attention.h"

namespace gqa::cuda {
namespace {

constexpr int kKeysAtOnce = 4;

// What a lane of the float32 kernel holds of its row.
struct FloatRow {
  float query[kChunk], out[kChunk] = {};
  float highest = -INFINITY, sum = 0, lost = 0;

  // Compensated: after 100,000 keys a plain sum would be some 1e-5 off.
  __device__ void add(float weight) {
    const float exact = weight - lost, next = sum + exact;
    lost = (next - sum) - exact;
    sum = next;
  }
};

__device__ void attend_keys(const AttentionArgs &a, const Queries &queries, int first, int last, int column,
                            FloatRow &row) {
  const bool paged = a.paged != 0, active = column < a.p.head_dim;
  const int64_t b = a.per_sequence || paged ? queries.b : 0;
  const int64_t start = a.p.k_cache != nullptr ? 0 : queries.sequence.k_start;
  float score[kKeysAtOnce], value[kKeysAtOnce][kChunk];
#pragma unroll
  for (int i = 0; i < kKeysAtOnce; ++i) {
    const int64_t key = first + i;
    score[i] = 0;
    for (int j = 0; j < kChunk; ++j) value[i][j] = 0;
    if (key >= last || !active) continue;
    int64_t k_at = b * a.k_stride[0] + (start + key) * a.k_stride[1] + queries.kv_head * a.k_stride[2];
    int64_t v_at = b * a.v_stride[0] + (start + key) * a.v_stride[1] + queries.kv_head * a.v_stride[2];
    if (paged) {
      k_at = cache_offset(a.p, a.k_stride, b, key, queries.kv_head);
      v_at = cache_offset(a.p, a.v_stride, b, key, queries.kv_head);
    }
    if (k_at < 0) {
      score[i] = NAN;
      continue;
    }
    float x[kChunk];
    load_chunk(static_cast<const float *>(a.k) + k_at + column, x);
    load_chunk(static_cast<const float *>(a.v) + v_at + column, value[i]);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) score[i] += row.query[j] * x[j];
  }
  float top = row.highest;
#pragma unroll
  for (int i = 0; i < kKeysAtOnce; ++i) {
    score[i] = warp_sum(score[i]) * a.p.softmax_scale;
    if (a.p.softcap > 0) score[i] = a.p.softcap * tanhf(score[i] / a.p.softcap);
    if (first + i >= last) score[i] = -INFINITY;
    top = fmaxf(top, score[i]);
  }
  const float base = top == -INFINITY ? 0.0f : top;
  const float factor = expf(row.highest - base);
  row.highest = top;
  row.sum *= factor;
  row.lost *= factor;
#pragma unroll
  for (int j = 0; j < kChunk; ++j) row.out[j] *= factor;
#pragma unroll
  for (int i = 0; i < kKeysAtOnce; ++i) {
    const float weight = expf(score[i] - base);
    row.add(weight);
#pragma unroll
    for (int j = 0; j < kChunk; ++j) row.out[j] += weight * value[i][j];
  }
}

__global__ void __launch_bounds__(32 * kFloatRows) attend_float32(const __grid_constant__ AttentionArgs a) {
  const gqa_attention_params &p = a.p;
  const BlockWork work = find_work(a);
  const Queries queries(p, work);
  if (work.b == p.batch || !queries.sequence.valid) return fill_rows<float>(a, queries, work, kFloatRows);
  const int lane = threadIdx.x % 32, column = lane * kChunk, at = work.row_block * kFloatRows + threadIdx.x / 32;
  if (at >= queries.rows) return;

  FloatRow row;
#pragma unroll
  for (int j = 0; j < kChunk; ++j) row.query[j] = 0;
  if (column < p.head_dim) {
    const float *from = static_cast<const float *>(p.q) + queries.offset(p.q_stride, at);
    if (p.rotary.cos != nullptr) {
      const int64_t query = queries.query(at);
      const int64_t position = queries.sequence.position(query) - queries.sequence.leftpad;
      const int64_t angles = rotary_offset(p.rotary, queries.b, queries.sequence.q_start + query, position);
      load_rotated_chunk(from, column, p.rotary, angles, row.query);
    } else {
      load_chunk(from + column, row.query);
    }
  }
  const KeyRange range = key_range(p, queries.sequence, queries.query(at));
  const int first = static_cast<int>(range.first), last = static_cast<int>(range.last);
  for (int key = first; key < last; key += kKeysAtOnce) attend_keys(a, queries, key, last, column, row);

  const Finish finish = Finish::of<float>(p, queries.head(at), row.highest * kLog2e, row.sum);
  if (lane == 0 && p.lse != nullptr) p.lse[queries.lse(p, at)] = finish.lse;
  if (column >= p.head_dim) return;
#pragma unroll
  for (int j = 0; j < kChunk; ++j) row.out[j] *= finish.factor;
  store_chunk(static_cast<float *>(p.out) + queries.offset(p.out_stride, at) + column, row.out);
}

constexpr int kSplitsAtOnce = 4;

// Sums of a row's splits part, part + step, ..., in lanes that own two groups of four elements each; head_dim is a
// multiple of 8 up to 256.
struct SplitSums {
  float out[2][4], sum;

  __device__ void add(const AttentionArgs &a, int64_t row, float base, int part, int step) {
    const int lane = threadIdx.x % 32;
    for (int first = part; first < a.num_splits; first += step * kSplitsAtOnce) {
      float2 sums[kSplitsAtOnce];
      float4 fours[kSplitsAtOnce][2];
#pragma unroll
      for (int i = 0; i < kSplitsAtOnce; ++i) {
        const int split = first + i * step;
        const bool there = split < a.num_splits;
        const float *from = a.partial_out + (split * a.rows + row) * a.p.head_dim;
        sums[i] = there ? a.partial_sum[split * a.rows + row] : make_float2(-INFINITY, 0.0f);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const int column = 128 * j + 4 * lane;
          fours[i][j] = make_float4(0, 0, 0, 0);
          if (there && column < a.p.head_dim) fours[i][j] = *reinterpret_cast<const float4 *>(from + column);
        }
      }
#pragma unroll
      for (int i = 0; i < kSplitsAtOnce; ++i) {
        const float weight = exp2_fast(sums[i].x - base);
        sum += __fmul_rn(weight, sums[i].y);  // not fused: rows alone or shared out add the same products
        if (!(sums[i].y > 0)) continue;       // nothing was written; NaN shows in the sum
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          out[j][0] += __fmul_rn(weight, fours[i][j].x);
          out[j][1] += __fmul_rn(weight, fours[i][j].y);
          out[j][2] += __fmul_rn(weight, fours[i][j].z);
          out[j][3] += __fmul_rn(weight, fours[i][j].w);
        }
      }
    }
  }
};

template <typename T>
__global__ void __launch_bounds__(32 * kCombineWarps) combine_splits(const __grid_constant__ AttentionArgs a) {
  const gqa_attention_params &p = a.p;
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32;
  const int share = kCombineWarps / combine_rows(a.num_splits);  // warps of a row
  const int64_t row = static_cast<int64_t>(blockIdx.x) * combine_rows(a.num_splits) + warp / share;
  if (row >= a.rows) return;
  const bool ragged = p.cu_seqlens_q.data != nullptr;
  const int64_t token = row / p.num_q_heads, b = ragged ? 0 : token / p.seqlen_q,
                i = ragged ? token : token % p.seqlen_q;
  const int head = static_cast<int>(row % p.num_q_heads);

  const float2 *parts = a.partial_sum + row;
  const bool nobody = parts[0].y == kNobody;
  float highest = -INFINITY;
  for (int split = lane; split < a.num_splits; split += 32) highest = fmaxf(highest, parts[split * a.rows].x);
  highest = warp_max(highest);
  SplitSums all{};
  all.add(a, row, highest == -INFINITY ? 0.0f : highest, warp % share, share);
  if (share > 1) {
    __shared__ SplitSums shared[kCombineWarps][32];
    shared[warp][lane] = all;
    __syncthreads();
    if (warp > 0) return;
    for (int other = 1; other < kCombineWarps; ++other) {
      const SplitSums &more = shared[other][lane];
      all.sum += more.sum;
#pragma unroll
      for (int e = 0; e < 8; ++e) all.out[e / 4][e % 4] += more.out[e / 4][e % 4];
    }
  }
  const float(&out)[2][4] = all.out;
  const float sum = all.sum;
  Finish finish = nobody ? Finish{0.0f, -INFINITY} : Finish::of<T>(p, head, highest, sum);
  finish.factor *= value_scale(p, head);
  T *to = static_cast<T *>(p.out) + b * p.out_stride[0] + i * p.out_stride[1] + head * p.out_stride[2];
#pragma unroll
  for (int j = 0; j < 2; ++j) {
    const int column = 128 * j + 4 * lane;
    if (column >= p.head_dim) continue;
#pragma unroll
    for (int e = 0; e < 4; ++e) to[column + e] = from_float<T>(out[j][e] * finish.factor);
  }
  if (lane == 0 && p.lse != nullptr) {
    p.lse[ragged ? head * p.total_q + token : (b * p.num_q_heads + head) * p.seqlen_q + i] = finish.lse;
  }
}

template <typename T, int kIndex = 0>
AttendKernel find_kernel(int shape) {
  if constexpr (kIndex == kAttentionShapeCount) {
    return nullptr;
  } else {
    return shape == kIndex ? attend_kernel<T, kIndex>() : find_kernel<T, kIndex + 1>(shape);
  }
}

gqa_kv_cache_append_params append_params(const gqa_attention_params &p) {
  gqa_kv_cache_append_params append{};
  append.struct_size = sizeof(append);
  append.dtype = p.dtype;
  append.k = p.k;
  append.v = p.v;
  append.k_cache = p.k_cache;
  append.v_cache = p.v_cache;
  append.cache_seqlens = p.cache_seqlens;
  append.cu_seqlens = p.cu_seqlens_q;
  append.cache_leftpad = p.cache_leftpad;
  append.block_table = p.block_table;
  append.batch = p.batch;
  append.seqlen = p.cu_seqlens_q.data != nullptr ? p.seqlen_q : p.seqlen_k;
  append.total_tokens = p.total_q;
  append.num_kv_heads = p.num_kv_heads;
  append.head_dim = p.head_dim;
  append.cache_capacity = p.cache_capacity;
  append.num_pages = p.num_pages;
  append.page_size = p.page_size;
  std::copy_n(p.k_stride, 3, append.k_stride);
  std::copy_n(p.v_stride, 3, append.v_stride);
  std::copy_n(p.k_cache_stride, 3, append.k_cache_stride);
  std::copy_n(p.v_cache_stride, 3, append.v_cache_stride);
  append.rotary = p.rotary;
  append.quantization = p.quantization;
  return append;
}

// k, rotated, contiguous in the workspace.
gqa_kv_cache_append_params rotate_params(const gqa_attention_params &p) {
  gqa_kv_cache_append_params rotate = append_params(p);
  rotate.k_cache = p.workspace;
  rotate.v_cache = nullptr;
  rotate.cache_seqlens = {};
  rotate.cu_seqlens = p.cu_seqlens_k;
  rotate.seqlen = p.seqlen_k;
  rotate.total_tokens = p.total_k;
  rotate.k_cache_stride[2] = p.head_dim;
  rotate.k_cache_stride[1] = static_cast<int64_t>(p.num_kv_heads) * p.head_dim;
  rotate.k_cache_stride[0] = rotate.k_cache_stride[1] * p.seqlen_k;
  return rotate;
}

// Strides of dimensions with one element say nothing.
bool rows_aligned(const void *base, const int64_t *stride, const int64_t *size) {
  for (int i = 0; i < 3; ++i) {
    if (size[i] > 1 && stride[i] % 8 != 0) return false;
  }
  return is_aligned16(base);
}

AttentionArgs make_args(const gqa_attention_params &p, const AttentionPlan &plan) {
  AttentionArgs a{};
  a.p = p;
  const bool cached = p.k_cache != nullptr;
  a.paged = p.block_table.data != nullptr;
  a.k = cached ? p.k_cache : p.k;
  a.v = cached ? p.v_cache : p.v;
  std::copy_n(cached ? p.k_cache_stride : p.k_stride, 3, a.k_stride);
  std::copy_n(cached ? p.v_cache_stride : p.v_stride, 3, a.v_stride);
  if (plan.rotates) {
    const gqa_kv_cache_append_params rotate = rotate_params(p);
    a.k = rotate.k_cache;
    std::copy_n(rotate.k_cache_stride, 3, a.k_stride);
  }
  a.per_sequence = !a.paged && (cached || p.cu_seqlens_k.data == nullptr);
  const int64_t outer = a.paged ? p.num_pages : (a.per_sequence ? p.batch : 1);
  const int64_t size[3] = {outer, a.paged ? p.page_size : 2, p.num_kv_heads};
  const bool alike = a.k_stride[0] == a.v_stride[0] && a.k_stride[1] == a.v_stride[1];
  a.direct = rows_aligned(a.k, a.k_stride, size) && rows_aligned(a.v, a.v_stride, size) && (!a.paged || alike);
  a.row_blocks = static_cast<int32_t>(plan.row_blocks);
  a.num_splits = plan.num_splits;
  a.divisor = plan.divisor;
  a.min_chunk = plan.min_chunk;
  a.quantized = p.quantization.dtype;
  a.transforms = p.softcap > 0 || !(p.softmax_scale > 0) || a.quantized != 0;
  a.multiplier = a.transforms ? 1.0f : p.softmax_scale * kLog2e;
  a.before_tanh = p.softcap > 0 ? p.softmax_scale / p.softcap : p.softmax_scale * kLog2e;
  a.after_tanh = p.softcap * kLog2e;
  const int64_t tokens = p.cu_seqlens_q.data != nullptr ? p.total_q : p.batch * p.seqlen_q;
  a.rows = tokens * p.num_q_heads;
  unsigned char *workspace = static_cast<unsigned char *>(p.workspace);
  a.partial_sum = reinterpret_cast<float2 *>(workspace + plan.partial_sum);
  a.partial_out = reinterpret_cast<float *>(workspace + plan.partial_out);
  return a;
}

gqa_status run(AttentionOp op, const gqa_attention_params *p, cudaStream_t stream) {
  GQA_RETURN_IF_ERROR(op == AttentionOp::kDecode ? check_attention_decode(p) : check_attention_prefill(p));
  gqa_device device;
  GQA_RETURN_IF_ERROR(current_device(&device));
  AttentionPlan plan;
  GQA_RETURN_IF_ERROR(plan_attention(op, p, &device, &plan));
  if (plan.plan.workspace_size > 0) {
    if (p->workspace == nullptr || p->workspace_size < plan.plan.workspace_size) return GQA_STATUS_WORKSPACE_TOO_SMALL;
    if (!is_aligned16(p->workspace)) return GQA_STATUS_INVALID_ARGUMENT;
  }
  if (plan.clusters) return decode_sm90::launch_decode(*p, plan.decode, plan.plan.launches[0], stream);
  const gqa_launch *next = plan.plan.launches, *end = next + plan.plan.num_launches;
  if (plan.appends || plan.rotates) {
    GQA_RETURN_IF_ERROR(launch_append(plan.appends ? append_params(*p) : rotate_params(*p), *next++, stream));
  }
  if (next == end) return GQA_STATUS_OK;
  if (plan.wgmma) return prefill_sm90::launch_prefill(*p, plan.prefill, *next, stream);
  const AttentionArgs args = make_args(*p, plan);
  if (p->dtype == GQA_DTYPE_FLOAT32) return launch(attend_float32, *next, stream, args);
  return dispatch_float(p->dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if constexpr (sizeof(T) == 4) {
      return GQA_STATUS_UNSUPPORTED;
    } else {
      GQA_RETURN_IF_ERROR(launch(find_kernel<T>(plan.shape), *next++, stream, args));
      return next == end ? GQA_STATUS_OK : launch(combine_splits<T>, *next, stream, args);
    }
  });
}

}  // namespace
}  // namespace gqa::cuda

extern "C" {

gqa_status gqa_attention_prefill_cuda(const gqa_attention_prefill_params *p, CUstream_st *stream) {
  return gqa::cuda::run(gqa::AttentionOp::kPrefill, p, stream);
}

gqa_status gqa_attention_decode_cuda(const gqa_attention_decode_params *p, CUstream_st *stream) {
  return gqa::cuda::run(gqa::AttentionOp::kDecode, p, stream);
}

}  // extern "C"
