// rmsnorm and add_rmsnorm: out = x * rsqrt(mean(x^2) + eps) * (weight + offset), after x + residual for the latter.
// Here what dense_rows.cuh does not serve: strided rows, odd widths and alignments, weights of another dtype.
// A row is taken by blockDim.x threads that keep it in registers, up to 4 vectors of 16 bytes each, blockDim.x apart,
// and the rest of it in shared memory; narrow rows share a block, blockDim.y of them.
// Memory order: x (and residual) once, the sum out, weight, out. Starts while the kernel before it ends.
// Limits: any width and alignment; rows that are not whole vectors of 16 or 8 bytes go element by element. Determinism:
// squares are summed in the order of square_sum.cuh, so a row's bytes depend neither on the block size, nor on its
// alignment, nor on other rows.
#include "plan/rmsnorm.h"

#include <type_traits>

#include "cuda/rmsnorm/dense_rows.cuh"
#include "cuda/rmsnorm/half_rows.cuh"
#include "cuda/rmsnorm/warp_rows.cuh"

namespace gqa::cuda {
namespace {

template <typename Params>
constexpr bool kAdds = std::is_same_v<Params, gqa_add_rmsnorm_params>;

template <typename T>
__device__ T *row_at(const void *base, const int64_t *stride, uint32_t outer, uint32_t inner) {
  return static_cast<T *>(const_cast<void *>(base)) + outer * stride[0] + inner * stride[1];
}

// A row of the call; one past the last has no elements.
template <typename T, typename W, typename Params>
struct Row {
  const T *x, *residual;
  const W *weight;
  T *out, *residual_out;
  int hidden;

  __device__ Row(const Params &p, uint32_t row) : residual(nullptr), residual_out(nullptr) {
    const uint32_t inner_rows = static_cast<uint32_t>(p.rows[1]);
    const uint32_t outer = row < inner_rows ? 0 : row / inner_rows, inner = row - outer * inner_rows;
    hidden = outer < p.rows[0] ? static_cast<int>(p.hidden) : 0;
    x = row_at<T>(p.x, p.x_stride, outer, inner);
    weight = static_cast<const W *>(p.weight);
    out = row_at<T>(p.out, p.out_stride, outer, inner);
    if constexpr (kAdds<Params>) {
      residual = row_at<T>(p.residual, p.residual_stride, outer, inner);
      residual_out = row_at<T>(p.residual_out, p.residual_out_stride, outer, inner);
    }
  }

