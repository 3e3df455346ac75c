// Decode attention on Hopper, small and medium work: one cluster per (sequence, KV head), one launch, no workspace.
// Keys are divided into tiles of 16. A block of the cluster takes a contiguous range of tiles, kStep tiles at a time:
// each warp scores kTiles of them against all query rows of the head group (S^T = K Q^T), then holds 32 dimensions
// (warp % kSlices) of every kGroups-th tile (warp / kSlices) and sums P V for them (O^T = V^T P^T). Scores pass through
// shared memory; sums stay in registers until the end and are pushed to the block that owns the output.
// Memory order: K and V once from global memory straight into operands, the next step's as soon as registers are free.
// Limits: 16-bit types, 16-byte aligned rows, at most 8 * kRowTiles query rows (tokens times heads of the group).
// Determinism: fixed order of sums; they depend on the sequence's own length and on the cluster size.
#pragma once

#include "common/rotate.h"
#include "cuda/common/cluster.cuh"
#include "cuda/common/mbarrier.cuh"
#include "cuda/common/mma_m16n8k16.cuh"
#include "cuda/common/pdl.cuh"
#include "cuda/common/stream.cuh"
#include "cuda/common/vec.cuh"
#include "cuda/gqa_attention_decode_sm90_args.h"

namespace gqa::cuda::decode_sm90 {

constexpr float kLn2 = 0.6931471805599453f;
constexpr uint32_t kNanPair = 0x7fff7fffu;  // two NaNs of either 16-bit type
constexpr int kTile = 16;

__device__ __forceinline__ float minus_infinity() { return __int_as_float(0xff800000); }

template <typename T_, int kDim_, int kWarps_, int kTiles_, int kRowTiles_, bool kPaged_, bool kPadded_>
struct Config {
  using T = T_;
  static constexpr int kDim = kDim_;  // head_dim, rounded up to a multiple of 32 if kPadded
  static constexpr int kWarps = kWarps_;
  static constexpr int kTiles = kTiles_;        // K tiles of a warp in a step
  static constexpr int kRowTiles = kRowTiles_;  // groups of 8 query rows
  static constexpr bool kPaged = kPaged_, kPadded = kPadded_;
  static constexpr int kSlices = kDim / 32;
  static constexpr int kGroups = kWarps / kSlices;
  static constexpr int kStep = kWarps * kTiles;     // tiles of a block in a step
  static constexpr int kValues = kSlices * kTiles;  // V tiles of a warp in a step
  static constexpr int kKeys = kStep * kTile;
  static constexpr int kRows = 8 * kRowTiles;
  static constexpr int kPitch = kDim + 8;  // of staged rows
  static constexpr int kThreads = 32 * kWarps;
  static_assert(kWarps % kSlices == 0);

  // Shared memory: scores of two steps, staged q and new keys, then the partial sums pushed by the cluster.
  static constexpr int kScores = 0;
  static constexpr int kQueries = kScores + 2 * kRows * kKeys * 4;
  static constexpr int kNewKeys = kQueries + kRows * kPitch * 2;
  static constexpr int kBarrier = kNewKeys + kTile * kPitch * 2;
  static constexpr int kSums = kBarrier + 16;
  // A unit is 32 dimensions of a row; unit u belongs to block u % cluster, which gets it from each group of each block.
  static constexpr int kUnitBytes = 32 * 4 + 8;

  static constexpr int shared_memory(int slots, int cluster) { return kSums + slots * cluster * kGroups * kUnitBytes; }
};

// Keys [low, high) that query token i of the sequence sees; those of token 0 start first, the last token's end last.
struct Keys {
  int32_t start, cached, total, leftpad, window_left;  // start: key position of token 0
  __device__ int low(int i) const { return window_left < 0 ? leftpad : max(leftpad, start + i - window_left); }
  __device__ int high(int i) const { return start + i + 1; }
};

// Page of a tile, or nothing for a contiguous cache.
template <typename C>
struct Place {
  int page = 0;

