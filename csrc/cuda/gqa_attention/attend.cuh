// softmax(q k^T * scale) v on the tensor cores, for half types; the kernel behind both prefill and decode.
// A block has one KV head and a tile of its rows (query, head of the group), so heads share each load of K and V. Few
// rows: each warp streams keys of its own, merged at the end. Many rows: each warp has rows of its own.
// Memory order: lengths, page ids one block ahead, K and V by cp.async into a ring; q, rotated, while the first is
// under way; out once, or float32 partials where the keys are split over the grid, joined by combine_splits.
// Limits: head_dim a multiple of 8 up to 256; any strides, alignment, page size and group; at most 99 KB of shared
// memory. Determinism: fixed order, no atomics; blocks of keys start at multiples of 64 from the sequence's first key,
// so a row's result depends on its own keys, on the shape of the tile and on the splits alone.
#pragma once

#include "cuda/common/rotary.cuh"
#include "cuda/gqa_attention/warp_tile.cuh"

namespace gqa::cuda {

// This block's rows and the keys they attend to. Keys [first, last) are attended to by some row; the block of the grid
// takes [begin, end) of them, where begin may lie up to 63 keys before first.
struct BlockRange {
  int row0, rows;
  int first, last;
  int begin, end;
};

__device__ __forceinline__ BlockRange find_range(const AttentionArgs &a, const Queries &queries, const BlockWork &work,
                                                 int block_rows) {
  BlockRange r;
  r.row0 = work.row_block * block_rows;
  r.rows = min(block_rows, queries.rows - r.row0);
  // Ranges move to the right with the query.
  r.first = static_cast<int>(key_range(a.p, queries.sequence, queries.query(r.row0)).first);
  r.last = static_cast<int>(key_range(a.p, queries.sequence, queries.query(r.row0 + r.rows - 1)).last);
  const int origin = static_cast<int>(queries.sequence.leftpad);
  const int start = origin + (r.first - origin) / kSplitUnit * kSplitUnit;
  const int keys = max(0, r.last - start);
  const int even = (keys + a.divisor - 1) / a.divisor;
  const int chunk = max(a.min_chunk, (even + kSplitUnit - 1) / kSplitUnit * kSplitUnit);
  const int64_t begin = start + static_cast<int64_t>(work.split) * chunk;
  r.begin = static_cast<int>(begin < r.last ? begin : max(start, r.last));
  r.end = static_cast<int>(begin + chunk < r.last ? begin + chunk : r.last);
  return r;
}

// The query tile, rotated, with zeros beyond the block's rows and beyond head_dim; and each row's keys.
template <typename T, int kIndex>
__device__ void load_queries(const AttentionArgs &a, const Queries &queries, const BlockRange &range, uint32_t tile,
                             int2 *ranges) {
  constexpr AttentionShape kShape = kAttentionShapes[kIndex];
  constexpr int kColumns = kShape.dim / 8;
  const gqa_attention_params &p = a.p;
  for (int row = threadIdx.x; row < kShape.rows(); row += kShape.threads()) {
    // Rows that only fill the tile see what the last row sees.
    const int query = static_cast<int>(queries.query(range.row0 + min(row, range.rows - 1)));
    const KeyRange keys = key_range(p, queries.sequence, query);
    ranges[row] = make_int2(static_cast<int>(keys.first), static_cast<int>(keys.last));
  }
  for (int i = threadIdx.x; i < kShape.rows() * kColumns; i += kShape.threads()) {
    const int row = i / kColumns, first = i % kColumns * 8;
    uint4 chunk = make_uint4(0, 0, 0, 0);
    if (row < range.rows && first < p.head_dim) {
      const T *from = static_cast<const T *>(p.q) + queries.offset(p.q_stride, range.row0 + row);
      if (p.rotary.cos != nullptr) {
        const int64_t query = queries.query(range.row0 + row);
        const int64_t position = queries.sequence.position(query) - queries.sequence.leftpad;
        const int64_t angles = rotary_offset(p.rotary, queries.b, queries.sequence.q_start + query, position);
        float x[kChunk];
        load_rotated_chunk(from, first, p.rotary, angles, x);
        chunk = make_uint4(pack<T>(x[0], x[1]), pack<T>(x[2], x[3]), pack<T>(x[4], x[5]), pack<T>(x[6], x[7]));
      } else if (is_aligned16(from)) {
        copy_async(tile + shared_offset<kShape.dim>(row, first / 8), from + first, true);
        continue;
      } else {
        chunk = load_unaligned(from + first);
      }
    }
    store_shared16(tile + shared_offset<kShape.dim>(row, first / 8), chunk);
  }
  copy_async_commit();
}

// Writes what a row has once, its lse or its partial sums, and returns the factor of its outputs.
template <typename T>
__device__ __forceinline__ float finish_row(const AttentionArgs &a, const Queries &queries, int split, int row,
                                            float highest, float sum, bool leader) {
  if (a.num_splits > 1) {
    if (leader) a.partial_sum[split * a.rows + queries.flat(a.p, row)] = make_float2(highest, sum);
    return 1.0f;
  }
  const Finish finish = Finish::of<T>(a.p, queries.head(row), highest, sum);
  if (leader && a.p.lse != nullptr) a.p.lse[queries.lse(a.p, row)] = finish.lse;
  return finish.factor * value_scale(a.p, queries.head(row));
}

// Every warp has rows of its own. Finished ones pass through the warp's part of the query tile, to leave in full lines.
template <typename T, int kIndex>
__device__ void write_rows(const AttentionArgs &a, const Queries &queries, const BlockRange &range, int split,
                           WarpTile<T, kIndex> &tile, unsigned char *memory) {
  constexpr AttentionShape kShape = kAttentionShapes[kIndex];
  constexpr int kColumns = kShape.dim / 8, kWarpRows = 16 * kShape.tiles;
  __syncwarp();
#pragma unroll
  for (int t = 0; t < kShape.tiles; ++t) {
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = tile.softmax.sum[t][half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const int row = tile.row0 + 16 * t + 8 * half + tile.lane / 4;
      if (row >= range.rows) continue;
      const float factor =
          finish_row<T>(a, queries, split, range.row0 + row, tile.softmax.base[t][half], sum, tile.lane % 4 == 0);
      float *partial = nullptr;
      if (a.num_splits > 1) {
        partial = a.partial_out + (split * a.rows + queries.flat(a.p, range.row0 + row)) * a.p.head_dim;
      }
#pragma unroll
      for (int n = 0; n < kColumns; ++n) {
        const float x = tile.out[t][n][2 * half], y = tile.out[t][n][2 * half + 1];
        const int pair = 2 * (tile.lane % 4);
        if (partial == nullptr) {
          *reinterpret_cast<uint32_t *>(memory + shared_offset<kShape.dim>(row, n) + 2 * pair) =
              pack<T>(x * factor, y * factor);
        } else if (8 * n < a.p.head_dim) {
          *reinterpret_cast<float2 *>(partial + 8 * n + pair) = make_float2(x, y);
        }
      }
    }
  }
  if (a.num_splits > 1) return;
  __syncwarp();
#pragma unroll 1
  for (int i = tile.lane; i < kWarpRows * kColumns; i += 32) {
    const int row = tile.row0 + i / kColumns, column = i % kColumns;
    if (row >= range.rows || 8 * column >= a.p.head_dim) continue;
    T *out = static_cast<T *>(a.p.out) + queries.offset(a.p.out_stride, range.row0 + row);
    copy_chunk(reinterpret_cast<const T *>(memory + shared_offset<kShape.dim>(row, column)), out + 8 * column);
  }
}

// All groups have the same rows: their results meet, 16 rows at a time, in shared memory, which the rings no longer
// need.
template <typename T, int kIndex>
__device__ void merge_groups(const AttentionArgs &a, const Queries &queries, const BlockRange &range, int split,
                             WarpTile<T, kIndex> &tile, int group, unsigned char *memory) {
  constexpr AttentionShape kShape = kAttentionShapes[kIndex];
  constexpr int kStride = kShape.dim + 8;  // floats; eight rows of a column pair lie in different banks
  static_assert(16 * kStride * 4 + 16 * 8 <= kShape.ring_bytes());
  float *outs = reinterpret_cast<float *>(memory);
  float2 *sums = reinterpret_cast<float2 *>(outs + kShape.groups * 16 * kStride);
  const int pairs = a.p.head_dim / 2;
#pragma unroll
  for (int t = 0; t < kShape.tiles; ++t) {
    __syncthreads();
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = tile.softmax.sum[t][half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const int row = 16 * group + 8 * half + tile.lane / 4;
      if (tile.lane % 4 == 0) sums[row] = make_float2(tile.softmax.base[t][half], sum);
#pragma unroll
      for (int n = 0; n < kShape.dim / 8; ++n) {
        *reinterpret_cast<float2 *>(outs + row * kStride + 8 * n + 2 * (tile.lane % 4)) =
            make_float2(tile.out[t][n][2 * half], tile.out[t][n][2 * half + 1]);
      }
    }
    __syncthreads();
    for (int i = threadIdx.x; i < min(range.rows - 16 * t, 16) * pairs; i += kShape.threads()) {
      const int row = i / pairs, column = i % pairs * 2, at = range.row0 + 16 * t + row;
      float highest = -INFINITY;
#pragma unroll
      for (int g = 0; g < kShape.groups; ++g) highest = fmaxf(highest, sums[16 * g + row].x);
      float sum = 0, x = 0, y = 0;
#pragma unroll
      for (int g = 0; g < kShape.groups; ++g) {
        const float weight = exp2_fast(sums[16 * g + row].x - highest);
        const float2 pair = *reinterpret_cast<const float2 *>(outs + (16 * g + row) * kStride + column);
        sum += weight * sums[16 * g + row].y;
        x += weight * pair.x;
        y += weight * pair.y;
      }
      const float factor = finish_row<T>(a, queries, split, at, highest, sum, column == 0);
      if (a.num_splits > 1) {
        float *partial = a.partial_out + (split * a.rows + queries.flat(a.p, at)) * a.p.head_dim;
        *reinterpret_cast<float2 *>(partial + column) = make_float2(x, y);
      } else {
        T *out = static_cast<T *>(a.p.out) + queries.offset(a.p.out_stride, at);
        out[column] = from_float<T>(x * factor);
        out[column + 1] = from_float<T>(y * factor);
      }
    }
  }
}

// Whether some row does not attend to some key that is loaded.
template <int kIndex>
__device__ bool is_mixed(const BlockRange &range, const int2 *ranges) {
  return ranges[kAttentionShapes[kIndex].rows() - 1].x > range.first || ranges[0].y < range.end;
}

template <typename T, int kIndex>
__global__ void __launch_bounds__(kAttentionShapes[kIndex].threads(), kAttentionShapes[kIndex].resident)
    attend(const __grid_constant__ AttentionArgs a) {
  constexpr AttentionShape kShape = kAttentionShapes[kIndex];
  static_assert(kShape.groups == 1 || kShape.warps == 1, "a group is one warp, or there is only one");
  static_assert(kSplitUnit % kShape.keys == 0, "splits are whole blocks of keys");
  static_assert(kShape.shared_memory() <= 99 * 1024, "the limit of sm_86 and sm_89");
  extern __shared__ __align__(128) unsigned char memory[];
  // What only the end needs again waits in shared memory, not in registers.
  __shared__ Queries kept_queries;
  __shared__ BlockRange kept_range;
  __shared__ KeySource<T> source;
  const BlockWork work = find_work(a);
  const Queries queries(a.p, work);
  if (work.b == a.p.batch || !queries.sequence.valid) return fill_rows<T>(a, queries, work, kShape.rows());
  if (work.row_block * kShape.rows() >= queries.rows) return;
  const BlockRange range = find_range(a, queries, work, kShape.rows());
  if (a.num_splits > 1 && range.begin >= range.end) {
    for (int row = threadIdx.x; row < range.rows; row += kShape.threads()) {
      finish_row<T>(a, queries, work.split, range.row0 + row, -INFINITY, 0.0f, true);
    }
    return;
  }

  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32 % kShape.warps, group = threadIdx.x / 32 / kShape.warps;
  int2 *ranges = reinterpret_cast<int2 *>(memory + kShape.rows() * kShape.dim * 2);
  unsigned char *rings = memory + kShape.rows() * (kShape.dim * 2 + 8);
  const uint32_t query_tile = shared_address(memory);
  const uint32_t ring = shared_address(rings) + group * kShape.ring_bytes();

  // Block i of this group starts at key begin + i * step.
  constexpr int kStep = kShape.groups * kShape.keys;
  constexpr bool kInTurns = kShape.stages == 1;
  constexpr bool kAlone = kShape.groups > 1;  // a group is one warp
  constexpr int kPending = kInTurns ? 0 : kShape.stages - 2;
  const int begin = range.begin + group * kShape.keys;
  const int blocks = begin < range.end ? (range.end - begin + kStep - 1) / kStep : 0;
  KeyLoader<T, kShape.dim, kShape.keys, kShape.warps> loader(source, warp, lane);
  const auto place = [&](int i) { return ring + i % kShape.stages * (2 * kShape.block_bytes()); };
  const auto load_keys = [&](int i) {
    if (i < blocks) loader.load_keys(a, begin + i * kStep, place(i));
    if (kInTurns) copy_async_commit();
  };
  const auto load_values = [&](int i) {
    if (i < blocks) {
      loader.load_values(a, begin + i * kStep, place(i) + kShape.block_bytes());
      loader.find_page(a, begin + (i + 1) * kStep);
    }
    copy_async_commit();
  };
  const auto start = [&] {
    loader.find_page(a, begin);
    if (kInTurns) load_keys(0);
#pragma unroll
    for (int i = 0; i < kShape.stages - 1; ++i) load_keys(i), load_values(i);
  };
  // What was copied is there for all warps of the group, and all are done with what they read before.
  const auto meet = [&] {
    copy_async_wait<kPending>();
    if constexpr (kAlone) {
      __syncwarp();
    } else {
      __syncthreads();
    }
  };

  load_queries<T, kIndex>(a, queries, range, query_tile, ranges);
  if (threadIdx.x == 0) {
    kept_queries = queries;
    kept_range = range;
    source = KeySource<T>(a, queries, range.first, range.end);
  }
  __syncthreads();
  start();
  copy_async_wait<kInTurns ? 1 : kShape.stages - 1>();  // of the queries
  __syncthreads();

  WarpTile<T, kIndex> tile(lane, warp * 16 * kShape.tiles, query_tile, ranges);
  const bool has_rows = tile.row0 < kept_range.rows;
  for (bool carefully = false;; carefully = true) {
    tile.clear();
    for (int i = 0; i < blocks; ++i) {
      meet();
      if (kInTurns) {
        load_values(i);
      } else {
        load_keys(i + kShape.stages - 1), load_values(i + kShape.stages - 1);
      }
      const int key = begin + i * kStep;
      const bool seen = has_rows && tile.sees_any(key), full = tile.sees_all(key);
      typename WarpTile<T, kIndex>::Scores scores;
      if (seen) tile.score(a, source.key_scale, scores, place(i), key, full);
      if (kInTurns) meet(), load_keys(i + 1);
      if (seen) tile.add(scores, place(i) + kShape.block_bytes(), a.multiplier, carefully && !full);
    }
    // Masked keys have weight 0, but 0 times infinity or NaN is NaN: where that may have happened, all over again.
    if (carefully || !is_mixed<kIndex>(kept_range, ranges)) break;
    if constexpr (kAlone) {
      if (!__any_sync(0xffffffffu, tile.is_spoilt())) break;
    } else {
      if (!__syncthreads_or(tile.is_spoilt())) break;
    }
    start();
  }
  if (__any_sync(0xffffffffu, tile.left_out)) {
    for (int i = 0; i < blocks; ++i) {
      const int first = begin + i * kStep;
      if (tile.sees_all(first)) continue;
#pragma unroll 1
      for (int key = first; key < first + kShape.keys; ++key) {
#pragma unroll
        for (int n = 0; n < kShape.dim / 8; ++n)
          tile.add_left_out(key, n, loader.value_at(a, key, 8 * n + 2 * (lane % 4)));
      }
    }
  }

  if constexpr (kShape.groups > 1) {
    merge_groups<T, kIndex>(a, kept_queries, kept_range, find_work(a).split, tile, group, rings);
  } else {
    write_rows<T, kIndex>(a, kept_queries, kept_range, find_work(a).split, tile, memory);
  }
}

}  // namespace gqa::cuda
