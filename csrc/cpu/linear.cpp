// CPU twin of linear: plain dot products and the bias, rounded once, and the residual, rounded again.
#include "plan/linear.h"

#include "cpu/dot.h"

namespace gqa::cpu {
namespace {

template <typename T>
GQA_CPU_CLONES void linear_tokens(const gqa_linear_params *p, int64_t first, int64_t last) {
  const T *bias = static_cast<const T *>(p->bias);
  for (int64_t token = first; token < last; ++token) {
    const T *x = static_cast<const T *>(p->x) + token * p->x_stride;
    T *out = static_cast<T *>(p->out) + token * p->out_stride;
    int64_t at = 0;
    for (int i = 0; i < 3; ++i) {
      const float *scale = p->weight_scale == nullptr ? nullptr : p->weight_scale + at;
      for (int64_t row = 0; row < p->out_features[i]; ++row, ++at) {
        const float sum = product(x, p->weights[i], p->weight_stride[i], scale, row, p->in_features);
        const T value = from_float<T>(bias == nullptr ? sum : sum + to_float(bias[at]));
        out[at] = with_residual(value, p->residual, token * p->residual_stride + at);
      }
    }
  }
}

}  // namespace
}  // namespace gqa::cpu

extern "C" gqa_status gqa_linear_cpu(const gqa_linear_params *p, int64_t first_row, int64_t last_row) {
  GQA_RETURN_IF_ERROR(gqa::check_params(p));
  return gqa::cpu::dispatch_float(
      p->dtype, [&](auto tag) { gqa::cpu::linear_tokens<typename decltype(tag)::type>(p, first_row, last_row); });
}
