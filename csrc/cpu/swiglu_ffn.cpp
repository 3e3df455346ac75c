// CPU twin of swiglu_ffn: plain dot products, each rounded to the dtype as torch's matrix products round theirs.
#include "plan/swiglu_ffn.h"

#include "cpu/dot.h"

namespace gqa::cpu {
namespace {

template <typename T>
GQA_CPU_CLONES void ffn_tokens(const gqa_swiglu_ffn_params *p, int64_t first, int64_t last) {
  for (int64_t token = first; token < last; ++token) {
    const T *x = static_cast<const T *>(p->x) + token * p->x_stride;
    T *activation = static_cast<T *>(p->activation) + token * p->intermediate;
    T *out = static_cast<T *>(p->out) + token * p->out_features;
    for (int64_t i = 0; i < p->intermediate; ++i) {
      const T gate = from_float<T>(product(x, p->w_gate, p->w_gate_stride, p->w_gate_scale, i, p->hidden));
      const T up = from_float<T>(product(x, p->w_up, p->w_up_stride, p->w_up_scale, i, p->hidden));
      const T silu = from_float<T>(to_float(gate) / (1.0f + vector_exp(-to_float(gate))));
      activation[i] = from_float<T>(to_float(silu) * to_float(up));
    }
    for (int64_t i = 0; i < p->out_features; ++i) {
      const float sum = product(activation, p->w_down, p->w_down_stride, p->w_down_scale, i, p->intermediate);
      out[i] = with_residual(from_float<T>(sum), p->residual, token * p->residual_stride + i);
    }
  }
}

}  // namespace
}  // namespace gqa::cpu

extern "C" gqa_status gqa_swiglu_ffn_cpu(const gqa_swiglu_ffn_params *p, int64_t first_row, int64_t last_row) {
  GQA_RETURN_IF_ERROR(gqa::check_params(p));
  return gqa::cpu::dispatch_float(
      p->dtype, [&](auto tag) { gqa::cpu::ffn_tokens<typename decltype(tag)::type>(p, first_row, last_row); });
}
