// How a warp of the Hopper decode kernels fills its stages: tiles of 16 cached rows, 16 bytes a lane and copy.
#pragma once

#include "cuda/common/async_copy.cuh"
#include "cuda/gqa_attention_decode_sm90/pages.cuh"

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

// 16 bytes of a row. L2 fetches rows that are no whole lines as they are, or it would bring what other blocks read,
// too.
template <typename C>
__device__ __forceinline__ void copy_chunk_async(uint32_t to, const char *from, uint32_t bytes) {
  if constexpr (C::kHeads == 1 && C::kRowBytes % 128 != 0) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(to), "l"(from), "r"(bytes) : "memory");
  } else {
    copy_async16(to, from, bytes);
  }
}

// One instruction, which the compiler does not see in 64-bit arithmetic.
__device__ __forceinline__ const char *row_at(const char *from, int row, int row_bytes) {
  const char *at;
  asm("mad.wide.s32 %0, %1, %2, %3;" : "=l"(at) : "r"(row), "r"(row_bytes), "l"(from));
  return at;
}

// The copies of this lane: kChunks / 2 a tile, one pattern of rows and chunks every kPeriod of them.
template <typename C>
struct Loader {
  static constexpr int kPeriod = 32 % C::kChunks == 0 ? 1 : 3;
  static constexpr int kPeriodRows = 32 * kPeriod / C::kChunks, kRepeats = C::kTile / kPeriodRows;
  static_assert(kPeriodRows * C::kChunks == 32 * kPeriod && kRepeats * kPeriodRows == C::kTile &&
                16 % kPeriodRows == 0);

  int row[kPeriod], chunk[kPeriod];
  uint32_t to[kPeriod];
  const char *k[kPeriod], *v[kPeriod];  // where those chunks of the head lie, of a tile at row 0
  int k_row, v_row;

  __device__ Loader(const Args &p, const Block<C> &t) : k_row(p.k_row), v_row(p.v_row) {
#pragma unroll
    for (int i = 0; i < kPeriod; ++i) {
      row[i] = static_cast<uint32_t>(32 * i + t.lane) / C::kChunks;
      chunk[i] = static_cast<uint32_t>(32 * i + t.lane) % C::kChunks;
      to[i] = row[i] * C::kRowBytes + ((chunk[i] ^ C::swizzle(row[i])) << 4);
      k[i] = t.k_head + static_cast<int64_t>(row[i]) * k_row + chunk[i] * 16;
      v[i] = t.v_head + static_cast<int64_t>(row[i]) * v_row + chunk[i] * 16;
      keep(to[i]), keep(row[i]), keep(k[i]), keep(v[i]);
    }
    keep(k_row), keep(v_row);
  }

  // Calls copy(i, rows ahead of row[i], shared address) for each copy of this lane into the tile at `address`.
  template <typename Copy>
  __device__ void for_each(uint32_t address, Copy &&copy) const {
#pragma unroll
    for (int m = 0; m < kRepeats; ++m) {
#pragma unroll
      for (int i = 0; i < kPeriod; ++i) {
        const int ahead = m * kPeriodRows;
        copy(i, ahead, ((address + to[i]) ^ (C::swizzle(ahead) << 4)) + ahead * C::kRowBytes);
      }
    }
  }

  // Starts the copies of a tile. Rows that nobody sees become zeros without being read.
  __device__ void load(const Args &p, const Block<C> &t, const Place<C> &place, int tile, uint32_t stage) const {
    const int first = tile * C::kTile;
    const uint32_t skipped = t.row_low - first, seen = t.row_high - t.row_low;
    const auto bytes = [&](int at) { return at - skipped < seen ? 16u : 0u; };
    const char *nan = reinterpret_cast<const char *>(__cvta_generic_to_global(&nan_chunk));
    if (C::kAligned && (!C::kPaged || p.paged_tiles)) {
      int pages[C::kSteps];  // of 16 rows each
      const char *k_rows[C::kSteps][kPeriod], *v_rows[C::kSteps][kPeriod];
#pragma unroll
      for (int step = 0; step < C::kSteps; ++step) {
        int page = 0, row_in_page = first + 16 * step;
        if constexpr (C::kPaged) {
          page = C::kSteps == 1 ? place.page : __shfl_sync(~0u, place.page, 16 * step);
          row_in_page -= Place<C>::page_of(p, row_in_page) * p.page_size;
        }
        pages[step] = page;
#pragma unroll
        for (int i = 0; i < kPeriod; ++i) {
          k_rows[step][i] = row_at(k[i] + (C::kPaged ? page * p.k_outer : 0), row_in_page, k_row);
          v_rows[step][i] = row_at(v[i] + (C::kPaged ? page * p.v_outer : 0), row_in_page, v_row);
        }
      }
      for_each(stage, [&](int i, int ahead, uint32_t to_address) {
        const int step = ahead / 16;
        const char *k_from = row_at(k_rows[step][i], ahead % 16, k_row);
        const char *v_from = row_at(v_rows[step][i], ahead % 16, v_row);
        if (C::kPaged && pages[step] < 0) k_from = v_from = nan;
        copy_chunk_async<C>(to_address, k_from, bytes(row[i] + ahead));
        copy_chunk_async<C>(to_address + C::kTileBytes, v_from, bytes(row[i] + ahead));
      });
    } else {
      for_each(stage, [&](int i, int ahead, uint32_t to_address) {
        const int at = row[i] + ahead, page = __shfl_sync(~0u, place.page, at);
        const char *k_from = t.k_head + Place<C>::offset(p, page, first + at, p.k_outer, k_row) + chunk[i] * 16;
        const char *v_from = t.v_head + Place<C>::offset(p, page, first + at, p.v_outer, v_row) + chunk[i] * 16;
        if constexpr (C::kAligned) {
          if (page < 0) k_from = v_from = nan;
          copy_chunk_async<C>(to_address, k_from, bytes(at));
          copy_chunk_async<C>(to_address + C::kTileBytes, v_from, bytes(at));
        } else {
          const uint4 zero{};
          store_shared16(to_address, bytes(at) == 0 ? zero
                                     : page < 0     ? nan_chunk
                                                    : load_unaligned16<C::kBytes>(k_from));
          store_shared16(to_address + C::kTileBytes, bytes(at) == 0 ? zero
                                                     : page < 0     ? nan_chunk
                                                                    : load_unaligned16<C::kBytes>(v_from));
        }
      });
    }
  }
};

}  // namespace gqa::cuda::decode_sm90
