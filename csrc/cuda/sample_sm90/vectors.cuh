// What is asked of a 16-byte vector of logits as a whole: its largest, and whether any lie in a window.
#pragma once

#include "common/sampling.h"
#include "cuda/common/pair_max.cuh"
#include "cuda/common/vec.cuh"

namespace gqa::cuda {

// Bits of the key below which logits widened from 16 bits agree.
template <typename T>
constexpr int kConstantBits = std::is_same_v<T, float> ? 0 : (std::is_same_v<T, __half> ? 13 : 16);

// The largest of the values seen so far; a NaN wins and stays.
template <typename T>
struct Largest {
  static constexpr uint32_t kLowest = std::is_same_v<T, __half> ? 0xfc00fc00u : 0xff80ff80u;
  uint32_t pair = kLowest;

  __device__ __forceinline__ void add(const Vec<T> &vec) {
    const uint4 words = *reinterpret_cast<const uint4 *>(&vec);
    pair = pair_max_nan<T>(pair, pair_max_nan<T>(pair_max_nan<T>(words.x, words.y), pair_max_nan<T>(words.z, words.w)));
  }

  __device__ __forceinline__ void add(T value) {
    uint16_t bits;
    memcpy(&bits, &value, sizeof(bits));
    pair = pair_max_nan<T>(pair, bits * 0x10001u);
  }

  // key() of the largest; all ones, which no key is, after a NaN.
  __device__ uint32_t key() const {
    const T *seen = reinterpret_cast<const T *>(&pair);
    const uint32_t a = sampling::key(to_float(seen[0])), b = sampling::key(to_float(seen[1]));
    return a == 0 || b == 0 ? 0xffffffffu : max(a, b);
  }
};

template <>
struct Largest<float> {
  float largest = -INFINITY;

  __device__ __forceinline__ void add(float value) {
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(largest) : "f"(largest), "f"(value));
  }

  __device__ __forceinline__ void add(const Vec<float> &vec) {
#pragma unroll
    for (const float value : vec.value) add(value);
  }

  __device__ uint32_t key() const {
    const uint32_t of = sampling::key(largest);
    return of == 0 ? 0xffffffffu : of;
  }
};

// Whether any element lies in [low, high]; that a few outside pass does no harm.
template <typename T>
struct Window {
  uint32_t low, high;

  __device__ Window(float from, float to) {
    if constexpr (std::is_same_v<T, __half>) {
      low = __half_as_ushort(__float2half_rd(from)) * 0x10001u;
      high = __half_as_ushort(__float2half_ru(to)) * 0x10001u;
    } else {
      low = __bfloat16_as_ushort(__float2bfloat16_rd(from)) * 0x10001u;
      high = __bfloat16_as_ushort(__float2bfloat16_ru(to)) * 0x10001u;
    }
  }

  __device__ __forceinline__ bool holds_any(const Vec<T> &vec) const {
    const uint4 words = *reinterpret_cast<const uint4 *>(&vec);
    return (in(words.x) | in(words.y) | in(words.z) | in(words.w)) != 0;
  }

 private:
  __device__ __forceinline__ uint32_t in(uint32_t pair) const {
    uint32_t above, below;
    if constexpr (std::is_same_v<T, __half>) {
      asm("set.ge.u32.f16x2 %0, %1, %2;" : "=r"(above) : "r"(pair), "r"(low));
      asm("set.le.u32.f16x2 %0, %1, %2;" : "=r"(below) : "r"(pair), "r"(high));
    } else {
      asm("set.ge.u32.bf16x2 %0, %1, %2;" : "=r"(above) : "r"(pair), "r"(low));
      asm("set.le.u32.bf16x2 %0, %1, %2;" : "=r"(below) : "r"(pair), "r"(high));
    }
    return above & below;
  }
};

template <>
struct Window<float> {
  float low, high;

  __device__ Window(float from, float to) : low(from), high(to) {}

  __device__ __forceinline__ bool holds_any(const Vec<float> &vec) const {
    bool any = false;
#pragma unroll
    for (const float z : vec.value) any = any || (z >= low && z <= high);
    return any;
  }
};

}  // namespace gqa::cuda
