// Softmax and sums of one warp of the Hopper decode kernels: S^T = K Q^T and O^T = V^T P^T, 16 keys at a time.
#pragma once

#include "cuda/common/transpose.cuh"
#include "cuda/gqa_attention_decode_sm90/tiles.cuh"

namespace gqa::cuda::decode_sm90 {

template <typename C>
struct Sums {
  using Weights = uint32_t[C::kSteps][C::kRowTiles][2];

  float max[C::kRowTiles][2], sum[C::kRowTiles][2];  // of rows 8 n + 2 c and the next; sum: of this thread's keys
  float o[C::kRowTiles][C::kDim / 16][4];            // dimensions 16 d + r of those two rows, then 16 d + 8 + r of them

  __device__ void clear() {
#pragma unroll
    for (int n = 0; n < C::kRowTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) max[n][e] = minus_infinity(), sum[n][e] = 0;
#pragma unroll
      for (int e = 0; e < C::kDim / 4; ++e) o[n][e / 4][e % 4] = 0;
    }
  }

  // Turns scores of the tile of keys `key` ... below `end` into weights, and scales the sums so far to the new maximum.
  __device__ void weigh(const Args &p, const Block<C> &t, int key, int end, Scores<C> *scores,
                        uint32_t (&weights)[C::kSteps][C::kRowTiles][2]) {
    const bool edge = is_edge(p, t, key, end);
#pragma unroll
    for (int n = 0; n < C::kRowTiles; ++n) {
      float top[2] = {max[n][0], max[n][1]}, factor[2];
#pragma unroll
      for (int step = 0; step < C::kSteps; ++step) {
        float(&s)[4] = scores->x[step][n];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          // Rounded, never part of an FMA below: huge scores have to meet their own maximum.
          s[e] = __fmul_rn(s[e], p.scale);
          if (!C::kPlain && p.softcap > 0) s[e] = __fmul_rn(p.softcap * kLog2e, tanhf(s[e]));
        }
        if (edge) mask(p, t, n, key + 16 * step, end, s);
#pragma unroll
        for (int e = 0; e < 2; ++e) top[e] = fmaxf(top[e], fmaxf(s[e], s[2 + e]));
      }
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) top[e] = fmaxf(top[e], __shfl_xor_sync(~0u, top[e], step));
        const float base = top[e] == minus_infinity() ? 0.0f : top[e];
        factor[e] = exp2_fast(max[n][e] - base);
        max[n][e] = top[e];
        sum[n][e] *= factor[e];
#pragma unroll
        for (int step = 0; step < C::kSteps; ++step) {
          float(&s)[4] = scores->x[step][n];
          s[e] = exp2_fast(s[e] - base), s[2 + e] = exp2_fast(s[2 + e] - base);
          sum[n][e] += s[e] + s[2 + e];
        }
      }
#pragma unroll
      for (int step = 0; step < C::kSteps; ++step) {
        const float(&s)[4] = scores->x[step][n];
        weights[step][n][0] = transpose_matrix(pack<typename C::T>(s[0], s[1]));
        weights[step][n][1] = transpose_matrix(pack<typename C::T>(s[2], s[3]));
      }
      if (__any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
        for (int e = 0; e < C::kDim / 4; ++e) o[n][e / 4][e % 4] *= factor[e % 2];
      }
    }
  }

  // Whether some token does not see some of the 16 keys.
  __device__ static bool is_edge(const Args &p, const Block<C> &t, int key, int end) {
    if constexpr (C::kPlain) return key + C::kTile > end;
    return key < t.keys.low(p.seqlen_q - 1) || key + C::kTile > min(t.keys.high(0), end);
  }
  __device__ static void mask(const Args &p, const Block<C> &t, int n, int key, int end, float (&s)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int token = C::kPlain ? 0 : token_of_row(p, 8 * n + 2 * t.c + e % 2), at = key + t.r + e / 2 * 8;
      const bool seen = C::kPlain ? at < end : at >= t.keys.low(token) && at < min(t.keys.high(token), end);
      if (!seen) s[e] = minus_infinity();
    }
  }

  __device__ void add(const Args &p, const Block<C> &t, Values<C> &values, int key, int end,
                      const uint32_t (&weights)[C::kSteps][C::kRowTiles][2]) {
    if (!C::kPlain && (p.seqlen_q > 1 || end > t.row_high) && is_edge(p, t, key, end)) {
      add_edge(p, t, values, key, end, weights);
      return;
    }
#pragma unroll
    for (int step = 0; step < C::kSteps; ++step) {
#pragma unroll
      for (int d = 0; d < C::kDim / 16; ++d) {
#pragma unroll
        for (int n = 0; n < C::kRowTiles; ++n) {
          multiply_add<typename C::T>(o[n][d], values.x[step][d], weights[step][n][0], weights[step][n][1]);
        }
      }
    }
  }

  // A tile that some tokens see in part: one token's rows at a time, with the values that token does not see at zero,
  // so that a NaN in them reaches nobody else. Cached values that a single token does not see are zeros already.
  __device__ void add_edge(const Args &p, const Block<C> &t, const Values<C> &values, int key, int end,
                           const uint32_t (&weights)[C::kSteps][C::kRowTiles][2]) {
#pragma unroll 1
    for (int i = 0; i < p.seqlen_q; ++i) {
      const int low = t.keys.low(i), high = min(t.keys.high(i), end);
#pragma unroll
      for (int step = 0; step < C::kSteps; ++step) {
        uint32_t seen[2];  // masks of this thread's pairs of keys
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int first = key + 16 * step + 8 * e + 2 * t.c;
          seen[e] = (first >= low && first < high ? 0x0000ffffu : 0) |
                    (first + 1 >= low && first + 1 < high ? 0xffff0000u : 0);
        }
#pragma unroll
        for (int d = 0; d < C::kDim / 16; ++d) {
          uint32_t v[4];
#pragma unroll
          for (int e = 0; e < 4; ++e) v[e] = values.x[step][d][e] & seen[e / 2];
#pragma unroll
          for (int n = 0; n < C::kRowTiles; ++n) {
            float part[4] = {};
            multiply_add<typename C::T>(part, v, weights[step][n][0], weights[step][n][1]);
#pragma unroll
            for (int e = 0; e < 4; ++e) {
              const int row = 8 * n + 2 * t.c + e % 2 - i * p.group;
              if (row >= 0 && row < p.group) o[n][d][e] += part[e];
            }
          }
        }
      }
    }
  }

  // Leaves sums, maxima and weights where the block joins those of its warps.
  __device__ void store(const Args &p, const Block<C> &t, char *warp_shared) {
    auto *rows = reinterpret_cast<float *>(warp_shared);
    auto *scales = reinterpret_cast<float2 *>(warp_shared + C::kWeights);
#pragma unroll
    for (int n = 0; n < C::kRowTiles; ++n) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int row = 8 * n + 2 * t.c + e;
#pragma unroll
        for (int step = 4; step < 32; step *= 2) sum[n][e] += __shfl_xor_sync(~0u, sum[n][e], step);
        if (row >= p.rows) continue;
        if (t.r == 0) scales[row] = make_float2(max[n][e], sum[n][e]);
        auto *to = reinterpret_cast<float4 *>(rows + row * C::kSumPitch + t.r * C::kSumStep);
#pragma unroll
        for (int d = 0; d < C::kDim / 16; d += 2) {
          to[d / 2] = make_float4(o[n][d][e], o[n][d][2 + e], o[n][d + 1][e], o[n][d + 1][2 + e]);
        }
      }
    }
  }
};

}  // namespace gqa::cuda::decode_sm90
