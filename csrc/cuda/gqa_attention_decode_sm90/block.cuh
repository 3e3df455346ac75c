// What a block of the Hopper decode kernels is about: its sequence, KV head and share of the cached keys.
#pragma once

#include "cuda/common/vec.cuh"
#include "cuda/gqa_attention_decode_sm90/args.h"
#include "plan/gqa_attention_decode_sm90.h"

namespace gqa::cuda::decode_sm90 {

constexpr float kLn2 = 0.6931471805599453f;

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

// kPlain_: one query token, no new keys, rotation, window, padding or softcap: short code for the calls that want
// least.
template <typename T_, int kShape_, DecodeCache kCache_, bool kPlain_>
struct Config {
  using T = T_;
  static constexpr DecodeShape kIs = kDecodeShapes[kShape_];
  static constexpr int kBytes = kIs.bytes;  // of a cached element; 1: quantised
  static constexpr int kDim = kIs.dim;
  static constexpr int kWarps = kIs.warps, kThreads = 32 * kWarps;
  static constexpr int kHeads = kIs.heads, kTeam = kWarps / kHeads;  // KV heads of a block, and warps of each
  static constexpr int kStages = kIs.stages;                         // tiles of K and V that a warp has room for
  static constexpr int kTile = kIs.tile, kSteps = kTile / 16;        // keys of a tile, and products along them
  static constexpr int kRowTiles = kIs.row_tiles;                    // groups of 8 query rows
  static constexpr bool kTurns = kIs.turns > 0;                      // blocks may work on several sequences
  // Values of a quantised tile are read with its keys, where registers suffice, so that the stage is free sooner.
  static constexpr bool kHolds = kBytes == 2 || kIs.resident == 1;
  // These need more registers than so many blocks leave.
  static constexpr bool kScarce =
      !kPlain_ && (kBytes == 2 ? kDim == 96 : kDim == 256 || kIs.resident == 3 || kCache_ == DecodeCache::kAny);
  static constexpr int kResident = kScarce && kIs.resident > 1 ? kIs.resident - 1 : kIs.resident;
  static constexpr bool kPaged = kCache_ != DecodeCache::kContiguous;  // rows are found through `Place`
  static constexpr bool kAligned = kCache_ != DecodeCache::kAny;
  static constexpr bool kPlain = kPlain_;
  static constexpr int kSlices = kDim / 32;
  static constexpr int kRows = 8 * kRowTiles;
  static_assert(kWarps % kHeads == 0);

  // A tile is kTile rows of kChunks 16-byte chunks, chunk c of row r in place c ^ swizzle(r).
  static constexpr int kChunks = kDim * kBytes / 16;
  static constexpr int kRowBytes = 16 * kChunks, kTileBytes = kTile * kRowBytes, kStageBytes = 2 * kTileBytes;
  static constexpr int kSwizzle = kChunks % 8 == 0 ? 8 : (kChunks % 4 == 0 ? 4 : 2);
  __host__ __device__ static constexpr int swizzle(int row) {
    return kSwizzle == 8 ? row & 7 : (kSwizzle == 4 ? row >> 1 & 3 : row >> 2 & 1);
  }

  // Shared memory: the warps' stages, later their sums; staged queries; the partial sums that this block joins.
  static constexpr int kWarpBytes = kStages * kStageBytes;
  // Sums of a row: dimension 8 i + r in float kSumStep r + i; steps and rows are odd numbers of 16 bytes.
  static constexpr int kSumStep = kDim / 8 + (kDim % 64 == 0 ? 4 : 0), kSumPitch = 8 * kSumStep + 4;
  static constexpr int kWeights = kRows * kSumPitch * 4;  // of a warp's sums: maximum and sum of each row
  static_assert(kSumStep / 4 % 2 == 1);
  static_assert(kWeights + kRows * 8 <= kWarpBytes);
  static constexpr int kQueryPitch = kDim + 8;
  static constexpr int kQueries = kWarps * kWarpBytes;
  static constexpr int kBarrier = kQueries + kHeads * kRows * kQueryPitch * 2;
  static constexpr int kParts = kBarrier + 16;
  // A unit is 32 dimensions of a row; unit u belongs to block u % blocks, which gets it from each block.
  static constexpr int kUnitBytes = 32 * 4 + 8;

  static_assert(kParts == decode_fixed_memory(kIs) && kUnitBytes == kDecodeUnitBytes);
};

// Address of 16-byte chunk 2 d + (chunk 0 or 1 of this lane) of this lane's row: `lane_at` is that of d = 0.
template <typename C>
__device__ __forceinline__ uint32_t chunk_address(uint32_t lane_at, int d) {
  const int chunk = 2 * d;
  return (lane_at ^ (chunk % C::kSwizzle << 4)) + chunk / C::kSwizzle * C::kSwizzle * 16;
}

// Offset in a tile of the row and chunk whose address this lane gives.
template <typename C>
__device__ __forceinline__ uint32_t lane_offset(int row, int chunk) {
  return row * C::kRowBytes + ((chunk ^ C::swizzle(row)) << 4);
}

// Keys [low, high) that query token i of the sequence sees; those of token 0 start first, the last token's end last.
struct Keys {
  int32_t start, cached, total, leftpad, window_left;  // start: key position of token 0
  __device__ int low(int i) const { return window_left < 0 ? leftpad : max(leftpad, start + i - window_left); }
  __device__ int high(int i) const { return start + i + 1; }
};

// Keeps the compiler from working x out again where it is used: in a register it costs no latency.
template <typename X>
__device__ __forceinline__ void keep(X &x) {
  if constexpr (sizeof(X) == 8) {
    asm volatile("" : "+l"(x));
  } else {
    asm volatile("" : "+r"(x));
  }
}

// Where this thread stands and what its block is about. 2^blocks_log blocks of the cluster share the keys: cached tiles
// go round all their warps, and this one takes first, first + stride ... below tile_end.
template <typename C>
struct Block {
  uint32_t key_offset, value_offset;  // in a tile, of what this lane addresses of K and V
  int warp, lane, r, c, b, head;
  int first_head, team, member;  // heads are shared out among teams of warps
  int rank, first_rank,
      blocks_log;  // among the blocks that share the keys, which are ranks first_rank ... of the cluster
  Keys keys;
  int first, stride, tile_end;
  int row_low, row_high;  // cached rows that anyone sees
  const char *k_head, *v_head;

