// The online softmax of the rows of a warpgroup.
#pragma once

#include "cuda/common/mma.cuh"

namespace gqa::cuda::prefill_sm90 {

// Columns of a block that a thread's two rows see: [begin, end), counted from the thread's first column.
struct PrefillMask {
  int begin[2], end[2];
};

// Scores beyond a row's mask become -inf. Score i of a thread is in row i / 2 % 2 of its two and in column 8 (i / 4) +
// i % 2 from its first one.
template <int kScores>
__device__ __forceinline__ void hide(float (&s)[kScores], const PrefillMask &mask) {
#pragma unroll
  for (int i = 0; i < kScores; ++i) s[i] = 8 * (i / 4) + i % 2 < mask.end[i / 2 % 2] ? s[i] : -INFINITY;
  if (max(mask.begin[0], mask.begin[1]) <= 0) return;
#pragma unroll
  for (int i = 0; i < kScores; ++i) s[i] = 8 * (i / 4) + i % 2 >= mask.begin[i / 2 % 2] ? s[i] : -INFINITY;
}

// A thread's two rows. Weights are 2^(score - base), and base need not be the highest score: it is enough that weights
// do not overflow, which their sum shows. So most blocks need no maximum. Every decision is a row's own: its bytes do
// not depend on the rows beside it.
struct PrefillSoftmax {
  float base[2] = {-INFINITY, -INFINITY};  // in log2 units
  float sum[2] = {0, 0};                   // of this thread's columns
  float factor[2] = {1, 1};                // of what was summed up before the last block
  bool careful = true;                     // some row of the warp has no base yet, or a huge one

  // Scores become weights, by the base there is where a row has one. True where sums of values have to be multiplied by
  // `factor`. `repeat` computes the scores once more; `repeated` is called when they are weights.
  template <int kScores, typename Repeat, typename Repeated>
  __device__ __forceinline__ bool weigh(float (&s)[kScores], float multiplier, Repeat &&repeat, Repeated &&repeated) {
    const bool slow = careful;
    bool rescale = false;
    float own[2];
    if (slow) {
      factor[0] = factor[1] = 1.0f;
      rescale = rate(s, multiplier, is_sound(0) ? INFINITY : kLimit, is_sound(1) ? INFINITY : kLimit, own);
    } else {
#pragma unroll
      for (int i = 0; i < kScores; ++i) s[i] = exp2_fast(__fmaf_rn(s[i], multiplier, -base[i / 2 % 2]));
      add_up(s, own);
    }
    if (__any_sync(0xffffffffu, !(own[0] <= kMost && own[1] <= kMost))) {
      if (!slow) factor[0] = factor[1] = 1.0f;
      correct(s, multiplier, own, repeat, repeated);
      rescale = true;
    }
    sum[0] += own[0];
    sum[1] += own[1];
    return rescale;
  }

  // The same by maxima, for any mask.
  template <int kScores>
  __device__ __forceinline__ bool weigh_carefully(float (&s)[kScores], float multiplier) {
    float own[2];
    factor[0] = factor[1] = 1.0f;
    const bool rescale = rate(s, multiplier, kLimit, kLimit, own);
    sum[0] += own[0];
    sum[1] += own[1];
    return rescale;
  }

 private:
  // A row's weights of this thread, always in the same order.
  template <int kScores>
  __device__ __forceinline__ static void add_up(const float (&s)[kScores], float (&own)[2]) {
    float added[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < kScores; ++i) added[i % 4] += s[i];
    own[0] = added[0] + added[1];
    own[1] = added[2] + added[3];
  }

  static constexpr float kMost = 1024, kLimit = 8;
  static constexpr float kLost = 0x1p100f;  // and above: weights may have overflowed
  static constexpr float kHuge = 0x1p26f;

  __device__ __forceinline__ bool is_sound(int row) const { return fabsf(base[row]) <= kHuge; }

  __device__ __forceinline__ float move(int row, float to) {
    const float by = exp2_fast(base[row] - (to == -INFINITY ? 0.0f : to));
    factor[row] *= by;
    sum[row] *= by;
    base[row] = to;
    return by;
  }

