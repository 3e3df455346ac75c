// rmsnorm and add_rmsnorm: out = x * rsqrt(mean(x^2) + eps) * (weight + offset), after x + residual for the latter.
// One block per row; each thread owns 16-byte vectors of the row, strided by the block.
// Memory order: x (and residual) once, kept in registers up to 1 or 4 vectors a thread and re-read beyond; weight,
// ahead of the reduction where there are few rows and latency is all; out. Limits: any width and alignment; unaligned
// rows and odd widths move the same vectors element by element. Determinism: squares are summed 32 vectors at a time by
// a fixed tree and those sums in order, so a row's bytes depend neither on the block size, nor on its alignment, nor on
// other rows.
#include "plan/rmsnorm.h"

#include <type_traits>

#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"

namespace gqa::cuda {
namespace {

template <typename Params>
constexpr bool kAdds = std::is_same_v<Params, gqa_add_rmsnorm_params>;

template <typename T>
__device__ T *row_at(const void *base, const int64_t *stride, uint32_t outer, uint32_t inner) {
  return static_cast<T *>(const_cast<void *>(base)) + outer * stride[0] + inner * stride[1];
}

template <typename T, typename W, typename Params>
struct Row {
  const T *x, *residual;
  const W *weight;
  T *out, *residual_out;
  int64_t hidden;

  __device__ Row(const Params &p, uint32_t row) : residual(nullptr), residual_out(nullptr), hidden(p.hidden) {
    const uint32_t inner_rows = static_cast<uint32_t>(p.rows[1]);
    const uint32_t outer = row < inner_rows ? 0 : row / inner_rows, inner = row - outer * inner_rows;
    x = row_at<T>(p.x, p.x_stride, outer, inner);
    weight = static_cast<const W *>(p.weight);
    out = row_at<T>(p.out, p.out_stride, outer, inner);
    if constexpr (kAdds<Params>) {
      residual = row_at<T>(p.residual, p.residual_stride, outer, inner);
      residual_out = row_at<T>(p.residual_out, p.residual_out_stride, outer, inner);
    }
  }
};

// The vector at element `at`; past the end of the row it is filled with zeros.
template <bool kAligned, typename T>
__device__ Vec<T> load(const T *row, int64_t at, int64_t hidden) {
  if constexpr (kAligned) {
    return load_vec(row + at);
  } else {
    Vec<T> vec;
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; ++i) vec.value[i] = at + i < hidden ? row[at + i] : from_float<T>(0);
    return vec;
  }
}

template <bool kAligned, typename T>
__device__ void store(T *row, int64_t at, int64_t hidden, const Vec<T> &vec) {
  if constexpr (kAligned) {
    store_vec(row + at, vec);
  } else {
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; ++i) {
      if (at + i < hidden) row[at + i] = vec.value[i];
    }
  }
}

// x, or x + residual rounded to T and written out.
template <bool kAligned, typename T, typename W, typename Params>
__device__ Vec<T> load_input(const Row<T, W, Params> &row, int64_t at) {
  Vec<T> x = load<kAligned>(row.x, at, row.hidden);
  if constexpr (kAdds<Params>) {
    const Vec<T> residual = load<kAligned>(row.residual, at, row.hidden);
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; ++i) {
      x.value[i] = from_float<T>(to_float(x.value[i]) + to_float(residual.value[i]));
    }
    store<kAligned>(row.residual_out, at, row.hidden, x);
  }
  return x;
}

template <typename T>
__device__ float sum_of_squares(const Vec<T> &vec) {
  float sum = 0;
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) sum += to_float(vec.value[i]) * to_float(vec.value[i]);
  return sum;
}

// The weights of one vector of x.
template <typename T, typename W>
struct Weights {
  static constexpr int kPart = Vec<W>::kSize < Vec<T>::kSize ? Vec<W>::kSize : Vec<T>::kSize;
  Vec<W> part[Vec<T>::kSize / kPart];

  __device__ W at(int i) const { return part[i / kPart].value[i % kPart]; }
};

template <bool kAligned, typename T, typename W, typename Params>
__device__ Weights<T, W> load_weights(const Row<T, W, Params> &row, int64_t at) {
  using Result = Weights<T, W>;
  Result weights;
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize / Result::kPart; ++i) {
    weights.part[i] = load<kAligned>(row.weight, at + i * Result::kPart, row.hidden);
  }
  return weights;
}