  __device__ void have_ready_at(int first) const {
    have_ready(x + first);
    have_ready(out + first);
    if constexpr (kAdds<Params>) {
      have_ready(residual + first);
      have_ready(residual_out + first);
    }
  }
};

// Kernel parameters come from memory too: those used last are fetched with the first.
template <typename Params>
__device__ void have_scale_ready(const Params &p, float inverse_hidden, bool past_cache) {
  have_ready(p.eps);
  have_ready(p.weight_offset);
  have_ready(p.cast_before_weight);
  have_ready(inverse_hidden);
  have_ready(static_cast<int>(past_cache));
}

// x, or x + residual rounded to T and written out, of kCount vectors of a row `step` apart: all loads, then all stores.
// Zeros past the end of the row: no branch then parts a load from the next.
template <int kChunk, int kCount, typename T, typename W, typename Params>
__device__ void load_inputs(const Row<T, W, Params> &row, int first, int step, bool past_cache, Vec<T> *vecs) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    vecs[i] = Vec<T>{};
    if (first + i * step < row.hidden) vecs[i] = load<kChunk, true>(row.x, first + i * step, row.hidden);
  }
  if constexpr (kAdds<Params>) {
    Vec<T> residual[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      residual[i] = Vec<T>{};
      if (first + i * step < row.hidden) {
        residual[i] = load<kChunk, true>(row.residual, first + i * step, row.hidden);
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      vecs[i] = sum_of(vecs[i], residual[i]);
      if (first + i * step < row.hidden) {
        store<kChunk>(row.residual_out, first + i * step, row.hidden, vecs[i], past_cache);
      }
    }
  }
}

// Rows of up to 32 vectors, each in up to 32 lanes of one warp.
template <int kChunk, typename T, typename W, typename Params>
__global__ void __launch_bounds__(512, 2)
    norm_narrow_rows(const __grid_constant__ Params p, float inverse_hidden, bool past_cache) {
  launch_dependents();
  const Row<T, W, Params> row(p, blockIdx.x * blockDim.y + threadIdx.y);
  const int at = threadIdx.x * Vec<T>::kSize;
  row.have_ready_at(at);
  have_scale_ready(p, inverse_hidden, past_cache);
  wait_for_prerequisites();
  Vec<T> x;
  load_inputs<kChunk, 1>(row, at, 0, past_cache, &x);
  Weights<T, W> weights;
  if (at < row.hidden) weights = load_weights<kChunk, T>(row.weight, at, row.hidden);
  const float total = group_sum(square_sum(x), blockDim.x);
  const float rstd = reciprocal_rms(total, inverse_hidden, p.eps);
  if (at < row.hidden) store<kChunk>(row.out, at, row.hidden, scaled<T, W>(x, weights, rstd, p), past_cache);
}

// Blocks per SM that registers are to allow; what moves or converts more for each vector gets more of them.
template <int kChunk, int kHeld, typename T, typename W>
constexpr int least_blocks() {
  constexpr bool kLean = kChunk == Vec<T>::kSize && std::is_same_v<T, W>;
  return kHeld == 1 ? 3 : kHeld == 2 ? (kLean ? 5 : 4) : 1;
}

// Wider rows. What a row has beyond kHeld vectors a thread is kept in shared memory where `keeps`, else read again.
template <int kChunk, int kHeld, typename T, typename W, typename Params>
__global__ void __launch_bounds__(most_threads(kHeld, kChunk == Vec<T>::kSize && !kAdds<Params>),
                                  least_blocks<kChunk, kHeld, T, W>())
    norm_rows(const __grid_constant__ Params p, float inverse_hidden, bool few_rows, bool past_cache, bool keeps) {
  constexpr bool kWeightsAhead = kHeld != kMostHeld;
  extern __shared__ __align__(16) float sums[];
  launch_dependents();
  const Row<T, W, Params> row(p, blockIdx.x * blockDim.y + threadIdx.y);
  const int step = blockDim.x * Vec<T>::kSize, first = threadIdx.x * Vec<T>::kSize;
  if (few_rows) {
#pragma unroll 1
    for (int at = first; at < row.hidden; at += step) prefetch_l2(row.weight + at);
  }
  if (kHeld != kMostHeld) row.have_ready_at(first);
  have_scale_ready(p, inverse_hidden, past_cache);
  wait_for_prerequisites();
  Vec<T> held[kHeld];
  load_inputs<kChunk, kHeld>(row, first, step, past_cache, held);
  Weights<T, W> ahead[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int at = first + i * step;
    if (kWeightsAhead && at < row.hidden) ahead[i] = load_weights<kChunk, T>(row.weight, at, row.hidden);
  }
  const int warps = blockDim.x / 32, groups = group_sums((static_cast<int>(p.hidden) - 1) / Vec<T>::kSize + 1);
  float *mine = sums + threadIdx.y * groups + threadIdx.x / 32;
  const bool leader = threadIdx.x % 32 == 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const float part = group_sum(square_sum(held[i]), 32);
    if (leader && i * warps + threadIdx.x / 32 < groups) mine[i * warps] = part;
    keep_packed(held[i]);
  }
  auto *kept = reinterpret_cast<Vec<T> *>(sums + groups) + threadIdx.x;
  int rounds = kHeld;
  if constexpr (kHeld == kMostHeld) {
    // A warp runs whole: its first lane is inside the row, or none is.
    const int warp_first = first - static_cast<int>(threadIdx.x % 32) * Vec<T>::kSize;
#pragma unroll 1
    for (; warp_first + rounds * step < row.hidden; ++rounds) {
      const int at = first + rounds * step;
      Vec<T> x;
      load_inputs<kChunk, 1>(row, at, 0, past_cache, &x);
      if (keeps && at < row.hidden) kept[(rounds - kHeld) * blockDim.x] = x;
      const float part = group_sum(square_sum(x), 32);
      if (leader) mine[rounds * warps] = part;
    }
  }
  // Groups past the end of the row, up to a whole tree.
#pragma unroll 1
  for (; rounds * warps + threadIdx.x / 32 < groups; ++rounds) {
    if (leader) mine[rounds * warps] = 0;
  }
  __syncthreads();
  const float rstd = reciprocal_rms(sum_of_groups(sums + threadIdx.y * groups, groups), inverse_hidden, p.eps);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int at = first + i * step;
    if (at >= row.hidden) continue;
    const Weights<T, W> weights = kWeightsAhead ? ahead[i] : load_weights<kChunk, T>(row.weight, at, row.hidden);
    store<kChunk>(row.out, at, row.hidden, scaled<T, W>(held[i], weights, rstd, p), past_cache);
  }
  if constexpr (kHeld == kMostHeld) {
    const T *again = kAdds<Params> ? row.residual_out : row.x;
#pragma unroll 1
    for (int at = first + kHeld * step; at < row.hidden; at += step, kept += blockDim.x) {
      const Vec<T> x = keeps ? *kept : load<kChunk>(again, at, row.hidden);
      const Weights<T, W> weights = load_weights<kChunk, T>(row.weight, at, row.hidden);
      store<kChunk>(row.out, at, row.hidden, scaled<T, W>(x, weights, rstd, p), past_cache);
    }
  }
}