  __device__ static int look_up(const Args &p, int b, uint32_t index) {
    const int64_t id = load_index(p.block_table, b, index);
    return id >= 0 && id < p.num_pages ? static_cast<int>(id) : -1;
  }
  __device__ static uint32_t page_of(const Args &p, int row) {
    return static_cast<uint32_t>((static_cast<uint64_t>(row) * p.page_magic) >> p.page_shift);
  }
  // May be called ahead of time for a tile that does not exist, whose page is then never used.
  __device__ void find(const Args &p, int b, int tile, int tiles_end) {
    if constexpr (C::kPaged) {
      if (p.paged_tiles && tile < tiles_end) page = look_up(p, b, page_of(p, tile * kTile));
    }
  }
  // Where `row` lies in a head of the cache, NULL for a bad page.
  __device__ const char *at(const Args &p, int b, const char *head, int64_t outer, int row_bytes, int row) const {
    if constexpr (C::kPaged) {
      const uint32_t index = page_of(p, row);
      const int id = p.paged_tiles ? page : look_up(p, b, index);
      const uint32_t in_page = row - index * p.page_size;
      return id < 0 ? nullptr : head + id * outer + static_cast<int64_t>(in_page) * row_bytes;
    } else {
      return head + static_cast<int64_t>(row) * row_bytes;
    }
  }
};

// Where this thread stands and what its block is about.
template <typename C>
struct Block {
  int warp, lane, r, c, rank, cluster, b, head;
  Keys keys;
  int tile_begin, tile_end;  // cached tiles of this block
  int row_low, row_high;     // cached rows that anyone sees
  const char *k_head, *v_head;

  __device__ int slice() const { return static_cast<uint32_t>(warp) % C::kSlices; }
  __device__ int group() const { return static_cast<uint32_t>(warp) / C::kSlices; }
  __device__ int slots(const Args &p) const { return rank < p.full_ranks ? p.slots : p.slots - 1; }
  // Position in the step of the i-th K or V tile of this warp.
  __device__ int k_local(int i) const { return warp * C::kTiles + i; }
  __device__ int v_local(int i) const { return group() + C::kGroups * i; }
  __device__ void make_uniform() {
    for (int *x :
         {&keys.start, &keys.cached, &keys.total, &keys.leftpad, &tile_begin, &tile_end, &row_low, &row_high}) {
      *x = __shfl_sync(~0u, *x, 0);
    }
  }
  __device__ int clamp(int row) const { return min(max(row, row_low), row_high - 1); }
};

template <typename C>
struct KTiles {
  Place<C> place[C::kTiles];
  uint4 x[C::kTiles][2][C::kSlices];  // rows 2r and 2r + 1 of the tile, dimensions 32 j + 8 c ...

  __device__ void find(const Args &p, const Block<C> &t, int first) {
#pragma unroll
    for (int i = 0; i < C::kTiles; ++i) place[i].find(p, t.b, first + t.k_local(i), t.tile_end);
  }
  __device__ void load(const Args &p, const Block<C> &t, int first) {
#pragma unroll
    for (int i = 0; i < C::kTiles; ++i) {
      const int tile = first + t.k_local(i);
      if (tile >= t.tile_end) continue;
#pragma unroll
      for (int e = 0; e < 2; ++e) {
        const char *at = place[i].at(p, t.b, t.k_head, p.k_outer, p.k_row, t.clamp(tile * kTile + 2 * t.r + e));
#pragma unroll
        for (int j = 0; j < C::kSlices; ++j) {
          const int d = 32 * j + 8 * t.c;
          if (C::kPaged && at == nullptr) {
            x[i][e][j] = make_uint4(kNanPair, kNanPair, kNanPair, kNanPair);
          } else if (C::kPadded && d >= p.head_dim) {
            x[i][e][j] = make_uint4(0, 0, 0, 0);
          } else {
            x[i][e][j] = load_stream16<C::kDim * 2>(at + 2 * d);
          }
        }
      }
    }
  }
};

template <typename C>
struct VTiles {
  Place<C> place[C::kValues];
  uint2 x[C::kValues][4];  // keys 4c ... 4c + 3 of the tile, dimensions 32 slice + 4 r ...

  __device__ void find(const Args &p, const Block<C> &t, int first) {
#pragma unroll
    for (int i = 0; i < C::kValues; ++i) place[i].find(p, t.b, first + t.v_local(i), t.tile_end);
  }
  __device__ void load(const Args &p, const Block<C> &t, int first) {
#pragma unroll
    for (int i = 0; i < C::kValues; ++i) {
      const int tile = first + t.v_local(i);
      if (tile >= t.tile_end) continue;
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        load_row(p, t, place[i].at(p, t.b, t.v_head, p.v_outer, p.v_row, t.clamp(tile * kTile + 4 * t.c + e)),
                 &x[i][e]);
      }
    }
  }
  __device__ static void load_row(const Args &p, const Block<C> &t, const char *row, uint2 *x) {
    const int d = 32 * t.slice() + 4 * t.r;
    if (C::kPaged && row == nullptr) {
      *x = make_uint2(kNanPair, kNanPair);
    } else if (C::kPadded && d >= p.head_dim) {
      *x = make_uint2(0, 0);
    } else {
      *x = load_stream8<C::kDim * 2>(row + 2 * d);
    }
  }
};

