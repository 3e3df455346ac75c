// Attention of the new token over its row's cache: each block a part of the keys of a KV head. The blocks of a head
// hand each other their sums, and each joins them, in a fixed order, for a part of the outputs.
#pragma once

#include "cuda/common/transpose.cuh"
#include "cuda/decoder_step_sm90/join.cuh"

namespace gqa::cuda::decoder_step {

// Rows of the stage that no copy brought: the new one, and zeros past the end.
template <int kDim>
__device__ __forceinline__ void fill_rows(const Block &t, const Part &part, char *rows, int first, int slot,
                                          bool zeros) {
  constexpr int kVectors = kDim / 8;
  const char *fresh = head_at(t, slot, kHeadPitch<kDim>);
#pragma unroll 1
  for (int i = t.lane; i < 16 * kVectors; i += 32) {
    const int key = first + i / kVectors, at = i / kVectors * kHeadPitch<kDim> + i % kVectors * 16;
    if (key < part.length && key < part.end) continue;
    const bool is_new = key < part.end;
    if (!is_new && !zeros) continue;
    *reinterpret_cast<uint4 *>(rows + at) =
        is_new ? reinterpret_cast<const uint4 *>(fresh)[i % kVectors] : make_uint4(0, 0, 0, 0);
  }
  __syncwarp();
}

// Keys come by copies of another kind than the weights that come after them.
__device__ __forceinline__ void release_keys(Ring &ring) {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  ring.release();
}

// Scores S^T = K Q^T of a warp's 16 keys: of keys lane / 4 and 8 further, query rows 2 (lane % 4) and the next.
template <typename T, int kDim>
__device__ __forceinline__ void score(const Args &p, const Block &t, uint32_t keys_at, int keys, float (&s)[4]) {
  constexpr int kPitch = kHeadPitch<kDim>;
  const uint32_t q = t.address + kStepHeadsAt + min(t.lane % 8, p.group - 1) * kPitch + t.lane / 8 * 16;
  const uint32_t k = keys_at + t.lane % 16 * kPitch + t.lane / 16 * 16;
  float sums[2][4] = {};
#pragma unroll
  for (int d = 0; d < kDim / 32; ++d) {
    uint32_t a[2][4], b[4];
    load_matrices(b, q + 64 * d);
    load_matrices(a[0], k + 64 * d);
    load_matrices(a[1], k + 64 * d + 32);
    multiply_add<T>(sums[0], a[0], b[0], b[1]);
    multiply_add<T>(sums[1], a[1], b[2], b[3]);
  }
#pragma unroll
  for (int e = 0; e < 4; ++e) {
    s[e] = __fmul_rn(sums[0][e] + sums[1][e], p.scale);
    if (t.lane / 4 + e / 2 * 8 >= keys) s[e] = __int_as_float(0xff800000);
  }
}

// The warps share out the keys of a stage for the scores, and the dimensions for the sums O^T = V^T P^T, 16 each: so
// the weights of all keys meet in shared memory, and the sums nowhere.
template <typename T, int kDim>
__device__ __forceinline__ void attend_part(const Args &p, Block &t, const Part &part, Ring &ring, uint16_t *out) {
  constexpr int kPitch = kHeadPitch<kDim>;
  const Weights of{t.shared + p.inputs_at};
  float max[2], sum[2] = {}, o[4] = {};
  max[0] = max[1] = __int_as_float(0xff800000);
#pragma unroll 1
  for (int key = part.first; key < part.end; key += kKeys) {
    const int first = key + 16 * t.warp, keys = part.end - first, offset = 16 * t.warp * kPitch;
    const uint32_t bytes = bytes_of_keys<kDim>(min(kKeys, part.end - key));
    float s[4], top[2];
    s[0] = s[1] = s[2] = s[3] = __int_as_float(0xff800000);
    ring.wait_full(bytes);
    if (keys > 0) {
      if (first + 16 > part.length)
        fill_rows<kDim>(t, part, t.shared + (ring.data() - t.address) + offset, first, kNewKey, false);
      score<T, kDim>(p, t, ring.data() + offset, keys, s);
    }
    release_keys(ring);
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      top[e] = fmaxf(s[e], s[2 + e]);
#pragma unroll
      for (int step = 4; step < 32; step *= 2) top[e] = fmaxf(top[e], __shfl_xor_sync(~0u, top[e], step));
    }
    if (t.lane < 4) of.pair(of.tops(), t.warp)[t.lane] = make_float2(top[0], top[1]);
    sync_consumers();
    float factor[2];
    float2 all = make_float2(max[0], max[1]);
#pragma unroll
    for (int w = 0; w < kWarps; ++w) {
      const float2 other = of.pair(of.tops(), w)[t.lane % 4];
      all = make_float2(fmaxf(all.x, other.x), fmaxf(all.y, other.y));
    }
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const float highest = e == 0 ? all.x : all.y, base = base_of(highest);
      factor[e] = exp2_fast(max[e] - base);
      max[e] = highest;
      s[e] = exp2_fast(s[e] - base), s[2 + e] = exp2_fast(s[2 + e] - base);
      sum[e] = sum[e] * factor[e] + s[e] + s[2 + e];
    }
#pragma unroll
    for (int e = 0; e < 4; ++e) o[e] *= factor[e % 2];
    if (keys > 0) {
      uint32_t *to = of.row(t.lane / 4) + 8 * t.warp + t.lane % 4;
      to[0] = transpose_matrix(pack<T>(s[0], s[1])), to[4] = transpose_matrix(pack<T>(s[2], s[3]));
    }
    if (key + kKeys >= part.end) {
#pragma unroll
      for (int e = 0; e < 2; ++e) {
#pragma unroll
        for (int step = 4; step < 32; step *= 2) sum[e] += __shfl_xor_sync(~0u, sum[e], step);
      }
      if (t.lane < 4) of.pair(of.sums(), t.warp)[t.lane] = make_float2(sum[0], sum[1]);
    }
    ring.wait_full(bytes);
    if (keys > 0 && (first + 16 > part.length || keys < 16)) {
      fill_rows<kDim>(t, part, t.shared + (ring.data() - t.address) + offset, first, kNewValue, true);
    }
    sync_consumers();
    if (t.warp < kDim / 16) {
      const uint32_t v = ring.data() + (t.lane % 8 + t.lane / 16 * 8) * kPitch + t.lane / 8 % 2 * 16 + 32 * t.warp;
      const uint32_t weights = shared_address(of.row(t.lane % 8)) + t.lane / 8 * 16;
      const int steps = (min(kKeys, part.end - key) + 15) / 16;
      float more[4] = {};
#pragma unroll
      for (int k = 0; k < kWarps; k += 2) {
        if (k >= steps) continue;
        uint32_t a[2][4], b[4];
        load_matrices(b, weights + 32 * k);
        load_matrices_transposed(a[0], v + 16 * k * kPitch);
        multiply_add<T>(o, a[0], b[0], b[1]);
        if (k + 1 >= steps) continue;
        load_matrices_transposed(a[1], v + 16 * (k + 1) * kPitch);
        multiply_add<T>(more, a[1], b[2], b[3]);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) o[e] += more[e];
    }
    release_keys(ring);
  }
  hand_over<T, kDim>(p, t, part, of, max, o, out);
}

