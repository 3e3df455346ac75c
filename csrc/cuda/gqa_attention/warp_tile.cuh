// What one warp does with a block of keys: scores, online softmax, weighted sum of values, all in registers.
#pragma once

#include "cuda/gqa_attention/key_loader.cuh"
#include "cuda/gqa_attention/softmax.cuh"
#include "plan/gqa_attention.h"

namespace gqa::cuda {

// The rows of kShape.tiles tiles of 16 query rows, laid out as Softmax says.
template <typename T, int kIndex>
struct WarpTile {
  static constexpr AttentionShape kShape = kAttentionShapes[kIndex];
  static constexpr int kDim = kShape.dim, kKeys = kShape.keys, kTiles = kShape.tiles, kHeld = kShape.held;
  using Scores = typename Softmax<kTiles, kKeys>::Scores;

  int lane, row0;      // the warp's first row in the block of rows
  uint32_t queries;    // shared address of the block's query tile
  const int2 *ranges;  // keys of each row of the block
  LaneAddress<kDim, false> down;
  LaneAddress<kDim, true> across;
  uint32_t held[kTiles][kHeld == 0 ? 1 : kHeld][4];
  float out[kTiles][kDim / 8][4];
  Softmax<kTiles, kKeys> softmax;
  bool left_out;  // there are values that add_left_out has to bring in

  __device__ WarpTile(int lane_, int row0_, uint32_t queries_, const int2 *ranges_)
      : lane(lane_), row0(row0_), queries(queries_), ranges(ranges_), down(lane_), across(lane_) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int step = 0; step < kHeld; ++step) load_matrices(held[t][step], down.at(queries, row0 + 16 * t, step));
    }
  }

  __device__ void clear() {
    left_out = false;
    softmax.clear();
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int n = 0; n < kDim / 8; ++n) out[t][n][0] = out[t][n][1] = out[t][n][2] = out[t][n][3] = 0;
    }
  }

  // Whether some row attends to some key, or every row to every key, of the block at `begin`: ranges move to the right
  // with the row.
  __device__ bool sees_any(int begin) const {
    return begin < ranges[row0 + 16 * kTiles - 1].y && begin + kKeys > ranges[row0].x;
  }
  __device__ bool sees_all(int begin) const {
    return begin >= ranges[row0 + 16 * kTiles - 1].x && begin + kKeys <= ranges[row0].y;
  }

  // Scores of the keys of one block, whose first key is `begin`. `full`: every row attends to every key.
  __device__ void score(const AttentionArgs &a, float key_scale, Scores &s, uint32_t k, int begin, bool full) const {
    multiply_keys(s, k);
    if (a.transforms) softmax.transform(a, key_scale, s);
    if (!full) softmax.mask(s, ranges + row0, begin, lane);
  }

  // Takes in the values of the block. `carefully`: some of those that not every row attends to may not be finite.
  __device__ void add(Scores &s, uint32_t v, float multiplier, bool carefully) {
    softmax.settle(s, out, multiplier);
    softmax.weigh(s, multiplier);
    if (carefully) {
      left_out = add_values<true>(s, v) != 0 || left_out;
    } else {
      add_values<false>(s, v);
    }
  }

  // Whether something met an infinity or NaN.
  __device__ bool is_spoilt() const {
    float zero = 0;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < kDim / 2; ++i) zero = __fmaf_rn(out[t][i / 4][i % 4], 0.0f, zero);
    }
    return zero != 0;
  }

  // Two values of key `key`, columns 8 n and up, that add_values left out: into the rows that attend to the key.
  // Infinities and NaN are the same at any scale, so this can wait for the end.
  __device__ void add_left_out(int key, int n, float2 values) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int2 range = ranges[row0 + 16 * t + 8 * half + lane / 4];
        if (key < range.x || key >= range.y) continue;
        if (!isfinite(values.x)) out[t][n][2 * half] += values.x;
        if (!isfinite(values.y)) out[t][n][2 * half + 1] += values.y;
      }
    }
  }

 private:
  __device__ void multiply_keys(Scores &s, uint32_t k) const {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int n = 0; n < kKeys / 8; ++n) s[t][n][0] = s[t][n][1] = s[t][n][2] = s[t][n][3] = 0;
    }
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      uint32_t q[kTiles][4];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        if (step < kHeld) {
#pragma unroll
          for (int i = 0; i < 4; ++i) q[t][i] = held[t][step][i];
        } else {
          load_matrices(q[t], down.at(queries, row0 + 16 * t, step));
        }
      }
#pragma unroll
      for (int n = 0; n < kKeys / 16; ++n) {
        uint32_t b[4];
        load_matrices(b, across.at(k, 16 * n, step));
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          multiply_add<T>(s[t][2 * n], q[t], b[0], b[1]);
          multiply_add<T>(s[t][2 * n + 1], q[t], b[2], b[3]);
        }
      }
    }
  }

  // A masked key has weight 0, but 0 times infinity or NaN is NaN. kCarefully leaves such values out and says whether
  // there were any; where every row attends to every key they belong into the sum.
  template <bool kCarefully>
  __device__ uint32_t add_values(const Scores &s, uint32_t v) {
    uint32_t found = 0;
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      uint32_t weights[kTiles][4];
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float(&four)[4] = s[t][2 * step + i / 2];
          weights[t][i] = pack<T>(four[2 * (i % 2)], four[2 * (i % 2) + 1]);
        }
      }
#pragma unroll
      for (int n = 0; n < kDim / 16; ++n) {
        uint32_t b[4];
        load_matrices_transposed(b, down.at(v, 16 * step, n));
        if constexpr (kCarefully) {
#pragma unroll
          for (int i = 0; i < 4; ++i) {
            const uint32_t bad = nonfinite<T>(b[i]);
            found |= bad;
            b[i] &= ~bad;
          }
        }
#pragma unroll
        for (int t = 0; t < kTiles; ++t) {
          multiply_add<T>(out[t][2 * n], weights[t], b[0], b[1]);
          multiply_add<T>(out[t][2 * n + 1], weights[t], b[2], b[3]);
        }
      }
    }
    return found;
  }
};

}  // namespace gqa::cuda
