// Products of the block's weight rows, out of the ring, with the inputs in shared memory.
#pragma once

#include "cuda/decoder_step_sm90/inputs.cuh"

namespace gqa::cuda::decoder_step {

// kCount times 32 columns, all of them on their way to registers at once.
template <typename T, int kCount>
__device__ __forceinline__ void multiply_pairs(float (&acc)[4][4], uint32_t weights, uint32_t inputs) {
  uint32_t a[kCount][2][4], b[kCount][4];
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    load_matrices(b[i], inputs + 64 * i);
    load_matrices(a[i][0], weights + 64 * i);
    load_matrices(a[i][1], weights + 64 * i + 32);
  }
#pragma unroll
  for (int i = 0; i < kCount; ++i) {
    multiply_add<T>(acc[i % 2 * 2], a[i][0], b[i][0], b[i][1]);
    multiply_add<T>(acc[i % 2 * 2 + 1], a[i][1], b[i][2], b[i][3]);
  }
}

// finish(output, row, sum, sum of the gate's partner). A stage's columns are shared out among the warps, 32 at a time;
// their sums meet in shared memory after as many tiles as it has room for.
template <typename T, typename Finish>
__device__ __forceinline__ void multiply(const Args &p, Block &t, Ring &ring, Slice slice, const Matrix &m,
                                         Finish &&finish) {
  const int together = t.tiles_together, tile_log = m.gated ? 3 : 4, tile = 1 << tile_log;
  const uint32_t inputs =
      t.address + p.inputs_at + min(t.lane % 8, p.rows - 1) * input_pitch(m.columns) + t.lane / 8 * 16;
#pragma unroll 1
  for (int begin = slice.begin; begin < slice.end; begin += together << tile_log) {
    const int count = min(slice.end - begin, together << tile_log);
    float *sums = t.sums();
    // [tile][row][warp][row of the tile]
    float *to = sums + t.warp * kTileRows + t.lane / 4;
#pragma unroll 1
    for (int first = begin; first < begin + count; first += tile) {
      const int outputs = min(tile, slice.end - first);
      slice.step = outputs == tile ? slice.full_step : slice.last_step;
      // Rows past the last repeat it: nobody looks at what they give.
      const int row = m.gated ? min(t.lane % 8, outputs - 1) + t.lane / 8 % 2 * outputs : min(t.lane % 16, outputs - 1);
      const uint32_t bytes = (m.gated ? 2 * outputs : outputs) * slice.pitch();
      const int lane_at = row * slice.pitch() + t.lane / 16 * 16;
      float acc[4][4] = {};
#pragma unroll 1
      for (int column = 0; column < m.columns; column += slice.step) {
        const int steps = min(slice.step, m.columns - column) >> 4;
        int k = (steps >> 1) * t.warp >> 3;
        const int high = (steps >> 1) * (t.warp + 1) >> 3;
        const uint32_t x = inputs + 2 * column;
        ring.wait_full(bytes);
        const uint32_t w = ring.data() + lane_at;
#pragma unroll 1
        for (; k + 4 <= high; k += 4) multiply_pairs<T, 4>(acc, w + 64 * k, x + 64 * k);
        if (k + 2 <= high) multiply_pairs<T, 2>(acc, w + 64 * k, x + 64 * k), k += 2;
        if (k < high) multiply_pairs<T, 1>(acc, w + 64 * k, x + 64 * k);
        if (steps % 2 != 0 && t.warp == 0) {
          uint32_t a[4], b[4];
          load_matrices(b, x + 32 * (steps - 1));
          load_matrices(a, w + 32 * (steps - 1));
          multiply_add<T>(acc[0], a, b[0], b[1]);
        }
        ring.release();
      }
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        const int token = t.lane % 4 * 2 + i % 2;
        if (token < p.rows)
          to[token * kWarps * kTileRows + i / 2 * 8] = (acc[0][i] + acc[1][i]) + (acc[2][i] + acc[3][i]);
      }
      to += p.rows * kWarps * kTileRows;
    }
    sync_consumers();
#pragma unroll 1
    for (int token = 0; token < p.rows; ++token) {
#pragma unroll 1
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