// Scores of a step, [row][key], its 16-byte chunks swizzled so that both sides are free of bank conflicts.
template <typename C>
__device__ __forceinline__ float *score_at(float *scores, int row, int key) {
  return scores + row * C::kKeys + (key ^ (((row & 6) ^ ((row & 1) << 2)) << 2));
}

// Softmax so far of this warp's keys and 32 dimensions of their values.
template <typename C>
struct Sums {
  float max[C::kRowTiles], sum[C::kRowTiles];  // of row 8 n + r; sum: of this thread's keys
  float o[C::kRowTiles][2][4];                 // dimensions 4r ... 4r + 3 of rows 8n + 2c and 8n + 2c + 1

  __device__ void clear() {
#pragma unroll
    for (int n = 0; n < C::kRowTiles; ++n) {
      max[n] = minus_infinity();
      sum[n] = 0;
#pragma unroll
      for (int e = 0; e < 8; ++e) o[n][e / 4][e % 4] = 0;
    }
  }

  __device__ void multiply(const uint2 (&v)[4], const uint32_t (&weights)[C::kRowTiles][2],
                           float (&to)[C::kRowTiles][2][4]) {
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const uint32_t v0 = e ? v[0].y : v[0].x, v1 = e ? v[1].y : v[1].x;
      const uint32_t v2 = e ? v[2].y : v[2].x, v3 = e ? v[3].y : v[3].x;
      const uint32_t a0 = __byte_perm(v0, v1, 0x5410), a1 = __byte_perm(v0, v1, 0x7632);
      const uint32_t a2 = __byte_perm(v2, v3, 0x5410), a3 = __byte_perm(v2, v3, 0x7632);
#pragma unroll
      for (int n = 0; n < C::kRowTiles; ++n) {
        mma_m16n8k16<typename C::T>(to[n][e], a0, a1, a2, a3, weights[n][0], weights[n][1]);
      }
    }
  }

  // A tile that some rows see in part: one token's rows at a time, with the values that token does not see at zero, so
  // that a NaN in them reaches nobody else.
  __device__ void multiply_edge(const Args &p, const Block<C> &t, const uint2 (&v)[4], int key, int end,
                                const uint32_t (&weights)[C::kRowTiles][2]) {
#pragma unroll 1
    for (int i = 0; i < p.seqlen_q; ++i) {
      const int low = t.keys.low(i), high = min(t.keys.high(i), end);
      uint2 seen[4];
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        const int at = key + 4 * t.c + e;
        seen[e] = at >= low && at < high ? v[e] : make_uint2(0, 0);
      }
      float part[C::kRowTiles][2][4] = {};
      multiply(seen, weights, part);
#pragma unroll
      for (int n = 0; n < C::kRowTiles; ++n) {
#pragma unroll
        for (int e = 0; e < 2; ++e) {
          const int row = 8 * n + 2 * t.c + e - i * p.group;
          if (row < 0 || row >= p.group) continue;
#pragma unroll
          for (int m = 0; m < 2; ++m) {
            o[n][m][e] += part[n][m][e];
            o[n][m][2 + e] += part[n][m][2 + e];
          }
        }
      }
    }
  }

  // Adds kCount tiles; tile i holds keys key(i) ... below `end`, or nothing where exists(i) is false.
  template <int kCount, typename Local, typename Key, typename Exists>
  __device__ void add(const Args &p, const Block<C> &t, float *scores, const uint2 (&v)[kCount][4], int end,
                      Local &&local, Key &&key, Exists &&exists) {
    const int last = p.seqlen_q - 1;
    const int all_low = t.keys.low(last), all_high = min(t.keys.high(0), end);  // keys that every token sees
    float s[C::kRowTiles][kCount][4];
#pragma unroll
    for (int n = 0; n < C::kRowTiles; ++n) {
      const int row = 8 * n + t.r;
      const int token = static_cast<int>((row * p.group_inverse) >> 20);
      const int low = t.keys.low(token), high = min(t.keys.high(token), end);
      float top = max[n];
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (!exists(i)) continue;
        const float4 x = *reinterpret_cast<const float4 *>(score_at<C>(scores, row, local(i) * kTile + 4 * t.c));
        s[n][i][0] = x.x, s[n][i][1] = x.y, s[n][i][2] = x.z, s[n][i][3] = x.w;
        if (key(i) < all_low || key(i) + kTile > all_high) {
#pragma unroll
          for (int e = 0; e < 4; ++e) {
            const int at = key(i) + 4 * t.c + e;
            if (at < low || at >= high) s[n][i][e] = minus_infinity();
          }
        }
        top = fmaxf(top, fmaxf(fmaxf(s[n][i][0], s[n][i][1]), fmaxf(s[n][i][2], s[n][i][3])));
      }
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 1));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 2));
      const float base = top == minus_infinity() ? 0.0f : top;
      const float factor = exp2_fast(max[n] - base);
      max[n] = top;
      float total = 0;
