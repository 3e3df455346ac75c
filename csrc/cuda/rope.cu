// rope: rotates each head of q and k by the angles of its token; pairs are (i, i + dim / 2) or (2i, 2i + 1).
// Here what rope_dense.cuh does not serve. A block is one token or a few: x walks a head by units of 1 or 16 bytes'
// worth of pairs, y heads, z tokens. Memory order: position, then a head's unit with cos and sin, then the unit
// written. Starts while the kernel before it ends. Limits: any head_dim, strides and alignment; what is not whole
// aligned 16-byte vectors takes the scalar instance. Determinism: no reductions, each product rounds by itself; bitwise
// repeatable, in place equals out of place.
#include "cuda/common/rope_dense.cuh"

namespace gqa::cuda {
namespace {

// N consecutive table entries as float, in 16-byte loads where N > 1.
template <int N, typename C>
__device__ void load_angles(const C *from, float (&angle)[N]) {
  constexpr int kStep = N == 1 ? 1 : Vec<C>::kSize;
#pragma unroll
  for (int i = 0; i < N; i += kStep) {
    const Run<C, kStep> run = load_run<kStep>(from + i);
#pragma unroll
    for (int j = 0; j < kStep; ++j) angle[i + j] = to_float(run.value[j]);
  }
}

// N pairs of one head: the runs that hold their halves, or two runs side by side where pairs are interleaved.
template <typename T, int N, bool kInterleaved>
struct Unit {
  Run<T, N> low, high;

  __device__ static int64_t low_at(int64_t pair) { return kInterleaved ? 2 * pair : pair; }
  __device__ static int64_t high_at(int64_t pair, int64_t half) { return kInterleaved ? 2 * pair + N : pair + half; }

  __device__ void load(const T *head, int64_t pair, int64_t half) {
    low = load_run<N>(head + low_at(pair));
    high = load_run<N>(head + high_at(pair, half));
  }

  __device__ void store(T *head, int64_t pair, int64_t half, bool past_cache) const {
    store_run(head + low_at(pair), low, past_cache);
    store_run(head + high_at(pair, half), high, past_cache);
  }

  __device__ T &at(int i) { return i < N ? low.value[i] : high.value[i - N]; }

  // A token whose position is outside the table.
  __device__ void fill(T value) {
#pragma unroll
    for (int i = 0; i < N; ++i) low.value[i] = high.value[i] = value;
  }

