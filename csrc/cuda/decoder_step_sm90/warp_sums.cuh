// Softmax and sums of one warp over 16 keys of each stage.
#pragma once

#include "cuda/common/transpose.cuh"
#include "cuda/decoder_step_sm90/queries.cuh"

namespace gqa::cuda::decoder_step {

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
    weights[0] = transpose_matrix(pack<T>(s[0][0], s[0][1]));
    weights[1] = transpose_matrix(pack<T>(s[0][2], s[0][3]));
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

}  // namespace gqa::cuda::decoder_step
