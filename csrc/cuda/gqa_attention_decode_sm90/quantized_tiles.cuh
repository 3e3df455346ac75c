// What a warp reads of an 8-bit tile: what is stored, e4m3 or int8, as operands of float16, which holds it exactly.
// A lane's four bytes of a key are two operands, so that dimensions 16 d + 4 c ... + 3 of it meet those of the query; a
// lane's four bytes of two values are the operands of dimensions 16 d + 2 r and 16 d + 2 r + 1.
// An int8 x becomes 1152 + x: the byte, its sign turned over, is the end of the fraction of 1024; less 1152 it is x.
#pragma once

#include "cuda/common/mma.cuh"
#include "cuda/gqa_attention_decode_sm90/block.cuh"

namespace gqa::cuda::decode_sm90 {

__device__ __forceinline__ bool is_int8(const Args &p) { return p.cache_dtype == GQA_DTYPE_INT8; }

__device__ __forceinline__ uint32_t less_1152(uint32_t pair) {
  uint32_t result;
  asm("sub.f16x2 %0, %1, %2;" : "=r"(result) : "r"(pair), "r"(0x64806480u));
  return result;
}

// Two stored numbers to float16: of bytes 0 and 1 of the word, then of bytes 2 and 3.
template <bool kInt8>
__device__ __forceinline__ uint2 widen_key(uint32_t word) {
  if constexpr (kInt8) {
    word ^= 0x80808080u;
    return {less_1152(__byte_perm(word, 0x64646464u, 0x4140)), less_1152(__byte_perm(word, 0x64646464u, 0x4342))};
  }
  uint2 pairs;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.rn.f16x2.e4m3x2 %0, low;\n"
      "cvt.rn.f16x2.e4m3x2 %1, high;\n}"
      : "=r"(pairs.x), "=r"(pairs.y)
      : "r"(word));
  return pairs;
}

// Of bytes 0 and 2, then of bytes 1 and 3.
template <bool kInt8>
__device__ __forceinline__ uint2 widen_value(uint32_t word) {
  if constexpr (kInt8) {
    return {less_1152((word & 0x00ff00ffu) ^ 0x64806480u),
            less_1152(__byte_perm(word, 0x64646464u, 0x4341) ^ 0x00800080u)};
  }
  return widen_key<false>(__byte_perm(word, 0, 0x3120));
}

// Words of 16 keys or values of a tile: read ahead if C::kHolds, else as they are wanted.
template <typename C>
struct Words {
  uint32_t at, x[C::kDim / 32][4];

  __device__ __forceinline__ void keys(const Block<C> &t, uint32_t tile, int step) {
    at = tile + step * 16 * C::kRowBytes + t.key_offset;
#pragma unroll
    for (int pair = 0; C::kHolds && pair < C::kDim / 32; ++pair) load_matrices(x[pair], chunk_address<C>(at, pair));
  }
  __device__ __forceinline__ void values(const Block<C> &t, uint32_t tile, int step) {
    at = tile + C::kTileBytes + step * 16 * C::kRowBytes + t.value_offset;
#pragma unroll
    for (int pair = 0; C::kHolds && pair < C::kDim / 32; ++pair) {
      load_matrices_transposed(x[pair], chunk_address<C>(at, pair));
    }
  }

  // Calls use(d, operand) for dimensions 16 d ... of the keys, then of the values.
  template <bool kInt8, typename Use>
  __device__ __forceinline__ void each_key(Use &&use) {
#pragma unroll
    for (int d = 0; d < C::kDim / 16; ++d) {
      uint32_t(&word)[4] = x[d / 2];
      if (!C::kHolds && d % 2 == 0) load_matrices(word, chunk_address<C>(at, d / 2));
      const uint2 upper = widen_key<kInt8>(word[d % 2 * 2]), lower = widen_key<kInt8>(word[d % 2 * 2 + 1]);
      const uint32_t operand[4] = {upper.x, lower.x, upper.y, lower.y};
      use(d, operand);
    }
  }
  template <bool kInt8, typename Use>
  __device__ __forceinline__ void each_value(Use &&use) {
#pragma unroll
    for (int d = 0; d < C::kDim / 16; ++d) {
      uint32_t(&word)[4] = x[d / 2];
      if (!C::kHolds && d % 2 == 0) load_matrices_transposed(word, chunk_address<C>(at, d / 2));
      const uint2 first = widen_value<kInt8>(word[d % 2]), second = widen_value<kInt8>(word[d % 2 + 2]);
      const uint32_t operand[4] = {first.x, first.y, second.x, second.y};
      use(d, operand);
    }
  }
};

}  // namespace gqa::cuda::decode_sm90
