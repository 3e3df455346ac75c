#include "cpu/rotary.h"

#include <limits>

#include "common/rotate.h"
#include "cpu/types.h"

namespace gqa::cpu {
namespace {

template <bool kInterleaved, typename T, typename C>
GQA_INLINE void rotate_pairs(const C *cosine, const C *sine, const T *__restrict x, T *__restrict out, int64_t half) {
  constexpr int kStep = kInterleaved ? 2 : 1;
  const int64_t second = kInterleaved ? 1 : half;
  for (int64_t i = 0; i < half; ++i) {
    const Pair pair =
        rotate_pair(to_float(x[i * kStep]), to_float(x[second + i * kStep]), to_float(cosine[i]), to_float(sine[i]));
    out[i * kStep] = from_float<T>(pair.first);
    out[second + i * kStep] = from_float<T>(pair.second);
  }
}

template <typename T, typename C>
GQA_CPU_CLONES void rotate(const gqa_rotary &r, int64_t offset, const T *x, T *out, int64_t head_dim) {
  const C *cosine = static_cast<const C *>(r.cos) + offset, *sine = static_cast<const C *>(r.sin) + offset;
  if (offset < 0) {
    for (int64_t i = 0; i < r.dim; ++i) out[i] = from_float<T>(std::numeric_limits<float>::quiet_NaN());
  } else if (r.interleaved) {
    rotate_pairs<true>(cosine, sine, x, out, r.dim / 2);
  } else {
    rotate_pairs<false>(cosine, sine, x, out, r.dim / 2);
  }
  std::memcpy(out + r.dim, x + r.dim, (head_dim - r.dim) * sizeof(T));
}

}  // namespace

template <typename T>
void rotate_head(const gqa_rotary &rotary, int64_t offset, const T *x, T *out, int64_t head_dim) {
  if (rotary.dtype == GQA_DTYPE_FLOAT32) {
    rotate<T, float>(rotary, offset, x, out, head_dim);
  } else {
    rotate<T, T>(rotary, offset, x, out, head_dim);
  }
}

template void rotate_head(const gqa_rotary &, int64_t, const float *, float *, int64_t);
template void rotate_head(const gqa_rotary &, int64_t, const float16 *, float16 *, int64_t);
template void rotate_head(const gqa_rotary &, int64_t, const bfloat16 *, bfloat16 *, int64_t);

}  // namespace gqa::cpu
