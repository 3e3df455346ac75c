// Joins the sums of a block's warps, and those of the blocks that share a head: in a fixed order, without a barrier.
#pragma once

#include "cuda/decoder_step_sm90/warp_sums.cuh"

namespace gqa::cuda::decoder_step {

template <int kDim>
constexpr int kJoinPitch = kDim + 4;  // floats

__device__ __forceinline__ float base_of(float top) { return top == __int_as_float(0xff800000) ? 0.0f : top; }

// Joins what the parts of a head have published, for this block's share of the outputs: a lane for each part, a warp
// for kEach outputs of one row at a time.
template <typename T, int kDim>
__device__ __forceinline__ void join_parts(const Args &p, const Block &t, const Part &part, int group, uint32_t *out) {
  constexpr int kEach = 4;
  const int outputs = group * kDim, parts = part.parts, share = (outputs / kEach + parts - 1) / parts * kEach;
  const int low = share * part.index, high = min(low + share, outputs);
  const uint64_t *from =
      p.parts + static_cast<int64_t>(part.pair) * (outputs + 2 * group) * p.splits + min(t.lane, parts - 1);
  for (int first = low + kEach * t.warp; first < high; first += kEach * kWarps) {
    const int row = first / kDim;
    float values[kEach + 2];
    receive(from + first * p.splits, from + (outputs + 2 * row) * p.splits, p.splits, t.tag, values);
    float x[kEach], top = values[0], total = values[1];
    float all = top;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) all = fmaxf(all, __shfl_xor_sync(~0u, all, step));
    const float factor = t.lane < parts ? exp2_fast(top - base_of(all)) : 0.0f;
    // Not a product with zero, which would keep a NaN.
    total = t.lane < parts ? total * factor : 0.0f;
#pragma unroll
    for (int i = 0; i < kEach; ++i) x[i] = t.lane < parts ? values[i + 2] * factor : 0.0f;
#pragma unroll
    for (int step = 16; step > 0; step /= 2) {
      total += __shfl_xor_sync(~0u, total, step);
#pragma unroll
      for (int i = 0; i < kEach; ++i) x[i] += __shfl_xor_sync(~0u, x[i], step);
    }
    if (t.lane == 0) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        publish(out + first + i, from_float<T>(total == 0 ? 0.0f : x[i] / total), t.tag);
      }
    }
  }
}

// Joins the sums of the block's warps: the outputs themselves where the block has all keys, else published as its
// part's.
template <typename T, int kDim>
__device__ __forceinline__ void join_warps(const Args &p, const Block &t, const Part &part, int group,
                                           WarpSums<T, kDim> &sums, uint32_t *out) {
  auto *join = reinterpret_cast<float *>(t.shared + p.inputs_at);
  auto *scales = reinterpret_cast<float2 *>(join + kWarps * group * kJoinPitch<kDim>);
#pragma unroll
  for (int e = 0; e < 2; ++e) {
    const int row = 2 * (t.lane % 4) + e;
#pragma unroll
    for (int step = 4; step < 32; step *= 2) sums.sum[e] += __shfl_xor_sync(~0u, sums.sum[e], step);
    if (row >= group) continue;
    if (t.lane < 4) scales[t.warp * group + row] = make_float2(sums.max[e], sums.sum[e]);
    float *to = join + (t.warp * group + row) * kJoinPitch<kDim> + t.lane / 4;
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) to[16 * d] = sums.o[d][e], to[16 * d + 8] = sums.o[d][2 + e];
  }
  sync_consumers();
  auto *factors = reinterpret_cast<float *>(scales + kWarps * group);  // of the warps' sums; then the rows' scales
  auto *joined = reinterpret_cast<float2 *>(factors + kWarps * group);
  if (t.thread < kWarps * group) {
    const int row = t.thread / kWarps, w = t.thread % kWarps;
    const float2 own = scales[w * group + row];
    float top = own.x;
#pragma unroll
    for (int step = 1; step < kWarps; step *= 2) top = fmaxf(top, __shfl_xor_sync(__activemask(), top, step));
    const float factor = exp2_fast(own.x - base_of(top));
    float total = own.y * factor;
#pragma unroll
    for (int step = 1; step < kWarps; step *= 2) total += __shfl_xor_sync(__activemask(), total, step);
    factors[row * kWarps + w] = factor;
    if (w == 0) joined[row] = make_float2(top, total);
  }
  sync_consumers();
  const bool alone = part.parts == 1;
  const int outputs = group * kDim;
  uint64_t *to = p.parts + static_cast<int64_t>(part.pair) * (outputs + 2 * group) * p.splits + part.index;
  for (int j = t.thread; j < outputs; j += kConsumers) {
    const int row = j / kDim, d = j % kDim;
    float sum = 0;
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      sum += join[(w * group + row) * kJoinPitch<kDim> + d] * factors[row * kWarps + w];
    }
    if (alone) {
      const float total = joined[row].y;
      publish(out + j, from_float<T>(total == 0 ? 0.0f : sum / total), t.tag);
    } else {
      publish(to + j * p.splits, sum, t.tag);
    }
  }
  if (!alone && t.thread < 2 * group) {
    publish(to + (outputs + t.thread) * p.splits, reinterpret_cast<const float *>(joined)[t.thread], t.tag);
  }
}

}  // namespace gqa::cuda::decoder_step