  __device__ void rotate(const float (&cosine)[N], const float (&sine)[N]) {
#pragma unroll
    for (int i = 0; i < N; ++i) {
      T &a = at(kInterleaved ? 2 * i : i), &b = at(kInterleaved ? 2 * i + 1 : N + i);
      const Pair rotated = rotate_pair(to_float(a), to_float(b), cosine[i], sine[i]);
      a = from_float<T>(rotated.first);
      b = from_float<T>(rotated.second);
    }
  }
};

template <typename T>
struct Head {
  const T *in;
  T *out;
};

// q's heads, then k's.
template <typename T>
__device__ Head<T> head_at(const gqa_rope_params &p, int64_t b, int64_t s, int64_t head) {
  const bool is_q = head < p.num_q_heads;
  const int64_t h = is_q ? head : head - p.num_q_heads;
  const int64_t in = b * (is_q ? p.q_stride[0] : p.k_stride[0]) + s * (is_q ? p.q_stride[1] : p.k_stride[1]) +
                     h * (is_q ? p.q_stride[2] : p.k_stride[2]);
  const int64_t out = b * (is_q ? p.q_out_stride[0] : p.k_out_stride[0]) +
                      s * (is_q ? p.q_out_stride[1] : p.k_out_stride[1]) +
                      h * (is_q ? p.q_out_stride[2] : p.k_out_stride[2]);
  return {static_cast<const T *>(is_q ? p.q : p.k) + in, static_cast<T *>(is_q ? p.q_out : p.k_out) + out};
}

template <typename T, typename C, int N, bool kInterleaved>
__global__ void __launch_bounds__(320, 4)
    rope_kernel(const __grid_constant__ gqa_rope_params p, bool few_tokens, bool past_cache) {
  launch_dependents();
  const uint32_t seqlen = static_cast<uint32_t>(p.seqlen);  // the plan keeps the number of tokens below 2^31
  const uint32_t token = blockIdx.x * blockDim.z + threadIdx.z;
  const uint32_t b = token < seqlen ? 0 : token / seqlen, s = token - b * seqlen;
  const int half = p.rotary.dim / 2, heads = p.num_q_heads + (p.k != nullptr ? p.num_kv_heads : 0);
  int pair = threadIdx.x * N;
  const bool inside = b < p.batch, has_positions = p.rotary.positions.data != nullptr;
  // Positions may be the kernel before's to write; without them the angles' place is known.
  int64_t offset = inside && !has_positions ? rotary_offset(p.rotary, b, s, s) : -1;
  if (few_tokens && offset >= 0) {
    prefetch_l2(static_cast<const C *>(p.rotary.cos) + offset + pair);
    prefetch_l2(static_cast<const C *>(p.rotary.sin) + offset + pair);
  }
  int head = threadIdx.y;
  Head<T> at = head_at<T>(p, b, s, head);
  have_ready(at.in);
  have_ready(at.out);
  have_ready(offset);
  have_ready(p.rotary.cos);
  have_ready(p.rotary.sin);
  have_ready(heads);
  have_ready(p.head_dim);
  have_ready(static_cast<int>(past_cache));
  wait_for_prerequisites();
  if (!inside) return;
  if (has_positions) offset = rotary_offset(p.rotary, b, s, s);
#pragma unroll 1
  for (; pair < half; pair += blockDim.x * N) {
    while (head < heads) {
      Unit<T, N, kInterleaved> unit;
      if (offset >= 0) {
        unit.load(at.in, pair, half);
        float cosine[N], sine[N];
        load_angles(static_cast<const C *>(p.rotary.cos) + offset + pair, cosine);
        load_angles(static_cast<const C *>(p.rotary.sin) + offset + pair, sine);
        unit.rotate(cosine, sine);
      } else {
        unit.fill(from_float<T>(__int_as_float(0x7fc00000)));
      }
      unit.store(at.out, pair, half, past_cache);
      head += blockDim.y;
      if (head < heads) at = head_at<T>(p, b, s, head);
    }
    head = threadIdx.y;
    at = head_at<T>(p, b, s, head);
  }
  if (p.rotary.dim == p.head_dim) return;
  for (int head = threadIdx.y; head < heads; head += blockDim.y) {
    const Head<T> at = head_at<T>(p, b, s, head);
    if (at.in == at.out) continue;
    for (int i = p.rotary.dim + threadIdx.x * N; i < p.head_dim; i += blockDim.x * N) {
      store_run(at.out + i, load_run<N>(at.in + i));
    }
  }
}

template <typename T, typename C>
gqa_status run(const gqa_rope_params *p, const gqa_launch &plan, cudaStream_t stream) {
  constexpr int kVector = Vec<T>::kSize;
  const bool interleaved = p->rotary.interleaved != 0;
  auto *vector = interleaved ? rope_kernel<T, C, kVector, true> : rope_kernel<T, C, kVector, false>;
  auto *scalar = interleaved ? rope_kernel<T, C, 1, true> : rope_kernel<T, C, 1, false>;
  const RopeVariant variant = RopeVariant::decode(plan.variant);
  if (variant.dense) {
    auto *dense = interleaved ? rope_dense<T, void, C, true> : rope_dense<T, void, C, false>;
    return launch_programmatic(dense, plan, stream, dense_rope<T>(*p, variant));
  }
  return launch_programmatic(variant.vectors ? vector : scalar, plan, stream, *p, variant.few_tokens,
                             variant.past_cache);
}

}  // namespace
}  // namespace gqa::cuda

extern "C" gqa_status gqa_rope_cuda(const gqa_rope_params *p, CUstream_st *stream) {
  gqa_plan plan;
  GQA_RETURN_IF_ERROR(gqa_rope_plan(p, nullptr, &plan));
  if (plan.num_launches == 0) return GQA_STATUS_OK;
  return gqa::cuda::dispatch_float(p->dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return p->rotary.dtype == p->dtype ? gqa::cuda::run<T, T>(p, plan.launches[0], stream)
                                       : gqa::cuda::run<T, float>(p, plan.launches[0], stream);
  });
}
