// CPU twin of rmsnorm and add_rmsnorm: float32 accumulation, the rounding of HuggingFace's LlamaRMSNorm.
#include "plan/rmsnorm.h"

#include <cmath>

#include "cpu/types.h"

namespace gqa::cpu {
namespace {

struct Scale {
  float eps;
  float weight_offset;
  bool cast_before_weight;
};

// Sixteen partial sums: independent chains that a vector unit can hold, added in a fixed order.
template <typename T>
GQA_INLINE float sum_of_squares(const T *x, int64_t n) {
  constexpr int kLanes = 16;
  float partial[kLanes] = {};
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes) {
    for (int lane = 0; lane < kLanes; ++lane) {
      const float value = to_float(x[i + lane]);
      partial[lane] += value * value;
    }
  }
  float sum = 0;
  for (int lane = 0; lane < kLanes; ++lane) sum += partial[lane];
  for (; i < n; ++i) sum += to_float(x[i]) * to_float(x[i]);
  return sum;
}

template <typename T, typename W>
GQA_INLINE void norm_row(const T *x, const W *weight, T *out, int64_t hidden, const Scale &scale) {
  const float mean = sum_of_squares(x, hidden) / static_cast<float>(hidden);
  const float rstd = 1.0f / std::sqrt(mean + scale.eps);
  if (scale.cast_before_weight) {
    for (int64_t i = 0; i < hidden; ++i) {
      const float normed = to_float(from_float<T>(to_float(x[i]) * rstd));
      out[i] = from_float<T>(normed * (to_float(weight[i]) + scale.weight_offset));
    }
  } else {
    for (int64_t i = 0; i < hidden; ++i) {
      out[i] = from_float<T>(to_float(x[i]) * rstd * (to_float(weight[i]) + scale.weight_offset));
    }
  }
}

template <typename T>
GQA_INLINE void add_row(const T *x, const T *residual, T *out, int64_t hidden) {
  for (int64_t i = 0; i < hidden; ++i) out[i] = from_float<T>(to_float(x[i]) + to_float(residual[i]));
}

template <typename T>
GQA_INLINE T *row_at(const void *base, const int64_t *stride, int64_t inner_rows, int64_t row) {
  return static_cast<T *>(const_cast<void *>(base)) + row / inner_rows * stride[0] + row % inner_rows * stride[1];
}

template <typename T, typename W>
GQA_CPU_CLONES void rmsnorm_rows(const gqa_rmsnorm_params *p, int64_t first, int64_t last) {
  const Scale scale{p->eps, p->weight_offset, p->cast_before_weight != 0};
  for (int64_t row = first; row < last; ++row) {
    norm_row(row_at<T>(p->x, p->x_stride, p->rows[1], row), static_cast<const W *>(p->weight),
             row_at<T>(p->out, p->out_stride, p->rows[1], row), p->hidden, scale);
  }
}

template <typename T, typename W>
GQA_CPU_CLONES void add_rmsnorm_rows(const gqa_add_rmsnorm_params *p, int64_t first, int64_t last) {
  const Scale scale{p->eps, p->weight_offset, p->cast_before_weight != 0};
  for (int64_t row = first; row < last; ++row) {
    T *sum = row_at<T>(p->residual_out, p->residual_out_stride, p->rows[1], row);
    add_row(row_at<T>(p->x, p->x_stride, p->rows[1], row), row_at<T>(p->residual, p->residual_stride, p->rows[1], row),
            sum, p->hidden);
    norm_row<T, W>(sum, static_cast<const W *>(p->weight), row_at<T>(p->out, p->out_stride, p->rows[1], row), p->hidden,
                   scale);
  }
}

}  // namespace
}  // namespace gqa::cpu

extern "C" {

gqa_status gqa_rmsnorm_cpu(const gqa_rmsnorm_params *p, int64_t first_row, int64_t last_row) {
  GQA_RETURN_IF_ERROR(gqa::check_params(p));
  return gqa::cpu::dispatch_float(p->dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p->weight_dtype == p->dtype) {
      gqa::cpu::rmsnorm_rows<T, T>(p, first_row, last_row);
    } else {
      gqa::cpu::rmsnorm_rows<T, float>(p, first_row, last_row);
    }
  });
}

gqa_status gqa_add_rmsnorm_cpu(const gqa_add_rmsnorm_params *p, int64_t first_row, int64_t last_row) {
  GQA_RETURN_IF_ERROR(gqa::check_params(p));
  return gqa::cpu::dispatch_float(p->dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    if (p->weight_dtype == p->dtype) {
      gqa::cpu::add_rmsnorm_rows<T, T>(p, first_row, last_row);
    } else {
      gqa::cpu::add_rmsnorm_rows<T, float>(p, first_row, last_row);
    }
  });
}

}  // extern "C"