#pragma unroll
      for (int i = 0; i < kCount; ++i) {
        if (!exists(i)) continue;
#pragma unroll
        for (int e = 0; e < 4; ++e) s[n][i][e] = exp2_fast(s[n][i][e] - base);
        total += (s[n][i][0] + s[n][i][1]) + (s[n][i][2] + s[n][i][3]);
      }
      sum[n] = sum[n] * factor + total;
      if (__any_sync(~0u, factor != 1.0f)) {
        const float even = __shfl_sync(~0u, factor, 8 * t.c), odd = __shfl_sync(~0u, factor, 8 * t.c + 4);
#pragma unroll
        for (int e = 0; e < 8; ++e) o[n][e / 4][e % 4] *= e & 1 ? odd : even;
      }
    }
#pragma unroll
    for (int i = 0; i < kCount; ++i) {
      if (!exists(i)) continue;
      uint32_t weights[C::kRowTiles][2];
#pragma unroll
      for (int n = 0; n < C::kRowTiles; ++n) {
        weights[n][0] = pack<typename C::T>(s[n][i][0], s[n][i][1]);
        weights[n][1] = pack<typename C::T>(s[n][i][2], s[n][i][3]);
      }
      if (key(i) < all_low || key(i) + kTile > all_high) {
        multiply_edge(p, t, v[i], key(i), end, weights);
      } else {
        multiply(v[i], weights, o);
      }
    }
  }
};

// Query rows as the second operand: row 8 n + r, dimensions 32 j + 8 c ... 8 c + 7, in the order the K tiles have.
template <typename C>
struct Queries {
  uint4 x[C::kRowTiles][C::kSlices];

  __device__ void load(const Args &p, const Block<C> &t) {
#pragma unroll
    for (int n = 0; n < C::kRowTiles; ++n) {
      const char *at = row_at(p, t, min(8 * n + t.r, p.rows - 1));
#pragma unroll
      for (int j = 0; j < C::kSlices; ++j) {
        const int d = 32 * j + 8 * t.c;
        x[n][j] = C::kPadded && d >= p.head_dim ? make_uint4(0, 0, 0, 0) : *reinterpret_cast<const uint4 *>(at + 2 * d);
      }
    }
  }
  __device__ static const char *row_at(const Args &p, const Block<C> &t, int row) {
    const int token = static_cast<int>((row * p.group_inverse) >> 20);
    return p.q + t.b * p.q_batch + token * p.q_token +
           (static_cast<int64_t>(t.head) * p.group + row - token * p.group) * p.q_head;
  }
  __device__ void load_staged(const Block<C> &t, const typename C::T *staged) {
#pragma unroll
    for (int n = 0; n < C::kRowTiles; ++n) {
#pragma unroll
      for (int j = 0; j < C::kSlices; ++j) {
        x[n][j] = *reinterpret_cast<const uint4 *>(staged + (8 * n + t.r) * C::kPitch + 32 * j + 8 * t.c);
      }
    }
  }

  // Scores of one K tile, in log2 units, to `scores` at key `local`.
  __device__ void score(const Args &p, const Block<C> &t, const uint4 (&k)[2][C::kSlices], float *scores,
                        int local) const {
#pragma unroll
    for (int n = 0; n < C::kRowTiles; ++n) {
      float a[4] = {}, b[4] = {};  // two chains halve the latency
#pragma unroll
      for (int j = 0; j < C::kSlices; ++j) {
        mma_m16n8k16<typename C::T>(a, k[0][j].x, k[1][j].x, k[0][j].y, k[1][j].y, x[n][j].x, x[n][j].y);
        mma_m16n8k16<typename C::T>(b, k[0][j].z, k[1][j].z, k[0][j].w, k[1][j].w, x[n][j].z, x[n][j].w);
      }
#pragma unroll
      for (int e = 0; e < 4; ++e) {
        a[e] = (a[e] + b[e]) * p.scale;
        if (p.softcap > 0) a[e] = p.softcap * kLog2e * tanhf(a[e]);
      }
      const int row = 8 * n + 2 * t.c;
      *reinterpret_cast<float2 *>(score_at<C>(scores, row, local + 2 * t.r)) = make_float2(a[0], a[2]);
      *reinterpret_cast<float2 *>(score_at<C>(scores, row + 1, local + 2 * t.r)) = make_float2(a[1], a[3]);
    }
  }
};

