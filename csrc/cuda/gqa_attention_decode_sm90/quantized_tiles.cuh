// What a warp reads of an 8-bit tile: what is stored, e4m3 or int8, as operands of float16, which holds it exactly.
// A lane's four bytes of a key are two operands, so that dimensions 16 d + 4 c ... + 3 of it meet those of the query; a
// lane's four bytes of two values are the operands of dimensions 16 d + 2 r and 16 d + 2 r + 1.
#pragma once

#include "cuda/common/mma.cuh"
#include "cuda/gqa_attention_decode_sm90/block.cuh"

namespace gqa::cuda::decode_sm90 {

// Two stored numbers to float16: of bytes 0 and 1 of the word, then of bytes 2 and 3.
template <bool kInt8>
__device__ __forceinline__ uint2 widen_bytes(uint32_t word) {
  uint2 pairs;
  if constexpr (kInt8) {
    // 1152 + x, by its bits, less 1152.
    word ^= 0x80808080u;
    const __half2 offset = __floats2half2_rn(1152.0f, 1152.0f);
    const uint32_t low = __byte_perm(word, 0x64646464u, 0x4140), high = __byte_perm(word, 0x64646464u, 0x4342);
    const __half2 x = __hsub2(*reinterpret_cast<const __half2 *>(&low), offset);
    const __half2 y = __hsub2(*reinterpret_cast<const __half2 *>(&high), offset);
    pairs = {*reinterpret_cast<const uint32_t *>(&x), *reinterpret_cast<const uint32_t *>(&y)};
  } else {
    asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.rn.f16x2.e4m3x2 %0, low;\n"
        "cvt.rn.f16x2.e4m3x2 %1, high;\n}"
        : "=r"(pairs.x), "=r"(pairs.y)
        : "r"(word));
  }
  return pairs;
}

// Calls use(d, operand) for the 16 keys and dimensions 16 d ... of the tile.
template <typename C, bool kInt8, typename Use>
__device__ __forceinline__ void each_key_operand(uint32_t at, Use &&use) {
#pragma unroll
  for (int pair = 0; pair < C::kDim / 32; ++pair) {
    uint32_t words[4];
    load_matrices(words, chunk_address<C>(at, pair));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint2 upper = widen_bytes<kInt8>(words[2 * i]), lower = widen_bytes<kInt8>(words[2 * i + 1]);
      const uint32_t operand[4] = {upper.x, lower.x, upper.y, lower.y};
      use(2 * pair + i, operand);
    }
  }
}
template <typename C, bool kInt8, typename Use>
__device__ __forceinline__ void each_value_operand(uint32_t at, Use &&use) {
#pragma unroll
  for (int pair = 0; pair < C::kDim / 32; ++pair) {
    uint32_t words[4];
    load_matrices_transposed(words, chunk_address<C>(at, pair));
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint2 first = widen_bytes<kInt8>(__byte_perm(words[i], 0, 0x3120));
      const uint2 second = widen_bytes<kInt8>(__byte_perm(words[i + 2], 0, 0x3120));
      const uint32_t operand[4] = {first.x, first.y, second.x, second.y};
      use(2 * pair + i, operand);
    }
  }
}

template <typename C, typename Use>
__device__ __forceinline__ void each_key(const Args &p, uint32_t at, Use &&use) {
  if (p.cache_dtype == GQA_DTYPE_INT8) {
    each_key_operand<C, true>(at, use);
  } else {
    each_key_operand<C, false>(at, use);
  }
}
template <typename C, typename Use>
__device__ __forceinline__ void each_value(const Args &p, uint32_t at, Use &&use) {
  if (p.cache_dtype == GQA_DTYPE_INT8) {
    each_value_operand<C, true>(at, use);
  } else {
    each_value_operand<C, false>(at, use);
  }
}

}  // namespace gqa::cuda::decode_sm90
