// What one warp does with a block of keys: scores, online softmax, weighted sum of values, all in registers.
#pragma once

#include <cfloat>

#include "cuda/gqa_attention/key_loader.cuh"
#include "plan/gqa_attention.h"

namespace gqa::cuda {

// The rows of kShape.tiles tiles of 16 query rows. A thread holds, of each tile, rows lane / 4 ("half" 0) and
// lane / 4 + 8 (half 1), and of each 8 columns 2 (lane % 4) and the next one.
template <typename T, int kIndex>
struct WarpTile {
  static constexpr AttentionShape kShape = kAttentionShapes[kIndex];
  static constexpr int kDim = kShape.dim, kKeys = kShape.keys, kTiles = kShape.tiles, kHeld = kShape.held;
  using Scores = float[kTiles][kKeys / 8][4];

  int lane, row0;      // the warp's first row in the block of rows
  uint32_t queries;    // shared address of the block's query tile
  const int2 *ranges;  // keys of each row of the block
  LaneAddress<kDim, false> down;
  LaneAddress<kDim, true> across;
  uint32_t held[kTiles][kHeld == 0 ? 1 : kHeld][4];
  float out[kTiles][kDim / 8][4];
  float base[kTiles][2];  // of the weights, in log2 units: a row's highest score, or up to kSlack less
  float sum[kTiles][2];   // this thread's columns' share
  bool left_out;          // there are values that add_left_out has to bring in
  bool huge;              // a base is beyond kHuge

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
    huge = false;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      base[t][0] = base[t][1] = -FLT_MAX;
      sum[t][0] = sum[t][1] = 0;
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
  __device__ void score(const AttentionArgs &a, Scores &s, uint32_t k, int begin, bool full) const {
    multiply_keys(s, k);
    if (a.transforms) transform(a, s);
    if (!full) mask(s, begin);
  }

  // Takes in the values of the block. `carefully`: some of those that not every row attends to may not be finite.
  __device__ void add(Scores &s, uint32_t v, float multiplier, bool carefully) {
    weigh(s, multiplier);
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

  __device__ int2 range_of(int t, int half) const { return ranges[row0 + 16 * t + 8 * half + lane / 4]; }

  // Two values of key `key`, columns 8 n and up, that add_values left out: into the rows that attend to the key.
  // Infinities and NaN are the same at any scale, so this can wait for the end.
  __device__ void add_left_out(int key, int n, float2 values) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int2 range = range_of(t, half);
        if (key < range.x || key >= range.y) continue;
        if (!isfinite(values.x)) out[t][n][2 * half] += values.x;
        if (!isfinite(values.y)) out[t][n][2 * half + 1] += values.y;
      }
    }
  }

 private:
  // tanh by one exponential: its absolute error of 1e-7 is far below the dtype's.
  __device__ static void transform(const AttentionArgs &a, Scores &s) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) s[t][i / 4][i % 4] *= a.before_tanh;
    }
    if (!(a.p.softcap > 0)) return;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) {
        float &x = s[t][i / 4][i % 4];
        x = a.after_tanh * (1.0f - __fdividef(2.0f, 1.0f + exp2_fast(x * (2 * kLog2e))));
      }
    }
  }

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

  __device__ void mask(Scores &s, int begin) const {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int2 range = range_of(t, half);
        const int first = range.x - begin - 2 * (lane % 4), last = range.y - begin - 2 * (lane % 4);
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            if (8 * n + i < first || 8 * n + i >= last) s[t][n][2 * half + i] = -INFINITY;
          }
        }
      }
    }
  }

  // A base moves only when a score exceeds it by this much (in log2 units), so weights reach 2^kSlack.
  static constexpr float kSlack = 8;
  // Beyond it a product's rounding error no longer vanishes beside the slack.
  static constexpr float kHuge = 1 << 24;

  // Scores become weights, 2^(score - base). What is decided about a row follows from its own scores alone.
  __device__ void weigh(Scores &s, float multiplier) {
    float top[kTiles][2], shift[kTiles][2];
    bool exceeded = huge;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // fmaxf passes over a NaN; its weight below is NaN and so is the sum.
        top[t][half] = -INFINITY;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          top[t][half] = fmaxf(top[t][half], fmaxf(s[t][n][2 * half], s[t][n][2 * half + 1]));
        }
        shift[t][half] = base[t][half];
        exceeded = exceeded || __fmaf_rn(top[t][half], multiplier, -base[t][half]) > kSlack;
      }
    }
    if (__any_sync(0xffffffffu, exceeded)) move_bases(s, top, shift, multiplier);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float added = 0;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float &score = s[t][n][2 * half + i];
            score = exp2_fast(__fmaf_rn(score, multiplier, -shift[t][half]));
            added += score;
          }
        }
        sum[t][half] += added;
      }
    }
  }

  // Bases of rows with a score far above become that score; sums and outputs are rescaled. Where a base is huge, the
  // scores themselves become relative to it, with products that round as the base did.
  __device__ void move_bases(Scores &s, float (&top)[kTiles][2], float (&shift)[kTiles][2], float multiplier) {
    const float unit = __fdividef(1.0f, multiplier);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        float &now = base[t][half];
        float highest = fmaxf(top[t][half], __shfl_xor_sync(0xffffffffu, top[t][half], 1));
        highest = fmaxf(highest, __shfl_xor_sync(0xffffffffu, highest, 2));
        float factor = 1;
        if (__fmaf_rn(highest, multiplier, -now) > kSlack) {
          const float next = __fmul_rn(highest, multiplier);
          factor = exp2_fast(now - next);
          now = next;
        }
        sum[t][half] *= factor;
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          out[t][n][2 * half] *= factor;
          out[t][n][2 * half + 1] *= factor;
        }
        const bool far = fabsf(now) > kHuge && now != -FLT_MAX;
        shift[t][half] = far ? 0.0f : now;
        huge = huge || far;
        if (!far) continue;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
#pragma unroll
          for (int i = 0; i < 2; ++i) {
            float &score = s[t][n][2 * half + i];
            score = (__fmul_rn(score, multiplier) - now) * unit;
          }
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