__device__ __forceinline__ float angle(const gqa_rotary &r, const void *table, int64_t at, bool half) {
  if (r.dtype == GQA_DTYPE_FLOAT32) return static_cast<const float *>(table)[at];
  return half ? __half2float(static_cast<const __half *>(table)[at])
              : __bfloat162float(static_cast<const __nv_bfloat16 *>(table)[at]);
}

// Stages `count` rows in shared memory, rotated if asked: row i from row_at(i), at the position of token token_of(i).
// The rest of the staged row, and of the rows up to `padded`, is zero.
template <typename C, typename RowAt, typename TokenOf>
__device__ void stage_rows(const Args &p, const Block<C> &t, typename C::T *staged, int count, int padded,
                           RowAt &&row_at, TokenOf &&token_of) {
  using T = typename C::T;
  const gqa_rotary &rotary = p.rotary;
  const int half = rotary.cos != nullptr ? rotary.dim / 2 : 0;
  constexpr int kPairs = C::kDim / 2;
  for (int at = threadIdx.x; at < padded * kPairs; at += C::kThreads) {
    const int row = at / kPairs, pair = at % kPairs;
    T *to = staged + row * C::kPitch;
    int low = 2 * pair, high = low + 1;
    if (pair < half && !rotary.interleaved) low = pair, high = pair + half;
    Pair x{0.0f, 0.0f};
    if (row < count && low < p.head_dim) {
      const T *from = reinterpret_cast<const T *>(row_at(row));
      x = {to_float(from[low]), to_float(from[high])};
      if (pair < half) {
        const int token = token_of(row);
        const int64_t offset = rotary_offset(rotary, t.b, token, t.keys.start + token - t.keys.leftpad);
        constexpr bool kHalf = std::is_same_v<T, __half>;
        const float nan = __int_as_float(0x7fc00000);
        const float cosine = offset < 0 ? nan : angle(rotary, rotary.cos, offset + pair, kHalf);
        const float sine = offset < 0 ? nan : angle(rotary, rotary.sin, offset + pair, kHalf);
        x = rotate_pair(x.first, x.second, cosine, sine);
      }
    }
    to[low] = from_float<T>(x.first);
    to[high] = from_float<T>(x.second);
  }
}

// Writes the new rows to the cache; a bad page drops the write.
template <typename C>
__device__ void append(const Args &p, const Block<C> &t, const typename C::T *new_keys) {
  const int chunks = p.head_dim / 8;
  for (int at = threadIdx.x; at < p.seqlen_q * chunks; at += C::kThreads) {
    const int token = at / chunks, d = at % chunks * 8, row = t.keys.cached + token;
    Place<C> place;
    place.find(p, t.b, row / kTile, row / kTile + 1);
    char *k = const_cast<char *>(place.at(p, t.b, t.k_head, p.k_outer, p.k_row, row));
    char *v = const_cast<char *>(place.at(p, t.b, t.v_head, p.v_outer, p.v_row, row));
    if (C::kPaged && k == nullptr) continue;
    *reinterpret_cast<uint4 *>(k + 2 * d) = *reinterpret_cast<const uint4 *>(new_keys + token * C::kPitch + d);
    *reinterpret_cast<uint4 *>(v + 2 * d) =
        *reinterpret_cast<const uint4 *>(p.v + t.b * p.v_in[0] + token * p.v_in[1] + t.head * p.v_in[2] + 2 * d);
  }
}

