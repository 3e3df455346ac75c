// Where the rows of a paged cache lie.
#pragma once

#include "cuda/gqa_attention_decode_sm90/block.cuh"

namespace gqa::cuda::decode_sm90 {

// Page of row `lane % kTile` of a tile, or of the nearest row that is seen; -1 for a bad one.
template <typename C>
struct Place {
  int page = 0;

  __device__ static uint32_t page_of(const Args &p, int row) {
    return static_cast<uint32_t>((static_cast<uint64_t>(row) * p.page_magic) >> p.page_shift);
  }
  __device__ static int look_up(const Args &p, int b, int row) {
    if (!C::kAligned && p.block_table.data == nullptr) return 0;
    const int64_t id = load_index(p.block_table, b, page_of(p, row));
    return id >= 0 && id < p.num_pages ? static_cast<int>(id) : -1;
  }
  __device__ void find(const Args &p, const Block<C> &t, int tile) {
    if constexpr (C::kPaged) {
      const int row = min(max(tile * C::kTile + t.lane % C::kTile, t.row_low), t.row_high - 1);
      if (tile < t.tile_end) page = look_up(p, t.b, row);
    }
  }
  __device__ bool is_bad() const { return __any_sync(~0u, page < 0); }
  // Offset of a row in a head of the cache.
  __device__ static int64_t offset(const Args &p, int page, int row, int64_t outer, int row_bytes) {
    if constexpr (C::kPaged) {
      const uint32_t in_page = row - page_of(p, row) * p.page_size;
      return page * outer + static_cast<int64_t>(in_page) * row_bytes;
    }
    return static_cast<int64_t>(row) * row_bytes;
  }
};

// Pages of a warp's coming tiles, where no 16 rows cross one: a lane looks up those of 16 rows, tiles ahead, because at
// every tile the warp would wait for the table.
template <typename C>
struct Pages {
  static constexpr int kAtOnce = 32 / C::kSteps;  // tiles
  int now = 0, next = 0;

  __device__ int look_up(const Args &p, const Block<C> &t, int at) const {
    const int tile = t.first + (at + t.lane / C::kSteps) * t.stride, row = tile * C::kTile + t.lane % C::kSteps * 16;
    return tile < t.tile_end ? Place<C>::look_up(p, t.b, min(max(row, t.row_low), t.row_high - 1)) : 0;
  }
  __device__ void begin(const Args &p, const Block<C> &t) {
    if constexpr (C::kPaged) {
      if (p.paged_tiles) now = look_up(p, t, 0), next = look_up(p, t, kAtOnce);
    }
  }
  // Of the warp's cached tile `at`; asked for in order.
  __device__ Place<C> of(const Args &p, const Block<C> &t, int at) {
    Place<C> place;
    if constexpr (C::kPaged) {
      if (!p.paged_tiles) {
        place.find(p, t, t.first + at * t.stride);
        return place;
      }
      if (at > 0 && at % kAtOnce == 0) now = next, next = look_up(p, t, at + kAtOnce);
      place.page = __shfl_sync(~0u, now, at % kAtOnce * C::kSteps + t.lane % C::kTile / 16);
    }
    return place;
  }
};

}  // namespace gqa::cuda::decode_sm90
