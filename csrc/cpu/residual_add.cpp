// CPU twin of residual_add: the sum in float32, rounded once.
#include "cpu/pointwise.h"

namespace gqa::cpu {
namespace {

struct Add {
  template <typename T>
  GQA_INLINE static void run(const T *x, const T *residual, T *out, int64_t count) {
    for (int64_t i = 0; i < count; ++i) out[i] = from_float<T>(to_float(x[i]) + to_float(residual[i]));
  }
};

template <typename T>
GQA_CPU_CLONES void residual_add_spans(const gqa_residual_add_params *p, int64_t first, int64_t last) {
  pointwise_spans<Add, T>(*p, first, last);
}

}  // namespace
}  // namespace gqa::cpu

extern "C" gqa_status gqa_residual_add_cpu(const gqa_residual_add_params *p, int64_t first_row, int64_t last_row) {
  GQA_RETURN_IF_ERROR(gqa::check_pointwise(p));
  const gqa_residual_add_params flat = gqa::flattened(*p);
  return gqa::cpu::dispatch_float(p->dtype, [&](auto tag) {
    gqa::cpu::residual_add_spans<typename decltype(tag)::type>(&flat, first_row, last_row);
  });
}
