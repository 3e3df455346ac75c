// silu(x) = x / (1 + e^-x), to the bits that torch's arithmetic gives, at the cost that each dtype needs.
#pragma once

#include "cuda/common/vec.cuh"

namespace gqa::cuda {

__device__ __forceinline__ float exp2_approximate(float x) {
  float y;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

__device__ __forceinline__ float reciprocal_approximate(float x) {
  float y;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(y) : "f"(x));
  return y;
}

// In float32, to be rounded to T. float: torch's own arithmetic, expf and an IEEE division. The 16-bit types have
// 65,536 gates, so what rounds like that arithmetic was found by trying all of them, and tests try them again: bfloat16
// takes approximations of both; half needs expf, and one Newton step on the quotient. Both halves of the quotient are
// divided by 4, which changes no bit but lets 4 / (1 + e^-x) vanish where torch's 1 + e^-x overflows, not before.
template <typename T>
__device__ __forceinline__ float silu(float x) {
  if constexpr (sizeof(T) == 4) {
    return x / (1.0f + expf(-x));
  } else if constexpr (std::is_same_v<T, __half>) {
    const float above = 0.25f * x, below = fmaf(0.25f, expf(-x), 0.25f);
    const float inverse = reciprocal_approximate(below), quotient = above * inverse;
    const float nearer = fmaf(fmaf(-below, quotient, above), inverse, quotient);
    return quotient != 0.0f && fabsf(quotient) < INFINITY ? nearer : quotient;
  } else {
    constexpr float kLog2e = 1.44269504f;
    return 0.25f * x * reciprocal_approximate(fmaf(0.25f, exp2_approximate(-kLog2e * x), 0.25f));
  }
}

template <typename T>
__device__ __forceinline__ T swiglu(T gate, T up) {
  const float activated = silu<T>(to_float(gate));
  if constexpr (sizeof(T) == 4)
    return activated * up;
  else
    return __hmul(from_float<T>(activated), up);
}

// The same of the values in a word: one float, or two of 16 bits.
template <typename T>
__device__ __forceinline__ uint32_t swiglu_word(uint32_t gate, uint32_t up) {
  if constexpr (sizeof(T) == 4) {
    return __float_as_uint(swiglu(__uint_as_float(gate), __uint_as_float(up)));
  } else if constexpr (std::is_same_v<T, __half>) {
    const float2 x = __half22float2(reinterpret_cast<const __half2 &>(gate));
    const __half2 out = __hmul2(__floats2half2_rn(silu<T>(x.x), silu<T>(x.y)), reinterpret_cast<const __half2 &>(up));
    return reinterpret_cast<const uint32_t &>(out);
  } else {
    const float low = silu<T>(__uint_as_float(gate << 16)), high = silu<T>(__uint_as_float(gate & 0xffff0000u));
    const __nv_bfloat162 out = __hmul2(__floats2bfloat162_rn(low, high), reinterpret_cast<const __nv_bfloat162 &>(up));
    return reinterpret_cast<const uint32_t &>(out);
  }
}

}  // namespace gqa::cuda
