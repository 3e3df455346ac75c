// The ring of stages between the warp that copies and the warps that compute, and what a block's stages hold.
#pragma once

#include "cuda/common/mbarrier.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/decoder_step_sm90/args.h"

namespace gqa::cuda::decoder_step {

constexpr int kWords = kStepWordsAt, kSums = kStepSumsAt, kSumsBytes = kStepSums, kQueries = kStepHeadsAt;

// A stage is full when all lanes of the copying warp and their bytes have arrived, empty when all other warps have.
struct Ring {
  uint32_t shared, at;
  int stages, stage_bytes;
  int stage = 0;
  uint32_t parity = 0;

  __device__ Ring(const Args &p, uint32_t shared_) : shared(shared_), at(shared_ + p.ring_at) {
    stages = p.stages, stage_bytes = p.stage_bytes;
  }
  __device__ void init() const {
    for (int i = 0; i < stages; ++i) {
      mbarrier_init(shared + 16 * i, 32);
      mbarrier_init(shared + 16 * i + 8, kWarps);
    }
    mbarrier_fence_init();
  }
  __device__ uint32_t full() const { return shared + 16 * stage; }
  __device__ uint32_t empty() const { return shared + 16 * stage + 8; }
  __device__ uint32_t data() const { return at + stage * stage_bytes; }
  __device__ void wait_full() const { mbarrier_wait(full(), parity); }
  __device__ void wait_empty() const { mbarrier_wait(empty(), parity ^ 1); }
  __device__ void advance() {
    if (++stage == stages) stage = 0, parity ^= 1;
  }
  // By each warp that computes.
  __device__ void release() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(empty());
    advance();
  }
};

// Up to three matrices side by side, or gate and up.
struct Matrix {
  const char *weights[3];
  int ends[2], outputs, columns;
};

// The outputs of a matrix that this block has, in tiles; a tile's columns come in as few equal stages as have room.
template <bool kGated>
struct Slice {
  static constexpr int kOutputs = kGated ? kTileRows / 2 : kTileRows;
  int begin, end, columns, room;
  int rows = 0, step = 0;

  __device__ Slice(const Matrix &m, int stage_bytes)
      : begin(static_cast<int>(static_cast<int64_t>(m.outputs) * blockIdx.x / gridDim.x)),
        end(static_cast<int>(static_cast<int64_t>(m.outputs) * (blockIdx.x + 1) / gridDim.x)),
        columns(m.columns),
        room(stage_bytes) {}
  __device__ int outputs(int first) const { return min(kOutputs, end - first); }
  // Columns of a stage of the tile from output `first` on.
  __device__ void find_step(int first) {
    const int now = outputs(first) * (kGated ? 2 : 1);
    if (now == rows) return;
    rows = now;
    const int most = (room / rows - 16) / 32 * 16, stages = (columns + most - 1) / most;
    step = ((columns + stages - 1) / stages + 15) / 16 * 16;
  }
  __device__ int pitch() const { return 2 * step + 16; }
};

// The keys of a row that a block attends to with one KV head: [first, end), the last of them new if `last`.
struct Part {
  int row, head, pair, index, parts;
  int64_t length;  // of the row's cache
  int first, end;
  bool valid, last;
};

__device__ __forceinline__ int parts_of_all(const Args &p) { return p.rows * p.kv_heads * p.splits; }

__device__ __forceinline__ Part find_part(const Args &p, const Layer &layer, int i) {
  Part part;
  part.pair = i / p.splits, part.index = i - part.pair * p.splits;
  part.row = part.pair / p.kv_heads, part.head = part.pair - part.row * p.kv_heads;
  part.length = load_index(p.cache_seqlens, part.row);
  const int64_t leftpad = load_index_or(p.cache_leftpad, 0, part.row);
  part.valid = part.length >= 0 && part.length < p.capacity && leftpad >= 0;
  int64_t low = leftpad;
  if (layer.window_left >= 0 && part.length - layer.window_left > low) low = part.length - layer.window_left;
  const int keys = part.valid && low <= part.length ? static_cast<int>(part.length + 1 - low) : 0;
  const int each = max(p.min_keys, (keys + p.splits - 1) / p.splits + 15 & ~15);
  part.parts = max(1, (keys + each - 1) / each);
  part.first = keys == 0 ? 0 : static_cast<int>(low) + part.index * each;
  part.end = keys == 0 ? 0 : min(part.first + each, static_cast<int>(part.length) + 1);
  part.last = part.index == part.parts - 1;
  return part;
}

}  // namespace gqa::cuda::decoder_step
