// What the copying warps do: all weights and cached keys of the block, in the order of their use, as room comes up.
#pragma once

#include "cuda/common/async_copy.cuh"
#include "cuda/decoder_step_sm90/ring.cuh"

namespace gqa::cuda::decoder_step {

__device__ __forceinline__ void copy_bulk(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier,
                                          uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// For the 32 lanes of a warp, whose copies bring so many bytes.
__device__ __forceinline__ void arrive_expect_for_warp(uint32_t barrier, uint32_t bytes) {
  asm volatile(
      "mbarrier.expect_tx.relaxed.cta.shared::cta.b64 [%0], %1;\n"
      "mbarrier.arrive.release.cta.shared::cta.b64 _, [%0], 32;" ::"r"(barrier),
      "r"(bytes)
      : "memory");
}

// Of a row of the tile that begins at output `first`.
__device__ __forceinline__ const char *weights_of(const Matrix &m, int row, int outputs, int first) {
  const int64_t bytes = 2 * static_cast<int64_t>(m.columns);
  if (m.gated) {
    return row < outputs ? m.weights[0] + (first + row) * bytes : m.weights[1] + (first + row - outputs) * bytes;
  }
  const int output = first + row;
  if (output < m.ends[0]) return m.weights[0] + output * bytes;
  return output < m.ends[1] ? m.weights[1] + (output - m.ends[0]) * bytes : m.weights[2] + (output - m.ends[1]) * bytes;
}

// A bulk copy occupies its warp for tens of cycles, so the rows of a tile are shared out among the warps.
__device__ __forceinline__ void copy_weights(const Matrix &m, Ring &ring, uint64_t policy) {
  const int warp = threadIdx.x / 32 - kWarps, lane = threadIdx.x % 32, row = lane * kStepCopyWarps + warp;
  Slice slice(m, ring.stage_bytes);
  for (int first = slice.begin; first < slice.end; first += slice.tile) {
    slice.find_step(first);
    const int mine = (slice.rows - warp + kStepCopyWarps - 1) / kStepCopyWarps;
    const char *from = row < slice.rows ? weights_of(m, row, slice.outputs(first), first) : nullptr;
    for (int column = 0; column < m.columns; column += slice.step) {
      const uint32_t bytes = 2 * min(slice.step, m.columns - column);
      ring.wait_empty();
      if (lane == 0) arrive_expect_for_warp(ring.full(), mine * bytes);
      __syncwarp();
      if (row < slice.rows) {
        copy_bulk(ring.data() + row * slice.pitch(), from + 2 * column, bytes, ring.full(), policy);
      }
      ring.advance();
    }
  }
}

// Keys, then values, kKeys rows of each at a time; the new row is not there yet. Rows are too short for bulk copies.
template <int kDim>
__device__ __forceinline__ void copy_keys(const Args &p, const Layer &layer, const Lengths &of_first, Ring &ring,
                                          uint64_t policy) {
  constexpr int kBytes = 2 * kDim, kPieces = kBytes / 16;
  const int thread = threadIdx.x - kConsumers;
  const int64_t row_bytes = static_cast<int64_t>(p.kv_heads) * kBytes;
  for (int i = blockIdx.x; i < parts_of_all(p); i += gridDim.x) {
    const Lengths lengths = i == static_cast<int>(blockIdx.x) ? of_first : load_lengths(p, i);
    const Part part = find_part(p, layer.window_left, i, lengths);
    const int64_t at = (static_cast<int64_t>(part.row) * p.capacity * p.kv_heads + part.head) * kBytes;
    for (int key = part.first; key < part.end; key += kKeys) {
      const int pieces = (min(key + kKeys, min(part.end, part.length)) - key) * kPieces;  // of cached rows
#pragma unroll 1
      for (int values = 0; values < 2; ++values) {
        const char *from = (values ? layer.v_cache : layer.k_cache) + at + key * row_bytes;
        ring.wait_empty();
        const uint32_t to = ring.data();
#pragma unroll 4
        for (int j = thread; j < pieces; j += kCopiers) {
          const int row = j / kPieces, piece = j % kPieces;
          asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(
                           to + row * (kBytes + 16) + piece * 16),
                       "l"(from + row * row_bytes + piece * 16), "l"(policy)
                       : "memory");
        }
        asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(ring.full()) : "memory");
        ring.advance();
      }
    }
  }
}

template <int kDim>
__device__ void copy_all(const Args &p, Ring &ring) {
  uint64_t once;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
#ifdef TRACE
  if (p.variant & 1) asm volatile("createpolicy.fractional.L2::evict_normal.b64 %0, 1.0;" : "=l"(once));
#endif
  const Lengths lengths = load_lengths(p, blockIdx.x);
#pragma unroll 1
  for (int i = 0; i <= 4 * p.layers; ++i) {
    const Phase phase = i == 4 * p.layers ? kHead : static_cast<Phase>(i % 4);
    const Layer &layer = p.layer[i / 4];
    copy_weights(matrix_of<kDim>(p, layer, phase), ring, once);
    if (phase == kQkv) copy_keys<kDim>(p, layer, lengths, ring, once);
  }
}

}  // namespace gqa::cuda::decoder_step
