// Decode attention on Hopper: the keys of a (sequence, KV head) are shared out among the blocks of a cluster, which
// join their sums by one-way stores in the same launch.
// Keys come in tiles of 16 or 32, which go round all warps of the cluster; a warp takes its tiles for all query rows of
// the head group and keeps its own ring of kStages tiles, softmax and sums: between the first load and the last nobody
// waits for anybody else. Warps meet once, in shared memory.
// Memory order: K and V once, by 16-byte asynchronous copies, with one sequence the first tile of each warp before the
// length is known; a stage is refilled as soon as its values are in registers.
// Limits: 16-bit types, 16-byte aligned rows, at most 8 * kRowTiles query rows (tokens times heads of the group).
// Determinism: fixed order of sums; they depend on the sequence's length, the size of the cluster and, with
// Args::fair, on the lengths of all sequences.
#pragma once

#include "cuda/common/programmatic_launch.cuh"
#include "cuda/gqa_attention_decode_sm90/finish.cuh"
#include "cuda/gqa_attention_decode_sm90/loads.cuh"
#include "cuda/gqa_attention_decode_sm90/quantized_keys.cuh"
#include "cuda/gqa_attention_decode_sm90/quantized_scores.cuh"
#include "cuda/gqa_attention_decode_sm90/scores.cuh"
#include "cuda/gqa_attention_decode_sm90/turns.cuh"

namespace gqa::cuda::decode_sm90 {

// The tiles of one warp, in order: its cached tiles and, in the warp after that of the last one, the new keys. Those
// come last or in place kStages - 1, so that they are loaded ahead of the loop.
template <typename C>
struct Work {
  int first, stride, cached, has_new, new_at;

  __device__ Work(const Block<C> &t, bool exists, bool appends) {
    first = t.first, stride = t.stride;
    const int before = t.rank * C::kTeam + t.member, tiles = t.tile_end - (first - before);
    const int rounds = static_cast<uint32_t>(tiles) / C::kTeam >> t.blocks_log, rest = tiles - rounds * stride;
    cached = exists ? rounds + (before < rest) : 0;
    has_new = !C::kPlain && appends && exists && before == rest;
    new_at = has_new ? min(cached, C::kStages - 1) : -1;
  }
  // The number of the i-th tile among the cached ones, and where it lies.
  __device__ int at(int i) const { return i - (has_new && i > new_at); }
  __device__ int tile(int i) const { return first + at(i) * stride; }
};

template <typename C>
using SumsOf = std::conditional_t<C::kBytes == 1, QuantizedSums<C>, Sums<C>>;

// `bad`: bit s is set where the tile in stage s has rows of bad pages.
template <typename C>
__device__ void attend(const Args &p, const Block<C> &t, const Loader<C> &loader, const Work<C> &work,
                       const Queries<C> &queries, Pages<C> pages, uint32_t bad, char *ring, SumsOf<C> *sums) {
  const uint32_t ring_base = shared_address(ring);
  Place<C> ahead = pages.of(p, t, work.at(C::kStages));
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
    const auto refill = [&] {
      __syncwarp();
      if (refills) {
        loader.load(p, t, ahead, next, stage);
        ahead = pages.of(p, t, work.at(i + C::kStages) + 1);
      }
      copy_async_commit();
    };
    typename SumsOf<C>::Weights weights;
    Scores<C> scores;
    if constexpr (C::kBytes == 1) {
      typename SumsOf<C>::Values values;
      sums->read(p, t, queries, stage, &scores, values);
      const bool checks_pages = C::kPaged && (is_new || (bad & 1));
      if (C::kPaged) bad = bad >> 1 | uint32_t{ahead.is_bad()} << (C::kStages - 1);
      if (C::kHolds) refill();
      sums->weigh(p, t, queries, key, end, checks_pages, &scores, weights);
      sums->add(p, t, values, key, end, weights);
      if (!C::kHolds) refill();
    } else {
      Values<C> values;
      read_tile(t, queries, stage, &scores, &values);
      refill();
      sums->weigh(p, t, key, end, &scores, weights);
      sums->add(p, t, values, key, end, weights);
    }
    offset = offset + C::kStageBytes == C::kWarpBytes ? 0 : offset + C::kStageBytes;
  }
}

