// How partial sums of the Hopper decode kernels meet: warps of a block in shared memory, blocks by one-way stores into
// the block that owns a unit of the output. Always in a fixed order.
#pragma once

#include "common/quantize.h"
#include "cuda/common/cluster.cuh"
#include "cuda/common/mbarrier.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/programmatic_launch.cuh"
#include "cuda/gqa_attention_decode_sm90/quantized_tiles.cuh"

namespace gqa::cuda::decode_sm90 {

// Which of the block's heads a row of all their rows belongs to.
template <typename C>
__device__ __forceinline__ int team_of(const Args &p, int row) {
  int team = 0;
#pragma unroll
  for (int i = 1; i < C::kHeads; ++i) team += row >= i * p.rows;
  return team;
}

// Joins the sums of each head's warps and hands them to emit(unit, lane of the unit, sums, maximum, weight): dimensions
// lane, 8 + lane, 16 + lane and 24 + lane of the unit.
template <typename C, typename Emit>
__device__ void join_warps(const Args &p, const char *shared, Emit &&emit) {
#pragma unroll 1
  for (int i = threadIdx.x; i < 8 * p.units; i += C::kThreads) {
    const int unit = i / 8, slice = unit % C::kSlices, team = team_of<C>(p, unit / C::kSlices);
    const int row = unit / C::kSlices - team * p.rows;
    const char *sums = shared + team * C::kTeam * C::kWarpBytes;
    const char *at = sums + (row * C::kSumPitch + i % 8 * C::kSumStep + 4 * slice) * 4;
    float2 scales[C::kTeam];
    float4 x[C::kTeam];
#pragma unroll
    for (int w = 0; w < C::kTeam; ++w) {
      scales[w] = reinterpret_cast<const float2 *>(sums + w * C::kWarpBytes + C::kWeights)[row];
      x[w] = *reinterpret_cast<const float4 *>(at + w * C::kWarpBytes);
    }
    float top = minus_infinity(), sum = 0;
    float4 o = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < C::kTeam; ++w) top = fmaxf(top, scales[w].x);
    const float base = top == minus_infinity() ? 0.0f : top;
#pragma unroll
    for (int w = 0; w < C::kTeam; ++w) {
      const float factor = exp2_fast(scales[w].x - base);
      o.x += factor * x[w].x, o.y += factor * x[w].y, o.z += factor * x[w].z, o.w += factor * x[w].w;
      sum += factor * scales[w].y;
    }
    emit(unit, i % 8, o, top, sum);
  }
}

// Sends the block's sums to the blocks that own their units.
template <typename C>
__device__ void push_sums(const Args &p, const Block<C> &t, char *shared, uint32_t shared_base) {
  const int weights = C::kParts + (t.most_slots(p) << t.blocks_log) * 128;
  join_warps<C>(p, shared, [&](int unit, int lane, float4 o, float top, float sum) {
    const uint32_t owner = unit & (t.blocks() - 1), part = (unit - owner) + t.rank;
    const uint32_t barrier = map_to_rank(shared_base + C::kBarrier, t.peer(owner));
    const uint32_t to = map_to_rank(shared_base, t.peer(owner));
    push(to + C::kParts + part * 128 + lane * 16, o.x, o.y, o.z, o.w, barrier);
    if (lane == 0) push(to + weights + part * 8, top, sum, barrier);
  });
}

__device__ __forceinline__ float load_sink(const Args &p, int head, bool half) {
  if (p.sinks == nullptr) return minus_infinity();
  if (p.sinks_float) return static_cast<const float *>(p.sinks)[head] * kLog2e;
  return kLog2e * (half ? __half2float(static_cast<const __half *>(p.sinks)[head])
                        : __bfloat162float(static_cast<const __nv_bfloat16 *>(p.sinks)[head]));
}

// Where this block's output goes; worked out while the keys are on their way, for the constant cache is slow to fetch.
struct Output {
  char *out;
  int64_t token_stride, head_stride;
  float *lse;
  const void *sinks;
  float v_scale;

  template <typename C>
  __device__ Output(const Args &p, const Block<C> &t)
      : out(p.out + t.b * p.out_stride[0] + static_cast<int64_t>(t.first_head) * p.group * p.out_stride[2]),
        token_stride(p.out_stride[1]),
        head_stride(p.out_stride[2]),
        lse(p.lse),
        sinks(p.sinks),
        v_scale(C::kBytes == 1 ? scale_of(p.v_scale, p.v_scale_stride, t.first_head) : 1.0f) {
    have_ready(out), have_ready(head_stride), have_ready(lse), have_ready(sinks);
  }
};

