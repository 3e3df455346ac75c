// Attention of the new token over its row's cache: each block a part of the keys of a KV head, the last of a head's
// blocks to finish joins their sums, in a fixed order.
#pragma once

#include "cuda/decoder_step_sm90/queries.cuh"

namespace gqa::cuda::decoder_step {

__device__ __forceinline__ uint32_t transpose(uint32_t x) {
  uint32_t y;
  asm("movmatrix.sync.aligned.m8n8.trans.b16 %0, %1;" : "=r"(y) : "r"(x));
  return y;
}

// Softmax and sums of one warp over 16 keys of each stage, S^T = K Q^T and O^T = V^T P^T: of query rows 2 c and
// 2 c + 1, dimensions 16 d + r and 16 d + 8 + r.
template <typename T, int kDim>
struct WarpSums {
  static constexpr int kPitch = kHeadPitch<kDim>;
  float max[2], sum[2] = {}, o[kDim / 16][4] = {};

  __device__ WarpSums() { max[0] = max[1] = __int_as_float(0xff800000); }

  // `keys` of the warp's rows exist.
  __device__ void scores(const Args &p, const Block &t, uint32_t rows, int keys, uint32_t (&weights)[2]) {
    const int group = p.q_heads / p.kv_heads;
    const uint32_t q = t.address + kQueries + min(t.lane % 8, group - 1) * kPitch + t.lane / 8 * 16;
    const uint32_t k = rows + t.lane % 16 * kPitch + t.lane / 16 * 16;
    float s[2][4] = {};
#pragma unroll
    for (int d = 0; d < kDim / 32; ++d) {
      uint32_t a[2][4], b[4];
      load_matrices(b, q + 64 * d);
      load_matrices(a[0], k + 64 * d);
      load_matrices(a[1], k + 64 * d + 32);
      multiply_add<T>(s[0], a[0], b[0], b[1]);
      multiply_add<T>(s[1], a[1], b[2], b[3]);
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      s[0][e] = __fmul_rn(s[0][e] + s[1][e], p.scale);
      if (t.lane / 4 + e / 2 * 8 >= keys) s[0][e] = __int_as_float(0xff800000);
    }
    float factor[2];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      float top = fmaxf(max[e], fmaxf(s[0][e], s[0][2 + e]));
#pragma unroll
      for (int step = 4; step < 32; step *= 2) top = fmaxf(top, __shfl_xor_sync(~0u, top, step));
      const float base = top == __int_as_float(0xff800000) ? 0.0f : top;
      factor[e] = exp2_fast(max[e] - base);
      max[e] = top;
      s[0][e] = exp2_fast(s[0][e] - base), s[0][2 + e] = exp2_fast(s[0][2 + e] - base);
      sum[e] = sum[e] * factor[e] + s[0][e] + s[0][2 + e];
    }
#pragma unroll
    for (int e = 0; e < kDim / 4; ++e) o[e / 4][e % 4] *= factor[e % 2];
    weights[0] = transpose(pack<T>(s[0][0], s[0][1]));
    weights[1] = transpose(pack<T>(s[0][2], s[0][3]));
  }

  __device__ void add(const Block &t, uint32_t rows, const uint32_t (&weights)[2]) {
    const uint32_t v = rows + (t.lane % 8 + t.lane / 16 * 8) * kPitch + t.lane / 8 % 2 * 16;
#pragma unroll
    for (int d = 0; d < kDim / 16; ++d) {
      uint32_t a[4];
      load_matrices_transposed(a, v + 32 * d);
      multiply_add<T>(o[d], a, weights[0], weights[1]);
    }
  }
};

template <int kDim>
constexpr int kJoinPitch = kDim + 4;  // floats

// Rows of the stage that no copy brought: the new one, and zeros past the end.
template <int kDim>
__device__ __forceinline__ void fill_rows(const Block &t, const Part &part, char *rows, int first, int slot,
                                          bool zeros) {
  constexpr int kVectors = kDim / 8;
  const char *fresh = t.shared + kQueries + slot * kHeadPitch<kDim>;
  bool wrote = false;
  for (int i = t.lane; i < 16 * kVectors; i += 32) {
    const int key = first + i / kVectors, at = i / kVectors * kHeadPitch<kDim> + i % kVectors * 16;
    if (key < part.length && key < part.end) continue;
    const bool is_new = key < part.end;
    if (!is_new && !zeros) continue;
    *reinterpret_cast<uint4 *>(rows + at) =
        is_new ? reinterpret_cast<const uint4 *>(fresh)[i % kVectors] : make_uint4(0, 0, 0, 0);
    wrote = true;
  }
  if (wrote) asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  __syncwarp();
}