// Attends to the new keys, staged in shared memory; a bad page makes them NaN, as it makes cached ones.
template <typename C>
__device__ void add_new_keys(const Args &p, const Block<C> &t, const Queries<C> &queries, float *scores,
                             const typename C::T *new_keys, Sums<C> *sums) {
  const auto is_bad = [&](int token) {
    if constexpr (C::kPaged) return Place<C>::look_up(p, t.b, Place<C>::page_of(p, t.keys.cached + token)) < 0;
    return false;
  };
  uint2 v[1][4];
  if (t.group() == 0) {
#pragma unroll
    for (int e = 0; e < 4; ++e) {
      const int token = min(4 * t.c + e, p.seqlen_q - 1);
      const char *row = p.v + t.b * p.v_in[0] + token * p.v_in[1] + t.head * p.v_in[2];
      VTiles<C>::load_row(p, t, is_bad(token) ? nullptr : row, &v[0][e]);
    }
  }
  if (t.warp == 0) {
    uint4 k[2][C::kSlices];
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int token = 2 * t.r + e;
      const bool bad = token < p.seqlen_q && is_bad(token);
#pragma unroll
      for (int j = 0; j < C::kSlices; ++j) {
        k[e][j] = *reinterpret_cast<const uint4 *>(new_keys + token * C::kPitch + 32 * j + 8 * t.c);
        if (bad) k[e][j] = make_uint4(kNanPair, kNanPair, kNanPair, kNanPair);
      }
    }
    queries.score(p, t, k, scores, 0);
  }
  __syncthreads();
  if (t.group() == 0) {
    sums->template add<1>(
        p, t, scores, v, t.keys.total, [](int) { return 0; }, [&](int) { return t.keys.cached; },
        [](int) { return true; });
  }
}

// Sends this warp's sums to the blocks that own their rows and dimensions.
template <typename C>
__device__ void push_sums(const Args &p, const Block<C> &t, Sums<C> &sums, uint32_t shared) {
  const int sources = t.cluster * C::kGroups, source = t.rank * C::kGroups + t.group();
  const uint32_t weights = shared + C::kSums + p.slots * sources * 128;
#pragma unroll
  for (int n = 0; n < C::kRowTiles; ++n) {
    float sum = sums.sum[n];
    sum += __shfl_xor_sync(~0u, sum, 1);
    sum += __shfl_xor_sync(~0u, sum, 2);
    const auto owner_of = [&](int row, int *slot) {
      const uint32_t unit = row * C::kSlices + t.slice();
      *slot = (unit * p.cluster_inverse) >> 16;
      return unit - *slot * t.cluster;
    };
    int slot;
#pragma unroll
    for (int e = 0; e < 2; ++e) {
      const int row = 8 * n + 2 * t.c + e;
      if (row >= p.rows) continue;
      const uint32_t owner = owner_of(row, &slot);
      const uint32_t at = shared + C::kSums + (slot * sources + source) * 128 + t.r * 16;
      push(map_to_rank(at, owner), sums.o[n][0][e], sums.o[n][0][2 + e], sums.o[n][1][e], sums.o[n][1][2 + e],
           map_to_rank(shared + C::kBarrier, owner));
    }
    if (t.c == 0 && 8 * n + t.r < p.rows) {
      const uint32_t owner = owner_of(8 * n + t.r, &slot);
      push(map_to_rank(weights + (slot * sources + source) * 8, owner), sums.max[n], sum,
           map_to_rank(shared + C::kBarrier, owner));
    }
  }
}

__device__ __forceinline__ float load_sink(const Args &p, int head, bool half) {
  if (p.sinks == nullptr) return minus_infinity();
  if (p.sinks_float) return static_cast<const float *>(p.sinks)[head] * kLog2e;
  return kLog2e * (half ? __half2float(static_cast<const __half *>(p.sinks)[head])
                        : __bfloat162float(static_cast<const __nv_bfloat16 *>(p.sinks)[head]));
}

