// float8_e4m3 and int8 numbers, by arithmetic that is the same to the bit on the CPU and on every GPU.
#pragma once

#include <cstring>

#include "common/index.h"

namespace gqa {

GQA_HOST_DEVICE uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof(bits));
  return bits;
}

GQA_HOST_DEVICE float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// Moved up to float's exponent and mantissa, then rebiased by a product, which makes denormals right.
GQA_HOST_DEVICE float e4m3_to_float(uint8_t value) {
  const uint32_t magnitude = value & 0x7fu, sign = (value & 0x80u) << 24;
  const uint32_t finite = bits_of(float_of(magnitude << 20) * 0x1p120f);
  return float_of(sign | (magnitude == 0x7f ? 0x7fc00000u : finite));
}

// To nearest even; what is beyond 448 becomes 448, NaN is 0x7f.
GQA_HOST_DEVICE uint8_t float_to_e4m3(float value) {
  const uint32_t bits = bits_of(value), sign = bits >> 24 & 0x80u, magnitude = bits & 0x7fffffffu;
  // Normal numbers: rebias and round by integer arithmetic. Denormal ones: a float addition rounds to steps of 2^-9.
  const uint32_t normal = (magnitude - 0x3c000000u + 0x7ffffu + (magnitude >> 20 & 1u)) >> 20;
  const uint32_t denormal = bits_of(float_of(magnitude) + 16384.0f) - 0x46800000u;
  const uint32_t rounded = magnitude < 0x3c800000u ? denormal : (normal < 0x7eu ? normal : 0x7eu);
  const uint32_t held = magnitude > 0x43e00000u ? 0x7eu : rounded;
  return static_cast<uint8_t>(magnitude > 0x7f800000u ? 0x7fu : sign | held);
}

// To nearest even; what is beyond 127 becomes 127, NaN is 0.
GQA_HOST_DEVICE int8_t float_to_int8(float value) {
  const float high = value < 127.0f ? value : 127.0f, held = high > -127.0f ? high : -127.0f;
  const int32_t rounded = static_cast<int32_t>(bits_of(held + 12582912.0f) - 0x4b400000u);
  return static_cast<int8_t>(value == value ? rounded : 0);
}

// What a cache stores for x, and what it then stands for, before the scale.
GQA_HOST_DEVICE uint8_t quantize(int32_t dtype, float x, float scale) {
  const float value = x / scale;
  return dtype == GQA_DTYPE_INT8 ? static_cast<uint8_t>(float_to_int8(value)) : float_to_e4m3(value);
}
GQA_HOST_DEVICE float stored_value(int32_t dtype, uint8_t stored) {
  return dtype == GQA_DTYPE_INT8 ? static_cast<float>(static_cast<int8_t>(stored)) : e4m3_to_float(stored);
}

GQA_HOST_DEVICE float scale_of(const float *scale, int64_t stride, int64_t head) {
  return scale == nullptr ? 1.0f : scale[head * stride];
}
GQA_HOST_DEVICE float k_scale_of(const gqa_kv_quantization &q, int64_t head) {
  return scale_of(q.k_scale, q.k_scale_stride, head);
}
GQA_HOST_DEVICE float v_scale_of(const gqa_kv_quantization &q, int64_t head) {
  return scale_of(q.v_scale, q.v_scale_stride, head);
}

}  // namespace gqa
