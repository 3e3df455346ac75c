// Attention of the new token over its row's cache: each block a part of the keys of a KV head. The blocks of a head
// hand each other their sums, and each joins them, in a fixed order, for a part of the outputs.
#pragma once

#include "cuda/decoder_step_sm90/join.cuh"

namespace gqa::cuda::decoder_step {

// Rows of the stage that no copy brought: the new one, and zeros past the end.
template <int kDim>
__device__ __forceinline__ void fill_rows(const Block &t, const Part &part, char *rows, int first, int slot,
                                          bool zeros) {
  constexpr int kVectors = kDim / 8;
  const char *fresh = head_at(t, slot, kHeadPitch<kDim>);
  for (int i = t.lane; i < 16 * kVectors; i += 32) {
    const int key = first + i / kVectors, at = i / kVectors * kHeadPitch<kDim> + i % kVectors * 16;
    if (key < part.length && key < part.end) continue;
    const bool is_new = key < part.end;
    if (!is_new && !zeros) continue;
    *reinterpret_cast<uint4 *>(rows + at) =
        is_new ? reinterpret_cast<const uint4 *>(fresh)[i % kVectors] : make_uint4(0, 0, 0, 0);
  }
  __syncwarp();
}

// Keys come by copies of another kind than the weights that come after them.
__device__ __forceinline__ void release_keys(Ring &ring) {
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
  ring.release();
}

template <typename T, int kDim>
__device__ __forceinline__ void attend(const Args &p, const Layer &layer, const Lengths &of_first, Block &t,
                                       Ring &ring) {
  const int group = p.q_heads / p.kv_heads;
  for (int i = blockIdx.x; i < parts_of_all(p); i += gridDim.x) {
    const Lengths lengths = i == static_cast<int>(blockIdx.x) ? of_first : load_lengths(p, i);
    const Part part = find_part(p, layer.window_left, i, lengths);
    uint32_t *out = p.attention + (static_cast<int64_t>(part.row) * p.q_heads + part.head * group) * kDim;
    if (part.index >= part.parts) continue;
    load_angles<T>(p, t, part.row, lengths);
    stage_heads<T, kDim>(p, layer, t, part);
    if (!part.valid) {  // not before the row's heads are there: nobody may get ahead of a block that still works on
                        // them
      for (int j = t.thread; j < group * kDim; j += kConsumers) {
        publish(out + j, from_float<T>(__int_as_float(0x7fffffff)), t.tag);
      }
      sync_consumers();
      continue;
    }
    WarpSums<T, kDim> sums;
    for (int key = part.first; key < part.end; key += kKeys) {
      const int first = key + 16 * t.warp, keys = part.end - first;
      const int offset = 16 * t.warp * kHeadPitch<kDim>;
      uint32_t weights[2];
      ring.wait_full();
      if (keys > 0) {
        char *rows = t.shared + (ring.data() - t.address) + offset;
        if (first + 16 > part.length) fill_rows<kDim>(t, part, rows, first, kNewKey, false);
        sums.scores(p, t, ring.data() + offset, keys, weights);
      }
      release_keys(ring);
      ring.wait_full();
      if (keys > 0) {
        char *rows = t.shared + (ring.data() - t.address) + offset;
        if (first + 16 > part.length || keys < 16) fill_rows<kDim>(t, part, rows, first, kNewValue, true);
        sums.add(t, ring.data() + offset, weights);
      }
      release_keys(ring);
    }
    join_warps(p, t, part, group, sums, out);
    if (part.parts > 1) join_parts<T, kDim>(p, t, part, group, out);
    sync_consumers();  // before anything else comes where the sums are
  }
}

}  // namespace gqa::cuda::decoder_step
