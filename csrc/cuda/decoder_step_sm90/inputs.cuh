// The inputs of a product, brought to shared memory as the blocks that make them publish them: as they are, or normed.
#pragma once

#include "cuda/common/square_sum.cuh"
#include "cuda/decoder_step_sm90/block.cuh"

namespace gqa::cuda::decoder_step {

__device__ __forceinline__ int input_pitch(int columns) { return 2 * columns + 16; }

__device__ __forceinline__ uint2 *input_row(const Args &p, const Block &t, int row, int columns) {
  return reinterpret_cast<uint2 *>(t.shared + p.inputs_at + row * input_pitch(columns));
}

__device__ __forceinline__ void receive_inputs(const Args &p, const Block &t, const uint32_t *from, int columns) {
  for (int row = 0; row < p.rows; ++row) {
    uint2 *to = input_row(p, t, row, columns);
    receive<4>(from + static_cast<int64_t>(row) * columns, t.tag, t.thread, kConsumers, columns / 4,
               [&](int i, uint2 four) { to[i] = four; });
  }
  sync_consumers();
}

// Four of T's values as floats.
template <typename T>
__device__ __forceinline__ float4 widen_four(uint2 x) {
  const float2 low = unpack<T>(x.x), high = unpack<T>(x.y);
  return make_float4(low.x, low.y, high.x, high.y);
}

template <typename T>
__device__ __forceinline__ float square_sum_of(uint2 x, float sum) {
  const float4 v = widen_four<T>(x);
  return __fmaf_rn(v.w, v.w, __fmaf_rn(v.z, v.z, __fmaf_rn(v.y, v.y, __fmaf_rn(v.x, v.x, sum))));
}

// HuggingFace's rounding: the normalised value rounds before the weight.
template <typename T>
__device__ __forceinline__ uint2 scale_four(uint2 x, uint2 weight, float rstd) {
  const float4 v = widen_four<T>(x);
  using Pair = PairOf<T>;
  const uint32_t low = pack<T>(v.x * rstd, v.y * rstd), high = pack<T>(v.z * rstd, v.w * rstd);
  const Pair a = __hmul2_rn(reinterpret_cast<const Pair &>(low), reinterpret_cast<const Pair &>(weight.x));
  const Pair b = __hmul2_rn(reinterpret_cast<const Pair &>(high), reinterpret_cast<const Pair &>(weight.y));
  return make_uint2(reinterpret_cast<const uint32_t &>(a), reinterpret_cast<const uint32_t &>(b));
}

// One row is the work of all warps, several are shared out among them. `from` is nullptr for the step's own input.
template <typename T>
struct Norm {
  static constexpr int kEach = kStepHidden / 4 / kConsumers;
  uint2 weights[kEach];  // of one row: on their way while the row is waited for

  __device__ void load(const Args &p, const Block &t, const char *from) {
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int at = t.thread + i * kConsumers;
      if (at < p.hidden / 4) weights[i] = reinterpret_cast<const uint2 *>(from)[at];
    }
  }

  template <typename Use>
  __device__ static void values(const Args &p, const uint32_t *from, uint32_t tag, int row, int first, int step,
                                Use &&use) {
    const int count = p.hidden / 4;
    if (from != nullptr) return receive<4>(from + static_cast<int64_t>(row) * p.hidden, tag, first, step, count, use);
    const auto *input = reinterpret_cast<const uint2 *>(p.input) + static_cast<int64_t>(row) * count;
    for (int i = first; i < count; i += step) use(i, input[i]);
  }

  __device__ void apply(const Args &p, const Block &t, const uint32_t *from, uint32_t tag, const char *weight) const {
    const float inverse = 1.0f / p.hidden;
    if (p.rows == 1) {
      uint2 *to = input_row(p, t, 0, p.hidden);
      float sum = 0;
      values(p, from, tag, 0, t.thread, kConsumers, [&](int i, uint2 four) {
        to[i] = four;
        sum = square_sum_of<T>(four, sum);
      });
      sum = group_sum(sum, 32);
      if (t.lane == 0) t.words()[t.warp] = sum;
      sync_consumers();
      sum = 0;
#pragma unroll
      for (int i = 0; i < kWarps; ++i) sum += t.words()[i];
      const float rstd = reciprocal_rms(sum, inverse, p.eps);
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int at = t.thread + i * kConsumers;
        if (at < p.hidden / 4) to[at] = scale_four<T>(to[at], weights[i], rstd);
      }
    } else {
      for (int row = t.warp; row < p.rows; row += kWarps) {
        uint2 *to = input_row(p, t, row, p.hidden);
        float sum = 0;
        values(p, from, tag, row, t.lane, 32, [&](int i, uint2 four) {
          to[i] = four;
          sum = square_sum_of<T>(four, sum);
        });
        const float rstd = reciprocal_rms(group_sum(sum, 32), inverse, p.eps);
        for (int i = t.lane; i < p.hidden / 4; i += 32) {
          to[i] = scale_four<T>(to[i], reinterpret_cast<const uint2 *>(weight)[i], rstd);
        }
      }
    }
    sync_consumers();
  }
};

}  // namespace gqa::cuda::decoder_step
