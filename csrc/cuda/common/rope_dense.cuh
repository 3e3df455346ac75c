// rope, and qk_rmsnorm_rope, of whole heads that lie side by side in a token: what models call.
// x is the lanes of a head, 8 pairs (4 of float32) each, y heads, z tokens. The blocks that share a token, blockIdx.x,
// run side by side, so that its angles are read from DRAM once; the tokens go on in blockIdx.y and z.
// Memory order: position, then the two vectors of a lane's pairs with their weights and angles, then both written; all
// loads of a thread are under way before the first is used. Limits: plan/rope_dense.h. Determinism: the pairs
// (i, i + dim / 2) of a lane are what meets first in the order of square_sum.cuh, so a norm's bytes are norm_rows's,
// and the rotation rounds as rope_kernel's does; in place equals out of place.
#pragma once

#include "common/attention.h"
#include "common/rotate.h"
#include "cuda/common/norm_scale.cuh"
#include "cuda/common/programmatic_launch.cuh"
#include "cuda/common/square_sum.cuh"
#include "plan/rope_dense.h"

namespace gqa::cuda {

// In the order of use, as parameters lie in memory; `rotary` is read only where a token's index is not its position.
template <typename T>
struct DenseRope {
  int32_t tokens, num_q_heads, heads, head_dim;
  int32_t q_stride, k_stride, q_out_stride, k_out_stride;  // of a token
  const T *q, *k;
  T *q_out, *k_out;
  const void *cos, *sin;
  int32_t table_stride;
  int32_t table_rows;  // 0: `rotary` says where the angles of a token are
  const void *q_weight, *k_weight;
  float inverse_dim, eps, weight_offset;
  bool cast_before_weight, few_tokens, past_cache;
  int32_t seqlen;
  gqa_rotary rotary;
};

template <typename T, typename Params>
DenseRope<T> dense_rope(const Params &p, const RopeVariant &variant) {
  DenseRope<T> d{};
  d.tokens = static_cast<int32_t>(p.batch * p.seqlen);
  d.num_q_heads = p.num_q_heads;
  d.heads = p.num_q_heads + (p.k != nullptr ? p.num_kv_heads : 0);
  d.head_dim = p.head_dim;
  d.q_stride = static_cast<int32_t>(token_stride(p, p.q_stride));
  d.k_stride = static_cast<int32_t>(token_stride(p, p.k_stride));
  d.q_out_stride = static_cast<int32_t>(token_stride(p, p.q_out_stride));
  d.k_out_stride = static_cast<int32_t>(token_stride(p, p.k_out_stride));
  d.q = static_cast<const T *>(p.q);
  d.k = static_cast<const T *>(p.k);
  d.q_out = static_cast<T *>(p.q_out);
  d.k_out = static_cast<T *>(p.k_out);
  d.cos = p.rotary.cos;
  d.sin = p.rotary.sin;
  d.table_stride = static_cast<int32_t>(p.rotary.stride_row);
  d.table_rows = rows_by_token(p);
  d.few_tokens = variant.few_tokens;
  d.past_cache = variant.past_cache;
  d.seqlen = static_cast<int32_t>(p.seqlen);
  d.rotary = p.rotary;
  return d;
}

template <int N, typename C>
__device__ __forceinline__ void load_table(const void *table, int64_t at, bool there, float (&angle)[N]) {
  constexpr int kStep = Vec<C>::kSize < N ? Vec<C>::kSize : N;
#pragma unroll
  for (int i = 0; i < N; i += kStep) {
    Run<C, kStep> run{};
    if (there) run = load_run<kStep>(static_cast<const C *>(table) + at + i);
#pragma unroll
    for (int j = 0; j < kStep; ++j) angle[i + j] = to_float(run.value[j]);
  }
}

// Over a head's vectors in the order of square_sum.cuh, of `lanes` lanes the `low` ones and after them the `high` ones:
// a lane adds to its own the vector blockDim.x, a power of two, further on, or has it where it has none; these meet by
// a butterfly. Lanes past the head bring zeros.
__device__ __forceinline__ float head_sum(float low, float high, int lanes) {
  const float sum = low + __shfl_sync(0xffffffffu, high, threadIdx.x - lanes, blockDim.x);
  return blockDim.x == 8 ? group_sum(sum, 8) : group_sum(sum, blockDim.x);  // 8: without a loop, most heads have 8
}

// Blocks of an SM that registers are to allow.
template <typename W, bool kUsual>
constexpr int rope_dense_blocks() {
  return std::is_void_v<W> ? 9 : kUsual ? (std::is_same_v<W, float> ? 7 : 8) : std::is_same_v<W, float> ? 6 : 7;
}

// W is the dtype of the weights; void: no norm. kUsual: RopeVariant::usual, which spares a third of the instructions,
// of which the norm has enough to be bound by.
template <typename T, typename W, typename C, bool kInterleaved, bool kUsual = false>
__global__ void __launch_bounds__(kRopeThreads, rope_dense_blocks<W, kUsual>())
    rope_dense(const __grid_constant__ DenseRope<T> p) {
  constexpr int N = Vec<T>::kSize;
  constexpr bool kNorms = !std::is_void_v<W>;
  launch_dependents();
  const int token = (blockIdx.z * gridDim.y + blockIdx.y) * blockDim.z + threadIdx.z;
  const int head = blockIdx.x * blockDim.y + threadIdx.y;
  const bool is_q = head < p.num_q_heads;
  const bool active = token < p.tokens && head < p.heads && threadIdx.x < p.head_dim / (2 * N);
  const int pair = threadIdx.x * N, low = kInterleaved ? 2 * pair : pair;
  const int high = (kInterleaved ? N : p.head_dim / 2);  // from low
  const int within = (is_q ? head : head - p.num_q_heads) * p.head_dim + low;
  const T *in = (is_q ? p.q : p.k) + static_cast<int64_t>(token) * (is_q ? p.q_stride : p.k_stride) + within;
  T *out = (is_q ? p.q_out : p.k_out) + static_cast<int64_t>(token) * (is_q ? p.q_out_stride : p.k_out_stride) + within;
  // Positions may be the kernel before's to write; without them the angles' place is known.
  int64_t angles = kUsual || token < p.table_rows ? static_cast<int64_t>(token) * p.table_stride + pair : -1;
  if (!kUsual && p.few_tokens && active && angles >= 0) {
    prefetch_l2(static_cast<const C *>(p.cos) + angles);
    prefetch_l2(static_cast<const C *>(p.sin) + angles);
  }
  have_ready(in);
  have_ready(out);
  have_ready(angles);
  have_ready(static_cast<int>(p.past_cache));
  if constexpr (kNorms) have_ready(p.eps);
  wait_for_prerequisites();
  // The position first, its branch ahead of all loads: what follows a branch after them would wait for them.
  if (!kUsual && p.table_rows == 0 && active) {
    prefetch_l2(in);
    prefetch_l2(in + high);
    const uint32_t batch = static_cast<uint32_t>(token) / static_cast<uint32_t>(p.seqlen);
    const int64_t s = token - static_cast<int64_t>(batch) * p.seqlen, offset = rotary_offset(p.rotary, batch, s, s);
    angles = offset < 0 ? -1 : offset + pair;
  }
  Vec<T> a, b;
  float cosine[N], sine[N];
  if constexpr (kUsual) {
    const W *weight = static_cast<const W *>(is_q ? p.q_weight : p.k_weight) + low;
    Weights<T, W> weight_a, weight_b;
    if (active) {
      a = load_vec(in);
      b = load_vec(in + high);
      load_table<N, C>(p.cos, angles, true, cosine);
      load_table<N, C>(p.sin, angles, true, sine);
      weight_a = load_weights<N, T>(weight, 0, N);
      weight_b = load_weights<N, T>(weight, high, high + N);
    }
    const float of_a = active ? square_sum(a) : 0.0f, of_b = active ? square_sum(b) : 0.0f;
    const float total = head_sum(of_a, of_b, p.head_dim / (2 * N));
    const float rstd = reciprocal_rms(total, p.inverse_dim, p.eps);
    a = scaled<T, W>(a, weight_a, rstd, LlamaScale{});
    b = scaled<T, W>(b, weight_b, rstd, LlamaScale{});
  } else {
    a = b = Vec<T>{};
    if (active) a = load_vec(in);
    if (active) b = load_vec(in + high);
    const bool turns = active && angles >= 0;
    load_table<N, C>(p.cos, angles, turns, cosine);
    load_table<N, C>(p.sin, angles, turns, sine);
    if constexpr (kNorms) {
      const W *weight = static_cast<const W *>(is_q ? p.q_weight : p.k_weight) + low;
      Weights<T, W> weight_a{}, weight_b{};
      if (active) weight_a = load_weights<N, T>(weight, 0, N);
      if (active) weight_b = load_weights<N, T>(weight, high, high + N);
      const float total = head_sum(square_sum(a), square_sum(b), p.head_dim / (2 * N));
      const float rstd = reciprocal_rms(total, p.inverse_dim, p.eps);
      a = scaled<T, W>(a, weight_a, rstd, p);
      b = scaled<T, W>(b, weight_b, rstd, p);
    }
  }
  if (!active) return;
  Floats<T> of_a = widen(a), of_b = widen(b);
#pragma unroll
  for (int i = 0; i < N; ++i) {
    float &x = !kInterleaved ? of_a.value[i] : 2 * i < N ? of_a.value[2 * i] : of_b.value[2 * i - N];
    float &y = !kInterleaved ? of_b.value[i] : 2 * i < N ? of_a.value[2 * i + 1] : of_b.value[2 * i + 1 - N];
    const Pair turned = rotate_pair(x, y, cosine[i], sine[i]);
    x = turned.first;
    y = turned.second;
  }
  a = narrow(of_a);
  b = narrow(of_b);
  if (!kUsual && angles < 0) {  // a position outside the table
#pragma unroll
    for (int i = 0; i < N; ++i) a.value[i] = b.value[i] = from_float<T>(__int_as_float(0x7fc00000));
  }
  if (p.past_cache) {
    store<N>(out, 0, 0, a, true);
    store<N>(out + high, 0, 0, b, true);
  } else {
    store<N>(out, 0, 0, a, false);
    store<N>(out + high, 0, 0, b, false);
  }
}

}  // namespace gqa::cuda
