// How partial sums of the Hopper decode kernels meet: warps of a block in shared memory, blocks by one-way stores into
// the block that owns a unit of the output. Always in a fixed order.
#pragma once

#include "cuda/common/cluster.cuh"
#include "cuda/common/mbarrier.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/gqa_attention_decode_sm90/block.cuh"

namespace gqa::cuda::decode_sm90 {

// Joins the sums of the block's warps and hands them to emit(unit, quad, sums, maximum, weight), four dimensions each;
// `weights` belong to quad 0.
template <typename C, typename Emit>
__device__ void join_warps(const Args &p, const char *shared, Emit &&emit) {
  constexpr int kQuads = C::kDim / 4;
#pragma unroll 1
  for (int i = threadIdx.x; i < p.rows * kQuads; i += C::kThreads) {
    const int row = i / kQuads, quad = i % kQuads;
    float2 scales[C::kWarps];
    float top = minus_infinity(), sum = 0;
    float4 o = make_float4(0, 0, 0, 0);
#pragma unroll
    for (int w = 0; w < C::kWarps; ++w) {
      scales[w] = reinterpret_cast<const float2 *>(shared + w * C::kWarpBytes + C::kWeights)[row];
      top = fmaxf(top, scales[w].x);
    }
    const float base = top == minus_infinity() ? 0.0f : top;
#pragma unroll
    for (int w = 0; w < C::kWarps; ++w) {
      const float *from = reinterpret_cast<const float *>(shared + w * C::kWarpBytes) + row * C::kSumPitch + 4 * quad;
      const float4 x = *reinterpret_cast<const float4 *>(from);
      const float factor = exp2_fast(scales[w].x - base);
      o.x += factor * x.x, o.y += factor * x.y, o.z += factor * x.z, o.w += factor * x.w;
      sum += factor * scales[w].y;
    }
    emit(row * C::kSlices + quad / 8, quad % 8, o, top, sum);
  }
}

// Sends the block's sums to the blocks that own their units; a block by itself keeps them.
template <typename C>
__device__ void push_sums(const Args &p, const Block<C> &t, char *shared, uint32_t shared_base) {
  const int weights = C::kParts + p.slots * t.cluster * 128;
  join_warps<C>(p, shared, [&](int unit, int quad, float4 o, float top, float sum) {
    const uint32_t slot = (unit * p.cluster_inverse) >> 16, owner = unit - slot * t.cluster;
    const int source = slot * t.cluster + t.rank, part = C::kParts + source * 128 + quad * 16;
    if (t.cluster == 1) {
      *reinterpret_cast<float4 *>(shared + part) = o;
      if (quad == 0) *reinterpret_cast<float2 *>(shared + weights + source * 8) = make_float2(top, sum);
      return;
    }
    const uint32_t barrier = map_to_rank(shared_base + C::kBarrier, owner);
    push(map_to_rank(shared_base + part, owner), o.x, o.y, o.z, o.w, barrier);
    if (quad == 0) push(map_to_rank(shared_base + weights + source * 8, owner), top, sum, barrier);
  });
}

__device__ __forceinline__ float load_sink(const Args &p, int head, bool half) {
  if (p.sinks == nullptr) return minus_infinity();
  if (p.sinks_float) return static_cast<const float *>(p.sinks)[head] * kLog2e;
  return kLog2e * (half ? __half2float(static_cast<const __half *>(p.sinks)[head])
                        : __bfloat162float(static_cast<const __nv_bfloat16 *>(p.sinks)[head]));
}

// Writes four dimensions of a row of the output, from `d` on, out of sums that a sink may still join.
template <typename C>
__device__ void write_quad(const Args &p, const Block<C> &t, bool valid, int row, int d, float4 o, float top,
                           float sum) {
  using T = typename C::T;
  const int token = C::kPlain ? 0 : token_of_row(p, row), head = t.head * p.group + row - token * p.group;
  if (p.sinks != nullptr) {
    const float sink = load_sink(p, head, std::is_same_v<T, __half>), highest = fmaxf(top, sink);
    const float base = highest == minus_infinity() ? 0.0f : highest, factor = exp2_fast(top - base);
    o.x *= factor, o.y *= factor, o.z *= factor, o.w *= factor;
    sum = sum * factor + exp2_fast(sink - base);
    top = highest;
  }
  float scale = sum == 0.0f ? 0.0f : __fdividef(1.0f, sum);
  if (!valid) scale = sum = __int_as_float(0x7fc00000);
  char *to = p.out + t.b * p.out_stride[0] + token * p.out_stride[1] + head * p.out_stride[2] + 2 * d;
  *reinterpret_cast<uint2 *>(to) = make_uint2(pack<T>(o.x * scale, o.y * scale), pack<T>(o.z * scale, o.w * scale));
  if (p.lse != nullptr && d == 0) {
    p.lse[(static_cast<int64_t>(t.b) * p.num_q_heads + head) * p.seqlen_q + token] =
        sum == 0.0f ? minus_infinity() : (top + log2f(sum)) * kLn2;
  }
}

// Joins the parts of a unit that the blocks of the cluster sent and writes it out, one warp.
template <typename C>
__device__ void finish_unit(const Args &p, const Block<C> &t, int slot, bool valid, const char *shared) {
  const auto *parts = reinterpret_cast<const float4 *>(shared + C::kParts) + slot * t.cluster * 8;
  const auto *scales =
      reinterpret_cast<const float2 *>(shared + C::kParts + p.slots * t.cluster * 128) + slot * t.cluster;
  const int unit = slot * t.cluster + t.rank, first = t.lane / 8, quad = t.lane % 8;
  float4 o = make_float4(0, 0, 0, 0);
  float sum = 0, top = minus_infinity();
  if (valid) {
#pragma unroll 1
    for (int i = first; i < t.cluster; i += 4) top = fmaxf(top, scales[i].x);
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 8));
    top = fmaxf(top, __shfl_xor_sync(~0u, top, 16));
    const float base = top == minus_infinity() ? 0.0f : top;
#pragma unroll 1
    for (int i = first; i < t.cluster; i += 4) {
      const float factor = exp2_fast(scales[i].x - base);
      const float4 x = parts[i * 8 + quad];
      o.x += factor * x.x, o.y += factor * x.y, o.z += factor * x.z, o.w += factor * x.w;
      sum += factor * scales[i].y;
    }
#pragma unroll
    for (int step = 8; step < 32; step *= 2) {
      o.x += __shfl_xor_sync(~0u, o.x, step), o.y += __shfl_xor_sync(~0u, o.y, step);
      o.z += __shfl_xor_sync(~0u, o.z, step), o.w += __shfl_xor_sync(~0u, o.w, step);
      sum += __shfl_xor_sync(~0u, sum, step);
    }
  }
  if (first == 0) write_quad(p, t, valid, unit / C::kSlices, 32 * (unit % C::kSlices) + 4 * quad, o, top, sum);
}

}  // namespace gqa::cuda::decode_sm90
