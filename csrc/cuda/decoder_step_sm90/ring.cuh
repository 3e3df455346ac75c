// The ring of stages between the warps that copy and those that compute, and what a block's stages hold.
#pragma once

#include "cuda/common/mbarrier.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/decoder_step_sm90/args.h"

namespace gqa::cuda::decoder_step {

// Stages lie one after the other, each as long as what it holds; one that has no room before the end lies at the start.
// Both sides find the same places. A stage is full when all copying lanes and their bytes have arrived, empty when all
// computing warps have.
struct Ring {
  uint32_t shared, at, size;
  int slot = 0;  // of the barriers
  uint32_t parity = 0, next = 0, offset = 0;

  __device__ Ring(const Args &p, uint32_t shared_) : shared(shared_), at(shared_ + p.ring_at), size(p.ring_bytes) {}
  __device__ void init() const {
    for (int i = 0; i < kStepSlots; ++i) {
      mbarrier_init(shared + 16 * i, kCopiers);
      mbarrier_init(shared + 16 * i + 8, kWarps);
    }
    mbarrier_fence_init();
  }
  __device__ uint32_t full() const { return shared + 16 * slot; }
  __device__ uint32_t data() const { return at + offset; }
  __device__ void place(uint32_t bytes) {
    offset = next + bytes > size ? 0 : next;
    next = offset + bytes;
  }
  __device__ void wait_full(uint32_t bytes) {
    place(bytes);
    mbarrier_wait(full(), parity);
  }
  __device__ void advance() {
    slot = (slot + 1) % kStepSlots;
    if (slot == 0) parity ^= 1;
  }
  // By each warp that computes.
  __device__ void release() {
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(shared + 16 * slot + 8);
    advance();
  }
};

// The copying side: which stages are in the ring. Positions count on and on; lane s knows where the stage of slot s
// begins. Not more than `ahead` stages are on their way at once: what blocks hand to each other waits behind them.
struct Filler {
  Ring ring;
  const int ahead;
  uint32_t begin = 0, end = 0, first = 0;  // end of the last stage, begin of the first in the ring
  int used = 0, oldest = 0;
  uint32_t parity = 0;

  __device__ Filler(const Args &p, const Ring &ring_) : ring(ring_), ahead(p.ahead) {}

  __device__ void make_room(uint32_t bytes) {
    const uint32_t before = ring.next;
    ring.place(bytes);
    if (ring.offset != before) end += ring.size - before;
    while (used > 0 && (end + bytes - first > ring.size || used == kStepSlots)) {
      mbarrier_wait(ring.shared + 16 * oldest + 8, parity);
      oldest = (oldest + 1) % kStepSlots;
      if (oldest == 0) parity ^= 1;
      --used;
      first = __shfl_sync(~0u, begin, oldest);
    }
    if (used == 0) first = end;
    if (threadIdx.x % 32 == ring.slot) begin = end;
    end += bytes, ++used;
    if (ahead > 0) {  // the stage that many before has come
      const int slot = (ring.slot + kStepSlots - ahead) % kStepSlots;
      mbarrier_wait(ring.shared + 16 * slot, slot > ring.slot ? ring.parity ^ 1 : ring.parity);
    }
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
  __device__ int pitch() const { return 2 * step + 16; }
};

__device__ __forceinline__ int tile_of(const Matrix &m) { return m.gated ? kTileRows / 2 : kTileRows; }

__device__ __forceinline__ int find_step(int columns, int rows, int room) {
  const int most = (room / rows - 16) / 64 * 32, stages = (columns + most - 1) / most;
  return ((columns + stages - 1) / stages + 31) / 32 * 32;
}

__device__ __forceinline__ int4 find_slice(const Matrix &m, int stage_bytes) {
  const int each = m.outputs / gridDim.x, rest = m.outputs - each * gridDim.x, block = blockIdx.x;
  const int begin = each * block + min(block, rest), count = each + (block < rest);
  if (count == 0) return make_int4(begin, begin, 0, 0);
  const int tile = tile_of(m), scale = m.gated ? 2 : 1, last = (count - 1) % tile + 1;
  return make_int4(begin, begin + count, find_step(m.columns, tile * scale, stage_bytes),
                   find_step(m.columns, last * scale, stage_bytes));
}

// Bytes of a stage of keys, or of values, whose rows are multiplied 16 at a time.
template <int kDim>
__device__ __forceinline__ uint32_t bytes_of_keys(int keys) {
  return (keys + 15) / 16 * 16 * (2 * kDim + 16);
}

constexpr int kSlicesAt = kStepWordsAt + 64, kPartAt = kSlicesAt + 80;

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
  int share;   // of the outputs that this part's block joins
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
  const int each = max(p.min_keys, ((keys + p.splits - 1) / p.splits + 7) / 8 * 8);
  part.parts = max(1, (keys + each - 1) / each);
  part.first = keys == 0 ? 0 : low + part.index * each;
  part.end = keys == 0 ? 0 : min(part.first + each, part.length + 1);
  const int outputs = p.group * p.head_dim;
  part.share = (outputs / 4 + part.parts - 1) / part.parts * 4;
  part.last = part.index == part.parts - 1;
  return part;
}

}  // namespace gqa::cuda::decoder_step
