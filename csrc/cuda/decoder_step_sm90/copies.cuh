// What the copying warp does: all weights and cached keys of the block, in the order of their use, as room comes up.
#pragma once

#include "cuda/decoder_step_sm90/ring.cuh"

namespace gqa::cuda::decoder_step {

__device__ __forceinline__ void copy_bulk(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier,
                                          uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

template <bool kGated>
__device__ __forceinline__ const char *weights_of(const Matrix &m, int lane, int outputs, int first) {
  const int64_t bytes = 2 * static_cast<int64_t>(m.columns);
  if constexpr (kGated)
    return lane < outputs ? m.weights[0] + (first + lane) * bytes : m.weights[1] + (first + lane - outputs) * bytes;
  const int output = first + lane;
  if (output < m.ends[0]) return m.weights[0] + output * bytes;
  return output < m.ends[1] ? m.weights[1] + (output - m.ends[0]) * bytes : m.weights[2] + (output - m.ends[1]) * bytes;
}

template <bool kGated>
__device__ void copy_weights(const Matrix &m, Ring &ring, uint64_t policy) {
  const int lane = threadIdx.x % 32;
  Slice<kGated> slice(m, ring.stage_bytes);
  for (int first = slice.begin; first < slice.end; first += slice.kOutputs) {
    slice.find_step(first);
    const char *from = lane < slice.rows ? weights_of<kGated>(m, lane, slice.outputs(first), first) : nullptr;
    for (int column = 0; column < m.columns; column += slice.step) {
      const uint32_t bytes = 2 * min(slice.step, m.columns - column);
      ring.wait_empty();
      if (lane < slice.rows) {
        mbarrier_arrive_expect(ring.full(), bytes);
        copy_bulk(ring.data() + lane * slice.pitch(), from + 2 * column, bytes, ring.full(), policy);
      } else {
        mbarrier_arrive(ring.full());
      }
      ring.advance();
    }
  }
}

// Keys, then values, kKeys rows of each at a time; the new row is not there yet.
template <int kDim>
__device__ void copy_keys(const Args &p, const Layer &layer, Ring &ring, uint64_t policy) {
  constexpr int kBytes = 2 * kDim, kPitch = kBytes + 16;
  const int lane = threadIdx.x % 32;
  const int64_t row_bytes = static_cast<int64_t>(p.kv_heads) * kBytes;
  for (int i = blockIdx.x; i < parts_of_all(p); i += gridDim.x) {
    const Part part = find_part(p, layer, i);
    const int64_t at = (static_cast<int64_t>(part.row) * p.capacity * p.kv_heads + part.head) * kBytes;
    for (int key = part.first; key < part.end; key += kKeys) {
      const int keys = min(kKeys, min(part.end, static_cast<int>(part.length)) - key);  // cached
      const int mine = keys > lane ? (keys - lane + 31) / 32 : 0;
#pragma unroll 1
      for (int values = 0; values < 2; ++values) {
        const char *from = (values ? layer.v_cache : layer.k_cache) + at;
        ring.wait_empty();
        mbarrier_arrive_expect(ring.full(), mine * kBytes);
        for (int j = lane; j < keys; j += 32) {
          copy_bulk(ring.data() + j * kPitch, from + (key + j) * row_bytes, kBytes, ring.full(), policy);
        }
        ring.advance();
      }
    }
  }
}

}  // namespace gqa::cuda::decoder_step
