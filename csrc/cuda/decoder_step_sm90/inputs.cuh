// The inputs of a product, brought to shared memory as the blocks that make them publish them: as they are, or normed.
#pragma once

#include "cuda/common/square_sum.cuh"
#include "cuda/decoder_step_sm90/block.cuh"

namespace gqa::cuda::decoder_step {

__device__ __forceinline__ int input_pitch(int columns) { return 2 * columns + 16; }

__device__ __forceinline__ uint4 *input_row(const Args &p, const Block &t, int row, int columns) {
  return reinterpret_cast<uint4 *>(t.shared + p.inputs_at + row * input_pitch(columns));
}

__device__ __forceinline__ void receive_inputs(const Args &p, const Block &t, const uint16_t *from, int columns) {
  const int vectors = columns / 8;
  uint4 *to = input_row(p, t, 0, columns);
  int end = vectors;  // of the row
  receive<8>(from, t.thread, kConsumers, p.rows * vectors, [&](int i, const uint4 &eight) {
    while (i >= end) end += vectors, ++to;  // rows are one vector apart
    to[i] = eight;
  });
  sync_consumers();
}

template <typename T>
__device__ __forceinline__ float square_sum_of(const uint4 &eight, float sum) {
  const Floats<T> x = widen(reinterpret_cast<const Vec<T> &>(eight));
#pragma unroll
  for (int i = 0; i < 8; ++i) sum = __fmaf_rn(x.value[i], x.value[i], sum);
  return sum;
}

// HuggingFace's rounding: the normalised value rounds before the weight.
template <typename T>
__device__ __forceinline__ uint4 scale_eight(const uint4 &eight, const uint4 &weight, float rstd) {
  using Pair = PairOf<T>;
  const Floats<T> x = widen(reinterpret_cast<const Vec<T> &>(eight));
  const auto *scale = reinterpret_cast<const Pair *>(&weight);
  uint4 scaled;
#pragma unroll
  for (int i = 0; i < 4; ++i) {
    const uint32_t pair = pack<T>(x.value[2 * i] * rstd, x.value[2 * i + 1] * rstd);
    reinterpret_cast<Pair *>(&scaled)[i] = __hmul2_rn(reinterpret_cast<const Pair &>(pair), scale[i]);
  }
  return scaled;
}

// Of all rows: a row's squares are summed by as many warps as there are for it, then each thread scales some columns of
// all rows.
template <typename T>
struct Norm {
  static constexpr int kEach = kStepHidden / 8 / kConsumers;
  uint4 weights[kEach];  // on their way while the rows are waited for

  __device__ void load(const Args &p, const Block &t, const char *from) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = t.thread + i * kConsumers;
      weights[i] = make_uint4(0, 0, 0, 0);
      if (at < p.hidden / 8) weights[i] = reinterpret_cast<const uint4 *>(from)[at];
    }
  }

  // `from` is nullptr for the step's own input.
  __device__ void apply(const Args &p, const Block &t, const uint16_t *from) const {
    const int shift = p.rows == 1 ? 3 : p.rows == 2 ? 2 : p.rows <= 4 ? 1 : 0, warps = 1 << shift;
    static_assert(kWarps == 8 && kStepRows <= 8);
    const int row = t.warp >> shift, first = (t.warp & (warps - 1)) * 32 + t.lane, count = p.hidden / 8;
    const int step = 32 * warps;
    if (row < p.rows) {
      uint4 *to = input_row(p, t, row, p.hidden);
      float sum = 0;
      const auto use = [&](int i, const uint4 &eight) {
        to[i] = eight;
        sum = square_sum_of<T>(eight, sum);
      };
      const int64_t at = static_cast<int64_t>(row) * p.hidden;
      if (from != nullptr) {
        receive<4>(from + at, first, step, count, use);
      } else {
#pragma unroll 1
        for (int i = first; i < count; i += step) use(i, reinterpret_cast<const uint4 *>(p.input)[at / 8 + i]);
      }
      sum = group_sum(sum, 32);
      if (t.lane == 0) t.words()[t.warp] = sum;
    }
    sync_consumers();
#pragma unroll 1
    for (int r = 0; r < p.rows; ++r) {
      float sum = 0;
#pragma unroll 1
      for (int i = 0; i < warps; ++i) sum += t.words()[r * warps + i];
      const float rstd = reciprocal_rms(sum, 1.0f / p.hidden, p.eps);
      uint4 *to = input_row(p, t, r, p.hidden);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int at = t.thread + i * kConsumers;
        if (at < count) to[at] = scale_eight<T>(to[at], weights[i], rstd);
      }
    }
    sync_consumers();
  }
};

}  // namespace gqa::cuda::decoder_step
