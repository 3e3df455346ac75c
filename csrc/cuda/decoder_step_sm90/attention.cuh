// Attention of the new token over its row's cache: each block a part of the keys of a KV head. The blocks of a head
// hand each other their sums, and each joins them, in a fixed order, for a part of the outputs.
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
    const uint32_t q = t.address + kStepHeadsAt + min(t.lane % 8, group - 1) * kPitch + t.lane / 8 * 16;
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
  const char *fresh = head_at(t, slot, kHeadPitch<kDim>);
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

// Keys come by copies of another kind than the weights that come after them.
__device__ __forceinline__ void release_keys(Ring &ring) {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  ring.release();
}

template <typename T, int kDim>
__device__ __forceinline__ void attend(const Args &p, const Layer &layer, const Lengths &of_first, Block &t,
                                       Ring &ring) {
  const int group = p.q_heads / p.kv_heads;
  auto *join = reinterpret_cast<float *>(t.shared + p.inputs_at);
  for (int i = blockIdx.x; i < parts_of_all(p); i += gridDim.x) {
    const Lengths lengths = i == static_cast<int>(blockIdx.x) ? of_first : load_lengths(p, i);
    const Part part = find_part(p, layer.window_left, i, lengths);
    uint32_t *out = p.attention + (static_cast<int64_t>(part.row) * p.q_heads + part.head * group) * kDim;
    if (part.index >= part.parts) continue;
    load_angles<T>(p, t, part.row, lengths);
    stage_heads<T, kDim>(p, layer, t, part);
    if (!part.valid) {  // not before the row's heads are there: nobody may get ahead of a block that still works on
                        // them
      for (int j = t.thread; j < group * kDim; j += kConsumers) {
        publish(out + j, from_float<T>(__int_as_float(0x7fffffff)), t.tag);
      }
      sync_consumers();
      continue;
    }
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
      release_keys(ring);
      ring.wait_full();
      if (keys > 0) {
        char *rows = t.shared + (ring.data() - t.address) + offset;
        if (first + 16 > part.length || keys < 16) fill_rows<kDim>(t, part, rows, first, kNewValue, true);
        sums.add(t, ring.data() + offset, weights);
      }
      release_keys(ring);
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
    if (!alone) join_parts<T, kDim>(p, t, part, group, out);
    sync_consumers();  // before anything else comes where the sums are
  }
}

}  // namespace gqa::cuda::decoder_step
