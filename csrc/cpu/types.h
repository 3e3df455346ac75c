// float16 and bfloat16 on the CPU, dispatch over dtypes, and run-time choice of vector width.
#pragma once

#include <cstdint>
#include <cstring>

#include "common/status.h"

// The same plain loops, compiled for several vector widths; the loader picks one.
#if defined(__x86_64__) && defined(__GNUC__) && !defined(__clang__) && __GNUC__ >= 12
#define GQA_CPU_CLONES __attribute__((target_clones("arch=x86-64-v4", "arch=x86-64-v3", "default")))
#else
#define GQA_CPU_CLONES
#endif

// For what a cloned function calls: only inlined code gets its vector width.
#define GQA_INLINE inline __attribute__((always_inline))

namespace gqa::cpu {

GQA_INLINE float bits_to_float(uint32_t bits) {
  float value;
  std::memcpy(&value, &bits, sizeof(value));
  return value;
}

GQA_INLINE uint32_t float_to_bits(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, sizeof(bits));
  return bits;
}

struct bfloat16 {
  uint16_t bits;
};

struct float16 {
  uint16_t bits;
};

GQA_INLINE float to_float(float value) { return value; }

GQA_INLINE float to_float(bfloat16 value) { return bits_to_float(static_cast<uint32_t>(value.bits) << 16); }

// Branch-free so that loops over it vectorise: rebias by a float multiply, which also makes denormals right.
GQA_INLINE float to_float(float16 value) {
  const uint32_t extended = static_cast<uint32_t>(static_cast<int32_t>(static_cast<int16_t>(value.bits)));
  const uint32_t word = extended << 13 & 0x8fffe000u;
  const float finite = bits_to_float(word) * 0x1p112f;
  return bits_to_float(float_to_bits(finite) | ((word & 0x0f800000u) == 0x0f800000u ? 0x7f800000u : 0u));
}

template <typename T>
T from_float(float value);

template <>
GQA_INLINE float from_float<float>(float value) {
  return value;
}

// Round to nearest even; NaN stays NaN.
template <>
GQA_INLINE bfloat16 from_float<bfloat16>(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const uint32_t nan = (bits >> 16) | 0x40u;
  return {static_cast<uint16_t>((bits & 0x7fffffffu) > 0x7f800000u ? nan : rounded)};
}

// Round to nearest even: adding 2^13 times its power of two, or that of the least normal half, leaves of a float the
// significand of the half, which carries into the exponent where it rounds up to the next. NaN stays NaN.
template <>
GQA_INLINE float16 from_float<float16>(float value) {
  constexpr uint32_t kInfinity = 0x47800000u, kLeastNormal = 0x38800000u;  // 2^16 and 2^-14
  const uint32_t bits = float_to_bits(value), magnitude = bits & 0x7fffffffu;
  const uint32_t finite = magnitude < kInfinity ? magnitude : kInfinity;
  const uint32_t power = (finite & 0x7f800000u) > kLeastNormal ? finite & 0x7f800000u : kLeastNormal;
  const uint32_t shift = power + (13u << 23);
  const uint32_t significand = float_to_bits(bits_to_float(finite) + bits_to_float(shift)) - shift;
  uint32_t half = ((power - kLeastNormal) >> 13) + significand;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {static_cast<uint16_t>(half | (bits >> 16 & 0x8000u))};
}

template <typename T>
struct Type {
  using type = T;
};

// Calls f(Type<T>{}) for the dtype; anything else is a status, never silence.
template <typename F>
gqa_status dispatch_float(int32_t dtype, F &&f) {
  switch (dtype) {
    case GQA_DTYPE_FLOAT32: f(Type<float>{}); return GQA_STATUS_OK;
    case GQA_DTYPE_FLOAT16: f(Type<float16>{}); return GQA_STATUS_OK;
    case GQA_DTYPE_BFLOAT16: f(Type<bfloat16>{}); return GQA_STATUS_OK;
    default: return GQA_STATUS_UNSUPPORTED;
  }
}

}  // namespace gqa::cpu
