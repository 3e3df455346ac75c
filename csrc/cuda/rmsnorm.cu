// rmsnorm and add_rmsnorm: out = x * rsqrt(mean(x^2) + eps) * (weight + offset), after x + residual for the latter.
// One block per row; each thread owns 16-byte vectors of the row, strided by the block.
// Memory order: x (and residual) once, kept in registers up to 4 vectors a thread and re-read beyond; weight; out.
// Limits: any width; unaligned rows and odd widths take the scalar path of the same kernel.
// Determinism: fixed reduction order, bitwise repeatable, independent of other rows.
#include "plan/rmsnorm.h"

#include <type_traits>

#include "cuda/common/launch.cuh"
#include "cuda/common/reduce.cuh"
#include "cuda/common/vec.cuh"

namespace gqa::cuda {
namespace {

constexpr int kHeld = 4;

template <typename Params>
constexpr bool kAdds = std::is_same_v<Params, gqa_add_rmsnorm_params>;

template <typename T>
__device__ T *row_at(const void *base, const int64_t *stride, int64_t inner_rows, int64_t row) {
  return static_cast<T *>(const_cast<void *>(base)) + row / inner_rows * stride[0] + row % inner_rows * stride[1];
}

template <typename T, typename W, typename Params>
struct Row {
  const T *x, *residual;
  const W *weight;
  T *out, *residual_out;

  __device__ Row(const Params &p, int64_t row) : residual(nullptr), residual_out(nullptr) {
    x = row_at<T>(p.x, p.x_stride, p.rows[1], row);
    weight = static_cast<const W *>(p.weight);
    out = row_at<T>(p.out, p.out_stride, p.rows[1], row);
    if constexpr (kAdds<Params>) {
      residual = row_at<T>(p.residual, p.residual_stride, p.rows[1], row);
      residual_out = row_at<T>(p.residual_out, p.residual_out_stride, p.rows[1], row);
    }
  }

  __device__ bool aligned() const {
    return is_aligned16(x) && is_aligned16(residual) && is_aligned16(weight) && is_aligned16(out) &&
           is_aligned16(residual_out);
  }
};

template <typename T, typename W, typename Params>
__device__ T finish(float value, float weight, float rstd, const Params &p) {
  const float normed = value * rstd;
  const float rounded = p.cast_before_weight ? to_float(from_float<T>(normed)) : normed;
  return from_float<T>(rounded * (weight + p.weight_offset));
}

// x, or x + residual rounded to T and written out.
template <typename T, typename W, typename Params>
__device__ Vec<T> load_input(const Row<T, W, Params> &row, int64_t at) {
  Vec<T> x = load_vec(row.x + at);
  if constexpr (kAdds<Params>) {
    const Vec<T> residual = load_vec(row.residual + at);
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; ++i) {
      x.value[i] = from_float<T>(to_float(x.value[i]) + to_float(residual.value[i]));
    }
    store_vec(row.residual_out + at, x);
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

template <typename T, typename W, typename Params>
__device__ void write_out(const Row<T, W, Params> &row, const Vec<T> &x, int64_t at, float rstd, const Params &p) {
  Vec<T> out;
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) {
    out.value[i] = finish<T, W>(to_float(x.value[i]), to_float(row.weight[at + i]), rstd, p);
  }
  store_vec(row.out + at, out);
}

template <typename T, typename W, typename Params>
__global__ void __launch_bounds__(512, 1) norm_row(const Params p) {
  __shared__ float buffer[32];
  const Row<T, W, Params> row(p, blockIdx.x);
  const float inverse = 1.0f / static_cast<float>(p.hidden);
  if (p.hidden % Vec<T>::kSize == 0 && row.aligned()) {
    const int64_t step = static_cast<int64_t>(blockDim.x) * Vec<T>::kSize;
    const int64_t first = threadIdx.x * Vec<T>::kSize;
    Vec<T> held[kHeld];
    float sum = 0;
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (first + i * step < p.hidden) {
        held[i] = load_input<T, W>(row, first + i * step);
        sum += sum_of_squares(held[i]);
      }
    }
    for (int64_t at = first + kHeld * step; at < p.hidden; at += step) sum += sum_of_squares(load_input<T, W>(row, at));
    const float rstd = rsqrtf(block_sum(sum, buffer) * inverse + p.eps);
#pragma unroll
    for (int i = 0; i < kHeld; ++i) {
      if (first + i * step < p.hidden) write_out<T, W>(row, held[i], first + i * step, rstd, p);
    }
    const T *again = kAdds<Params> ? row.residual_out : row.x;
    for (int64_t at = first + kHeld * step; at < p.hidden; at += step) {
      write_out<T, W>(row, load_vec(again + at), at, rstd, p);
    }
  } else {
    float sum = 0;
    for (int64_t i = threadIdx.x; i < p.hidden; i += blockDim.x) {
      float value = to_float(row.x[i]);
      if constexpr (kAdds<Params>) {
        row.residual_out[i] = from_float<T>(value + to_float(row.residual[i]));
        value = to_float(row.residual_out[i]);
      }
      sum += value * value;
    }
    const float rstd = rsqrtf(block_sum(sum, buffer) * inverse + p.eps);
    const T *again = kAdds<Params> ? row.residual_out : row.x;
    for (int64_t i = threadIdx.x; i < p.hidden; i += blockDim.x) {
      row.out[i] = finish<T, W>(to_float(again[i]), to_float(row.weight[i]), rstd, p);
    }
  }
}

template <typename Params>
gqa_status run(const Params *p, const gqa_plan &plan, cudaStream_t stream) {
  if (plan.num_launches == 0) return GQA_STATUS_OK;
  return dispatch_float(p->dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto *kernel = p->weight_dtype == p->dtype ? norm_row<T, T, Params> : norm_row<T, float, Params>;
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