// Writes dimensions lane, 8 + lane ... of a unit of the output, out of sums that a sink may still join.
template <typename C>
__device__ void write_lane(const Args &p, const Block<C> &t, const Output &output, bool valid, int unit, int lane,
                           float4 o, float top, float sum) {
  using T = typename C::T;
  const int team = team_of<C>(p, unit / C::kSlices), row = unit / C::kSlices - team * p.rows, slice = unit % C::kSlices;
  if (C::kHeads > 1 && t.first_head + team >= p.num_kv_heads) return;
  const int token = C::kPlain ? 0 : token_of_row(p, row), in_block = row - token * p.group + team * p.group;
  const int head = t.first_head * p.group + in_block;
  if (output.sinks != nullptr) {
    const float sink = load_sink(p, head, std::is_same_v<T, __half>), highest = fmaxf(top, sink);
    const float base = highest == minus_infinity() ? 0.0f : highest, factor = exp2_fast(top - base);
    o.x *= factor, o.y *= factor, o.z *= factor, o.w *= factor;
    sum = sum * factor + exp2_fast(sink - base);
    top = highest;
  }
  float scale = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
  if constexpr (C::kBytes == 1) {
    scale *= team == 0 ? output.v_scale : scale_of(p.v_scale, p.v_scale_stride, t.first_head + team);
  }
  if (!valid) scale = sum = __int_as_float(0x7fc00000);
  char *row_at = output.out + in_block * output.head_stride;
  if (!C::kPlain) row_at += token * output.token_stride;
  if constexpr (C::kBytes == 1) {  // dimensions 2 lane, 2 lane + 1 and 16 more of both
    auto *to = reinterpret_cast<uint32_t *>(reinterpret_cast<T *>(row_at) + 32 * slice) + lane;
    to[0] = pack<T>(o.x * scale, o.y * scale), to[8] = pack<T>(o.z * scale, o.w * scale);
  } else {
    T *to = reinterpret_cast<T *>(row_at) + 32 * slice + lane;
    to[0] = from_float<T>(o.x * scale), to[8] = from_float<T>(o.y * scale);
    to[16] = from_float<T>(o.z * scale), to[24] = from_float<T>(o.w * scale);
  }
  if (output.lse != nullptr && slice == 0 && lane == 0) {
    output.lse[(static_cast<int64_t>(t.b) * p.num_q_heads + head) * p.seqlen_q + token] =
        sum == 0.0f ? minus_infinity() : (top + log2f(sum)) * kLn2;
  }
}

// Joins the parts of this block's units that the blocks of the cluster sent, and writes them out.
template <typename C>
__device__ void finish_units(const Args &p, const Block<C> &t, const Output &output, const char *shared) {
  constexpr int kStep = 8;  // of the blocks, at a time
  const char *weights = shared + C::kParts + (t.most_slots(p) << t.blocks_log) * 128;
#pragma unroll 1
  for (int i = threadIdx.x; i < 8 * t.slots(p); i += C::kThreads) {
    const int first = i / 8 << t.blocks_log;
    const auto *scales_at = reinterpret_cast<const float2 *>(weights) + first;
    const auto *parts = reinterpret_cast<const float4 *>(shared + C::kParts) + first * 8 + i % 8;
    float4 o = make_float4(0, 0, 0, 0);
    float sum = 0, top = minus_infinity();
#pragma unroll 1
    for (int rank = 0; rank < t.blocks(); rank += kStep) {
      float2 scales[kStep];
      float4 x[kStep];
      const float before = top;
#pragma unroll
      for (int e = 0; e < kStep; ++e) {
        const bool exists = rank + e < t.blocks();
        scales[e] = exists ? scales_at[rank + e] : make_float2(minus_infinity(), 0);
        x[e] = exists ? parts[(rank + e) * 8] : make_float4(0, 0, 0, 0);
        top = fmaxf(top, scales[e].x);
      }
      const float base = top == minus_infinity() ? 0.0f : top, kept = exp2_fast(before - base);
      o.x *= kept, o.y *= kept, o.z *= kept, o.w *= kept;
      sum *= kept;
#pragma unroll
      for (int e = 0; e < kStep; ++e) {
        const float factor = exp2_fast(scales[e].x - base);
        o.x += factor * x[e].x, o.y += factor * x[e].y, o.z += factor * x[e].z, o.w += factor * x[e].w;
        sum += factor * scales[e].y;
      }
    }
    write_lane(p, t, output, true, first + t.rank, i % 8, o, top, sum);
  }
}

}  // namespace gqa::cuda::decode_sm90