template <typename T, int kDim>
__device__ __forceinline__ void attend(const Args &p, const Layer &layer, const Lengths &of_first, Block &t, Ring &ring,
                                       const uint16_t *qkv, uint16_t *attention) {
#pragma unroll 1
  for (int i = blockIdx.x; i < parts_of_all(p); i += gridDim.x) {
    const bool is_first = i == static_cast<int>(blockIdx.x);
    const Lengths lengths = is_first ? of_first : load_lengths(p, i);
    Part part = *reinterpret_cast<const Part *>(t.shared + kPartAt);
    if (!is_first || layer.window_left != p.layer[0].window_left) part = find_part(p, layer.window_left, i, lengths);
    uint16_t *out = attention + (static_cast<int64_t>(part.row) * p.q_heads + part.head * p.group) * kDim;
    if (part.index >= part.parts) continue;
    load_angles<T>(p, t, part.row, lengths);
    stage_heads<T, kDim>(p, layer, t, part, qkv);
    if (part.first < part.end) {
      attend_part<T, kDim>(p, t, part, ring, out);
      if (part.parts > 1) join_parts<T, kDim>(p, t, part, out);
    } else {  // no key, or a row that is none
      for (int j = t.thread; j < p.group * kDim; j += kConsumers) {
        publish(out + j, from_float<T>(part.valid ? 0.0f : __int_as_float(0x7fffffff)));
      }
    }
    sync_consumers();  // before anything else comes where the weights are
  }
}

}  // namespace gqa::cuda::decoder_step
