// Softmax and sums over 8-bit tiles, in float16 whatever the query's type: a power of two brings the query into range,
// and scales wait for the scores and the output.
#pragma once

#include "cuda/gqa_attention_decode_sm90/loads.cuh"
#include "cuda/gqa_attention_decode_sm90/quantized_products.cuh"
#include "cuda/gqa_attention_decode_sm90/scores.cuh"

namespace gqa::cuda::decode_sm90 {

template <typename C>
struct QuantizedSums : Sums<C> {
  // Weights of up to 2^kHeadroom keep those of 2^-24 and less apart from zero. Not more: the base must round to no less
  // than 15 below any score.
  static constexpr float kHeadroom = 7;

  using typename Sums<C>::Weights;
  using Values = Words<C>[C::kSteps];

  // Scores of the tile's keys, and its values, out of shared memory: the stage is free after, if C::kHolds.
  __device__ __forceinline__ static void read(const Args &p, const Block<C> &t, const Queries<C> &queries,
                                              uint32_t tile, Scores<C> *scores, Values &values) {
    Words<C> keys[C::kSteps];
#pragma unroll
    for (int step = 0; step < C::kSteps; ++step) keys[step].keys(t, tile, step);
#pragma unroll
    for (int step = 0; step < C::kSteps; ++step) values[step].values(t, tile, step);
    if (is_int8(p)) {
      score_keys<C, true>(queries, keys, scores);
    } else {
      score_keys<C, false>(queries, keys, scores);
    }
  }

  // Weights of the tile of keys `key` ... below `end`, as operands; sums so far are scaled to the new base.
  // `checks_pages`: keys of bad pages may be among them.
  __device__ void weigh(const Args &p, const Block<C> &t, const Queries<C> &queries, int key, int end,
                        bool checks_pages, Scores<C> *scores, Weights &weights) {
    const int page = C::kPaged && checks_pages ? find_page(p, t, key, end) : 0;
    const bool edge = this->is_edge(p, t, key, end);
#pragma unroll
    for (int n = 0; n < C::kRowTiles; ++n) {
#pragma unroll
      for (int step = 0; step < C::kSteps; ++step) {
        float(&x)[4] = scores->x[step][n];
#pragma unroll
        for (int e = 0; e < 4; ++e) {
          x[e] = __fmul_rn(x[e], queries.scale[n][e % 2]);
          if (!C::kPlain && p.softcap > 0) x[e] = __fmul_rn(p.softcap * kLog2e, tanhf(x[e]));
        }
        if (C::kPaged && checks_pages) spoil(page, 16 * step + t.r, x);
        if (edge) this->mask(p, t, n, key + 16 * step, end, x);
      }
      weigh_rows(n, scores, weights);
    }
  }

  __device__ void add(const Args &p, const Block<C> &t, Values &values, int key, int end, const Weights &weights) {
    const bool mixed = !C::kPlain && (p.seqlen_q > 1 || end > t.row_high) && this->is_edge(p, t, key, end);
    if (is_int8(p)) {
      add_values<true>(p, t, values, key, end, mixed, weights);
    } else {
      add_values<false>(p, t, values, key, end, mixed, weights);
    }
  }

 private:
  // Scores of a row tile become weights; sums so far are scaled to the new bases.
  __device__ void weigh_rows(int n, Scores<C> *scores, Weights &weights) {
    float factor[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float &base = this->max[n][e], &sum = this->sum[n][e];
      float top = minus_infinity();
#pragma unroll
      for (int step = 0; step < C::kSteps; ++step) {
        top = fmaxf(top, fmaxf(scores->x[step][n][e], scores->x[step][n][2 + e]));
      }
      top = fmaxf(base, top - kHeadroom);
#pragma unroll
      for (int step = 4; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
      const float finite = top == minus_infinity() ? 0.0f : top;
      factor[e] = exp2_fast(base - finite);
      base = top;
      sum *= factor[e];
#pragma unroll
      for (int step = 0; step < C::kSteps; ++step) {
        float(&x)[4] = scores->x[step][n];
        x[e] = exp2_fast(x[e] - finite), x[2 + e] = exp2_fast(x[2 + e] - finite);
        sum += x[e] + x[2 + e];
      }
    }
#pragma unroll
    for (int step = 0; step < C::kSteps; ++step) {
      const float(&x)[4] = scores->x[step][n];
      weights[step][n][0] = transpose_matrix(pack<__half>(x[0], x[1]));
      weights[step][n][1] = transpose_matrix(pack<__half>(x[2], x[3]));
    }
    if (__any_sync(~0u, factor[0] != 1.0f || factor[1] != 1.0f)) {
#pragma unroll
      for (int e = 0; e < C::kDim / 4; ++e) this->o[n][e / 4][e % 4] *= factor[e % 2];
    }
  }

  template <bool kInt8>
  __device__ __forceinline__ void add_values(const Args &p, const Block<C> &t, Values &values, int key, int end,
                                             bool mixed, const Weights &weights) {
#pragma unroll
    for (int step = 0; step < C::kSteps; ++step) {
      if (mixed) {
        add_edge<kInt8>(p, t, values[step], key + 16 * step, end, weights[step]);
        continue;
      }
      values[step].template each_value<kInt8>([&](int d, const uint32_t(&v)[4]) {
#pragma unroll
        for (int n = 0; n < C::kRowTiles; ++n) {
          multiply_add<__half>(this->o[n][d], v, weights[step][n][0], weights[step][n][1]);
        }
      });
    }
  }

  // Page of key `key` + lane, or of the nearest that is seen.
  __device__ static int find_page(const Args &p, const Block<C> &t, int key, int end) {
    return Place<C>::look_up(p, t.b, min(max(key + t.lane % C::kTile, t.row_low), end - 1));
  }
  // Scores of keys whose page does not exist become NaN: int8 has no number that would make them so.
  __device__ static void spoil(int page, int row, float (&s)[4]) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      if (__shfl_sync(~0u, page, row + e / 2 * 8) < 0) s[e] = __int_as_float(0x7fc00000);
    }
  }

  // As Sums::add_edge.
  template <bool kInt8>
  __device__ void add_edge(const Args &p, const Block<C> &t, Words<C> &values, int key, int end,
                           const uint32_t (&weights)[C::kRowTiles][2]) {
#pragma unroll 1
    for (int i = 0; i < p.seqlen_q; ++i) {
      const int low = t.keys.low(i), high = min(t.keys.high(i), end);
      const auto sees = [&](int at_key) { return at_key >= low && at_key < high; };
      uint32_t seen[2];
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const int first = key + 8 * e + 2 * t.c;
        seen[e] = (sees(first) ? 0x0000ffffu : 0) | (sees(first + 1) ? 0xffff0000u : 0);
      }
      values.template each_value<kInt8>([&](int d, const uint32_t(&all)[4]) {
        uint32_t v[4];
#pragma unroll
        for (int e = 0; e < 4; ++e) v[e] = all[e] & seen[e / 2];
#pragma unroll
        for (int n = 0; n < C::kRowTiles; ++n) {
          float part[4] = {};
          multiply_add<__half>(part, v, weights[n][0], weights[n][1]);
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int row = 8 * n + 2 * t.c + e % 2 - i * p.group;
            if (row >= 0 && row < p.group) this->o[n][d][e] += part[e];
          }
        }
      });
    }
  }
};

}  // namespace gqa::cuda::decode_sm90
