// The ring of stages between the warps that copy and those that compute, and what a block's stages hold.
#pragma once

#include "cuda/common/mbarrier.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/decoder_step_sm90/args.h"

namespace gqa::cuda::decoder_step {

// A stage is full when all copying lanes and their bytes have arrived, empty when all computing warps have.
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
      mbarrier_init(shared + 16 * i, kCopiers);
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

enum Phase { kQkv, kO, kGateUp, kDown, kHead };

// Up to three matrices side by side; or gate and up, whose rows come in turn, eight of each.
struct Matrix {
  const char *weights[3];
  int ends[2], outputs, columns;
  bool gated;
};

template <int kDim>
__device__ __forceinline__ Matrix matrix_of(const Args &p, const Layer &l, Phase phase) {
  const int q = p.q_heads * kDim, kv = p.kv_heads * kDim;
  switch (phase) {
    case kQkv: return {{l.q, l.k, l.v}, {q, q + kv}, q + 2 * kv, p.hidden, false};
    case kO: return {{l.o, l.o, l.o}, {p.hidden, p.hidden}, p.hidden, q, false};
    case kGateUp: return {{l.gate, l.up, l.up}, {0, 0}, p.intermediate, p.hidden, true};
    case kDown: return {{l.down, l.down, l.down}, {p.hidden, p.hidden}, p.hidden, p.intermediate, false};
    default: return {{p.head, p.head, p.head}, {p.vocabulary, p.vocabulary}, p.vocabulary, p.hidden, false};
  }
}

// The outputs of a phase that this block has, in tiles; a tile's columns come in as few equal stages as have room.
// Worked out once, for divisions take long.
struct Slice {
  int begin, end, full_step, last_step;  // columns of a stage of a full tile, and of the last
  int step;

  __device__ int count() const { return end - begin; }
};

__device__ __forceinline__ int tile_of(const Matrix &m) { return m.gated ? kTileRows / 2 : kTileRows; }

__device__ __forceinline__ int find_step(int columns, int rows, int room) {
  const int most = (room / rows - 16) / 32 * 16, stages = (columns + most - 1) / most;
  return ((columns + stages - 1) / stages + 15) / 16 * 16;
}

__device__ __forceinline__ int4 find_slice(const Matrix &m, int stage_bytes) {
  const int each = m.outputs / gridDim.x, rest = m.outputs - each * gridDim.x, block = blockIdx.x;
  const int begin = each * block + min(block, rest), count = each + (block < rest);
  if (count == 0) return make_int4(begin, begin, 0, 0);
  const int tile = tile_of(m), scale = m.gated ? 2 : 1, last = (count - 1) % tile + 1;
  return make_int4(begin, begin + count, find_step(m.columns, tile * scale, stage_bytes),
                   find_step(m.columns, last * scale, stage_bytes));
}

constexpr int kSlicesAt = kStepWordsAt + 64;

__device__ __forceinline__ Slice slice_of(const char *shared, Phase phase) {
  const int4 s = reinterpret_cast<const int4 *>(shared + kSlicesAt)[phase];
  return {s.x, s.y, s.z, s.w, s.z};
}

struct Lengths {
  int64_t cached, leftpad;
};

// The keys of a row that a block attends to with one KV head: [first, end), the last of them new if `last`.
struct Part {
  int row, head, pair, index, parts;
  int length;  // of the row's cache
  int first, end;
  bool valid, last;
};

__device__ __forceinline__ int parts_of_all(const Args &p) { return p.rows * p.kv_heads * p.splits; }

__device__ __forceinline__ Lengths load_lengths(const Args &p, int i) {
  const int row = i / p.splits / p.kv_heads;
  if (i >= parts_of_all(p)) return {0, 0};
  return {load_index(p.cache_seqlens, row), load_index_or(p.cache_leftpad, 0, row)};
}

__device__ __forceinline__ Part find_part(const Args &p, int64_t window_left, int i, const Lengths &lengths) {
  Part part;
  part.pair = i / p.splits, part.index = i - part.pair * p.splits;
  part.row = part.pair / p.kv_heads, part.head = part.pair - part.row * p.kv_heads;
  part.valid = lengths.cached >= 0 && lengths.cached < p.capacity && lengths.leftpad >= 0;
  part.length = part.valid ? static_cast<int>(lengths.cached) : 0;
  int low = lengths.leftpad < p.capacity ? static_cast<int>(lengths.leftpad) : p.capacity;
  if (window_left >= 0 && part.length - window_left > low) low = static_cast<int>(part.length - window_left);
  const int keys = part.valid && low <= part.length ? part.length + 1 - low : 0;
  const int each = max(p.min_keys, ((keys + p.splits - 1) / p.splits + 15) / 16 * 16);
  part.parts = max(1, (keys + each - 1) / each);
  part.first = keys == 0 ? 0 : low + part.index * each;
  part.end = keys == 0 ? 0 : min(part.first + each, part.length + 1);
  part.last = part.index == part.parts - 1;
  return part;
}

}  // namespace gqa::cuda::decoder_step
