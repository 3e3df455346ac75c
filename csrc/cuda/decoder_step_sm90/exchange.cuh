// How blocks hand values to each other without a barrier: a value's own bits say that it is there. Every layer has its
// own place for them, filled before the launch with a pattern that no value has; whoever needs values reads them until
// none is that pattern. Sums of a head's parts, whose places are used in every layer, carry the layer's number.
#pragma once

#include "cuda/common/vec.cuh"

namespace gqa::cuda::decoder_step {

constexpr uint16_t kAbsent = 0xffff;  // a NaN; others of that payload become another

template <typename T>
__device__ __forceinline__ uint16_t bits_of(T value) {
  const uint16_t bits = *reinterpret_cast<const uint16_t *>(&value);
  return bits == kAbsent ? 0x7fff : bits;
}

template <typename T>
__device__ __forceinline__ void publish(uint16_t *to, T value) {
  asm volatile("st.relaxed.gpu.global.b16 [%0], %1;" ::"l"(to), "h"(bits_of(value)) : "memory");
}

__device__ __forceinline__ void publish(uint64_t *to, float value, uint32_t tag) {
  const uint64_t word = __float_as_uint(value) | static_cast<uint64_t>(tag) << 32;
  asm volatile("st.relaxed.gpu.global.b64 [%0], %1;" ::"l"(to), "l"(word) : "memory");
}

// Eight values.
__device__ __forceinline__ uint4 look(const uint16_t *from) {
  uint4 w;
  asm volatile("ld.relaxed.gpu.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
               : "l"(from)
               : "memory");
  return w;
}

__device__ __forceinline__ bool is_there(const uint4 &w) {
  // Of ~pair, which has a zero half: the sign bit of a half that borrows.
  const auto absent = [](uint32_t pair) { return (~pair - 0x00010001u) & pair; };
  return (((absent(w.x) | absent(w.y)) | (absent(w.z) | absent(w.w))) & 0x80008000u) == 0;
}

// Calls use(i, eight values) for vectors i = first, first + step ... below count, several of them on their way at once;
// the lanes of a warp have consecutive ones. With many to come, a warp waits for one before it asks for the others:
// more would take bandwidth from the weights.
template <int kAtOnce, typename Use>
__device__ __forceinline__ void receive(const uint16_t *from, int first, int step, int count, Use &&use) {
  if (count > step && (first & ~31) < count) {
    while (!is_there(look(from + 8 * (first & ~31)))) {
    }
  }
#pragma unroll 1
  for (; first < count; first += kAtOnce * step) {
    uint4 w[kAtOnce];
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      w[i] = make_uint4(0, 0, 0, 0);
      if (first + i * step < count) w[i] = look(from + 8 * (first + i * step));
    }
    bool all;
    do {
      all = true;
#pragma unroll
      for (int i = 0; i < kAtOnce; ++i) {
        if (!is_there(w[i])) {
          w[i] = look(from + 8 * (first + i * step));
          all = false;
        }
      }
    } while (!all);
#pragma unroll
    for (int i = 0; i < kAtOnce; ++i) {
      if (first + i * step < count) use(first + i * step, w[i]);
    }
  }
}

// A part's value, or the tag of another layer.
__device__ __forceinline__ bool look(const uint64_t *from, uint32_t tag, float &value) {
  uint64_t word;
  asm volatile("ld.relaxed.gpu.global.b64 %0, [%1];" : "=l"(word) : "l"(from) : "memory");
  value = __uint_as_float(static_cast<uint32_t>(word));
  return static_cast<uint32_t>(word >> 32) == tag;
}

}  // namespace gqa::cuda::decoder_step
