// Joins the sums of the blocks that share a head: in a fixed order, without a barrier.
#pragma once

#include "cuda/decoder_step_sm90/queries.cuh"

namespace gqa::cuda::decoder_step {

__device__ __forceinline__ float base_of(float top) { return top == __int_as_float(0xff800000) ? 0.0f : top; }

// What the warps of a block share of a stage's keys, where the inputs of products lie at other times: each query row's
// weights, and each warp's maxima and sums of the rows.
struct Weights {
  char *at;

  __device__ uint32_t *row(int i) const { return reinterpret_cast<uint32_t *>(at + i * kStepWeightPitch); }
  __device__ float *tops() const { return reinterpret_cast<float *>(at + kStepGroup * kStepWeightPitch); }
  __device__ float *sums() const { return tops() + kWarps * kStepGroup; }
  __device__ float2 *pair(float *of, int warp) const { return reinterpret_cast<float2 *>(of + warp * kStepGroup); }
};

template <int kDim>
__device__ __forceinline__ uint64_t *part_at(const Args &p, const Part &part, int index) {
  return p.parts + (static_cast<int64_t>(part.pair) * p.splits + index) * p.group * (kDim + 2);
}

// The outputs themselves where the block has all keys, else its part's sums, each row's maximum and sum of weights
// after them.
template <typename T, int kDim>
__device__ __forceinline__ void hand_over(const Args &p, const Block &t, const Part &part, const Weights &of,
                                          const float (&max)[2], const float (&o)[4], uint16_t *out) {
  uint64_t *to = part_at<kDim>(p, part, part.index);
  const int dim = 16 * t.warp + t.lane / 4;
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int row = 2 * (t.lane % 4) + e;
    if (row >= p.group) continue;
    float total = 0;
    if (part.parts == 1 || t.warp == kWarps - 1) {
#pragma unroll
      for (int w = 0; w < kWarps; ++w) total += of.sums()[w * kStepGroup + row];
    }
    if (t.warp < kDim / 16) {
#pragma unroll
      for (int i = 0; i < 2; ++i) {
        const int at = row * kDim + dim + 8 * i;
        const float value = o[2 * i + e];
        if (part.parts == 1) {
          publish(out + at, from_float<T>(total == 0 ? 0.0f : value / total));
        } else {
          publish(to + at, value, t.tag);
        }
      }
    }
    if (part.parts > 1 && t.warp == kWarps - 1 && t.lane < 4) {
      publish(to + p.group * kDim + 2 * row, max[e], t.tag);
      publish(to + p.group * kDim + 2 * row + 1, total, t.tag);
    }
  }
}

// Joins what the parts of a head have published, for this block's share of the outputs: a warp for four of them, its
// lanes for every eighth part.
template <typename T, int kDim>
__device__ __forceinline__ void join_parts(const Args &p, const Block &t, const Part &part, uint16_t *out) {
  constexpr int kEach = kStepParts / 8;
  const int low = part.share * part.index, high = min(low + part.share, p.group * kDim);
#pragma unroll 1
  for (int first = low + 4 * t.warp; first < high; first += 4 * kWarps) {
    const int output = first + t.lane % 4, scales = p.group * kDim + first / kDim * 2;
    float top[kEach], sum[kEach], value[kEach];
    bool all;
    do {
      all = true;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int index = t.lane / 4 + 8 * i;
        top[i] = __int_as_float(0xff800000), sum[i] = value[i] = 0;
        if (index >= part.parts) continue;
        const uint64_t *from = part_at<kDim>(p, part, index);
        const bool a = look(from + scales, t.tag, top[i]), b = look(from + scales + 1, t.tag, sum[i]);
        const bool c = look(from + output, t.tag, value[i]);
        all = all && a && b && c;
      }
    } while (!all);
    __syncwarp();
    float highest = top[0], total = 0, x = 0;
#pragma unroll
    for (int i = 1; i < kEach; ++i) highest = fmaxf(highest, top[i]);
#pragma unroll
    for (int step = 4; step < 32; step *= 2) highest = fmaxf(highest, __shfl_xor_sync(~0u, highest, step));
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const float factor = exp2_fast(top[i] - base_of(highest));
      total += sum[i] * factor, x += value[i] * factor;
    }
#pragma unroll
    for (int step = 4; step < 32; step *= 2) {
      total += __shfl_xor_sync(~0u, total, step), x += __shfl_xor_sync(~0u, x, step);
    }
    if (t.lane < 4) publish(out + output, from_float<T>(total == 0 ? 0.0f : x / total));
  }
}

}  // namespace gqa::cuda::decoder_step
