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

// Where the keys and values of a block's KV head are. In shared memory, as registers are scarce in the loop over keys.
template <typename T>
struct KeySource {
  const T *k, *v;
  int b, first, last;  // only keys [first, last) are read, and only their pages looked up; the others become zeros

  KeySource() = default;
  __device__ KeySource(const AttentionArgs &a, const Queries &queries, int first_, int last_)
      : b(static_cast<int>(queries.b)), first(first_), last(last_) {
    const int64_t sequence = a.per_sequence ? queries.b : 0;
    const int64_t start = a.p.k_cache != nullptr ? 0 : queries.sequence.k_start;
    k = static_cast<const T *>(a.k) + sequence * a.k_stride[0] + start * a.k_stride[1] +
        queries.kv_head * a.k_stride[2];
    v = static_cast<const T *>(a.v) + sequence * a.v_stride[0] + start * a.v_stride[1] +
        queries.kv_head * a.v_stride[2];
  }

  __device__ bool has(int key) const { return key >= first && key < last; }
};

// Loads blocks of kKeys keys or values of one KV head; of its group's kWarps warps each loads kKeys / kWarps rows.
template <typename T, int kDim, int kKeys, int kWarps>
class KeyLoader {
  static constexpr int kLanes = kPermuted<kDim>;    // side by side they copy 16 bytes each of a row at once,
  static constexpr int kParts = kDim / 8 / kLanes;  // in this many parts,
  static constexpr int kRows = 32 / kLanes;         // of this many rows per warp,
  static constexpr int kJump = kRows * kWarps;      // and then go on this far down
  static constexpr int kSteps = kKeys / kJump;
  static_assert(kKeys % kJump == 0 && kSteps * kRows <= 32, "whole steps, and a lane per row for its page");

 public:
  __device__ KeyLoader(const KeySource<T> &source, int warp, int lane)
      : source_(source), row_(warp * kRows + lane / kLanes), lane_(lane) {}

  // Looks up the pages of the block at `begin`, which is the next to be loaded: of one row per lane.
  __device__ void find_page(const AttentionArgs &a, int begin) {
    if (!a.paged) return;
    const int key = begin + row_ - lane_ / kLanes + lane_ / kRows * kJump + lane_ % kRows;
    const bool wanted = lane_ < kSteps * kRows && source_.has(key);
    offset_ = wanted ? offset_of(a, a.k_stride, key) : 0;
  }

  // Starts the copies of the block at `begin` to a shared address; a row of a bad page becomes NaN.
  __device__ void load_keys(const AttentionArgs &a, int begin, uint32_t to) const {
    load(a, source_.k, a.k_stride, begin, to);
  }
  __device__ void load_values(const AttentionArgs &a, int begin, uint32_t to) const {
    load(a, source_.v, a.v_stride, begin, to);
  }

  // Columns `column` and the next one of the value of a key, straight from global memory.
  __device__ float2 value_at(const AttentionArgs &a, int key, int column) const {
    if (!source_.has(key) || column >= a.p.head_dim) return make_float2(0, 0);
    const int64_t from = offset_of(a, a.v_stride, key);
    if (from < 0) return make_float2(NAN, NAN);
    return make_float2(to_float(source_.v[from + column]), to_float(source_.v[from + column + 1]));
  }

 private:
  static constexpr int64_t kBadPage = -1;

  // Of a key's row from the first one, in elements.
  __device__ int64_t offset_of(const AttentionArgs &a, const int64_t *stride, int key) const {
    if (!a.paged) return key * stride[1];
    const uint32_t size = static_cast<uint32_t>(a.p.page_size), index = static_cast<uint32_t>(key) / size;
    const int64_t page = load_index(a.p.block_table, source_.b, index);
    return page >= 0 && page < a.p.num_pages ? page * stride[0] + (key - index * size) * stride[1] : kBadPage;
  }

  // Where this lane's first chunk of step `step` goes: rows 8 apart have their columns permuted alike.
  __device__ uint32_t offset(int step) const {
    const uint32_t first = shared_offset<kDim>(row_, lane_ % kLanes), flip = kJump % 8 == 0 ? 0 : step % 2 * 64;
    return (first ^ flip) + step * kJump * kDim * 2;
  }
  __device__ bool has_column(const AttentionArgs &a, int part) const {
    return (part * kLanes + lane_ % kLanes) * 8 < a.p.head_dim;
  }

  __device__ __forceinline__ void load(const AttentionArgs &a, const T *base, const int64_t *stride, int begin,
                                       uint32_t to) const {
    if (!a.direct || (a.paged && __any_sync(0xffffffffu, offset_ == kBadPage))) {
      return load_any(a, base, stride, begin, to);
    }
    const int first = source_.first - begin, last = source_.last - begin;
    const T *from = base + (begin + row_) * stride[1] + lane_ % kLanes * 8;
#pragma unroll
    for (int step = 0; step < kSteps; ++step) {
      // Paged keys and values have the same strides, so a row has the same offset in both.
      if (a.paged) {
        from = base + __shfl_sync(0xffffffffu, offset_, step * kRows + lane_ / kLanes) + lane_ % kLanes * 8;
      }
      const int row = row_ + step * kJump;
      const bool there = row >= first && row < last;
#pragma unroll
      for (int part = 0; part < kParts; ++part) {
        copy_async(to + offset(step) + part * kLanes * 16, from + part * kLanes * 8, there && has_column(a, part));
      }
      from += kJump * stride[1];
    }
  }

  // Bad pages, rows that are not 16-byte aligned, paged K and V with unlike strides.
  __device__ void load_any(const AttentionArgs &a, const T *base, const int64_t *stride, int begin, uint32_t to) const {
#pragma unroll 1
    for (int i = 0; i < kSteps * kParts; ++i) {
      const int step = i / kParts, part = i % kParts, key = begin + row_ + step * kJump;
      uint4 chunk = make_uint4(0, 0, 0, 0);
      if (source_.has(key) && has_column(a, part)) {
        const int64_t from = offset_of(a, stride, key);
        chunk = from < 0 ? make_uint4(0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu)
                         : load_unaligned(base + from + (part * kLanes + lane_ % kLanes) * 8);
      }
      store_shared16(to + offset(step) + part * kLanes * 16, chunk);
    }
  }

  const KeySource<T> &source_;
  int64_t offset_ = 0;  // of this lane's row in a paged cache
  int row_, lane_;
};

}  // namespace gqa::cuda
