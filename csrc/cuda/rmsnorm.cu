// rmsnorm and add_rmsnorm: out = x * rsqrt(mean(x^2) + eps) * (weight + offset), after x + residual for the latter.
// A row is taken by blockDim.x threads that keep it in registers, up to 4 vectors of 16 bytes each, blockDim.x apart,
// and the rest of it in shared memory; narrow rows share a block, blockDim.y of them.
// Memory order: x (and residual) once, the sum out, weight, out. Starts while the kernel before it ends.
// Limits: any width and alignment; rows that are not whole vectors of 16 or 8 bytes go element by element. Determinism:
// squares are summed in the order of square_sum.cuh, so a row's bytes depend neither on the block size, nor on its
// alignment, nor on other rows.
#include "plan/rmsnorm.h"

#include <type_traits>

#include "cuda/common/programmatic_launch.cuh"
#include "cuda/common/square_sum.cuh"

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
};

// The vector at element `at`, moved kChunk elements at a time; what lies past the end of the row is zero.
template <int kChunk, typename T>
__device__ Vec<T> load(const T *row, int at, int hidden) {
  if constexpr (kChunk == Vec<T>::kSize) {
    return load_vec(row + at);
  } else {
    Vec<T> vec;
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; i += kChunk) {
      Run<T, kChunk> run{};
      if (at + i < hidden) run = load_run<kChunk>(row + at + i);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) vec.value[i + j] = run.value[j];
    }
    return vec;
  }
}

template <int kChunk, typename T>
__device__ void store(T *row, int at, int hidden, const Vec<T> &vec, bool past_cache) {
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; i += kChunk) {
    Run<T, kChunk> run;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) run.value[j] = vec.value[i + j];
    if (kChunk == Vec<T>::kSize || at + i < hidden) store_run(row + at + i, run, past_cache);
  }
}

// The weights of one vector of x, in their own dtype if it is x's, else as floats.
template <typename T, typename W>
using Weights = std::conditional_t<std::is_same_v<T, W>, Vec<T>, Floats<T>>;

template <int kChunk, typename T, typename W>
__device__ Weights<T, W> load_weights(const W *weight, int at, int hidden) {
  if constexpr (std::is_same_v<T, W>) {
    return load<kChunk>(weight, at, hidden);
  } else {
    constexpr int kStep = kChunk == 1 ? 1 : kChunk / 2;  // as many bytes as a chunk of x
    Floats<T> floats;
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; i += kStep) {
      Run<W, kStep> run{};
      if (at + i < hidden) run = load_run<kStep>(weight + at + i);
#pragma unroll
      for (int j = 0; j < kStep; ++j) floats.value[i + j] = run.value[j];
    }
    return floats;
  }
}

template <typename T>
__device__ Floats<T> as_floats(const Vec<T> &weights) {
  return widen(weights);
}

template <typename T>
__device__ Floats<T> as_floats(const Floats<T> &weights) {
  return weights;
}

// HuggingFace's rounding: the normalised value rounds to T before the weight, or only the product does.
template <typename T, typename W, typename Params>
__device__ Vec<T> scaled(const Vec<T> &x, const Weights<T, W> &weights, float rstd, const Params &p) {
  Floats<T> value = widen(x);
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) value.value[i] *= rstd;
  if (sizeof(T) == 2 && p.cast_before_weight) {
    const Vec<T> rounded = narrow(value);
    if constexpr (sizeof(T) == 2 && std::is_same_v<T, W>) {
      if (p.weight_offset == 0) return multiply(rounded, weights);
    }
    value = widen(rounded);
  }
  const Floats<T> factor = as_floats(weights);
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) value.value[i] *= factor.value[i] + p.weight_offset;
  return narrow(value);
}

template <typename T>
__device__ Vec<T> sum(const Vec<T> &a, const Vec<T> &b) {
  Floats<T> x = widen(a);
  const Floats<T> y = widen(b);
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) x.value[i] += y.value[i];
  return narrow(x);
}

