// The online softmax of a warp's rows: masks, running bases and sums, and scores that become weights.
#pragma once

#include <cfloat>

#include "cuda/common/mma.cuh"
#include "cuda/gqa_attention/args.cuh"

namespace gqa::cuda {

// Of kTiles tiles of 16 rows. A thread holds, of each tile, rows lane / 4 ("half" 0) and lane / 4 + 8 (half 1), and of
// each 8 columns 2 (lane % 4) and the next one. What is decided about a row follows from its own scores alone.
template <int kTiles, int kKeys>
struct Softmax {
  using Scores = float[kTiles][kKeys / 8][4];

  float base[kTiles][2];   // of the weights, in log2 units: a row's highest score, or up to kSlack less
  float shift[kTiles][2];  // what the scores at hand are relative to: the base, or 0 where it is huge
  float sum[kTiles][2];    // of the weights, this thread's columns' share
  bool huge;               // a base is beyond kHuge

  __device__ void clear() {
    huge = false;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
      base[t][0] = base[t][1] = -FLT_MAX;
      sum[t][0] = sum[t][1] = 0;
    }
  }

  // tanh by one exponential: its absolute error of 1e-7 is far below the dtype's.
  __device__ static void transform(const AttentionArgs &a, float key_scale, Scores &s) {
    const float before_tanh = a.before_tanh * key_scale;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) s[t][i / 4][i % 4] *= before_tanh;
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

  // `ranges`: the keys that the warp's rows attend to.
  __device__ static void mask(Scores &s, const int2 *ranges, int begin, int lane) {
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        const int2 range = ranges[16 * t + 8 * half + lane / 4];
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

  // Finds bases that suit the scores, and rescales `out` to them.
  template <int kColumns>
  __device__ void settle(Scores &s, float (&out)[kTiles][kColumns][4], float multiplier) {
    float top[kTiles][2];
    bool exceeded = huge;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        // fmaxf passes over a NaN; its weight will be NaN and so will the sum.
        top[t][half] = -INFINITY;
#pragma unroll
        for (int n = 0; n < kKeys / 8; ++n) {
          top[t][half] = fmaxf(top[t][half], fmaxf(s[t][n][2 * half], s[t][n][2 * half + 1]));
        }
        shift[t][half] = base[t][half];
        exceeded = exceeded || __fmaf_rn(top[t][half], multiplier, -base[t][half]) > kSlack;
      }
    }
    if (__any_sync(0xffffffffu, exceeded)) move_bases(s, top, out, multiplier);
  }

  // Scores become weights, 2^(score - base).
  __device__ void weigh(Scores &s, float multiplier) {
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

 private:
  // A base moves only when a score exceeds it by this much (in log2 units), so weights reach 2^kSlack.
  static constexpr float kSlack = 8;
  // Beyond it a product's rounding error no longer vanishes beside the slack.
  static constexpr float kHuge = 1 << 24;

  // Bases of rows with a score far above become that score; sums and outputs are rescaled. Where a base is huge, the
  // scores themselves become relative to it, with products that round as the base did.
  template <int kColumns>
  __device__ void move_bases(Scores &s, const float (&top)[kTiles][2], float (&out)[kTiles][kColumns][4],
                             float multiplier) {
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
        for (int n = 0; n < kColumns; ++n) {
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
};

}  // namespace gqa::cuda