// Joins what `count` wrote: maxima and sums in `scales`, [count][group] of them, and rows of sums.
__device__ __forceinline__ float2 join_scale(const float2 *scales, int count, int stride, int row) {
  float top = __int_as_float(0xff800000), sum = 0;
  for (int i = 0; i < count; ++i) top = fmaxf(top, scales[i * stride + row].x);
  const float base = top == __int_as_float(0xff800000) ? 0.0f : top;
  for (int i = 0; i < count; ++i) sum += scales[i * stride + row].y * exp2_fast(scales[i * stride + row].x - base);
  return make_float2(base, sum);
}

template <typename T, int kDim>
__device__ void attend(const Args &p, const Layer &layer, int index, Block &t, Ring &ring) {
  const int group = p.q_heads / p.kv_heads;
  auto *join = reinterpret_cast<float *>(t.shared + p.inputs_at);
  for (int i = blockIdx.x; i < parts_of_all(p); i += gridDim.x) {
    const Part part = find_part(p, layer, i);
    auto *out =
        reinterpret_cast<T *>(p.attention) + (static_cast<int64_t>(part.row) * p.q_heads + part.head * group) * kDim;
    if (part.index >= part.parts) continue;
    if (!part.valid) {
      for (int j = t.thread; j < group * kDim; j += kConsumers) out[j] = from_float<T>(__int_as_float(0x7fffffff));
      continue;
    }
    sync_consumers();
    stage_heads<T, kDim>(p, layer, t, part);
    WarpSums<T, kDim> sums;
    for (int key = part.first; key < part.end; key += kKeys) {
      const int first = key + 16 * t.warp, keys = part.end - first;
      const int offset = 16 * t.warp * kHeadPitch<kDim>;
      uint32_t weights[2];
      ring.wait_full();
      if (keys > 0) {
        char *rows = t.shared + (ring.data() - t.address) + offset;
        if (first + 16 > part.length) fill_rows<kDim>(t, part, rows, first, kNewKey, false);
        sums.scores(p, t, ring.data() + offset, keys, weights);
      }
      ring.release();
      ring.wait_full();
      if (keys > 0) {
        char *rows = t.shared + (ring.data() - t.address) + offset;
        if (first + 16 > part.length || keys < 16) fill_rows<kDim>(t, part, rows, first, kNewValue, true);
        sums.add(t, ring.data() + offset, weights);
      }
      ring.release();
    }
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
    const bool alone = part.parts == 1;
    const int64_t slot = static_cast<int64_t>(part.pair) * p.splits + part.index;
    for (int j = t.thread; j < group * kDim; j += kConsumers) {
      const int row = j / kDim, d = j % kDim;
      const float2 scale = join_scale(scales, kWarps, group, row);
      float sum = 0;
#pragma unroll
      for (int w = 0; w < kWarps; ++w) {
        sum += join[(w * group + row) * kJoinPitch<kDim> + d] * exp2_fast(scales[w * group + row].x - scale.x);
      }
      if (alone) {
        out[j] = from_float<T>(scale.y == 0 ? 0.0f : sum / scale.y);
        continue;
      }
      p.part_sums[slot * group * kDim + j] = sum;
      if (d == 0) reinterpret_cast<float2 *>(p.part_scales)[slot * group + row] = scale;
    }
    if (alone) continue;
    sync_consumers();
    if (t.thread == 0) {
      __threadfence();
      const uint32_t before = atomicAdd(p.arrived_parts + part.pair, 1u);
      __threadfence();
      t.words()[20] = before + 1 == static_cast<uint32_t>(part.parts * (index + 1)) ? 1.0f : 0.0f;
    }
    sync_consumers();
    if (t.words()[20] == 0) continue;
    const int64_t start = static_cast<int64_t>(part.pair) * p.splits * group;
    const auto *from = reinterpret_cast<const float2 *>(p.part_scales) + start;
    auto *all = reinterpret_cast<float2 *>(join);
    for (int j = t.thread; j < part.parts * group; j += kConsumers) all[j] = __ldcg(from + j);
    sync_consumers();
    for (int j = t.thread; j < group * kDim; j += kConsumers) {
      const int row = j / kDim;
      const float2 scale = join_scale(all, part.parts, group, row);
      float sum = 0;
#pragma unroll 8
      for (int s = 0; s < part.parts; ++s) {
        sum += __ldcg(p.part_sums + (start + s * group) * kDim + j) * exp2_fast(all[s * group + row].x - scale.x);
      }
      out[j] = from_float<T>(scale.y == 0 ? 0.0f : sum / scale.y);
    }
  }
}

}  // namespace gqa::cuda::decoder_step