// Joins what all blocks pushed for the units of this one, in a fixed order, and writes them out.
template <typename C>
__device__ void finish(const Args &p, const Block<C> &t, bool valid, const char *shared) {
  using T = typename C::T;
  const int sources = t.cluster * C::kGroups;
  const char *weights = shared + C::kSums + p.slots * sources * 128;
  for (int slot = t.warp; slot < t.slots(p); slot += C::kWarps) {
    const int unit = slot * t.cluster + t.rank, row = unit / C::kSlices, slice = unit % C::kSlices;
    const int token = static_cast<int>((row * p.group_inverse) >> 20);
    const int head = t.head * p.group + row - token * p.group;
    float4 o = make_float4(0, 0, 0, 0);
    float sum = 0, top = load_sink(p, head, std::is_same_v<T, __half>);
    const float sink = top;
    if (valid) {
      const auto *parts = reinterpret_cast<const float4 *>(shared + C::kSums + slot * sources * 128);
      const auto *scales = reinterpret_cast<const float2 *>(weights + slot * sources * 8);
      const int first = t.lane / 8, quad = t.lane % 8;
      for (int i = first; i < sources; i += 4) top = fmaxf(top, scales[i].x);
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 8));
      top = fmaxf(top, __shfl_xor_sync(~0u, top, 16));
      const float base = top == minus_infinity() ? 0.0f : top;
#pragma unroll 4
      for (int i = first; i < sources; i += 4) {
        const float factor = exp2_fast(scales[i].x - base);
        const float4 x = parts[i * 8 + quad];
        o.x += factor * x.x, o.y += factor * x.y, o.z += factor * x.z, o.w += factor * x.w;
        sum += factor * scales[i].y;
      }
#pragma unroll
      for (int step = 8; step < 32; step *= 2) {
        o.x += __shfl_xor_sync(~0u, o.x, step), o.y += __shfl_xor_sync(~0u, o.y, step);
        o.z += __shfl_xor_sync(~0u, o.z, step), o.w += __shfl_xor_sync(~0u, o.w, step);
        sum += __shfl_xor_sync(~0u, sum, step);
      }
      sum += exp2_fast(sink - base);
    } else {
      sum = __int_as_float(0x7fc00000);
      o = make_float4(sum, sum, sum, sum);
    }
    const float scale = sum == 0.0f ? 0.0f : 1.0f / sum;
    const int d = 32 * slice + 4 * t.lane;
    if (t.lane < 8 && (!C::kPadded || d < p.head_dim)) {
      char *to = p.out + t.b * p.out_stride[0] + token * p.out_stride[1] + head * p.out_stride[2] + 2 * d;
      *reinterpret_cast<uint2 *>(to) = make_uint2(pack<T>(o.x * scale, o.y * scale), pack<T>(o.z * scale, o.w * scale));
    }
    if (p.lse != nullptr && slice == 0 && t.lane == 0) {
      p.lse[(static_cast<int64_t>(t.b) * p.num_q_heads + head) * p.seqlen_q + token] =
          sum == 0.0f ? minus_infinity() : (top + log2f(sum)) * kLn2;
    }
  }
}

// A length from a tensor of either width: 0 where absent, negative where it does not fit 32 bits. Loads without a
// branch, so that the caller's other work hides their latency; `nothing` keeps it out of the slower uniform registers.
struct Length {
  int32_t low, high;

  __device__ void load(const gqa_index &index, int b, int nothing) {
    const bool present = index.data != nullptr, wide = present && index.dtype == GQA_DTYPE_INT64;
    const char *at = static_cast<const char *>(index.data) + b * index.stride[0] * (wide ? 8 : 4) + nothing;
    low = high = 0;
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n@p ld.global.b32 %0, [%1];\n}"
                 : "+r"(low)
                 : "l"(at), "r"(static_cast<uint32_t>(present)));
    asm volatile("{\n.reg .pred p;\nsetp.ne.u32 p, %2, 0;\n@p ld.global.b32 %0, [%1 + 4];\n}"
                 : "+r"(high)
                 : "l"(at), "r"(static_cast<uint32_t>(wide)));
  }
  __device__ int value() const { return high == 0 ? low : -1; }
};

// The sequence's lengths, and this block's share of its cached tiles.
template <typename C>
__device__ bool divide(const Args &p, const Length &length, const Length &padding, Block<C> *t) {
  const int new_keys = p.k != nullptr ? p.seqlen_q : 0;
  int cached = length.value(), leftpad = padding.value();
  // capacity + 16 fits 32 bits, and a wide negative number stays negative
  const bool valid = cached >= 0 && cached <= p.capacity - new_keys && leftpad >= 0;
  cached = valid ? cached : 0;
  t->keys = {cached + new_keys - p.seqlen_q, cached, cached + new_keys, min(leftpad, p.capacity), p.window_left};
  t->row_low = max(t->keys.low(0), 0), t->row_high = cached;
  const int first = static_cast<uint32_t>(t->row_low) / kTile;
  const int tiles =
      t->row_low < cached ? static_cast<int>(static_cast<uint32_t>(cached + kTile - 1) / kTile) - first : 0;
  // rank / cluster of the tiles, rounded down or one less; exact at both ends.
  const auto bound = [&](int rank) {
    return rank == t->cluster ? tiles
                              : static_cast<int>(__umulhi(static_cast<uint32_t>(tiles) * rank, p.cluster_fraction));
  };
  t->tile_begin = first + bound(t->rank), t->tile_end = first + bound(t->rank + 1);
  return valid;
}

