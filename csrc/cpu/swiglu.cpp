// CPU twin of swiglu: silu in float32, rounded to the dtype, then the product.
#include "cpu/math.h"
#include "cpu/pointwise.h"

namespace gqa::cpu {
namespace {

struct Swiglu {
  template <typename T>
  GQA_INLINE static T apply(T gate, T up) {
    const float x = to_float(gate);
    const T silu = from_float<T>(x / (1.0f + vector_exp(-x)));
    return from_float<T>(to_float(silu) * to_float(up));
  }
};

template <typename T>
GQA_CPU_CLONES void swiglu_spans(const gqa_swiglu_params *p, int64_t first, int64_t last) {
  pointwise_spans<Swiglu, T>(*p, first, last);
}

}  // namespace
}  // namespace gqa::cpu

extern "C" gqa_status gqa_swiglu_cpu(const gqa_swiglu_params *p, int64_t first_row, int64_t last_row) {
  GQA_RETURN_IF_ERROR(gqa::check_pointwise(p));
  const gqa_swiglu_params flat = gqa::flattened(*p);
  return gqa::cpu::dispatch_float(
      p->dtype, [&](auto tag) { gqa::cpu::swiglu_spans<typename decltype(tag)::type>(&flat, first_row, last_row); });
}
