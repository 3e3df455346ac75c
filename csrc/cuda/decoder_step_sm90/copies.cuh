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

// The stages of weights in the order of their use, as one lane sees them: it has a row of each tile, if any. A bulk
// copy occupies its warp for tens of cycles, so the rows are shared out among the warps.
template <int kDim>
struct Stages {
  const Args &p;
  const char *shared;
  const int warp, row;
  int i = 0;  // phase, of all layers'
  Matrix m;
  Slice slice;
  int first, column, rows;
  const char *from;

  __device__ Stages(const Args &args, const char *shared_)
      : p(args), shared(shared_), warp(threadIdx.x / 32 - kWarps), row(threadIdx.x % 32 * kStepCopyWarps + warp) {
    begin_phase();
  }
  __device__ bool more() const { return i <= 4 * p.layers; }
  __device__ uint32_t bytes() const { return 2 * min(slice.step, m.columns - column); }
  __device__ int rows_of_warp() const { return (rows - warp + kStepCopyWarps - 1) / kStepCopyWarps; }

  __device__ void begin_phase() {
    for (; more(); ++i) {
      const Phase phase = i == 4 * p.layers ? kHead : static_cast<Phase>(i % 4);
      slice = slice_of(shared, phase);
      if (slice.count() == 0) continue;
      m = matrix_of<kDim>(p, p.layer[min(i / 4, p.layers - 1)], phase);
      first = slice.begin;
      return begin_tile();
    }
  }
  __device__ void begin_tile() {
    const int tile = tile_of(m), outputs = min(tile, slice.end - first);
    slice.step = outputs == tile ? slice.full_step : slice.last_step;
    rows = m.gated ? 2 * outputs : outputs;
    column = 0;
    from = row < rows ? weights_of(m, row, outputs, first) : nullptr;
  }
  __device__ void advance() {
    column += slice.step;
    if (column < m.columns) return;
    first += tile_of(m);
    if (first < slice.end) return begin_tile();
    ++i;
    begin_phase();
  }
  __device__ void copy(Filler &filler, uint64_t policy) const {
    const Ring &ring = filler.ring;
    filler.make_room(rows * slice.pitch());
    if (threadIdx.x % 32 == 0) arrive_expect_for_warp(ring.full(), rows_of_warp() * bytes());
    __syncwarp();
    if (from != nullptr) copy_bulk(ring.data() + row * slice.pitch(), from + 2 * column, bytes(), ring.full(), policy);
  }
};

// Keys, then values, kKeys rows of each at a time; the new row is not there yet. Rows are too short for bulk copies.
template <int kDim>
__device__ __forceinline__ void copy_keys(const Args &p, const Layer &layer, const Lengths &of_first, Filler &filler,
                                          uint64_t policy) {
  constexpr int kBytes = 2 * kDim, kPieces = kBytes / 16;
  const int thread = threadIdx.x - kConsumers;
  const int64_t row_bytes = static_cast<int64_t>(p.kv_heads) * kBytes;
  for (int i = blockIdx.x; i < parts_of_all(p); i += gridDim.x) {
    const Lengths lengths = i == static_cast<int>(blockIdx.x) ? of_first : load_lengths(p, i);
    const Part part = find_part(p, layer.window_left, i, lengths);
    const int64_t at = (static_cast<int64_t>(part.row) * p.capacity * p.kv_heads + part.head) * kBytes;
    for (int key = part.first; key < part.end; key += kKeys) {
      const int keys = min(kKeys, part.end - key), pieces = min(keys, part.length - key) * kPieces;  // of cached rows
#pragma unroll 1
      for (int values = 0; values < 2; ++values) {
        const char *from = (values ? layer.v_cache : layer.k_cache) + at + key * row_bytes;
        filler.make_room(bytes_of_keys<kDim>(keys));
        const uint32_t to = filler.ring.data();
#pragma unroll 4
        for (int j = thread; j < pieces; j += kCopiers) {
          const int row = j / kPieces, piece = j % kPieces;
          asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2;" ::"r"(
                           to + row * (kBytes + 16) + piece * 16),
                       "l"(from + row * row_bytes + piece * 16), "l"(policy)
                       : "memory");
        }
        asm volatile("cp.async.mbarrier.arrive.noinc.shared::cta.b64 [%0];" ::"r"(filler.ring.full()) : "memory");
        filler.ring.advance();
      }
    }
  }
}

template <int kDim>
__device__ void copy_all(const Args &p, const char *shared, const Ring &ring) {
  uint64_t once;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  const Lengths lengths = load_lengths(p, blockIdx.x);
  Stages<kDim> stages(p, shared);
  Filler filler(p, ring);
  int phase = 0;
#pragma unroll 1
  while (true) {
    // Keys come after the weights of q, k and v.
    for (; phase < stages.i && phase < 4 * p.layers; ++phase) {
      if (phase % 4 == kQkv) copy_keys<kDim>(p, p.layer[phase / 4], lengths, filler, once);
    }
    if (!stages.more()) break;
    stages.copy(filler, once);
    filler.ring.advance();
    stages.advance();
  }
}

}  // namespace gqa::cuda::decoder_step
