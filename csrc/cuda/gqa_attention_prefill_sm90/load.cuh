// The loading warpgroup: one thread finds work and fills the rings, three warps inspect values.
#pragma once

#include "cuda/common/mma.cuh"
#include "cuda/common/tma.cuh"
#include "cuda/gqa_attention_prefill_sm90/work.cuh"

namespace gqa::cuda::prefill_sm90 {

// Starts the copy of a tile's panels. Columns past the tensor's become zeros.
template <typename Tile>
__device__ __forceinline__ void copy_panels(const CUtensorMap &map, uint32_t to, uint32_t panel_bytes, uint32_t full,
                                            int token, int head, int batch) {
#pragma unroll
  for (int panel = 0; panel < Tile::kPanels; ++panel) {
    copy_panel(to + panel * panel_bytes, map, full, panel * Tile::kPanel, token, head, batch);
  }
}

// A block of keys or values. A page that does not exist is read as one outside of the tensor; keys past the end have
// none.
template <typename Tile>
__device__ __forceinline__ void copy_block(const PrefillArgs &a, const PrefillWork &work, const CUtensorMap &map,
                                           uint32_t to, uint32_t full, int block) {
  const int kv_head = work.head / a.group, first = block * Tile::kKeys;
  mbarrier_arrive_expect(full, Tile::kBlockBytes);
  if (a.page_rows == 0) {
    return copy_panels<Tile>(map, to, Tile::kKeyPanel, full, work.k_start + first, kv_head, work.k_batch);
  }
  const int pages = static_cast<int>(a.p.num_pages), page_size = static_cast<int>(a.p.page_size);
#pragma unroll 1
  for (int row = 0; row < Tile::kKeys; row += a.page_rows) {
    const int key = first + row;
    int page = pages;
    if (key < work.keys) {
      const int64_t wanted = load_index(a.p.block_table, work.batch, key / page_size);
      if (wanted >= 0 && wanted < pages) page = static_cast<int>(wanted);
    }
    copy_panels<Tile>(map, to + row * Tile::kSwizzle, Tile::kKeyPanel, full, key % page_size, kv_head, page);
  }
}

// One thread that finds work and keeps the rings full.
template <typename Tile>
__device__ __forceinline__ void load_tiles(const PrefillArgs &a, const CUtensorMap &q, const CUtensorMap &k,
                                           const CUtensorMap &v, uint32_t memory, PrefillWork *shared_work) {
  const PrefillBarriers<Tile> barriers{memory + Tile::kBarriersAt};
  RingPosition<Tile::kStages> key_at, value_at;
  int turn = 0;
  for (int round = 0;; ++round) {
    PrefillWork work{};
    do find_work<Tile>(a, turn++, work);
    while (work.task != PrefillTask::kDone && work.row0 >= work.queries);
    // Scores of the tile before are done, so the place that the tile before that had is free.
    mbarrier_wait(barriers.query_empty(), (round & 1) ^ 1);
    shared_work[round & 1] = work;
    if (work.task != PrefillTask::kAttend) {
      mbarrier_arrive(barriers.query_full());
      if (work.task == PrefillTask::kDone) return;
      continue;
    }
    const auto load_keys = [&](int block) {
      mbarrier_wait(barriers.key_empty(key_at.stage), key_at.parity ^ 1);
      copy_block<Tile>(a, work, k, memory + Tile::kKeysAt + key_at.stage * Tile::kBlockBytes,
                       barriers.key_full(key_at.stage), block);
      key_at.advance();
    };
    const auto load_values = [&](int block) {
      mbarrier_wait(barriers.value_empty(value_at.stage), value_at.parity ^ 1);
      copy_block<Tile>(a, work, v, memory + Tile::kValuesAt + value_at.stage * Tile::kBlockBytes,
                       barriers.value_loaded(value_at.stage), block);
      value_at.advance();
    };
    mbarrier_arrive_expect(barriers.query_full(), Tile::kQueryBytes);
    copy_panels<Tile>(q, memory, Tile::kQueryPanel, barriers.query_full(), work.q_start + work.row0, work.head,
                      work.q_batch);
    load_keys(work.end_block - 1);
    for (int block = work.end_block - 2; block >= work.first_block; --block) {
      load_keys(block);
      load_values(block + 1);
    }
    load_values(work.first_block);
  }
}

// A key that a row does not see has weight 0, but 0 times infinity or NaN is NaN. In blocks that not every row sees
// such values become zeros; at the end of the tile computing warps add them to the rows that do see them.
template <typename T, typename Tile>
__device__ __forceinline__ void inspect_values(unsigned char *shared, uint32_t memory, PrefillWork *shared_work,
                                               int inspector) {
  using Pair = std::conditional_t<std::is_same_v<T, __half>, __half2, __nv_bfloat162>;
  constexpr uint32_t kChunks = Tile::kBlockBytes / 16, kStep = 32 * kInspectors;
  const PrefillBarriers<Tile> barriers{memory + Tile::kBarriersAt};
  const uint32_t lane = threadIdx.x % 32, first_chunk = 32 * inspector + lane;
  RingPosition<Tile::kStages> at;
  for (int round = 0;; ++round) {
    mbarrier_wait(barriers.query_full(), round & 1);
    PrefillWork &work = shared_work[round & 1];
    if (work.task == PrefillTask::kDone) return;
    if (work.task != PrefillTask::kAttend) continue;
    const int first = work.first_block, first_sure = work.first_sure, end_sure = work.end_sure;
    for (int block = work.end_block - 1; block >= first; --block) {
      mbarrier_wait(barriers.value_loaded(at.stage), at.parity);
      if (block < first_sure || block >= end_sure) {
        uint4 *const chunks = reinterpret_cast<uint4 *>(shared + Tile::kValuesAt + at.stage * Tile::kBlockBytes);
        const Pair zero{};
        Pair sum{};  // of zero times each value: +0, or NaN
#pragma unroll 4
        for (uint32_t i = first_chunk; i < kChunks; i += kStep) {
          const uint4 x = chunks[i];
          for (const uint32_t &pair : {x.x, x.y, x.z, x.w})
            sum = __hfma2(reinterpret_cast<const Pair &>(pair), zero, sum);
        }
        if (reinterpret_cast<const uint32_t &>(sum) != 0) {
          for (uint32_t i = first_chunk; i < kChunks; i += kStep) {
            uint4 x = chunks[i];
            for (uint32_t *pair : {&x.x, &x.y, &x.z, &x.w}) *pair &= ~nonfinite<T>(*pair);
            chunks[i] = x;
          }
          fence_async_proxy();
          work.care = 1;
        }
      }
      __syncwarp();
      if (lane == 0) mbarrier_arrive(barriers.value_full(at.stage));
      at.advance();
    }
  }
}

}  // namespace gqa::cuda::prefill_sm90
