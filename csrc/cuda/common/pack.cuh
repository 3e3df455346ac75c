// Whole vectors between their dtype and float32: two 16-bit elements by one instruction.
#pragma once

#include "cuda/common/vec.cuh"

namespace gqa::cuda {

template <typename T>
struct Floats {
  float value[Vec<T>::kSize];
};

__device__ __forceinline__ float2 widen_pair(__half2 pair) { return __half22float2(pair); }
// bfloat16 is the upper half of a float: one instruction each.
__device__ __forceinline__ float2 widen_pair(__nv_bfloat162 pair) {
  const uint32_t word = *reinterpret_cast<const uint32_t *>(&pair);
  return make_float2(__uint_as_float(word << 16), __uint_as_float(word & 0xffff0000u));
}

__device__ __forceinline__ void narrow_pair(__half2 *pair, float a, float b) { *pair = __floats2half2_rn(a, b); }
__device__ __forceinline__ void narrow_pair(__nv_bfloat162 *pair, float a, float b) {
  *pair = __floats2bfloat162_rn(a, b);
}

template <typename T>
using PairOf = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;

template <typename T>
__device__ __forceinline__ Floats<T> widen(const Vec<T> &vec) {
  Floats<T> out;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; ++i) out.value[i] = vec.value[i];
  } else {
    const auto *pairs = reinterpret_cast<const PairOf<T> *>(vec.value);
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize / 2; ++i) {
      const float2 two = widen_pair(pairs[i]);
      out.value[2 * i] = two.x;
      out.value[2 * i + 1] = two.y;
    }
  }
  return out;
}

template <typename T>
__device__ __forceinline__ Vec<T> narrow(const Floats<T> &floats) {
  Vec<T> out;
  if constexpr (sizeof(T) == 4) {
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; ++i) out.value[i] = floats.value[i];
  } else {
    auto *pairs = reinterpret_cast<PairOf<T> *>(out.value);
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize / 2; ++i) narrow_pair(&pairs[i], floats.value[2 * i], floats.value[2 * i + 1]);
  }
  return out;
}

// Products of 16-bit elements, rounded once.
template <typename T>
__device__ __forceinline__ Vec<T> multiply(const Vec<T> &a, const Vec<T> &b) {
  Vec<T> out;
  const auto *x = reinterpret_cast<const PairOf<T> *>(a.value), *y = reinterpret_cast<const PairOf<T> *>(b.value);
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize / 2; ++i) reinterpret_cast<PairOf<T> *>(out.value)[i] = __hmul2_rn(x[i], y[i]);
  return out;
}

// The same vector, though the compiler cannot know: what was widened from it before is not kept for what is after.
template <typename T>
__device__ __forceinline__ Vec<T> anew(const Vec<T> &vec, uint32_t zero) {
  Vec<T> out;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    reinterpret_cast<uint32_t *>(out.value)[i] = reinterpret_cast<const uint32_t *>(vec.value)[i] ^ zero;
  }
  return out;
}

// Keeps the packed words in registers over a barrier, where the compiler would keep the floats they were widened to.
template <typename T>
__device__ __forceinline__ void keep_packed(Vec<T> &vec) {
  auto *word = reinterpret_cast<uint32_t *>(vec.value);
  asm volatile("" : "+r"(word[0]), "+r"(word[1]), "+r"(word[2]), "+r"(word[3]));
}

}  // namespace gqa::cuda
