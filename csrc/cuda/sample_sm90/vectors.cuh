// What is asked of a 16-byte vector of logits as a whole: its largest, and whether any lie in a window.
#pragma once

#include "common/sampling.h"
#include "cuda/common/pair_max.cuh"
#include "cuda/common/vec.cuh"
#include "plan/sample.h"

namespace gqa::cuda {

// Bits of the key below which logits widened from 16 bits agree.
template <typename T>
constexpr int kConstantBits = std::is_same_v<T, float> ? 0 : (std::is_same_v<T, __half> ? 13 : 16);

// Whether the workers help to pick the token: a stretch is large, and nothing is held beside it.
template <int kThreads>
constexpr bool kPicks = kThreads == kSampleClusterMany;

// Largest and least as one word, so that the larger word has the larger largest; ~key of the least is below.
__device__ __forceinline__ unsigned long long ends_of(uint32_t largest, uint32_t least) {
  return static_cast<unsigned long long>(largest) << 32 | ~least;
}

// The largest and the least of the values seen so far; a NaN wins and stays.
template <typename T>
struct Extent {
  static constexpr uint32_t kInfinities = std::is_same_v<T, __half> ? 0x7c007c00u : 0x7f807f80u;
  uint32_t largest = kInfinities | 0x80008000u, least = kInfinities;

  __device__ __forceinline__ void add(const Vec<T> &vec) {
    const uint4 w = *reinterpret_cast<const uint4 *>(&vec);
    largest = pair_max_nan<T>(largest, pair_max_nan<T>(pair_max_nan<T>(w.x, w.y), pair_max_nan<T>(w.z, w.w)));
    least = pair_min<T>(least, pair_min<T>(pair_min<T>(w.x, w.y), pair_min<T>(w.z, w.w)));
  }

  __device__ __forceinline__ void add(T value) {
    uint16_t bits;
    memcpy(&bits, &value, sizeof(bits));
    largest = pair_max_nan<T>(largest, bits * 0x10001u);
    least = pair_min<T>(least, bits * 0x10001u);
  }

  // key() of the largest and the least; all ones, which no key is, for the largest after a NaN.
  __device__ unsigned long long ends() const {
    const T *most = reinterpret_cast<const T *>(&largest), *fewest = reinterpret_cast<const T *>(&least);
    const uint32_t a = sampling::key(to_float(most[0])), b = sampling::key(to_float(most[1]));
    const uint32_t low = min(sampling::key(to_float(fewest[0])), sampling::key(to_float(fewest[1])));
    return ends_of(a == 0 || b == 0 ? 0xffffffffu : max(a, b), low);
  }
};

template <>
struct Extent<float> {
  float largest = -INFINITY, least = INFINITY;

  __device__ __forceinline__ void add(float value) {
    asm("max.NaN.f32 %0, %1, %2;" : "=f"(largest) : "f"(largest), "f"(value));
    least = fminf(least, value);
  }

  __device__ __forceinline__ void add(const Vec<float> &vec) {
#pragma unroll
    for (const float value : vec.value) add(value);
  }

  __device__ unsigned long long ends() const {
    const uint32_t of = sampling::key(largest);
    return ends_of(of == 0 ? 0xffffffffu : of, sampling::key(least));
  }
};

// Which elements lie in [low, high], as bits of 0xf000f; that a few outside pass does no harm. element() is that of a
// bit, also where it is shifted by a multiple of four within its half.
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

  __device__ __forceinline__ uint32_t find(const Vec<T> &vec) const {
    const uint4 w = *reinterpret_cast<const uint4 *>(&vec);
    return (in(w.x) & 0x10001u) | (in(w.y) & 0x20002u) | (in(w.z) & 0x40004u) | (in(w.w) & 0x80008u);
  }

  __device__ static int element(int bit) { return bit % 4 * 2 + bit / 16; }

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

  __device__ __forceinline__ uint32_t find(const Vec<float> &vec) const {
    uint32_t found = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) found |= vec.value[i] >= low && vec.value[i] <= high ? 1u << i : 0;
    return found;
  }

  __device__ static int element(int bit) { return bit % 4; }
};

}  // namespace gqa::cuda