template <typename C, int kBlocks>
__global__ void __launch_bounds__(C::kThreads, kBlocks) decode_cluster(const __grid_constant__ Args p) {
  using T = typename C::T;
  extern __shared__ __align__(128) char shared[];
  const uint32_t shared_base = shared_address(shared);
  auto *scores = reinterpret_cast<float *>(shared + C::kScores);
  auto *staged_q = reinterpret_cast<T *>(shared + C::kQueries);
  auto *staged_k = reinterpret_cast<T *>(shared + C::kNewKeys);
  Block<C> t;
  t.warp = __shfl_sync(~0u, threadIdx.x / 32, 0), t.lane = threadIdx.x % 32, t.r = t.lane / 4, t.c = t.lane % 4;
  t.rank = cluster_rank(), t.cluster = cluster_size(), t.head = blockIdx.y, t.b = blockIdx.z;

  launch_dependents();
  wait_for_predecessors();
  Length length, padding;
  length.load(p.cache_seqlens, t.b, t.lane * p.zero);
  padding.load(p.cache_leftpad, t.b, t.lane * p.zero);
  if (threadIdx.x == 0) {
    mbarrier_init(shared_base + C::kBarrier, 1);
    mbarrier_fence_init();
    mbarrier_arrive_expect(shared_base + C::kBarrier, t.slots(p) * t.cluster * C::kGroups * C::kUnitBytes);
  }
  cluster_arrive_relaxed();  // waited for just before the push
  t.k_head = p.k_cache + t.head * p.k_head + (C::kPaged ? 0 : t.b * p.k_outer);
  t.v_head = p.v_cache + t.head * p.v_head + (C::kPaged ? 0 : t.b * p.v_outer);

  const bool rotates = p.rotary.cos != nullptr, last = t.rank == t.cluster - 1;
  Queries<C> queries;
  if (!rotates) queries.load(p, t);
  bool valid = divide(p, length, padding, &t);
  KTiles<C> k;
  VTiles<C> v;
  k.find(p, t, t.tile_begin), v.find(p, t, t.tile_begin);
  k.load(p, t, t.tile_begin), v.load(p, t, t.tile_begin);
  valid = __shfl_sync(~0u, valid, 0);
  t.make_uniform();
  const bool appends = valid && last && p.k != nullptr;
  k.find(p, t, t.tile_begin + C::kStep), v.find(p, t, t.tile_begin + C::kStep);
  if (rotates) {
    stage_rows(
        p, t, staged_q, p.rows, C::kRows, [&](int row) { return Queries<C>::row_at(p, t, row); },
        [&](int row) { return static_cast<int>((row * p.group_inverse) >> 20); });
  }
  if (appends) {
    stage_rows(
        p, t, staged_k, p.seqlen_q, kTile,
        [&](int row) { return p.k + t.b * p.k_in[0] + row * p.k_in[1] + t.head * p.k_in[2]; },
        [](int row) { return row; });
  }
  if (rotates || appends) __syncthreads();
  if (rotates) queries.load_staged(t, staged_q);
  Sums<C> sums;
  sums.clear();
  if (appends) {
    append(p, t, staged_k);
    add_new_keys(p, t, queries, scores + C::kRows * C::kKeys, staged_k, &sums);
  }

  int parity = 0;
  for (int first = t.tile_begin; first < t.tile_end; first += C::kStep, parity ^= 1) {
    float *now = scores + parity * C::kRows * C::kKeys;
    const int next = first + C::kStep;
#pragma unroll
    for (int i = 0; i < C::kTiles; ++i) {
      if (first + t.k_local(i) < t.tile_end) queries.score(p, t, k.x[i], now, t.k_local(i) * kTile);
    }
    k.load(p, t, next);
    k.find(p, t, next + C::kStep);
    // One barrier a step: nobody writes these scores again before everybody has passed the next one.
    __syncthreads();
    sums.template add<C::kValues>(
        p, t, now, v.x, t.row_high, [&](int i) { return t.v_local(i); },
        [&](int i) { return (first + t.v_local(i)) * kTile; },
        [&](int i) { return first + t.v_local(i) < t.tile_end; });
    v.load(p, t, next);
    v.find(p, t, next + C::kStep);
  }

  cluster_wait();
  if (valid) {
    push_sums(p, t, sums, shared_base);
    mbarrier_wait_cluster(shared_base + C::kBarrier, 0);
  }
  finish(p, t, valid, shared);
}

}  // namespace gqa::cuda::decode_sm90
