// The loading warpgroup: one warp finds tiles (search.cuh), one fills the rings, two inspect values.
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

// Where a lane's rows of a block are: a chunk of rows of one page.
struct PageChunk {
  int page, row;
};

// A page that does not exist is read as one outside of the tensor; keys past the end have none.
template <typename Tile>
__device__ __forceinline__ PageChunk find_chunk(const PrefillArgs &a, const PrefillWork &work, int block) {
  const int pages = static_cast<int>(a.p.num_pages), page_size = static_cast<int>(a.p.page_size);
  const int inside = threadIdx.x % 32 * a.page_rows, key = block * Tile::kKeys + inside;
  PageChunk chunk{pages, key % page_size};
  if (inside < Tile::kKeys && key < work.keys) {
    const int64_t wanted = load_index(a.p.block_table, work.batch, key / page_size);
    if (wanted >= 0 && wanted < pages) chunk.page = static_cast<int>(wanted);
  }
  return chunk;
}

// A block of keys or values, by a warp.
template <typename Tile>
__device__ __forceinline__ void copy_block(const PrefillArgs &a, const PrefillWork &work, const CUtensorMap &map,
                                           uint32_t to, uint32_t full, int block, PageChunk chunk) {
  const int kv_head = work.head / a.group, lane = threadIdx.x % 32, inside = lane * a.page_rows;
  if (lane == 0) mbarrier_arrive_expect(full, Tile::kBlockBytes);
  if (a.page_rows == 0) {
    if (lane != 0) return;
    copy_panels<Tile>(map, to, Tile::kKeyPanel, full, work.k_start + block * Tile::kKeys, kv_head, work.k_batch);
  } else {
    __syncwarp();
    if (inside >= Tile::kKeys) return;
    copy_panels<Tile>(map, to + inside * Tile::kSwizzle, Tile::kKeyPanel, full, chunk.row, kv_head, chunk.page);
  }
}

// One warp that keeps the rings full, as in one run of blocks over all tiles: values come one block after their keys,
// also where the keys are the next tile's, and that tile's queries ahead of both.
template <typename Tile>
__device__ __forceinline__ void load_tiles(const PrefillArgs &a, const CUtensorMap &q, const CUtensorMap &k,
                                           const CUtensorMap &v, uint32_t memory, const PrefillWork *shared_work) {
  const PrefillBarriers<Tile> barriers{memory + Tile::kBarriersAt};
  RingCount<kWorkPlaces> work_at;
  RingCount<Tile::kQueries> query_at;
  RingCount<Tile::kStages> key_at;  // values are one block behind
  const auto load_queries = [&](RingCount<kWorkPlaces> place) {
    mbarrier_wait(barriers.work_full(place.stage()), place.parity());
    const PrefillWork &work = shared_work[place.stage()];
    if (work.task != PrefillTask::kAttend) return;
    mbarrier_wait(barriers.query_empty(query_at.stage()), query_at.parity() ^ 1);
    if (threadIdx.x == 0) {
      const uint32_t full = barriers.query_full(query_at.stage());
      mbarrier_arrive_expect(full, Tile::kQueryBytes);
      copy_panels<Tile>(q, memory + query_at.stage() * Tile::kQueryBytes, Tile::kQueryPanel, full,
                        work.q_start + work.row0, work.head, work.q_batch);
    }
    query_at.advance();
  };
  PageChunk chunk{};
  const auto load_keys = [&](const PrefillWork &work, int block) {
    if (a.page_rows != 0) chunk = find_chunk<Tile>(a, work, block);
    mbarrier_wait(barriers.key_empty(key_at.stage()), key_at.parity() ^ 1);
    copy_block<Tile>(a, work, k, memory + Tile::kKeysAt + key_at.stage() * Tile::kBlockBytes,
                     barriers.key_full(key_at.stage()), block, chunk);
    key_at.advance();
  };
  const auto release = [&](RingCount<kWorkPlaces> place) {
    __syncwarp();
    if (threadIdx.x == 0) mbarrier_arrive(barriers.work_empty(place.stage()));
  };
  int late = -1;  // the block whose values are next, of the tile at late_at
  PageChunk late_chunk{};
  RingCount<kWorkPlaces> late_at;
  const auto load_values = [&](RingCount<Tile::kStages> value_at) {
    if (late < 0) return;
    mbarrier_wait(barriers.value_empty(value_at.stage()), value_at.parity() ^ 1);
    const PrefillWork &work = shared_work[late_at.stage()];
    copy_block<Tile>(a, work, v, memory + Tile::kValuesAt + value_at.stage() * Tile::kBlockBytes,
                     barriers.value_loaded(value_at.stage()), late, late_chunk);
    if (late == work.first_block) release(late_at);
    late = -1;
  };
  load_queries(work_at);
  for (;;) {
    const PrefillWork &work = shared_work[work_at.stage()];
    RingCount<kWorkPlaces> next_at = work_at;
    next_at.advance();
    if (work.task != PrefillTask::kAttend) {
      load_values(key_at.before());
      if (work.task == PrefillTask::kDone) return;
      release(work_at);
      load_queries(next_at);
    } else {
      const int first_block = work.first_block;
      for (int block = work.end_block - 1; block >= first_block; --block) {
        load_keys(work, block);
        load_values(key_at.before().before());
        late = block;
        late_at = work_at;
        late_chunk = chunk;
      }
      if (Tile::kQueries == 1) load_values(key_at.before());
      load_queries(next_at);
    }
    work_at = next_at;
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
  RingCount<Tile::kStages> at;
  RingCount<kWorkPlaces> work_at;
  for (;; work_at.advance()) {
    mbarrier_wait(barriers.work_full(work_at.stage()), work_at.parity());
    PrefillWork &work = shared_work[work_at.stage()];
    if (work.task == PrefillTask::kDone) return;
    const auto release = [&] {
      __syncwarp();
      if (lane == 0) mbarrier_arrive(barriers.work_empty(work_at.stage()));
    };
    if (work.task != PrefillTask::kAttend) {
      release();
      continue;
    }
    const int first = work.first_block, first_sure = work.first_sure, end_sure = work.end_sure;
    for (int block = work.end_block - 1; block >= first; --block) {
      mbarrier_wait(barriers.value_loaded(at.stage()), at.parity());
      if (block < first_sure || block >= end_sure) {
        uint4 *const chunks = reinterpret_cast<uint4 *>(shared + Tile::kValuesAt + at.stage() * Tile::kBlockBytes);
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
      if (lane == 0) mbarrier_arrive(barriers.value_full(at.stage()));
      at.advance();
    }
    release();
  }
}

}  // namespace gqa::cuda::prefill_sm90
