// float32 functions that vectorise: straight-line code, no tables, no calls, no branches.
#pragma once

#include "cpu/types.h"

namespace gqa::cpu {

// e^x within 1 ulp, denormal results too; 0 and infinity beyond the range, NaN for NaN. Range reduction to
// [-ln 2 / 2, ln 2 / 2] and the polynomial of SLEEF's expf_u10, which torch's CPU kernels call: the same bytes as
// theirs where the machine has FMA.
GQA_INLINE float vector_exp(float x) {
  constexpr float kLog2e = 1.442695040888963407f, kLn2High = 0.693145751953125f, kLn2Low = 1.428606765330187045e-06f;
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, held in the low bits
  x = x < -104.0f ? -104.0f : x;
  x = x > 100.0f ? 100.0f : x;
  const float shifted = x * kLog2e + kRound;
  const int32_t n = static_cast<int32_t>(float_to_bits(shifted) - float_to_bits(kRound));
  const float whole = shifted - kRound;
  float r = x - whole * kLn2High;
  r = r - whole * kLn2Low;
  float p = 0.000198527617612853646278381f;
  p = p * r + 0.00139304355252534151077271f;
  p = p * r + 0.00833336077630519866943359f;
  p = p * r + 0.0416664853692054748535156f;
  p = p * r + 0.166666671633720397949219f;
  p = p * r + 0.5f;
  p = 1.0f + (r * r * p + r);
  // 2^n in two factors, as n may lie outside the exponents of float.
  const int32_t half = n >> 1;
  const float low = bits_to_float(static_cast<uint32_t>(half + 127) << 23);
  const float high = bits_to_float(static_cast<uint32_t>(n - half + 127) << 23);
  return p * low * high;
}

}  // namespace gqa::cpu