template <bool kAligned, typename T, typename W, typename Params>
__device__ void write_out(const Row<T, W, Params> &row, const Vec<T> &x, const Weights<T, W> &weights, int64_t at,
                          float rstd, const Params &p) {
  Vec<T> out;
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) {
    const float normed = to_float(x.value[i]) * rstd;
    const float rounded = p.cast_before_weight ? to_float(from_float<T>(normed)) : normed;
    out.value[i] = from_float<T>(rounded * (to_float(weights.at(i)) + p.weight_offset));
  }
  store<kAligned>(row.out, at, row.hidden, out);
}

template <bool kAligned, int kHeld, typename T, typename W, typename Params>
__global__ void __launch_bounds__(512, kAligned ? 2 : 1) norm_row(const __grid_constant__ Params p) {
  constexpr bool kWeightsAhead = kHeld == 1;
  extern __shared__ float partial[];
  const Row<T, W, Params> row(p, blockIdx.x);
  const int64_t step = static_cast<int64_t>(blockDim.x) * Vec<T>::kSize;
  const int64_t first = threadIdx.x * Vec<T>::kSize;
  const int warps = blockDim.x / 32, warp = threadIdx.x / 32;
  const bool leader = threadIdx.x % 32 == 0;
  Vec<T> held[kHeld];
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (first + i * step < row.hidden) held[i] = load_input<kAligned>(row, first + i * step);
  }
  Weights<T, W> ahead;
  if (kWeightsAhead && first < row.hidden) ahead = load_weights<kAligned>(row, first);
  // Warps run whole: a warp is past the end of the row or its first lane is not.
  const int64_t warp_first = first - threadIdx.x % 32 * Vec<T>::kSize;
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    if (warp_first + i * step < row.hidden) {
      const float sum = warp_sum(first + i * step < row.hidden ? sum_of_squares(held[i]) : 0.0f);
      if (leader) partial[i * warps + warp] = sum;
    }
  }
  for (int64_t i = kHeld; warp_first + i * step < row.hidden; ++i) {
    const int64_t at = first + i * step;
    const float sum = warp_sum(at < row.hidden ? sum_of_squares(load_input<kAligned>(row, at)) : 0.0f);
    if (leader) partial[i * warps + warp] = sum;
  }
  __syncthreads();
  const int64_t group = 32 * Vec<T>::kSize, groups = (row.hidden + group - 1) / group;
  float sum = 0;
  for (int64_t i = 0; i < groups; ++i) sum += partial[i];
  const float rstd = rsqrtf(sum / static_cast<float>(row.hidden) + p.eps);
#pragma unroll
  for (int i = 0; i < kHeld; ++i) {
    const int64_t at = first + i * step;
    if (at < row.hidden) {
      write_out<kAligned>(row, held[i], kWeightsAhead ? ahead : load_weights<kAligned>(row, at), at, rstd, p);
    }
  }
  const T *again = kAdds<Params> ? row.residual_out : row.x;
  for (int64_t at = first + kHeld * step; at < row.hidden; at += step) {
    write_out<kAligned>(row, load<kAligned>(again, at, row.hidden), load_weights<kAligned>(row, at), at, rstd, p);
  }
}

template <typename Params>
gqa_status run(const Params *p, const gqa_plan &plan, cudaStream_t stream) {
  if (plan.num_launches == 0) return GQA_STATUS_OK;
  return dispatch_float(p->dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto pick = [&](auto aligned, auto held) {
      constexpr bool kAligned = decltype(aligned)::value;
      constexpr int kHeld = decltype(held)::value;
      return p->weight_dtype == p->dtype ? norm_row<kAligned, kHeld, T, T, Params>
                                         : norm_row<kAligned, kHeld, T, float, Params>;
    };
    constexpr std::integral_constant<int, 1> kOne;
    constexpr std::integral_constant<int, 4> kFour;
    const int variant = plan.launches[0].variant;
    auto *kernel = variant == kUnalignedRows ? pick(std::false_type{}, kOne)
                   : variant == kFewRows     ? pick(std::true_type{}, kOne)
                                             : pick(std::true_type{}, kFour);
    return launch(kernel, plan.launches[0], stream, *p);
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
