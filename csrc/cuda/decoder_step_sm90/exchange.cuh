// How blocks hand values to each other without a barrier: each word carries its value and a tag, the number of the
// layer it belongs to, so that whoever needs it reads the word until the tag is there. A word is written again a layer
// later, which nobody does before all blocks have used it: every phase needs all of the phase before.
#pragma once

#include "cuda/common/vec.cuh"

namespace gqa::cuda::decoder_step {

template <typename T>
__device__ __forceinline__ void publish(uint32_t *to, T value, uint32_t tag) {
  const uint32_t word = *reinterpret_cast<const uint16_t *>(&value) | tag << 16;
  asm volatile("st.relaxed.gpu.global.b32 [%0], %1;" ::"l"(to), "r"(word) : "memory");
}

__device__ __forceinline__ void publish(uint64_t *to, float value, uint32_t tag) {
  const uint64_t word = __float_as_uint(value) | static_cast<uint64_t>(tag) << 32;
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
}

__device__ __forceinline__ uint4 look(const uint32_t *from) {
  uint4 w;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
               : "l"(from)
               : "memory");
  return w;
}

__device__ __forceinline__ bool is_there(const uint4 &w, uint32_t tag) {
  const uint32_t t = tag << 16;
  return (((w.x ^ t) | (w.y ^ t)) | ((w.z ^ t) | (w.w ^ t))) < 0x10000u;
}

// Four values.
__device__ __forceinline__ uint2 values_of(const uint4 &w) {
  return make_uint2(__byte_perm(w.x, w.y, 0x5410), __byte_perm(w.z, w.w, 0x5410));
}

// Until the vector has come. A warp that waits asks for one vector at a time: more would take bandwidth from the
// weights.
__device__ __forceinline__ void watch(const uint32_t *from, uint32_t tag) {
  while (!is_there(look(from), tag)) {
  }
}

// Calls use(i, four values) for vectors i = first, first + step ... below count, several of them on their way at once;
// the lanes of a warp have consecutive ones.
template <int kAtOnce, typename Use>
__device__ __forceinline__ void receive(const uint32_t *from, uint32_t tag, int first, int step, int count, Use &&use) {
#pragma unroll 1
  for (; first < count; first += kAtOnce * step) {
    if (count > step) watch(from + 4 * (first & ~31), tag);
    uint4 w[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * step < count) w[i] = look(from + 4 * (first + i * step));
    }
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * step >= count) continue;
      while (!is_there(w[i], tag)) w[i] = look(from + 4 * (first + i * step));
      use(first + i * step, values_of(w[i]));
    }
  }
}

// kCount values, `step` words apart but for the first two, which are at `pair`.
template <int kCount>
__device__ __forceinline__ void receive(const uint64_t *from, const uint64_t *pair, int64_t step, uint32_t tag,
                                        float (&values)[kCount]) {
  bool all;
  do {
    uint64_t last;  // to be written
    asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(last) : "l"(pair) : "memory");
    all = static_cast<uint32_t>(last >> 32) == tag;
  } while (!__all_sync(~0u, all));
  do {
    all = true;
    uint64_t words[kCount];
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      const uint64_t *at = i < 2 ? pair + i * step : from + (i - 2) * step;
      asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(words[i]) : "l"(at) : "memory");
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      all = all && static_cast<uint32_t>(words[i] >> 32) == tag;
      values[i] = __uint_as_float(static_cast<uint32_t>(words[i]));
    }
  } while (!all);
}

}  // namespace gqa::cuda::decoder_step
