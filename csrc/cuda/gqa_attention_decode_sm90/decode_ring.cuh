// Decode attention on Hopper: the keys of a (sequence, KV head) are shared out among the blocks of a cluster, which
// join their sums by one-way stores in the same launch.
// Keys come in tiles of 16, which go round all warps of the cluster; a warp takes its tiles for all query rows of the
// head group and keeps its own ring of kStages tiles, softmax and sums: between the first load and the last nobody
// waits for anybody else. Warps meet once, in shared memory.
// Memory order: K and V once, by 16-byte asynchronous copies, with one sequence the first tile of each warp before the
// length is known; a stage's K is refilled as soon as it is scored.
// Limits: 16-bit types, 16-byte aligned rows, at most 8 * kRowTiles query rows (tokens times heads of the group).
// Determinism: fixed order of sums; they depend on the sequence's own length and on the size of the cluster.
#pragma once

#include "cuda/common/programmatic_launch.cuh"
#include "cuda/gqa_attention_decode_sm90/finish.cuh"
#include "cuda/gqa_attention_decode_sm90/loads.cuh"
#include "cuda/gqa_attention_decode_sm90/new_keys.cuh"
#include "cuda/gqa_attention_decode_sm90/scores.cuh"

namespace gqa::cuda::decode_sm90 {

// The tiles of one warp, in order: its cached tiles and, in the warp after that of the last one, the new keys. Those
// come last or in place kStages - 1, so that they are loaded ahead of the loop.
template <typename C>
struct Work {
  int first, stride, cached, has_new, new_at;

