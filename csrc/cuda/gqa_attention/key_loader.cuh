// Blocks of keys and values on their way from global to shared memory.
#pragma once

#include "cuda/common/async_copy.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/gqa_attention/args.cuh"

namespace gqa::cuda {

// Rows of kDim halves in shared memory, their 16-byte columns permuted so that eight rows of one column lie in
// different banks. The permutation is an exclusive or with a function of the row modulo 8.
template <int kDim>
constexpr uint32_t kPermuted = kDim % 64 == 0 ? 8 : 4;  // columns among which it moves one

template <int kDim>
__device__ __forceinline__ uint32_t permutation(uint32_t row) {
  static_assert(kDim % 64 == 0 || kDim == 96, "other widths need another permutation");
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
    constexpr uint32_t kPart = kPermuted<kDim>;
    return base + row_bytes + ((2 * pair % kPart ^ column) << 4) + (row * (kDim * 2) + 2 * pair / kPart * kPart * 16);
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
      : b_(static_cast<int>(queries.b)), first_(first), last_(last), row0_(warp * kRows), lane_(lane) {
    const int64_t b = a.per_sequence ? queries.b : 0;
    const int64_t start = a.p.k_cache != nullptr ? 0 : queries.sequence.k_start;
    k_ = static_cast<const T *>(a.k) + b * a.k_stride[0] + start * a.k_stride[1] + queries.kv_head * a.k_stride[2];
    v_ = static_cast<const T *>(a.v) + b * a.v_stride[0] + start * a.v_stride[1] + queries.kv_head * a.v_stride[2];
  }

  // Looks up the page of this lane's row of the block at `begin`, which is the next to be loaded.
  __device__ void find_page(const AttentionArgs &a, int begin) {
    if (!a.paged) return;
    const int key = begin + row0_ + lane_;
    offset_ = 0;
    if (lane_ < kRows && key >= first_ && key < last_) {
      const uint32_t size = static_cast<uint32_t>(a.p.page_size), index = static_cast<uint32_t>(key) / size;
      const int64_t page = load_index(a.p.block_table, b_, index);
      offset_ =
          page >= 0 && page < a.p.num_pages ? page * a.k_stride[0] + (key - index * size) * a.k_stride[1] : kBadPage;
    }
  }

  // Starts the copies of the block at `begin` to shared addresses k and v; a row of a bad page becomes NaN.
  __device__ void load(const AttentionArgs &a, int begin, uint32_t k, uint32_t v) const {
    if (!a.direct || (a.paged && __any_sync(0xffffffffu, offset_ == kBadPage))) {
      load_any(a, begin, k, v);
    } else if (a.paged) {
      load_pages(a, begin, k, v);
    } else {
      load_rows(a, begin, k, v);
    }
  }

  // Columns `column` and the next one of the value of a key, straight from global memory.
  __device__ float2 value_at(const AttentionArgs &a, int key, int column) const {
    if (key < first_ || key >= last_ || column >= a.p.head_dim) return make_float2(0, 0);
    const int64_t from = a.paged ? cache_offset(a.p, a.v_stride, b_, key, 0) : key * a.v_stride[1];
    if (from < 0) return make_float2(NAN, NAN);
    return make_float2(to_float(v_[from + column]), to_float(v_[from + column + 1]));
  }

 private:
  static constexpr int64_t kBadPage = -1;

  __device__ int row_of(int step) const { return (lane_ + 32 * step) / kColumns; }
  __device__ int column_of(int step) const { return (lane_ + 32 * step) % kColumns; }
  __device__ bool is_wanted(const AttentionArgs &a, int key, int column) const {
    return key >= first_ && key < last_ && column * 8 < a.p.head_dim;
  }

  __device__ void load_rows(const AttentionArgs &a, int begin, uint32_t k, uint32_t v) const {
    const int row0 = begin + row0_ + row_of(0);
    const T *k_row = k_ + row0 * a.k_stride[1], *v_row = v_ + row0 * a.v_stride[1];
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int row = row_of(step), column = column_of(step), jump = row - row_of(0);
      const bool wanted = is_wanted(a, begin + row0_ + row, column);
      const uint32_t to = shared_offset<kDim>(row0_ + row, column);
      copy_async(k + to, k_row + jump * a.k_stride[1] + column * 8, wanted);
      copy_async(v + to, v_row + jump * a.v_stride[1] + column * 8, wanted);
    }
  }

  // K and V have the same strides, so a row has the same offset in both.
  __device__ void load_pages(const AttentionArgs &a, int begin, uint32_t k, uint32_t v) const {
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      const int row = row_of(step), column = column_of(step);
      const int64_t from = __shfl_sync(0xffffffffu, offset_, row) + column * 8;
      const bool wanted = is_wanted(a, begin + row0_ + row, column);
      const uint32_t to = shared_offset<kDim>(row0_ + row, column);
      copy_async(k + to, k_ + from, wanted);
      copy_async(v + to, v_ + from, wanted);
    }
  }

  // Bad pages, rows that are not 16-byte aligned, paged K and V with unlike strides.
  __device__ void load_any(const AttentionArgs &a, int begin, uint32_t k, uint32_t v) const {
#pragma unroll 1
    for (int step = 0; step < kSteps; ++step) {
      const int row = row_of(step), column = column_of(step), key = begin + row0_ + row;
      uint4 k_chunk = make_uint4(0, 0, 0, 0), v_chunk = k_chunk;
      if (is_wanted(a, key, column)) {
        const int64_t k_from = a.paged ? cache_offset(a.p, a.k_stride, b_, key, 0) : key * a.k_stride[1];
        const int64_t v_from = a.paged ? cache_offset(a.p, a.v_stride, b_, key, 0) : key * a.v_stride[1];
        const uint4 nan = make_uint4(0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu);
        k_chunk = k_from < 0 ? nan : load_unaligned(k_ + k_from + column * 8);
        v_chunk = v_from < 0 ? nan : load_unaligned(v_ + v_from + column * 8);
      }
      const uint32_t to = shared_offset<kDim>(row0_ + row, column);
      store_shared16(k + to, k_chunk);
      store_shared16(v + to, v_chunk);
    }
  }

  const T *k_, *v_;
  int64_t offset_ = 0;  // of this lane's row in a paged cache
  int b_, first_, last_, row0_, lane_;
};

}  // namespace gqa::cuda