template <typename C>
__global__ void __launch_bounds__(C::kThreads, C::kResident) decode_ring(const __grid_constant__ Args p) {
#if __CUDA_ARCH__ >= 900  // the plan chooses it there only
  using T = typename C::T;
  extern __shared__ __align__(1024) char shared[];
  const uint32_t shared_base = shared_address(shared);
  Block<C> t;
  t.find_lane();
  t.rank = cluster_rank(), t.first_rank = 0, t.blocks_log = 31 - __clz(cluster_size());
  t.first_head = blockIdx.y * C::kHeads, t.b = blockIdx.z;
  const bool clusters = t.blocks_log > 0, early = C::kPlain && p.early, turns = C::kTurns && p.fair > 0;
  const bool rotates = !C::kPlain && p.rotary.cos != nullptr;
  char *ring = shared + t.warp * C::kWarpBytes;
  if (p.triggers_early) launch_dependents();
  if (!p.static_prefix) wait_for_prerequisites();
  int phase = 0;
#pragma unroll 1
  for (int turn = 0;; ++turn) {
    Length length, padding;
    length.load(p.cache_seqlens, turns ? min(t.lane, p.batch - 1) : t.b, t.lane * p.zero);
    int cached = 0;
    bool more = false;
    if constexpr (C::kTurns) {
      if (turns) {
        const Turns<C> all(p, t, length.value());
        if (turn > 0) cluster_arrive();
        if (!all.find(p, length.value(), all.first_place(turn) + cluster_rank(), &t, &cached)) break;
        more = all.first_place(turn + 1) < all.places;
      }
    }
    if constexpr (!C::kPlain) padding.load(p.cache_leftpad, t.b, t.lane * p.zero);
    t.find_heads(p);
    const Loader<C> loader(p, t);
    Queries<C> queries;
    if (!rotates && !p.static_prefix) queries.load(p, t);  // ahead of the keys, or they would arrive after them
    Pages<C> pages;
    if (C::kPaged || C::kPlain) {  // rows below the capacity exist: these can be asked for whatever the length
      t.take_all(p);
      if (!turns) pages.begin(p, t);
      if (early && t.first < t.tile_end) loader.load(p, t, pages.of(p, t, 0), t.first, shared_address(ring));
    }
    const int guessed = t.first, guessed_stride = t.stride;
    if (clusters && turn == 0) {
      if (threadIdx.x == 0) {
        mbarrier_init(shared_base + C::kBarrier, 1);
        mbarrier_fence_init();
      }
      cluster_arrive_relaxed();  // waited for just before the push
    }
    const Output output(p, t);

    if (!turns) cached = length.value();
    bool valid =
        divide(p, cached, C::kPlain ? 0 : padding.value(), turns ? -1 : p.share, &t);  // -1: as many blocks as found
    valid = __shfl_sync(~0u, valid, 0);
    t.make_uniform();
    if (t.rank >= t.blocks()) {  // too short a sequence to be shared out as far as here
      copy_async_wait<0>();
      wait_for_prerequisites();
      return;
    }
    if (t.blocks_log > 0 && threadIdx.x == 0) {
      mbarrier_arrive_expect(shared_base + C::kBarrier, (t.slots(p) << t.blocks_log) * C::kUnitBytes);
    }
    const bool appends = valid && p.k != nullptr;
    const Work<C> work(t, t.exists(p), appends);
    if (turns || t.first != guessed || t.stride != guessed_stride) pages.begin(p, t);
    Place<C> place[C::kStages];
#pragma unroll
    for (int s = 0; s < C::kStages; ++s) {
      if (s > 0 || !early) place[s] = pages.of(p, t, s);
    }
#pragma unroll
    for (int s = 0; s < C::kStages; ++s) {
      const int tile = work.first + s * work.stride;
      const uint32_t stage = shared_address(ring) + s * C::kStageBytes;
      if (tile < t.tile_end && s != work.new_at && (s > 0 || !early)) loader.load(p, t, place[s], tile, stage);
      if (s < C::kStages - 1) copy_async_commit();
    }
    if (p.static_prefix) {
      wait_for_prerequisites();
      if (!rotates) queries.load(p, t);
    }
    if (!C::kPlain && work.has_new) {
      const int offset = work.new_at * C::kStageBytes;
      if constexpr (C::kBytes == 1) {
        stage_quantized_keys(p, t, ring + offset);
      } else {
        load_new_keys(p, t, loader, shared_address(ring) + offset, ring + offset);
      }
    }
    copy_async_commit();
    if (rotates) {
      auto *staged = reinterpret_cast<T *>(shared + C::kQueries) + t.team * C::kRows * C::kQueryPitch;
      stage_queries(p, t, staged);
      __syncthreads();
      queries.load_staged(p, t, staged);
    }
    uint32_t bad = 0;
    if constexpr (C::kBytes == 1) {
      queries.suit_quantized(p, t);
      if (C::kPaged) {
#pragma unroll
        for (int s = 0; s < C::kStages; ++s) bad |= uint32_t{(s == 0 && early) || place[s].is_bad()} << s;
      }
    }
    SumsOf<C> sums;
    sums.clear();
    attend(p, t, loader, work, queries, pages, bad, ring, &sums);
    if (!p.triggers_early) launch_dependents();

    if constexpr (C::kPlain) copy_async_wait<0>();  // for a first tile that nobody wanted
    __syncwarp();
    sums.store(p, t, ring);
    __syncthreads();
    if (t.blocks_log == 0) {
      join_warps<C>(p, shared, [&](int unit, int lane, float4 o, float top, float sum) {
        write_lane(p, t, output, valid, unit, lane, o, top, sum);
      });
    } else {
      cluster_wait();
      push_sums(p, t, shared, shared_base);
      mbarrier_wait_cluster(shared_base + C::kBarrier, phase);
      phase ^= 1;
      finish_units(p, t, output, shared);
    }
    if (!more) return;
    if (t.blocks_log == 0) cluster_wait();
    __syncthreads();  // the rings are free again
  }
  wait_for_prerequisites();  // of a block without work
#endif
}

}  // namespace gqa::cuda::decode_sm90