  __device__ Work(const Block<C> &t, bool appends) {
    first = t.first, stride = t.stride;
    const int before = t.rank * C::kWarps + t.warp, tiles = t.tile_end - (first - before);
    const int rounds = static_cast<uint32_t>(tiles) / C::kWarps >> t.blocks_log, rest = tiles - rounds * stride;
    cached = rounds + (before < rest);
    has_new = !C::kPlain && appends && before == rest;
    new_at = has_new ? min(cached, C::kStages - 1) : -1;
  }
  __device__ int tile(int i) const { return first + (i - (has_new && i > new_at)) * stride; }
};

template <typename C>
__device__ void attend(const Args &p, const Block<C> &t, const Loader<C> &loader, const Work<C> &work,
                       const Queries<C> &queries, Place<C> ahead, char *ring, Sums<C> *sums) {
  const uint32_t ring_base = shared_address(ring);
  int offset = 0;
  if (C::kPlain && work.cached > 0 && (work.first + 1) * C::kTile > t.row_high) {
    copy_async_wait<C::kStages - 1>();  // loaded ahead of the length: nobody sees the values from there on
    __syncwarp();
    const int seen = t.row_high - work.first * C::kTile;
    for (int at = seen * C::kRowBytes + 16 * t.lane; at < C::kTileBytes; at += 512) {
      store_shared16(ring_base + C::kTileBytes + at, {});
    }
  }
#pragma unroll 1
  for (int i = 0; i < work.cached + work.has_new; ++i) {
    const int tile = work.tile(i), next = work.tile(i + C::kStages);
    const uint32_t stage = ring_base + offset;
    const bool is_new = !C::kPlain && i == work.new_at, refills = next < t.tile_end;
    const int key = is_new ? t.keys.cached : tile * C::kTile, end = is_new ? t.keys.total : t.row_high;
    if (is_new && i < C::kStages - 1) {
      copy_async_wait<0>();  // the last tile of this warp, loaded with the last group
    } else {
      copy_async_wait<C::kStages - 1>();
    }
    __syncwarp();
    if (is_new) append_new_keys(p, t, ring + offset);
    Scores<C> scores;
    Values<C> values;
    Sums<C>::read(t, queries, stage, &scores, &values);
    __syncwarp();
    if (refills) {
      loader.load(p, t, ahead, next, stage);
      ahead.find(p, t, next + work.stride);
    }
    copy_async_commit();
    uint32_t weights[C::kSteps][C::kRowTiles][2];
    sums->weigh(p, t, key, end, &scores, weights);
    sums->add(p, t, values, key, end, weights);
    offset = offset + C::kStageBytes == C::kWarpBytes ? 0 : offset + C::kStageBytes;
  }
}

template <typename C, int kBlocks>
__global__ void __launch_bounds__(C::kThreads, kBlocks) decode_ring(const __grid_constant__ Args p) {
#if __CUDA_ARCH__ >= 900  // the plan chooses it there only
  using T = typename C::T;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t shared_base = shared_address(shared);
  Block<C> t;
  t.find_lane();
  t.head = blockIdx.y, t.b = blockIdx.z;
  t.blocks_log = 31 - __clz(cluster_size());
  t.find_rank(p);
  const bool shares = t.blocks_log > 0, early = C::kPlain && p.early;
  char *ring = shared + t.warp * C::kWarpBytes;
  wait_for_prerequisites();
  Length length, padding;
  length.load(p.cache_seqlens, t.b, t.lane * p.zero);
  Length others{};  // of sequence `lane`
  if (p.fair > 0) others.load(p.cache_seqlens, min(t.lane, p.batch - 1), 0);
  if constexpr (!C::kPlain) padding.load(p.cache_leftpad, t.b, t.lane * p.zero);
  t.find_heads(p);
  const Loader<C> loader(p, t);
  const bool rotates = !C::kPlain && p.rotary.cos != nullptr;
  Queries<C> queries;
  if (!rotates) queries.load(p, t);  // ahead of the keys, or they would arrive after them
  if constexpr (C::kPlain) {
    if (early) {  // rows below the capacity exist: the first tile is loaded whatever the length
      t.row_low = 0, t.row_high = p.capacity, t.tile_end = (p.capacity + C::kTile - 1) / C::kTile;
      const int tile = t.rank * C::kWarps + t.warp;
      Place<C> place;
      place.find(p, t, tile);
      if (tile < t.tile_end) {
        loader.load(p, t, place, tile, shared_address(ring));
      }
    }
  }
  if (shares) {
    if (threadIdx.x == 0) {
      mbarrier_init(shared_base + C::kBarrier, 1);
      mbarrier_fence_init();
    }
    cluster_arrive_relaxed();  // waited for just before the push
  }
  const Output output(p, t);

  const int share = find_share(p, t, others);
  bool valid = divide(p, length.value(), C::kPlain ? 0 : padding.value(), share, &t);
  valid = __shfl_sync(~0u, valid, 0);
  t.make_uniform();
  if (t.rank >= t.blocks()) {  // too short a sequence to be shared out as far as here
    copy_async_wait<0>();
    return;
  }
  if (t.blocks_log > 0 && threadIdx.x == 0) {
    mbarrier_arrive_expect(shared_base + C::kBarrier, (t.slots(p) << t.blocks_log) * C::kUnitBytes);
  }
  const bool appends = valid && p.k != nullptr;
  const Work<C> work(t, appends);
  Place<C> place[C::kStages], ahead;
#pragma unroll
  for (int s = 0; s < C::kStages; ++s) {
    if (s > 0 || !early) place[s].find(p, t, work.first + s * work.stride);
  }
  ahead.find(p, t, work.tile(C::kStages));
#pragma unroll
  for (int s = 0; s < C::kStages; ++s) {
    const int tile = work.first + s * work.stride;
    const uint32_t stage = shared_address(ring) + s * C::kStageBytes;
    if (tile < t.tile_end && s != work.new_at && (s > 0 || !early)) {
      loader.load(p, t, place[s], tile, stage);
    }
    if (s < C::kStages - 1) copy_async_commit();
  }
  if (!C::kPlain && work.has_new) {
    const int offset = work.new_at * C::kStageBytes;
    load_new_keys(p, t, loader, shared_address(ring) + offset, ring + offset);
  }
  copy_async_commit();
  if (rotates) {
    auto *staged = reinterpret_cast<T *>(shared + C::kQueries);
    stage_queries(p, t, staged);
    __syncthreads();
    queries.load_staged(p, t, staged);
  }
  Sums<C> sums;
  sums.clear();
  attend(p, t, loader, work, queries, ahead, ring, &sums);
  launch_dependents();  // not sooner: the next kernel's blocks would take the room of ours that have not begun

  if constexpr (C::kPlain) copy_async_wait<0>();  // for a first tile that nobody wanted
  __syncwarp();
  sums.store(p, t, ring);
  __syncthreads();
  if (t.blocks_log == 0) {
    join_warps<C>(p, shared, [&](int unit, int lane, float4 o, float top, float sum) {
      write_lane(p, t, output, valid, unit, lane, o, top, sum);
    });
    return;
  }
  cluster_wait();
  push_sums(p, t, shared, shared_base);
  mbarrier_wait_cluster(shared_base + C::kBarrier, 0);
  finish_units(p, t, output, shared);
#endif
}

}  // namespace gqa::cuda::decode_sm90
