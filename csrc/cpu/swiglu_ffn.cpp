// CPU twin of swiglu_ffn: plain dot products, each rounded to the dtype as torch's matrix products round theirs.
#include "plan/swiglu_ffn.h"

#include "cpu/dot.h"

namespace gqa::cpu {
namespace {

template <typename T>
GQA_INLINE T product(const T *a, const T *b, int64_t count) {
  return from_float<T>(dot(a, b, count));
}

template <typename T>
GQA_CPU_CLONES void ffn_tokens(const gqa_swiglu_ffn_params *p, int64_t first, int64_t last) {
  const T *w_gate = static_cast<const T *>(p->w_gate), *w_up = static_cast<const T *>(p->w_up);
  const T *w_down = static_cast<const T *>(p->w_down);
  for (int64_t token = first; token < last; ++token) {
    const T *x = static_cast<const T *>(p->x) + token * p->x_stride;
    T *activation = static_cast<T *>(p->activation) + token * p->intermediate;
    T *out = static_cast<T *>(p->out) + token * p->out_features;
    for (int64_t i = 0; i < p->intermediate; ++i) {
      const float gate = to_float(product(x, w_gate + i * p->w_gate_stride, p->hidden));
      const T silu = from_float<T>(gate / (1.0f + vector_exp(-gate)));
      activation[i] = from_float<T>(to_float(silu) * to_float(product(x, w_up + i * p->w_up_stride, p->hidden)));
    }
    for (int64_t i = 0; i < p->out_features; ++i)
      out[i] = product(activation, w_down + i * p->w_down_stride, p->intermediate);
  }
}

}  // namespace
}  // namespace gqa::cpu

extern "C" gqa_status gqa_swiglu_ffn_cpu(const gqa_swiglu_ffn_params *p, int64_t first_row, int64_t last_row) {
  GQA_RETURN_IF_ERROR(gqa::check_params(p));
  return gqa::cpu::dispatch_float(
      p->dtype, [&](auto tag) { gqa::cpu::ffn_tokens<typename decltype(tag)::type>(p, first_row, last_row); });
}
