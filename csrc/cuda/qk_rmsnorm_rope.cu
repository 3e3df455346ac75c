// qk_rmsnorm_rope: each head of q and k normalised by its weight and rounded, then rotated: rope(rmsnorm(q),
// rmsnorm(k)). Here what rope_dense.cuh does not serve. Vector kernel: x is the lanes of a head, a vector of 16 bytes
// each, y heads, z tokens. Scalar kernel: a warp a head. Memory order: position, a vector with its weight, cos and sin,
// then out; the halves of a pair meet by shuffle, in the scalar kernel in shared memory. Starts while the kernel before
// it ends. Limits: the scalar kernel takes any head that fits its shared memory. Determinism: squares are summed in the
// order of square_sum.cuh and the rotation rounds as rope's does, so the bytes are those of the two ops; in place
// equals out of place.
#include "plan/qk_rmsnorm_rope.h"

#include "cuda/common/rope_dense.cuh"

namespace gqa::cuda {
namespace {

using Params = gqa_qk_rmsnorm_rope_params;

__device__ float invalid() { return __int_as_float(0x7fc00000); }

template <typename T, typename W>
struct Head {
  const T *in;
  T *out;
  const W *weight;
};

// q's heads, then k's.
template <typename T, typename W>
__device__ Head<T, W> head_at(const Params &p, uint32_t b, uint32_t s, int head) {
  const bool is_q = head < p.num_q_heads;
  const int64_t h = is_q ? head : head - p.num_q_heads;
  const int64_t *in = is_q ? p.q_stride : p.k_stride, *out = is_q ? p.q_out_stride : p.k_out_stride;
  return {static_cast<const T *>(is_q ? p.q : p.k) + b * in[0] + s * in[1] + h * in[2],
          static_cast<T *>(is_q ? p.q_out : p.k_out) + b * out[0] + s * out[1] + h * out[2],
          static_cast<const W *>(is_q ? p.q_weight : p.k_weight)};
}

// The angles of a lane's vector, an element each; NaN for a token whose position is outside the table. Interleaved
// pairs lie within the vector: the angles are then half as many.
template <int N, typename C>
__device__ void load_angles(const void *table, int64_t offset, int first, float (&angle)[N]) {
  constexpr int kStep = N * sizeof(C) > 16 ? 16 / sizeof(C) : N;
#pragma unroll
  for (int i = 0; i < N; i += kStep) {
    Run<C, kStep> run;
    if (offset >= 0) run = load_run<kStep>(static_cast<const C *>(table) + offset + first + i);
#pragma unroll
    for (int j = 0; j < kStep; ++j) angle[i + j] = offset >= 0 ? to_float(run.value[j]) : invalid();
  }
}

// rotate_pair's first or second, by the sign of the sine: a - b is a + -b to the bit.
__device__ float rotated(float x, float across, float cosine, float signed_sine) {
  const float along = __fmul_rn(x, cosine);
  return signed_sine == 0.0f ? along : __fadd_rn(along, __fmul_rn(across, signed_sine));
}

template <typename T>
__device__ Vec<T> from_lane(const Vec<T> &vec, int lane) {
  Vec<T> other;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t word = reinterpret_cast<const uint32_t *>(vec.value)[i];
    reinterpret_cast<uint32_t *>(other.value)[i] = __shfl_sync(0xffffffffu, word, lane);
  }
  return other;
}

template <typename T, typename W, typename C, bool kInterleaved>
__global__ void __launch_bounds__(320, sizeof(C) == 2 ? 2 : 3)
    qk_rmsnorm_rope_vector(const __grid_constant__ Params p, float inverse_dim, bool past_cache) {
  constexpr int kVector = Vec<T>::kSize, kAngles = kInterleaved ? kVector / 2 : kVector;
  launch_dependents();
  const uint32_t seqlen = static_cast<uint32_t>(p.seqlen), token = blockIdx.x * blockDim.z + threadIdx.z;
  const uint32_t b = token < seqlen ? 0 : token / seqlen, s = token - b * seqlen;
  const int first = threadIdx.x * kVector, half = p.rotary.dim / 2;
  const bool inside = b < p.batch && first < p.head_dim;
  const bool rotates = first < p.rotary.dim, upper = first >= half;
  const int lane = (threadIdx.y * blockDim.x + threadIdx.x) % 32;
  const int partner = !rotates ? lane : upper ? lane - half / kVector : lane + half / kVector;
  const int heads = p.num_q_heads + p.num_kv_heads, rounds = (heads + blockDim.y - 1) / blockDim.y;
  const int pair = kInterleaved ? first / 2 : upper ? first - half : first;
  have_ready(head_at<T, W>(p, b, s, threadIdx.y).in + first);
  have_ready(p.rotary.cos);
  have_ready(p.eps);
  have_ready(static_cast<int>(past_cache));
  wait_for_prerequisites();
  const int64_t offset = inside ? rotary_offset(p.rotary, b, s, s) : -1;
#pragma unroll 1
  for (int round = 0; round < rounds; ++round) {
    const int head = round * blockDim.y + threadIdx.y;
    const bool active = inside && head < heads;
    // All loads before the first use; nothing of what they give is used where the lane is not active.
    const Head<T, W> at = head_at<T, W>(p, b, s, active ? head : 0);
    Vec<T> x{};
    Weights<T, W> weights{};
    if (active) x = load_vec(at.in + first);
    if (active) weights = load_weights<kVector, T>(at.weight, first, p.head_dim);
    float cosine[kAngles], sine[kAngles];
    load_angles<kAngles, C>(p.rotary.cos, rotates ? offset : -1, pair, cosine);
    load_angles<kAngles, C>(p.rotary.sin, rotates ? offset : -1, pair, sine);
    const float total = group_sum(square_sum(x), blockDim.x);
    Vec<T> out = scaled<T, W>(x, weights, reciprocal_rms(total, inverse_dim, p.eps), p);
    keep_packed(out);
    Vec<T> other;
    if constexpr (!kInterleaved) other = from_lane(out, partner);
    if (rotates) {
      Floats<T> value = widen(out);
      if constexpr (kInterleaved) {
#pragma unroll
        for (int j = 0; j < kAngles; ++j) {
          const Pair turned = rotate_pair(value.value[2 * j], value.value[2 * j + 1], cosine[j], sine[j]);
          value.value[2 * j] = turned.first;
          value.value[2 * j + 1] = turned.second;
        }
      } else {
        const Floats<T> across = widen(other);
#pragma unroll
        for (int j = 0; j < kAngles; ++j) {
          value.value[j] = rotated(value.value[j], across.value[j], cosine[j], upper ? sine[j] : -sine[j]);
        }
      }
      out = narrow(value);
    }
    if (active) store<kVector>(at.out, first, p.head_dim, out, past_cache);
  }
}

template <typename T, typename W, typename C>
__global__ void __launch_bounds__(128) qk_rmsnorm_rope_scalar(const __grid_constant__ Params p, float inverse_dim) {
  constexpr int kVector = Vec<T>::kSize;
  extern __shared__ __align__(16) char memory[];
  launch_dependents();
  const int64_t seqlen = p.seqlen, heads = p.num_q_heads + p.num_kv_heads;
  const int64_t index = static_cast<int64_t>(blockIdx.x) * blockDim.y + threadIdx.y;
  const int64_t token = index / heads, b = token / seqlen, s = token - b * seqlen;
  const int groups = group_sums((p.head_dim - 1) / kVector + 1), half = p.rotary.dim / 2;
  float *sums = reinterpret_cast<float *>(memory) + threadIdx.y * groups;
  const int normed_bytes = (p.head_dim * static_cast<int>(sizeof(T)) + 15) / 16 * 16;
  T *normed = reinterpret_cast<T *>(memory + blockDim.y * groups * sizeof(float) + threadIdx.y * normed_bytes);
  wait_for_prerequisites();
  if (b >= p.batch) return;
  const Head<T, W> at = head_at<T, W>(p, b, s, static_cast<int>(index - token * heads));
#pragma unroll 1
  for (int group = 0; group < groups; ++group) {
    const int first = (group * 32 + threadIdx.x) * kVector;
    const float sum = group_sum(first < p.head_dim ? square_sum(load<1>(at.in, first, p.head_dim)) : 0.0f, 32);
    if (threadIdx.x == 0) sums[group] = sum;
  }
  __syncwarp();
  const float rstd = reciprocal_rms(sum_of_groups(sums, groups), inverse_dim, p.eps);
  for (int first = threadIdx.x * kVector; first < p.head_dim; first += 32 * kVector) {
    const Vec<T> x = load<1>(at.in, first, p.head_dim);
    const Weights<T, W> weights = load_weights<1, T>(at.weight, first, p.head_dim);
    store<1>(normed, first, p.head_dim, scaled<T, W>(x, weights, rstd, p), false);
  }
  __syncwarp();
  const int64_t offset = rotary_offset(p.rotary, b, s, s);
  for (int i = threadIdx.x; i < half; i += 32) {
    const int low = p.rotary.interleaved ? 2 * i : i, high = p.rotary.interleaved ? 2 * i + 1 : i + half;
    const float cosine = offset < 0 ? invalid() : to_float(static_cast<const C *>(p.rotary.cos)[offset + i]);
    const float sine = offset < 0 ? invalid() : to_float(static_cast<const C *>(p.rotary.sin)[offset + i]);
    const Pair pair = rotate_pair(to_float(normed[low]), to_float(normed[high]), cosine, sine);
    at.out[low] = from_float<T>(pair.first);
    at.out[high] = from_float<T>(pair.second);
  }
  for (int i = p.rotary.dim + threadIdx.x; i < p.head_dim; i += 32) at.out[i] = normed[i];
}

template <typename T, typename W, typename C>
gqa_status run(const Params *p, const gqa_launch &plan, cudaStream_t stream) {
  const float inverse_dim = 1.0f / static_cast<float>(p->head_dim);
  const RopeVariant variant = RopeVariant::decode(plan.variant);
  if (variant.dense) {
    DenseRope<T> dense = dense_rope<T>(*p, variant);
    dense.q_weight = p->q_weight;
    dense.k_weight = p->k_weight;
    dense.inverse_dim = inverse_dim;
    dense.eps = p->eps;
    dense.weight_offset = p->weight_offset;
    dense.cast_before_weight = p->cast_before_weight != 0;
    auto *kernel = variant.usual ? rope_dense<T, W, C, false, true> : rope_dense<T, W, C, false>;
    return launch_programmatic(kernel, plan, stream, dense);
  }
  if (!variant.vectors) return launch_programmatic(qk_rmsnorm_rope_scalar<T, W, C>, plan, stream, *p, inverse_dim);
  auto *kernel = p->rotary.interleaved ? qk_rmsnorm_rope_vector<T, W, C, true> : qk_rmsnorm_rope_vector<T, W, C, false>;
  return launch_programmatic(kernel, plan, stream, *p, inverse_dim, variant.past_cache);
}

}  // namespace
}  // namespace gqa::cuda

extern "C" gqa_status gqa_qk_rmsnorm_rope_cuda(const gqa_qk_rmsnorm_rope_params *p, CUstream_st *stream) {
  gqa_plan plan;
  GQA_RETURN_IF_ERROR(gqa_qk_rmsnorm_rope_plan(p, nullptr, &plan));
  if (plan.num_launches == 0) return GQA_STATUS_OK;
  return gqa::cuda::dispatch_float(p->dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const gqa_launch &launch = plan.launches[0];
    const bool same_weight = p->weight_dtype == p->dtype, same_table = p->rotary.dtype == p->dtype;
    if (same_weight && same_table) return gqa::cuda::run<T, T, T>(p, launch, stream);
    if (same_weight) return gqa::cuda::run<T, T, float>(p, launch, stream);
    return same_table ? gqa::cuda::run<T, float, T>(p, launch, stream)
                      : gqa::cuda::run<T, float, float>(p, launch, stream);
  });
}