template <int kChunk, typename T, typename W, typename Params>
gqa_status launch_rows(const Params &p, const gqa_launch &plan, cudaStream_t stream) {
  const NormVariant v = NormVariant::decode(plan.variant);
  const float inverse_hidden = 1.0f / static_cast<float>(p.hidden);
  if (v.held == 0) {
    return launch_programmatic(norm_narrow_rows<kChunk, T, W, Params>, plan, stream, p, inverse_hidden, v.past_cache);
  }
  auto *kernel = v.held == kMostHeld ? norm_rows<kChunk, kMostHeld, T, W, Params>
                                     : norm_rows<kChunk, light_held<Params>(), T, W, Params>;
  return launch_programmatic(kernel, plan, stream, p, inverse_hidden, v.few_rows, v.past_cache, v.keeps);
}

template <typename T, typename Params>
gqa_status launch_dense(const Params &p, const gqa_launch &plan, cudaStream_t stream) {
  const NormVariant v = NormVariant::decode(plan.variant);
  DenseNorm<T> dense{};
  dense.weight = static_cast<const T *>(p.weight);
  dense.x = static_cast<const T *>(p.x);
  dense.out = static_cast<T *>(p.out);
  if constexpr (kAdds<Params>) {
    dense.residual = static_cast<const T *>(p.residual);
    dense.residual_out = static_cast<T *>(p.residual_out);
  }
  dense.hidden = static_cast<int32_t>(p.hidden);
  dense.inverse_hidden = 1.0f / static_cast<float>(p.hidden);
  dense.eps = p.eps;
  dense.weight_offset = p.weight_offset;
  dense.cast_before_weight = p.cast_before_weight != 0;
  dense.few_rows = v.few_rows;
  dense.past_cache = v.past_cache;
  dense.ahead = static_cast<uint8_t>(v.ahead);
  constexpr bool kAdd = kAdds<Params>;
  const int rows = static_cast<int>(p.rows[0] * p.rows[1]);
  if (v.held == 0) {
    auto *kernel = norm_dense_narrow_rows<kAdd, T>;
    if (dense.hidden > 32 * Vec<T>::kSize) kernel = norm_dense_warp_pairs<kAdd, T>;
    if (dense.hidden > 64 * Vec<T>::kSize) kernel = norm_dense_warp_rows<kAdd, T>;
    return launch_programmatic(kernel, plan, stream, dense, rows);
  }
  constexpr int kMost = kAdd ? 2 : 4, kInCluster = kAdd ? 1 : 4;  // vectors of a thread
  if (v.cluster > 1) {
    auto *kernel = norm_dense_rows<kMost, true, !kAdd, kAdd, T>;
    if (!v.late) kernel = norm_dense_rows<kMost, true, false, kAdd, T>;
    if (v.held == 1) kernel = norm_dense_rows<kInCluster, true, false, kAdd, T>;
    if (v.usual) kernel = norm_dense_rows<kMost, true, false, kAdd, T, true>;
    if (v.usual && v.held == 1) kernel = norm_dense_rows<kInCluster, true, false, kAdd, T, true>;
    return launch_programmatic_clusters(kernel, plan, v.cluster, stream, dense);
  }
  if (v.usual) {  // of many rows: never one vector a thread but of an add
    constexpr int kFewest = kAdd ? 1 : 2;
    auto *kernel = norm_dense_rows<kFewest, false, false, kAdd, T, true>;
    if (v.held == kMost) kernel = norm_dense_rows<kMost, false, false, kAdd, T, true>;
    if (v.chunk != Vec<T>::kSize) kernel = norm_dense_half_rows<4, kAdd, T, true>;
    return launch_programmatic(kernel, plan, stream, dense);
  }
  auto *kernel = v.held == 1 ? norm_dense_rows<1, false, false, kAdd, T> : norm_dense_rows<2, false, false, kAdd, T>;
  if (v.held == 4) kernel = norm_dense_rows<kMost, false, false, kAdd, T>;
  if (v.chunk != Vec<T>::kSize) {
    kernel = v.held == 4 ? norm_dense_half_rows<kMost, kAdd, T> : norm_dense_half_rows<2, kAdd, T>;
  }
  return launch_programmatic(kernel, plan, stream, dense);
}

