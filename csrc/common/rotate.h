// The rotation of one pair of a rotary embedding, the same bytes on every device.
#pragma once

#include "common/index.h"

namespace gqa {

struct Pair {
  float first, second;
};

// Each product and sum rounds by itself, as x * cos + rotate_half(x) * sin does in eager float32 PyTorch: a CPU file
// that includes this is compiled without contraction into FMA. A sine of zero leaves the sign of a zero alone.
GQA_HOST_DEVICE Pair rotate_pair(float a, float b, float cosine, float sine) {
#if defined(__CUDA_ARCH__)
  const float ac = __fmul_rn(a, cosine), bs = __fmul_rn(b, sine);
  const float bc = __fmul_rn(b, cosine), as = __fmul_rn(a, sine);
  return {sine == 0.0f ? ac : __fsub_rn(ac, bs), sine == 0.0f ? bc : __fadd_rn(bc, as)};
#else
  const float ac = a * cosine, bs = b * sine;
  const float bc = b * cosine, as = a * sine;
  return {sine == 0.0f ? ac : ac - bs, sine == 0.0f ? bc : bc + as};
#endif
}

}  // namespace gqa
