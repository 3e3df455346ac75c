// Which tile a block takes next: the order of tiles, and the warp that finds them.
#pragma once

#include "cuda/gqa_attention_prefill_sm90/work.cuh"

namespace gqa::cuda::prefill_sm90 {

// Blocks take tiles to and fro: where these are in order of their height each gets as much as the others, and what is
// left to the end is short.
__device__ __forceinline__ int take_tile(int turn) {
  const int grid = gridDim.x, block = blockIdx.x;
  return turn * grid + (turn % 2 == 0 ? block : grid - 1 - block);
}

// Tiles of a section in order of their height, and of one height all heads, those of one KV head side by side. Sections
// go up and down by turns and the last one down, so that heights never jump.
template <typename Tile>
__device__ __forceinline__ bool find_dense(const PrefillArgs &a, int tile, PrefillWork &work) {
  if (tile >= a.tiles) return false;
  const int section = a.per_section.divide(tile), within = tile - section * static_cast<int>(a.per_section.by);
  const Divisor &heads = section == a.last_section ? a.heads_of_last : a.heads_of_section;
  const int height = heads.divide(within), head = section * a.section + within - height * static_cast<int>(heads.by);
  const int batch = a.q_heads.divide(head);
  if (threadIdx.x % 32 == 0) {
    work.batch = batch;
    work.head = head - batch * static_cast<int>(a.q_heads.by);
    work.row0 = ((a.last_section - section) % 2 == 0 ? a.row_tiles - 1 - height : height) * Tile::kRows;
  }
  return true;
}

// How far the search is. In shared memory, as the searching warp has few registers.
struct TileSearch {
  int32_t turn;
  int32_t counted;                       // a ragged batch with sound offsets that fits
  int32_t height, before, sequences;     // the row tile, how many tiles are higher, and how many sequences have it
  int32_t row_tiles[kPrefillSequences];  // of each sequence; sequence `batch` are the rows of none
};

static_assert(kWorkPlaces * sizeof(PrefillWork) + sizeof(TileSearch) <= kPrefillWorkBytes);

// False where offsets are unsound: which rows are whose is then for load_sequence to say.
template <typename Tile>
__device__ __forceinline__ bool count_ragged(const PrefillArgs &a, TileSearch &search) {
  const gqa_index &offsets = a.p.cu_seqlens_q;
  bool sound = load_index(offsets, 0) == 0;
#pragma unroll 1
  for (int b = threadIdx.x % 32; b <= a.p.batch; b += 32) {
    const int64_t first = load_index(offsets, b), last = b < a.p.batch ? load_index(offsets, b + 1) : a.p.total_q;
    sound = sound && first <= last && last <= a.p.total_q;
    search.row_tiles[b] = min(static_cast<int>((last - first + Tile::kRows - 1) / Tile::kRows), a.row_tiles);
  }
  search.height = a.row_tiles;
  search.before = search.sequences = 0;
  return __all_sync(0xffffffffu, sound);
}

// All tiles that there are in order of their height; `tile` rises from call to call.
template <typename Tile>
__device__ __forceinline__ bool find_ragged(const PrefillArgs &a, int tile, TileSearch &search, PrefillWork &work) {
  const int heads = a.p.num_q_heads, all = static_cast<int>(a.p.batch) + 1;
  int height = search.height, before = search.before, sequences = search.sequences;
  // Which of 32 sequences from the first have the row tile.
  const auto have = [&](int first) {
    const int b = first + threadIdx.x % 32;
    return __ballot_sync(0xffffffffu, b < all && search.row_tiles[b] > height);
  };
  while (tile >= before + sequences * heads) {
    if (height == 0) return false;
    before += sequences * heads;
    --height;
    sequences = 0;
#pragma unroll 1
    for (int b = 0; b < all; b += 32) sequences += __popc(have(b));
  }
  __syncwarp();  // all lanes have read them
  search.height = height, search.before = before, search.sequences = sequences;
  int rank = (tile - before) / heads, first = 0;
  if (threadIdx.x % 32 == 0) {
    work.head = tile - before - rank * heads;
    work.row0 = height * Tile::kRows;
  }
  uint32_t those = have(0);
#pragma unroll 1
  for (; rank >= __popc(those); those = have(first)) rank -= __popc(those), first += 32;
#pragma unroll 1
  for (; rank > 0; --rank) those &= those - 1;
  if (threadIdx.x % 32 == 0) work.batch = first + __ffs(those) - 1;
  return true;
}

// The next tile that has queries, or that there is none. By one warp: a lookup takes thousands of clocks.
template <typename Tile>
__device__ __forceinline__ void find_tile(const PrefillArgs &a, TileSearch &search, PrefillWork &work) {
  for (int empty = 1; empty;) {
    // Unknown arguments: what does not change is not kept in registers, which are short.
    const PrefillArgs &here = (&a)[afresh(0)];
    const int tile = take_tile(search.turn);
    bool exists;
    if (Tile::kCounts && search.counted) {
      exists = find_ragged<Tile>(here, tile, search, work);
    } else {
      exists = find_dense<Tile>(here, tile, work);
    }
    __syncwarp();
    empty = 0;
    if (threadIdx.x % 32 == 0) {
      ++search.turn;
      work.task = PrefillTask::kDone;
      if (exists) {
        describe_tile<Tile>(here, work);
        empty = work.row0 >= work.queries;
      }
    }
    __syncwarp();
    empty = uniform(empty);
  }
}

// Arguments that the first tile is found by, one of each line of the constant cache: they come meanwhile.
__device__ __forceinline__ void touch(const PrefillArgs &a) {
  asm volatile("" ::"l"(a.p.seqlen_q), "l"(a.p.seqlen_k), "r"(a.window_left), "r"(a.tiles), "r"(a.plain),
               "r"(a.heads_of_last.by), "r"(a.q_heads.shift));
}

// All tiles, ahead of all who need them.
template <typename Tile>
__device__ __forceinline__ void find_tiles(const PrefillArgs &a, uint32_t memory, PrefillWork *shared_work) {
  const PrefillBarriers<Tile> barriers{memory + Tile::kBarriersAt};
  TileSearch &search = *reinterpret_cast<TileSearch *>(shared_work + kWorkPlaces);
  search.turn = 0;
  search.counted = Tile::kCounts && a.counts && count_ragged<Tile>(a, search);
  __syncwarp();
  for (RingCount<kWorkPlaces> at;; at.advance()) {
    // Not kept in registers, which are short.
    const auto place = [&]() -> PrefillWork & { return shared_work[afresh(at.stage())]; };
    mbarrier_wait(barriers.work_empty(afresh(at.stage())), at.parity() ^ 1);
    find_tile<Tile>(a, search, place());
    const bool done = place().task == PrefillTask::kDone;
    __syncwarp();
    if (threadIdx.x % 32 == 0) mbarrier_arrive(barriers.work_full(afresh(at.stage())));
    if (done) return;
  }
}

}  // namespace gqa::cuda::prefill_sm90