  __device__ void find_lane() {
    asm volatile("mov.u32 %0, %%laneid;" : "=r"(lane));  // volatile: read once
    warp = __shfl_sync(~0u, threadIdx.x / 32, 0), r = lane / 4, c = lane % 4;
    team = C::kHeads == 1 ? 0 : warp / C::kTeam, member = C::kHeads == 1 ? warp : warp % C::kTeam;
    key_offset = lane_offset<C>(lane % 16, lane / 16);
    value_offset = lane_offset<C>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
    keep(key_offset), keep(value_offset), keep(r), keep(c);
  }
  __device__ uint32_t peer(uint32_t owner) const { return first_rank + owner; }
  __device__ int blocks() const { return 1 << blocks_log; }
  // Units that this block owns, and the most that any does.
  __device__ int slots(const Args &p) const { return (p.units - rank + blocks() - 1) >> blocks_log; }
  __device__ int most_slots(const Args &p) const { return (p.units + blocks() - 1) >> blocks_log; }
  __device__ void make_uniform() {
    for (int *x : {&keys.start, &keys.cached, &keys.total, &keys.leftpad, &first, &stride, &tile_end, &row_low,
                   &row_high, &blocks_log}) {
      *x = __shfl_sync(~0u, *x, 0);
    }
  }
  // All rows of the capacity, by all blocks of the cluster.
  __device__ void take_all(const Args &p) {
    row_low = 0, row_high = p.capacity, tile_end = (p.capacity + C::kTile - 1) / C::kTile;
    first = rank * C::kTeam + member, stride = C::kTeam << blocks_log;
  }
  // A block of the last heads may have fewer of them: the others' warps repeat the last one, without keys.
  __device__ bool exists(const Args &p) const { return C::kHeads == 1 || first_head + team < p.num_kv_heads; }
  __device__ void find_heads(const Args &p) {
    head = C::kHeads == 1 ? first_head : min(first_head + team, p.num_kv_heads - 1);
    const bool in_pages = C::kPaged && p.block_table.data != nullptr;
    k_head = p.k_cache + head * p.k_head + (in_pages ? 0 : b * p.k_outer);
    v_head = p.v_cache + head * p.v_head + (in_pages ? 0 : b * p.v_outer);
  }
};

__device__ __forceinline__ int token_of_row(const Args &p, int row) {
  return static_cast<int>((row * p.group_inverse) >> 20);
}

// A length from a tensor of either width: 0 where absent, the nearest of 32 bits where it does not fit. Loads without a
// branch, so that the caller's other work hides their latency; `nothing` keeps it out of the slower uniform registers.
struct Length {
  int32_t low, high;
  bool wide;

  __device__ void load(const gqa_index &index, int b, int nothing) {
    const bool present = index.data != nullptr;
    wide = present && index.dtype == GQA_DTYPE_INT64;
    const char *at = static_cast<const char *>(index.data) + b * index.stride[0] * (wide ? 8 : 4) + nothing;
    low = high = 0;
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n@p ld.global.b32 %0, [%1];\n}"
                 : "+r"(low)
                 : "l"(at), "r"(static_cast<uint32_t>(present)));
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n@p ld.global.b32 %0, [%1 + 4];\n}"
                 : "+r"(high)
                 : "l"(at), "r"(static_cast<uint32_t>(wide)));
  }
  __device__ int value() const {
    if (!wide || (high == 0 && low >= 0)) return low;
    return high < 0 ? -1 : 0x7fffffff;
  }
};

// The sequence's lengths, the blocks that share its keys and where this warp's tiles begin and end.
template <typename C>
__device__ bool divide(const Args &p, int cached, int leftpad, int share, Block<C> *t) {
  const int new_keys = !C::kPlain && p.k != nullptr ? p.seqlen_q : 0;
  // capacity + 16 fits 32 bits
  const bool valid = cached >= 0 && cached <= p.capacity - new_keys && leftpad >= 0;
  cached = valid ? cached : 0;
  t->keys = {cached + new_keys - p.seqlen_q, cached, cached + new_keys, min(leftpad, p.capacity), p.window_left};
  t->row_low = C::kPlain ? 0 : max(t->keys.low(0), 0), t->row_high = cached;
  const bool exists = t->exists(p);
  const int start = static_cast<uint32_t>(t->row_low) / C::kTile;
  t->first = start + t->rank * C::kTeam + t->member;
  t->tile_end = t->row_low < cached ? static_cast<int>(static_cast<uint32_t>(cached + C::kTile - 1) / C::kTile) : start;
#pragma unroll 1
  while (t->blocks_log > 0 && (t->tile_end - start - 1) >> (t->blocks_log - 1) < share) --t->blocks_log;
  t->stride = C::kTeam << t->blocks_log;
  if (!exists) t->first = t->tile_end;
  return valid;
}

}  // namespace gqa::cuda::decode_sm90
