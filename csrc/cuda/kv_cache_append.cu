// kv_cache_append: writes new keys, rotated if asked, and values to their rows of the cache, quantised if it is.
// One thread per 8 elements of a new token's head, consecutive threads along the head, then heads, then tokens.
// Memory order: lengths, page id, k and v, rows out; rotated or quantised: k, its partner, tables, row out; then v.
// Limits: head_dim a multiple of 8; rows that are not 16-byte aligned are moved element by element.
// Determinism: each cache row has one writer, so bitwise repeatable.
#include "cuda/common/kv_cache_append.cuh"

#include "common/attention.h"
#include "cuda/common/quantized.cuh"
#include "cuda/common/rotary.cuh"

namespace gqa::cuda {
namespace {

struct NewRow {
  bool valid;
  int64_t source;    // row of k and v
  int64_t row;       // row of the cache
  int64_t position;  // of its rotation, where none is given
};

__device__ NewRow find_row(const gqa_kv_cache_append_params &p, int64_t b, int64_t token) {
  int64_t start = 0, length = p.seqlen;
  bool valid = true;
  if (p.cu_seqlens.data != nullptr) valid = load_span(p.cu_seqlens, b, p.total_tokens, p.seqlen, &start, &length);
  const int64_t cached = load_index_or(p.cache_seqlens, 0, b), leftpad = load_index_or(p.cache_leftpad, 0, b);
  const bool fits = p.v_cache == nullptr || (cached >= 0 && cached <= p.cache_capacity - length);
  valid = valid && token < length && fits && leftpad >= 0;
  return {valid, start + token, cached + token, cached + token - leftpad};
}

// Eight elements of a new row to a quantised cache, as rounded to T before.
template <typename T>
__device__ void append_quantized(const gqa_kv_cache_append_params &p, const float (&x)[kChunk], void *cache, int64_t to,
                                 float scale) {
  float rounded[kChunk];
#pragma unroll
  for (int i = 0; i < kChunk; ++i) rounded[i] = to_float(from_float<T>(x[i]));
  store_quantized(p.quantization.dtype, static_cast<uint8_t *>(cache) + to, rounded, scale);
}

struct NewChunk {
  int first;  // element
  int64_t head, token, b;
};

template <typename Index>
__device__ __forceinline__ NewChunk find_chunk(const gqa_kv_cache_append_params &p, Index index) {
  const Index chunks = static_cast<Index>(p.head_dim / kChunk), heads = static_cast<Index>(p.num_kv_heads);
  const Index tokens = static_cast<Index>(p.seqlen);
  NewChunk chunk;
  chunk.first = static_cast<int>(index % chunks) * kChunk;
  index /= chunks;
  chunk.head = static_cast<int64_t>(index % heads);
  index /= heads;
  chunk.token = static_cast<int64_t>(index % tokens);
  chunk.b = static_cast<int64_t>(index / tokens);
  return chunk;
}

// Both are on their way before either is stored.
template <typename T>
__device__ __forceinline__ void copy_chunks(const T *k, T *k_to, const T *v, T *v_to) {
  if (is_aligned16(k) && is_aligned16(k_to) && is_aligned16(v) && is_aligned16(v_to)) {
    constexpr int kVecs = kChunk / Vec<T>::kSize;
    Vec<T> x[2 * kVecs];
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      x[i] = load_vec_once(k + i * Vec<T>::kSize);
      x[kVecs + i] = load_vec_once(v + i * Vec<T>::kSize);
    }
#pragma unroll
    for (int i = 0; i < kVecs; ++i) {
      store_vec(k_to + i * Vec<T>::kSize, x[i]);
      store_vec(v_to + i * Vec<T>::kSize, x[kVecs + i]);
    }
  } else {
    copy_chunk(k, k_to);
    copy_chunk(v, v_to);
  }
}

template <typename T>
__global__ void __launch_bounds__(256) append_chunks(const __grid_constant__ gqa_kv_cache_append_params p) {
  constexpr uint32_t kNarrow = 1u << 24;  // blocks: divisions of 64 bits would take longer than the copies
  const uint64_t index = static_cast<uint64_t>(blockIdx.x) * blockDim.x + threadIdx.x;
  const NewChunk chunk =
      gridDim.x < kNarrow ? find_chunk(p, static_cast<uint32_t>(index)) : find_chunk<uint64_t>(p, index);
  const int64_t b = chunk.b, head = chunk.head;
  const int first = chunk.first;
  if (b >= p.batch) return;
  const NewRow row = find_row(p, b, chunk.token);
  if (!row.valid) return;
  const int64_t batch = p.cu_seqlens.data != nullptr ? 0 : b;
  const bool quantizes = sizeof(T) == 2 && p.quantization.dtype != 0;
  const int64_t k_to = p.v_cache == nullptr
                           ? batch * p.k_cache_stride[0] + row.source * p.k_cache_stride[1] + head * p.k_cache_stride[2]
                           : cache_offset(p, p.k_cache_stride, b, row.row, head);
  if (p.rotary.cos == nullptr && !quantizes) {  // so there is a cache; pages are the same for k and v
    if (k_to < 0) return;
    const int64_t v_to = cache_offset(p, p.v_cache_stride, b, row.row, head);
    const T *k =
        static_cast<const T *>(p.k) + batch * p.k_stride[0] + row.source * p.k_stride[1] + head * p.k_stride[2];
    const T *v =
        static_cast<const T *>(p.v) + batch * p.v_stride[0] + row.source * p.v_stride[1] + head * p.v_stride[2];
    copy_chunks(k + first, static_cast<T *>(p.k_cache) + k_to + first, v + first,
                static_cast<T *>(p.v_cache) + v_to + first);
    return;
  }
  if (k_to >= 0) {
    const T *from =
        static_cast<const T *>(p.k) + batch * p.k_stride[0] + row.source * p.k_stride[1] + head * p.k_stride[2];
    T *to = static_cast<T *>(p.k_cache) + k_to + first;
    float x[kChunk];
    if (p.rotary.cos != nullptr) {
      load_rotated_chunk(from, first, p.rotary, rotary_offset(p.rotary, b, row.source, row.position), x);
    } else {
      load_chunk(from + first, x);
    }
    if (quantizes) {
      append_quantized<T>(p, x, p.k_cache, k_to + first, k_scale_of(p.quantization, head));
    } else {
      store_chunk(to, x);
    }
  }
  if (p.v_cache == nullptr) return;
  if (const int64_t v_to = cache_offset(p, p.v_cache_stride, b, row.row, head); v_to >= 0) {
    const T *from =
        static_cast<const T *>(p.v) + batch * p.v_stride[0] + row.source * p.v_stride[1] + head * p.v_stride[2];
    if (quantizes) {
      float x[kChunk];
      load_chunk(from + first, x);
      append_quantized<T>(p, x, p.v_cache, v_to + first, v_scale_of(p.quantization, head));
    } else {
      copy_chunk(from + first, static_cast<T *>(p.v_cache) + v_to + first);
    }
  }
}

}  // namespace

gqa_status launch_append(const gqa_kv_cache_append_params &p, const gqa_launch &plan, cudaStream_t stream) {
  return dispatch_float(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return launch(append_chunks<T>, plan, stream, p);
  });
}

}  // namespace gqa::cuda

extern "C" gqa_status gqa_kv_cache_append_cuda(const gqa_kv_cache_append_params *p, CUstream_st *stream) {
  gqa_plan plan;
  GQA_RETURN_IF_ERROR(gqa_kv_cache_append_plan(p, nullptr, &plan));
  if (plan.num_launches == 0) return GQA_STATUS_OK;
  return gqa::cuda::launch_append(*p, plan.launches[0], stream);
}
