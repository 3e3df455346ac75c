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
  const uint32_t sign = static_cast<uint32_t>(value.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(value.bits & 0x7fffu) << 13;
  const float finite = bits_to_float(magnitude) * 0x1p112f;
  const uint32_t special = magnitude | 0x7f800000u;
  const uint32_t bits = magnitude >= (0x7c00u << 13) ? special : float_to_bits(finite);
  return bits_to_float(sign | bits);
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

template <>
GQA_INLINE float16 from_float<float16>(float value) {
  const uint32_t bits = float_to_bits(value);
  const uint32_t sign = (bits >> 16) & 0x8000u;
  const uint32_t magnitude = bits & 0x7fffffffu;
  // Normal halves: rebias and round by integer arithmetic. Denormal halves: let a float addition round.
  const uint32_t normal = (magnitude - 0x38000000u + 0xfffu + ((magnitude >> 13) & 1u)) >> 13;
  const uint32_t denormal = float_to_bits(bits_to_float(magnitude) + 0.5f) - 0x3f000000u;
  uint32_t half = magnitude < 0x38800000u ? denormal : normal;
  half = magnitude >= 0x477ff000u ? 0x7c00u : half;
  half = magnitude > 0x7f800000u ? 0x7e00u : half;
  return {static_cast<uint16_t>(sign | half)};
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
