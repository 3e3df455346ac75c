// Products of the block's weight rows, out of the ring, with the inputs in shared memory.
#pragma once

#include "cuda/decoder_step_sm90/inputs.cuh"

namespace gqa::cuda::decoder_step {

// finish(output, row, sum), or finish(output, row, gate's sum, up's sum). A tile's columns are shared out among the
// warps, sixteen at a time.
template <typename T, bool kGated, typename Finish>
__device__ __forceinline__ void multiply(const Args &p, Block &t, Ring &ring, const Matrix &m, Finish &&finish) {
  Slice<kGated> slice(m, ring.stage_bytes);
  const uint32_t inputs =
      t.address + p.inputs_at + min(t.lane % 8, p.rows - 1) * input_pitch(m.columns) + t.lane / 8 * 16;
  for (int first = slice.begin; first < slice.end; first += slice.kOutputs) {
    slice.find_step(first);
    const int outputs = slice.outputs(first);
    // Rows past the last repeat it: nobody looks at what they give.
    const int row = kGated ? min(t.lane % 8, outputs - 1) + t.lane / 8 % 2 * outputs : min(t.lane % 16, outputs - 1);
    const int lane_at = row * slice.pitch() + t.lane / 16 * 16;
    float acc[2][4] = {};
    for (int column = 0; column < m.columns; column += slice.step) {
      const int steps = min(slice.step, m.columns - column) / 16;
      const int low = steps * t.warp / kWarps, high = steps * (t.warp + 1) / kWarps;
      const uint32_t x = inputs + 2 * column;
      ring.wait_full();
      const uint32_t w = ring.data() + lane_at;
      int k = low;
#pragma unroll 4
      for (; k + 1 < high; k += 2) {
        uint32_t a[2][4], b[4];
        load_matrices(b, x + 32 * k);
        load_matrices(a[0], w + 32 * k);
        load_matrices(a[1], w + 32 * k + 32);
        multiply_add<T>(acc[0], a[0], b[0], b[1]);
        multiply_add<T>(acc[1], a[1], b[2], b[3]);
      }
      if (k < high) {
        uint32_t a[4], b[4];
        load_matrices(b, x + 32 * k);
        load_matrices(a, w + 32 * k);
        multiply_add<T>(acc[0], a, b[0], b[1]);
      }
      ring.release();
    }
    float *sums = t.sums();
#pragma unroll
    for (int i = 0; i < 4; i += 2) {
      auto *to = reinterpret_cast<float2 *>(sums + ((t.warp * kTileRows + t.lane / 4 + i * 4) * 8 + t.lane % 4 * 2));
      *to = make_float2(acc[0][i] + acc[1][i], acc[0][i + 1] + acc[1][i + 1]);
    }
    sync_consumers();
    const int output = t.thread % slice.kOutputs, token = t.thread / slice.kOutputs;
    if (output < outputs && token < p.rows) {
      const auto total = [&](int row) {
        float sum = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += sums[(w * kTileRows + row) * 8 + token];
        return sum;
      };
      if constexpr (kGated) {
        finish(first + output, token, total(output), total(8 + output));
      } else {
        finish(first + output, token, total(output));
      }
    }
    t.flip ^= 1;
  }
}

}  // namespace gqa::cuda::decoder_step
