// CPU twin of swiglu: silu in float32, rounded to the dtype, then the product.
#include "cpu/math.h"
#include "cpu/pointwise.h"

namespace gqa::cpu {
namespace {

struct Swiglu {
  // 16 bits by stages, over parts that stay in L1: one loop of it all has more live values than registers.
  template <typename T>
  GQA_INLINE static void run(const T *gate, const T *up, T *out, int64_t count) {
    if constexpr (sizeof(T) == 4) {
      for (int64_t i = 0; i < count; ++i) out[i] = gate[i] / (1.0f + vector_exp(-gate[i])) * up[i];
      return;
    }
    constexpr int64_t kPart = 512;
    float value[kPart];
    for (int64_t first = 0; first < count; first += kPart) {
      const int64_t part = count - first < kPart ? count - first : kPart;
      for (int64_t i = 0; i < part; ++i) value[i] = to_float(gate[first + i]);
      for (int64_t i = 0; i < part; ++i) value[i] = value[i] / (1.0f + vector_exp(-value[i]));
      for (int64_t i = 0; i < part; ++i) value[i] = to_float(from_float<T>(value[i]));
      for (int64_t i = 0; i < part; ++i) out[first + i] = from_float<T>(value[i] * to_float(up[first + i]));
    }
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