// x, or x + residual rounded to T and written out, of kCount vectors of a row `step` apart: all loads, then all stores.
template <int kChunk, int kCount, typename T, typename W, typename Params>
__device__ void load_inputs(const Row<T, W, Params> &row, int first, int step, bool past_cache, Vec<T> *vecs) {
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    if (first + i * step < row.hidden) vecs[i] = load<kChunk>(row.x, first + i * step, row.hidden);
  }
  if constexpr (kAdds<Params>) {
    Vec<T> residual[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (first + i * step < row.hidden) residual[i] = load<kChunk>(row.residual, first + i * step, row.hidden);
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (first + i * step >= row.hidden) continue;
      vecs[i] = sum(vecs[i], residual[i]);
      store<kChunk>(row.residual_out, first + i * step, row.hidden, vecs[i], past_cache);
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
  wait_for_prerequisites();
  Vec<T> x;
  load_inputs<kChunk, 1>(row, at, 0, past_cache, &x);
  Weights<T, W> weights;
  if (at < row.hidden) weights = load_weights<kChunk, T>(row.weight, at, row.hidden);
  const float total = group_sum(at < row.hidden ? square_sum(x) : 0.0f, blockDim.x);
  const float rstd = rsqrtf(total * inverse_hidden + p.eps);
  if (at < row.hidden) store<kChunk>(row.out, at, row.hidden, scaled<T, W>(x, weights, rstd, p), past_cache);
}

// Wider rows. What a row has beyond kHeld vectors a thread is kept in shared memory where `keeps`, else read again.
template <int kChunk, int kHeld, typename T, typename W, typename Params>
__global__ void __launch_bounds__(kHeld > 2 && kChunk == Vec<T>::kSize ? 1024 : 512, kHeld > 2 ? 1 : 2)
    norm_rows(const __grid_constant__ Params p, float inverse_hidden, bool few_rows, bool past_cache, bool keeps) {
  constexpr bool kWeightsAhead = kHeld == 1;
  extern __shared__ __align__(16) float sums[];
  launch_dependents();
  const Row<T, W, Params> row(p, blockIdx.x * blockDim.y + threadIdx.y);
  const int step = blockDim.x * Vec<T>::kSize, first = threadIdx.x * Vec<T>::kSize;
  if (few_rows) {
#pragma unroll 1
    for (int at = first; at < row.hidden; at += step) prefetch_l2(row.weight + at);
  }
  wait_for_prerequisites();
  Vec<T> held[kHeld];
  load_inputs<kChunk, kHeld>(row, first, step, past_cache, held);
  Weights<T, W> ahead;
  if (kWeightsAhead && first < row.hidden) ahead = load_weights<kChunk, T>(row.weight, first, row.hidden);
  const int warps = blockDim.x / 32, groups = group_sums((static_cast<int>(p.hidden) - 1) / Vec<T>::kSize + 1);
  float *mine = sums + threadIdx.y * groups + threadIdx.x / 32;
  const bool leader = threadIdx.x % 32 == 0;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const float part = group_sum(first + i * step < row.hidden ? square_sum(held[i]) : 0.0f, 32);
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
      const float part = group_sum(at < row.hidden ? square_sum(x) : 0.0f, 32);
      if (leader) mine[rounds * warps] = part;
    }
  }
  // Groups past the end of the row, up to a whole tree.
#pragma unroll 1
  for (; rounds * warps + threadIdx.x / 32 < groups; ++rounds) {
    if (leader) mine[rounds * warps] = 0;
  }
  __syncthreads();
  const float rstd = rsqrtf(sum_of_groups(sums + threadIdx.y * groups, groups) * inverse_hidden + p.eps);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int at = first + i * step;
    if (at >= row.hidden) continue;
    const Weights<T, W> weights = kWeightsAhead ? ahead : load_weights<kChunk, T>(row.weight, at, row.hidden);
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
  auto *kernel = v.held == 1   ? norm_rows<kChunk, 1, T, W, Params>
                 : v.held == 2 ? norm_rows<kChunk, 2, T, W, Params>
                               : norm_rows<kChunk, kMostHeld, T, W, Params>;
  return launch_programmatic(kernel, plan, stream, p, inverse_hidden, v.few_rows, v.past_cache, v.keeps);
}

template <typename Params>
gqa_status run(const Params *p, const gqa_plan &plan, cudaStream_t stream) {
  if (plan.num_launches == 0) return GQA_STATUS_OK;
  return dispatch_float(p->dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    constexpr int kVector = Vec<T>::kSize;
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
  GQA_RETURN_IF_ERROR(gqa_rmsnorm_plan(p, nullptr, &plan));
  return gqa::cuda::run(p, plan, stream);
}

gqa_status gqa_add_rmsnorm_cuda(const gqa_add_rmsnorm_params *p, CUstream_st *stream) {
  gqa_plan plan;
  GQA_RETURN_IF_ERROR(gqa_add_rmsnorm_plan(p, nullptr, &plan));
  return gqa::cuda::run(p, plan, stream);
}

}  // extern "C"