  // Weights by the maximum: a row gets a new base where weights would be above 2^limit. True where one did.
  template <int kScores>
  __device__ __forceinline__ bool rate(float (&s)[kScores], float multiplier, float limit0, float limit1,
                                       float (&own)[2]) {
    const float limit[2] = {limit0, limit1};
    float top[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      // Two chains: one alone is too slow.
      float even = s[2 * row], odd = s[2 * row + 1];
#pragma unroll
      for (int i = 4 + 2 * row; i < kScores; i += 4) even = fmaxf(even, s[i]), odd = fmaxf(odd, s[i + 1]);
      even = fmaxf(even, odd);
      even = fmaxf(even, __shfl_xor_sync(0xffffffffu, even, 1));
      even = fmaxf(even, __shfl_xor_sync(0xffffffffu, even, 2));
      top[row] = fmaxf(base[row], even * multiplier);
    }
    // Negated: also true of the first, infinite step.
    const bool moved = !(top[0] - base[0] <= limit[0] && top[1] - base[1] <= limit[1]);
    const bool rescale = __any_sync(0xffffffffu, moved);
    if (rescale) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        if (!(top[row] - base[row] <= limit[row])) move(row, top[row]);
      }
      careful = __any_sync(0xffffffffu, !(is_sound(0) && is_sound(1)));
    }
    // In one FMA scores are exact while base is rounded: the same factor for the whole row, unless it is so large that
    // 2^error overflows. Then scores are rounded as base was.
    float scale[2] = {multiplier, multiplier}, from[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) from[row] = base[row] == -INFINITY ? 0.0f : base[row];
    if (careful) {
      const bool huge[2] = {fabsf(from[0]) > kHuge, fabsf(from[1]) > kHuge};
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        if (huge[i / 2 % 2]) s[i] = __fmul_rn(s[i], multiplier);
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        if (huge[row]) scale[row] = 1.0f;
      }
    }
#pragma unroll
    for (int i = 0; i < kScores; ++i) s[i] = exp2_fast(__fmaf_rn(s[i], scale[i / 2 % 2], -from[i / 2 % 2]));
    add_up(s, own);
    return rescale;
  }

  // Some row's weights have become large: its base moves up by as much, and the weights are scaled like sums are. Where
  // they may have overflowed, back to the scores. No overflow makes NaN: a row that is NaN stays it.
  template <int kScores, typename Repeat, typename Repeated>
  __device__ __forceinline__ void correct(float (&s)[kScores], float multiplier, float (&own)[2], Repeat &&repeat,
                                          Repeated &&repeated) {
    // The sign of a row's factor says that it is lost: registers are short.
    const auto is_lost = [&](int row) { return __float_as_int(factor[row]) < 0; };
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      const bool here = own[row] >= kLost && sum[row] == sum[row];
      if ((__ballot_sync(0xffffffffu, here) >> (threadIdx.x % 32 & ~3u) & 15u) != 0) factor[row] = -factor[row];
    }
    if (__any_sync(0xffffffffu, is_lost(0) || is_lost(1))) {
      repeat();
      const float limit[2] = {is_lost(0) ? kLimit : INFINITY, is_lost(1) ? kLimit : INFINITY};
      factor[0] = fabsf(factor[0]), factor[1] = fabsf(factor[1]);
      rate(s, multiplier, limit[0], limit[1], own);
      repeated();
    }
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      float most = fmaxf(own[row], __shfl_xor_sync(0xffffffffu, own[row], 1));
      most = fmaxf(most, __shfl_xor_sync(0xffffffffu, most, 2));
      if (!(most > kMost && most < kLost)) continue;
      const float by = move(row, base[row] + static_cast<float>((__float_as_int(most) >> 23) - 127));
      own[row] *= by;
#pragma unroll
      for (int i = 2 * row; i < kScores; i += 4) s[i] *= by, s[i + 1] *= by;
    }
    careful = __any_sync(0xffffffffu, !(is_sound(0) && is_sound(1)));
  }
};

}  // namespace gqa::cuda::prefill_sm90