template <typename Params>
gqa_status run(const Params *p, const gqa_plan &plan, cudaStream_t stream) {
  if (plan.num_launches == 0) return GQA_STATUS_OK;
  return dispatch_float(p->dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kVector = Vec<T>::kSize;
    if (NormVariant::decode(plan.launches[0].variant).dense) return launch_dense<T>(*p, plan.launches[0], stream);
    const auto by_weight = [&](auto chunk) {
      constexpr int kChunk = decltype(chunk)::value;
      return p->weight_dtype == p->dtype ? launch_rows<kChunk, T, T>(*p, plan.launches[0], stream)
                                         : launch_rows<kChunk, T, float>(*p, plan.launches[0], stream);
    };
    const int chunk = NormVariant::decode(plan.launches[0].variant).chunk;
    if (chunk == kVector) return by_weight(std::integral_constant<int, kVector>{});
    if (chunk == kVector / 2) return by_weight(std::integral_constant<int, kVector / 2>{});
    return by_weight(std::integral_constant<int, 1>{});
  });
}

}  // namespace
}  // namespace gqa::cuda

extern "C" {

gqa_status gqa_rmsnorm_cuda(const gqa_rmsnorm_params *p, CUstream_st *stream) {
  gqa_plan plan;
  gqa_device device;
  GQA_RETURN_IF_ERROR(gqa::check_params(p));
  GQA_RETURN_IF_ERROR(gqa::cuda::current_device(&device));
  GQA_RETURN_IF_ERROR(gqa_rmsnorm_plan(p, &device, &plan));
  return gqa::cuda::run(p, plan, stream);
}

gqa_status gqa_add_rmsnorm_cuda(const gqa_add_rmsnorm_params *p, CUstream_st *stream) {
  gqa_plan plan;
  gqa_device device;
  GQA_RETURN_IF_ERROR(gqa::check_params(p));
  GQA_RETURN_IF_ERROR(gqa::cuda::current_device(&device));
  GQA_RETURN_IF_ERROR(gqa_add_rmsnorm_plan(p, &device, &plan));
  return gqa::cuda::run(p, plan, stream);
}

}  // extern "C"
