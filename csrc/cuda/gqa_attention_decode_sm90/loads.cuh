// How a warp of the Hopper decode kernels fills its stages: tiles of 16 cached rows, 16 bytes a lane and copy.
#pragma once

#include "cuda/common/async_copy.cuh"
#include "cuda/gqa_attention_decode_sm90/block.cuh"

namespace gqa::cuda::decode_sm90 {

// What rows of a bad page read as: NaN in either 16-bit type.
static __device__ const uint4 nan_chunk = {0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu};

template <int kBytes>
__device__ __forceinline__ uint4 load_unaligned16(const char *from) {
  if constexpr (kBytes == 1) {  // the aligned words that hold them
    const auto address = reinterpret_cast<uintptr_t>(from);
    const auto *x = reinterpret_cast<const uint32_t *>(address / 4 * 4);
    const uint32_t shift = address % 4 * 8, last = shift != 0 ? x[4] : 0;
    return make_uint4(__funnelshift_r(x[0], x[1], shift), __funnelshift_r(x[1], x[2], shift),
                      __funnelshift_r(x[2], x[3], shift), __funnelshift_r(x[3], last, shift));
  }
  const auto *x = reinterpret_cast<const uint16_t *>(from);
  return make_uint4(x[0] | x[1] << 16, x[2] | x[3] << 16, x[4] | x[5] << 16, x[6] | x[7] << 16);
}

template <int kBytes>
__device__ __forceinline__ void store_unaligned16(char *to, uint4 value) {
  const uint32_t pairs[4] = {value.x, value.y, value.z, value.w};
  if constexpr (kBytes == 1) {
#pragma unroll
    for (int i = 0; i < 16; ++i) to[i] = static_cast<char>(pairs[i / 4] >> 8 * (i % 4));
    return;
  }
  auto *x = reinterpret_cast<uint16_t *>(to);
#pragma unroll
  for (int i = 0; i < 8; ++i) x[i] = static_cast<uint16_t>(pairs[i / 2] >> 16 * (i % 2));
}

// 16 bytes of a row. L2 fetches rows of less than 128 bytes as they are, or it would bring what other blocks read, too.
template <typename C>
__device__ __forceinline__ void copy_chunk_async(uint32_t to, const char *from, uint32_t bytes) {
  if constexpr (C::kRowBytes < 128) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
  } else {
    copy_async16<C::kRowBytes>(to, from, bytes);
  }
}

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

// The copies of this lane: kChunks / 2 a tile, one pattern of rows and chunks every kPeriod of them.
template <typename C>
struct Loader {
  static constexpr int kPeriod = 32 % C::kChunks == 0 ? 1 : 3;
  static constexpr int kPeriodRows = 32 * kPeriod / C::kChunks, kRepeats = C::kTile / kPeriodRows;
  static_assert(kPeriodRows * C::kChunks == 32 * kPeriod && kRepeats * kPeriodRows == C::kTile);

  int row[kPeriod], chunk[kPeriod];
  uint32_t to[kPeriod];

  __device__ explicit Loader(int lane) {
#pragma unroll
    for (int i = 0; i < kPeriod; ++i) {
      row[i] = static_cast<uint32_t>(32 * i + lane) / C::kChunks;
      chunk[i] = static_cast<uint32_t>(32 * i + lane) % C::kChunks;
      to[i] = row[i] * C::kRowBytes + ((chunk[i] ^ C::swizzle(row[i])) << 4);
    }
  }

  // Calls copy(row in the tile, chunk, shared address) for each copy of this lane into the tile at `address`.
  template <typename Copy>
  __device__ void for_each(uint32_t address, Copy &&copy) const {
#pragma unroll
    for (int m = 0; m < kRepeats; ++m) {
#pragma unroll
      for (int i = 0; i < kPeriod; ++i) {
        const int ahead = m * kPeriodRows;
        copy(row[i] + ahead, chunk[i], ((address + to[i]) ^ (C::swizzle(ahead) << 4)) + ahead * C::kRowBytes);
      }
    }
  }

  // Starts the copies of a tile's K or V. Rows that nobody sees become zeros without being read.
  __device__ void load(const Args &p, const Block<C> &t, const Place<C> &place, int tile, const char *head,
                       int64_t outer, int row_bytes, uint32_t address) const {
    const int first = tile * C::kTile;
    const uint32_t skipped = t.row_low - first, seen = t.row_high - t.row_low;
    const auto bytes = [&](int at) { return at - skipped < seen ? 16u : 0u; };
    const char *nan = reinterpret_cast<const char *>(__cvta_generic_to_global(&nan_chunk));
    if constexpr (!C::kAligned) {
      for_each(address, [&](int at, int chunk_at, uint32_t to_address) {
        const int page = __shfl_sync(~0u, place.page, at);
        const char *from = head + Place<C>::offset(p, page, first + at, outer, row_bytes) + chunk_at * 16;
        store_shared16(to_address, bytes(at) == 0 ? uint4{} : page < 0 ? nan_chunk : load_unaligned16<C::kBytes>(from));
      });
    } else if (!C::kPaged || p.paged_tiles) {
      const char *base = head + Place<C>::offset(p, place.page, first, outer, row_bytes);
      for_each(address, [&](int at, int chunk_at, uint32_t to_address) {
        const char *from = base + static_cast<int64_t>(at) * row_bytes + chunk_at * 16;
        if (C::kPaged && place.page < 0) from = nan;
        copy_chunk_async<C>(to_address, from, bytes(at));
      });
    } else {
      for_each(address, [&](int at, int chunk_at, uint32_t to_address) {
        const int page = __shfl_sync(~0u, place.page, at);
        const char *from = head + Place<C>::offset(p, page, first + at, outer, row_bytes) + chunk_at * 16;
        if (page < 0) from = nan;
        copy_chunk_async<C>(to_address, from, bytes(at));
      });
    }
  }
  __device__ void load_k(const Args &p, const Block<C> &t, const Place<C> &place, int tile, uint32_t stage) const {
    load(p, t, place, tile, t.k_head, p.k_outer, p.k_row, stage);
  }
  __device__ void load_v(const Args &p, const Block<C> &t, const Place<C> &place, int tile, uint32_t stage) const {
    load(p, t, place, tile, t.v_head, p.v_outer, p.v_row, stage + C::kTileBytes);
  }
};

}  // namespace gqa::cuda::decode_sm90
