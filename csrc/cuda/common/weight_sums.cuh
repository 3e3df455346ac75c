// A warp's sums of weights times inputs: 32 rows by 8 or 16 tokens on tensor cores, in float32.
#pragma once

#include "cuda/common/weight_ring.cuh"

namespace gqa::cuda {

// Of four e4m3 numbers, the first two and the last two as T, which holds them exactly, NaN too.
template <typename T>
__device__ __forceinline__ uint2 widen_e4m3(uint32_t word) {
  uint2 pairs;
  asm("{\n.reg .b16 low, high;\nmov.b32 {low, high}, %2;\ncvt.rn.f16x2.e4m3x2 %0, low;\n"
      "cvt.rn.f16x2.e4m3x2 %1, high;\n}"
      : "=r"(pairs.x), "=r"(pairs.y)
      : "r"(word));
  if constexpr (std::is_same_v<T, __nv_bfloat16>) {
    const float2 first = unpack<__half>(pairs.x), last = unpack<__half>(pairs.y);
    pairs = {pack<T>(first.x, first.y), pack<T>(last.x, last.y)};
  }
  return pairs;
}

__device__ __forceinline__ uint2 load_pair(uint32_t address) {
  uint2 pair;
  asm volatile("ld.shared.v2.b32 {%0, %1}, [%2];" : "=r"(pair.x), "=r"(pair.y) : "r"(address) : "memory");
  return pair;
}

template <typename C>
struct Sums {
  using T = typename C::T;
  static constexpr int kTiles = kStreamRows * 32 / 16 / C::kTeam, kTokenTiles = C::kTokenTiles;
  static constexpr int kColumns = stream_sum_columns(kTokenTiles);
  float acc[kTiles][kTokenTiles][4] = {};

  // The first of the warp's rows among its team's.
  __device__ static int first_row() { return threadIdx.x % C::kTeam / 32 * 16 * kTiles; }

  // Four matrices of 8 rows by 16 bytes, of rows 16 t ... 16 t + 15. Rows past the last repeat it.
  __device__ static void load_rows(uint32_t (&a)[4], uint32_t stage, int rows, int t, int k) {
    const int lane = threadIdx.x % 32;
    load_matrices(a, piece_of(stage, min(first_row() + 16 * t + lane % 16, rows - 1), 2 * k + lane / 16));
  }

  // += weights x^T over the columns of a stage. input(token, piece) is the shared address of 16 bytes of x. Sums of
  // rows and tokens past the last are never looked at.
  template <typename Input>
  __device__ void multiply(uint32_t stage, int rows, int tokens, Input &&input) {
    if (first_row() >= rows) return;
    if constexpr (C::kE4m3) return multiply_e4m3(stage, rows, tokens, input);
    const int lane = threadIdx.x % 32, token = min(lane % 8 + lane / 16 * 8, tokens - 1);
#pragma unroll
    for (int k = 0; k < kStreamRowBytes / 32; ++k) {
      uint32_t b[4];
      load_matrices(b, input(token, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        if (t > 0 && rows <= 16 * t) break;
        uint32_t a[4];
        load_rows(a, stage, rows, t, k);
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) multiply_add<T>(acc[t][n], a, b[2 * n], b[2 * n + 1]);
      }
    }
  }

  // The same of e4m3 weights. Lane c of a row's four reads columns 4 c ... 4 c + 3 of every 16, and so does it of x:
  // the order of columns does not matter to a product as long as both have it.
  template <typename Input>
  __device__ void multiply_e4m3(uint32_t stage, int rows, int tokens, Input &&input) {
    const int lane = threadIdx.x % 32, half = lane % 4 / 2, within = lane % 2 * 8;
#pragma unroll
    for (int k = 0; k < kStreamRowBytes / 32; ++k) {
      uint2 b[2][kTokenTiles];
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
        const int token = min(8 * n + lane / 4, tokens - 1);
#pragma unroll
        for (int j = 0; j < 2; ++j) b[j][n] = load_pair(input(token, 4 * k + 2 * j + half) + within);
      }
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        uint32_t words[4];
        load_rows(words, stage, rows, t, k);
#pragma unroll
        for (int j = 0; j < 2; ++j) {
          const uint2 upper = widen_e4m3<T>(words[2 * j]), lower = widen_e4m3<T>(words[2 * j + 1]);
          const uint32_t a[4] = {upper.x, lower.x, upper.y, lower.y};
#pragma unroll
          for (int n = 0; n < kTokenTiles; ++n) multiply_add<T>(acc[t][n], a, b[j][n].x, b[j][n].y);
        }
      }
    }
  }

  // To this warp's place in shared memory, and from zero again.
  __device__ void flush(float *shared) {
    const int lane = threadIdx.x % 32;
    float *to = shared + (threadIdx.x / C::kTeam * kStreamRows + first_row()) * kColumns;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          to[(16 * t + lane / 4 + i / 2 * 8) * kColumns + 8 * n + lane % 4 * 2 + i % 2] = acc[t][n][i];
          acc[t][n][i] = 0.0f;
        }
      }
    }
  }

  __device__ static float total(const float *shared, int row, int token) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kStreamTeams; ++w) sum += shared[(w * kStreamRows + row) * kColumns + token];
    return sum;
  }
};

}  // namespace gqa::cuda
