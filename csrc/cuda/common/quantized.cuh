// Chunks of eight elements on their way into and out of quantised caches, whose rows may start anywhere.
#pragma once

#include "common/quantize.h"
#include "cuda/common/mma.cuh"
#include "cuda/common/rotary.cuh"

namespace gqa::cuda {

__device__ __forceinline__ void store_quantized(int32_t dtype, uint8_t *to, const float (&x)[kChunk], float scale) {
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kChunk; ++i) words[i / 4] |= static_cast<uint32_t>(quantize(dtype, x[i], scale)) << 8 * (i % 4);
  if (reinterpret_cast<uintptr_t>(to) % 8 == 0) {
    *reinterpret_cast<uint2 *>(to) = make_uint2(words[0], words[1]);
  } else {
#pragma unroll
    for (int i = 0; i < kChunk; ++i) to[i] = static_cast<uint8_t>(words[i / 4] >> 8 * (i % 4));
  }
}

__device__ __forceinline__ uint2 load_stored(const uint8_t *from) {
  if (reinterpret_cast<uintptr_t>(from) % 8 == 0) return *reinterpret_cast<const uint2 *>(from);
  uint32_t words[2] = {0, 0};
#pragma unroll
  for (int i = 0; i < kChunk; ++i) words[i / 4] |= static_cast<uint32_t>(from[i]) << 8 * (i % 4);
  return make_uint2(words[0], words[1]);
}

// As elements of T, which holds every stored value exactly; the scale is left to the sums.
template <typename T>
__device__ __forceinline__ uint4 widen_stored(int32_t dtype, uint2 stored) {
  const auto pair = [&](uint32_t word, int at) {
    return pack<T>(stored_value(dtype, static_cast<uint8_t>(word >> at)),
                   stored_value(dtype, static_cast<uint8_t>(word >> (at + 8))));
  };
  return make_uint4(pair(stored.x, 0), pair(stored.x, 16), pair(stored.y, 0), pair(stored.y, 16));
}

}  // namespace gqa::cuda
