// 16-byte vectors of float, half and bfloat16, and conversion to and from float.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>
#include <type_traits>

namespace gqa::cuda {

template <typename T>
__device__ __forceinline__ float to_float(T value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __half2float(value);
  } else {
    return __bfloat162float(value);
  }
}

template <typename T>
__device__ __forceinline__ T from_float(float value) {
  if constexpr (sizeof(T) == 4) {
    return value;
  } else if constexpr (std::is_same_v<T, __half>) {
    return __float2half_rn(value);
  } else {
    return __float2bfloat16_rn(value);
  }
}

template <typename T>
struct alignas(16) Vec {
  static constexpr int kSize = 16 / sizeof(T);
  T value[kSize];
};

template <typename T>
__device__ __forceinline__ Vec<T> load_vec(const T *at) {
  return *reinterpret_cast<const Vec<T> *>(at);
}

// Read once: leaves L1 to what is read again.
template <typename T>
__device__ __forceinline__ Vec<T> load_vec_once(const T *at) {
  uint4 bits;
  asm volatile("ld.global.L1::no_allocate.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(bits.x), "=r"(bits.y), "=r"(bits.z), "=r"(bits.w)
               : "l"(at)
               : "memory");
  return *reinterpret_cast<const Vec<T> *>(&bits);
}

template <typename T>
__device__ __forceinline__ void store_vec(T *at, const Vec<T> &vec) {
  *reinterpret_cast<Vec<T> *>(at) = vec;
}

// N elements moved at once: a vector where N is Vec<T>::kSize, an element where N is 1.
template <typename T, int N>
struct alignas(N * sizeof(T)) Run {
  T value[N];
};

template <int N, typename T>
__device__ __forceinline__ Run<T, N> load_run(const T *at) {
  return *reinterpret_cast<const Run<T, N> *>(at);
}

template <typename T, int N>
__device__ __forceinline__ void store_run(T *at, const Run<T, N> &run) {
  *reinterpret_cast<Run<T, N> *>(at) = run;
}

// `past_cache`: as not to be read again soon, the first to leave L2.
template <typename T, int N>
__device__ __forceinline__ void store_run(T *at, const Run<T, N> &run, bool past_cache) {
  if constexpr (sizeof(run) >= 8) {
    using Bits = std::conditional_t<sizeof(run) == 16, uint4, uint2>;
    if (past_cache) return __stcs(reinterpret_cast<Bits *>(at), *reinterpret_cast<const Bits *>(run.value));
  }
  store_run(at, run);
}

__host__ __device__ __forceinline__ bool is_aligned16(const void *pointer) {
  return reinterpret_cast<uintptr_t>(pointer) % 16 == 0;
}

}  // namespace gqa::cuda
