// Blocks of keys and values on their way from global to shared memory.
#pragma once

#include "cuda/common/async_copy.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/quantized.cuh"
#include "cuda/gqa_attention/args.cuh"
#include "cuda/gqa_attention/shared_rows.cuh"

namespace gqa::cuda {

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
  const char *k, *v;
  int element;         // bytes
  float key_scale;     // of a quantised cache
  int b, first, last;  // only keys [first, last) are read, and only their pages looked up; the others become zeros

  KeySource() = default;
  __device__ KeySource(const AttentionArgs &a, const Queries &queries, int first_, int last_)
      : b(static_cast<int>(queries.b)), first(first_), last(last_) {
    const int64_t sequence = a.per_sequence ? queries.b : 0;
    const int64_t start = a.p.k_cache != nullptr ? 0 : queries.sequence.k_start;
    const auto head_of = [&](const void *x, const int64_t *stride) {
      return static_cast<const char *>(x) +
             (sequence * stride[0] + start * stride[1] + queries.kv_head * stride[2]) * element;
    };
    element = a.quantized != 0 ? 1 : sizeof(T);
    key_scale = k_scale_of(a.p.quantization, queries.kv_head);
    k = head_of(a.k, a.k_stride);
    v = head_of(a.v, a.v_stride);
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
    if (a.quantized != 0) {
      const auto *stored = reinterpret_cast<const uint8_t *>(source_.v) + from + column;
      return make_float2(stored_value(a.quantized, stored[0]), stored_value(a.quantized, stored[1]));
    }
    const T *values = reinterpret_cast<const T *>(source_.v) + from + column;
    return make_float2(to_float(values[0]), to_float(values[1]));
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

  __device__ __forceinline__ void load(const AttentionArgs &a, const char *head, const int64_t *stride, int begin,
                                       uint32_t to) const {
    if (a.quantized != 0) return load_stored_rows(a, head, stride, begin, to);
    const T *base = reinterpret_cast<const T *>(head);
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

  // Rows of a quantised cache: through registers, a few at a time so that their loads overlap.
  __device__ void load_stored_rows(const AttentionArgs &a, const char *head, const int64_t *stride, int begin,
                                   uint32_t to) const {
    constexpr int kAtOnce = kWarps > 1 ? 1 : (kSteps * kParts % 4 == 0 ? 4 : 2);  // registers are scarce
#pragma unroll 1
    for (int i = 0; i < kSteps * kParts; i += kAtOnce) {
      uint2 stored[kAtOnce];
      bool bad[kAtOnce];
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int step = (i + j) / kParts, part = (i + j) % kParts, key = begin + row_ + step * kJump;
        stored[j] = make_uint2(0, 0);
        bad[j] = false;
        if (!source_.has(key) || !has_column(a, part)) continue;
        const int64_t from = offset_of(a, stride, key);
        bad[j] = from < 0;
        const auto *bytes = reinterpret_cast<const uint8_t *>(head);
        if (!bad[j]) stored[j] = load_stored(bytes + from + (part * kLanes + lane_ % kLanes) * 8);
      }
#pragma unroll
      for (int j = 0; j < kAtOnce; ++j) {
        const int step = (i + j) / kParts, part = (i + j) % kParts;
        uint4 chunk = widen_stored<T>(a.quantized, stored[j]);
        if (bad[j]) chunk = make_uint4(0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu, 0x7fff7fffu);
        store_shared16(to + offset(step) + part * kLanes * 16, chunk);
      }
    }
  }

  const KeySource<T> &source_;
  int64_t offset_ = 0;  // of this lane's row in a paged cache
  int row_, lane_;
};

}  // namespace gqa::cuda
