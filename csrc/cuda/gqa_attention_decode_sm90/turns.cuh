// Several sequences of unlike length on few clusters: which one a block works on follows from all lengths.
#pragma once

#include "cuda/gqa_attention_decode_sm90/block.cuh"

namespace gqa::cuda::decode_sm90 {

// A sequence and KV head gets 1, 2, 4 ... blocks, up to a cluster: the fewest that leave each of them its share of all
// tiles. Those that get most come first; the row of places that results goes round the blocks of all clusters, in turn
// forwards and backwards, so that whoever has a long one gets the last short ones.
template <typename C>
struct Turns {
  static constexpr int kSizes = 5;  // 1, 2, 4, 8 and 16 blocks

  int share;          // tiles of a block
  int count[kSizes];  // of sequences with so many blocks
  int places;

  __device__ static int groups(const Args &p) { return (p.num_kv_heads + C::kHeads - 1) / C::kHeads; }  // of heads
  // Length of sequence `b`: absent ones get no place.
  __device__ static int length_of(const Args &p, int b) {
    Length length;
    length.load(p.cache_seqlens, min(b, p.batch - 1), 0);
    return length.value();
  }
  __device__ static int tiles_of(const Args &p, int cached) {
    const int keys = cached < 0 || cached > p.capacity ? 0
                     : p.window_left < 0               ? cached
                                                       : min(cached, p.window_left + 1);
    return static_cast<int>(static_cast<uint32_t>(keys + C::kTile - 1) / C::kTile);
  }
  __device__ int size_log(int tiles, int most) const {
    int log = 0;
    while (log < most && (tiles - 1) >> log >= share) ++log;
    return log;
  }

  // `first`: the length of sequence `lane`.
  __device__ Turns(const Args &p, const Block<C> &t, int first) {
    const int size = cluster_size(), most = 31 - __clz(size), heads = groups(p);
    uint32_t tiles = t.lane < p.batch ? tiles_of(p, first) : 0;
    for (int b = t.lane + 32; b < p.batch; b += 32) tiles += tiles_of(p, length_of(p, b));
    tiles = __reduce_add_sync(~0u, tiles);
    share = max(p.share, static_cast<int>(p.fair * tiles) + 1);
#pragma unroll 1
    for (int attempt = 0;; ++attempt) {
#pragma unroll
      for (int i = 0; i < kSizes; ++i) count[i] = 0;
      places = 0;
#pragma unroll 1
      for (int b = 0; b < p.batch; b += 32) {
        const int log = size_log(tiles_of(p, b == 0 ? first : length_of(p, b + t.lane)), most);
        const bool exists = b + t.lane < p.batch;
#pragma unroll
        for (int i = 0; i < kSizes; ++i) {
          const int some = __popc(__ballot_sync(~0u, exists && log == i));
          count[i] += some, places += some * heads << i;
        }
      }
      if (places <= static_cast<int>(gridDim.y) * size || attempt == 2) break;
      share += share / 2;  // perhaps wider ones spare a turn
    }
  }

  // Place of the cluster's first block in a turn.
  __device__ int first_place(int turn) const {
    const int clusters = gridDim.y, cluster = blockIdx.y;
    return (turn * clusters + (turn % 2 != 0 ? clusters - 1 - cluster : cluster)) * static_cast<int>(cluster_size());
  }

  // The sequence, head and rank at a place; false if there are not so many.
  __device__ bool find(const Args &p, int first, int place, Block<C> *t, int *cached) const {
    if (place >= places) return false;
    const int most = 31 - __clz(cluster_size());
    int log = 0, at = place;
#pragma unroll
    for (int i = kSizes - 1; i > 0; --i) {
      const int end = count[i] * groups(p) << i;
      if (log == 0) {
        if (at < end) {
          log = i;
        } else {
          at -= end;
        }
      }
    }
    t->rank = at & ((1 << log) - 1), t->first_rank = static_cast<int>(cluster_rank()) - t->rank, t->blocks_log = log;
    int index = static_cast<uint32_t>(at >> log) / groups(p);
    t->first_head = ((at >> log) - index * groups(p)) * C::kHeads;
#pragma unroll 1
    for (int b = 0; b < p.batch; b += 32) {
      const int length = b == 0 ? first : length_of(p, b + t->lane);
      const bool fits = b + t->lane < p.batch && size_log(tiles_of(p, length), most) == log;
      const uint32_t all = __ballot_sync(~0u, fits), before = all & ((1u << t->lane) - 1);
      const uint32_t hit = __ballot_sync(~0u, fits && __popc(before) == index);
      if (hit != 0) {
        const int lane = __ffs(hit) - 1;
        t->b = b + lane, *cached = __shfl_sync(~0u, length, lane);
        break;
      }
      index -= __popc(all);
    }
    return true;
  }
};

}  // namespace gqa::cuda::decode_sm90
