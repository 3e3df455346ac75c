// Products of the block's weight rows, out of the ring, with the inputs in shared memory.
#pragma once

#include "cuda/decoder_step_sm90/inputs.cuh"

namespace gqa::cuda::decoder_step {

// finish(output, row, sum, sum of the gate's partner). A stage's columns are shared out among the warps, sixteen at a
// time; their sums meet in shared memory after as many tiles as it has room for.
template <typename T, typename Finish>
__device__ __forceinline__ void multiply(const Args &p, Block &t, Ring &ring, Slice slice, const Matrix &m,
                                         Finish &&finish) {
  const int together = t.tiles_together, tile_log = m.gated ? 3 : 4, tile = 1 << tile_log;
  const uint32_t inputs =
      t.address + p.inputs_at + min(t.lane % 8, p.rows - 1) * input_pitch(m.columns) + t.lane / 8 * 16;
  for (int begin = slice.begin; begin < slice.end; begin += together << tile_log) {
    const int count = min(slice.end - begin, together << tile_log);
    float *sums = t.sums();
    // [tile][row][warp][row of the tile]
    float *to = sums + t.warp * kTileRows + t.lane / 4;
    for (int first = begin; first < begin + count; first += tile) {
      const int outputs = min(tile, slice.end - first);
      slice.step = outputs == tile ? slice.full_step : slice.last_step;
      // Rows past the last repeat it: nobody looks at what they give.
      const int row = m.gated ? min(t.lane % 8, outputs - 1) + t.lane / 8 % 2 * outputs : min(t.lane % 16, outputs - 1);
      const int lane_at = row * (2 * slice.step + 16) + t.lane / 16 * 16;
      float acc[2][4] = {};
      for (int column = 0; column < m.columns; column += slice.step) {
        const int steps = min(slice.step, m.columns - column) >> 4;
        int k = steps * t.warp >> 3;
        const int high = steps * (t.warp + 1) >> 3;
        const uint32_t x = inputs + 2 * column;
        ring.wait_full();
        const uint32_t w = ring.data() + lane_at;
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
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = t.lane % 4 * 2 + i % 2;
        if (token < p.rows) to[token * kWarps * kTileRows + i / 2 * 8] = acc[0][i] + acc[1][i];
      }
      to += p.rows * kWarps * kTileRows;
    }
    sync_consumers();
    for (int token = 0; token < p.rows; ++token) {
      for (int output = t.thread; output < count; output += kConsumers) {
        const float *from = sums + ((output >> tile_log) * p.rows + token) * kWarps * kTileRows + (output & (tile - 1));
        float sum = 0, partner = 0;
#pragma unroll
        for (int w = 0; w < kWarps; ++w) sum += from[w * kTileRows];
        if (m.gated) {
#pragma unroll
          for (int w = 0; w < kWarps; ++w) partner += from[w * kTileRows + 8];
        }
        finish(begin + output, token, sum, partner);
      }
    }
    t.flip ^= 1;
  }
}

}  // namespace gqa::cuda::decoder_step
