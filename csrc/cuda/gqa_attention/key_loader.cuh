// Blocks of keys and values on their way from global to shared memory.
#pragma once

#include "cuda/common/cp_async.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/gqa_attention/args.cuh"

namespace gqa::cuda {

// Rows of kDim halves in shared memory, their 16-byte columns permuted so that eight rows of one column lie in
// different banks. The permutation is an exclusive or with a function of the row modulo 8.
template <int kDim>
__device__ __forceinline__ uint32_t permutation(uint32_t row) {
  static_assert(kDim % 64 == 0 || kDim == 96, "three banks of rows need another permutation");
  return kDim % 64 == 0 ? row & 7 : (row >> 1) & 3;
}

template <int kDim>
__device__ __forceinline__ uint32_t shared_offset(uint32_t row, uint32_t column) {
  return row * (kDim * 2) + ((column ^ permutation<kDim>(row)) << 4);
}

// Four 8 x 8 matrices of a 16 x 16 tile as load_matrices wants them. kAcross: the second matrix is to the right of the
// first (keys as the b operand), else below it (queries, and values transposed).
template <int kDim, bool kAcross>
struct LaneAddress {
  uint32_t row_bytes, column;

  __device__ explicit LaneAddress(int lane) {
    const uint32_t matrix = lane / 8, right = kAcross ? matrix & 1 : matrix >> 1,
                   down = kAcross ? matrix >> 1 : matrix & 1;
    row_bytes = (down * 8 + lane % 8) * (kDim * 2);
    column = right ^ permutation<kDim>(lane % 8);
  }

  // Of the tile at row `row`, a multiple of 8, and elements 16 pair ... 16 pair + 15.
  __device__ uint32_t at(uint32_t base, int row, int pair) const {
    return base + row * (kDim * 2) + row_bytes + (((2 * pair) ^ column) << 4);
  }
};

// Eight halves from an address of any alignment.
template <typename T>
__device__ __forceinline__ uint4 load_unaligned(const T *from) {
  const uint16_t *halves = reinterpret_cast<const uint16_t *>(from);
  uint32_t pairs[4];
#pragma unroll
  for (int i = 0; i < 4; ++i) pairs[i] = halves[2 * i] | static_cast<uint32_t>(halves[2 * i + 1]) << 16;
  return {pairs[0], pairs[1], pairs[2], pairs[3]};
}

// Loads blocks of kKeys keys for one KV head; of its group's kWarps warps each loads kKeys / kWarps rows.
template <typename T, int kDim, int kKeys, int kWarps>
class KeyLoader {
  static constexpr int kColumns = kDim / 8;
  static constexpr int kRows = kKeys / kWarps;
  static constexpr int kSteps = kRows * kColumns / 32;
  static_assert(kRows <= 32 && kRows * kColumns % 32 == 0, "a lane per row, whole warps of columns");

 public:
  // Only keys [first, last) are read, and only their pages looked up; the others become zeros.
  __device__ KeyLoader(const AttentionArgs &a, const Queries &queries, int first, int last, int warp, int lane)
      : first_(first), last_(last), row0_(warp * kRows), lane_(lane) {
    const int64_t b = a.per_sequence ? queries.b : 0;
    const int64_t start = a.p.k_cache != nullptr ? 0 : queries.sequence.k_start;
    k_ = static_cast<const T *>(a.k) + b * a.k_stride[0] + start * a.k_stride[1] + queries.kv_head * a.k_stride[2];
    v_ = static_cast<const T *>(a.v) + b * a.v_stride[0] + start * a.v_stride[1] + queries.kv_head * a.v_stride[2];
  }

  // Looks up the page of this lane's row of the block at `begin`, which is the next to be loaded.
  __device__ void find_page(const AttentionArgs &a, int64_t b, int begin) {
    if (!a.paged) return;
    const int key = begin + row0_ + lane_;
    page_ = -1;
    if (lane_ < kRows && key >= first_ && key < last_) {
      const uint32_t size = static_cast<uint32_t>(a.p.page_size), index = static_cast<uint32_t>(key) / size;
      const int64_t page = load_index(a.p.block_table, b, index);
      page_ = page >= 0 && page < a.p.num_pages ? static_cast<int>(page) : -1;
      row_in_page_ = static_cast<int>(static_cast<uint32_t>(key) - index * size);
    }
  }

  // Starts the copies of the block at `begin` to shared addresses k and v; a row of a bad page becomes NaN.
  __device__ void load(const AttentionArgs &a, int begin, uint32_t k, uint32_t v) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int row = (lane_ + 32 * step) / kColumns, column = (lane_ + 32 * step) % kColumns;
      const int key = begin + row0_ + row;
      const bool wanted = key >= first_ && key < last_ && column * 8 < a.p.head_dim;
      int64_t k_from, v_from;
      bool missing = false;
      if (a.paged) {
        const int page = __shfl_sync(0xffffffffu, page_, row), inner = __shfl_sync(0xffffffffu, row_in_page_, row);
        missing = page < 0;
        k_from = page * a.k_stride[0] + inner * a.k_stride[1];
        v_from = page * a.v_stride[0] + inner * a.v_stride[1];
      } else {
        k_from = key * a.k_stride[1];
        v_from = key * a.v_stride[1];
      }
      const uint32_t to = shared_offset<kDim>(row0_ + row, column);
      if (wanted && missing) {
        const uint4 nan = make_uint4(0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu);
        store_shared(k + to, nan);
        store_shared(v + to, nan);
      } else if (a.aligned) {
        copy_async(k + to, wanted ? k_ + k_from + column * 8 : k_, wanted);
        copy_async(v + to, wanted ? v_ + v_from + column * 8 : v_, wanted);
      } else {
        store_shared(k + to, wanted ? load_unaligned(k_ + k_from + column * 8) : uint4{});
        store_shared(v + to, wanted ? load_unaligned(v_ + v_from + column * 8) : uint4{});
      }
    }
  }

 private:
  const T *k_, *v_;
  int first_, last_, row0_, lane_;
  int page_ = -1, row_in_page_ = 0;
};

}  // namespace gqa::cuda
