// softmax(q k^T * scale) v of dense prompts on Hopper: TMA loads, wgmma products, one warpgroup loading for the others.
// A block walks over tiles of kRows queries of one head; each computing warpgroup has 64 of the rows, and scores,
// weights and sums of values in registers. Turns: while one warpgroup is in its softmax the other one's products run.
// Memory order: q and the last block of keys, then keys one block ahead of values, from the last block to the first.
// Limits: 16-bit types, head_dim the tile's, 16-byte aligned rows, lengths below 2^30, scale > 0. Values that a row
// does not see must be finite. Determinism: fixed order, no atomics.
#pragma once

#include "cuda/common/mbarrier.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/tma.cuh"
#include "cuda/common/wgmma.cuh"

namespace gqa::cuda::prefill_sm90 {

template <int kDim_, int kKeys_, int kGroups_>
struct PrefillTile {
  static constexpr int kDim = kDim_, kKeys = kKeys_;
  static constexpr int kGroups = kGroups_;  // computing warpgroups
  static constexpr int kStages = 2;         // blocks of keys, and of values, on their way
  static constexpr int kRows = 64 * kGroups, kThreads = 128 * (kGroups + 1);
  static constexpr int kLoaderRegisters = kGroups == 2 ? 24 : 32, kRegisters = kGroups == 2 ? 240 : 160;
  static constexpr uint32_t kQueryBytes = 2 * kRows * kDim, kBlockBytes = 2 * kKeys * kDim;
  static constexpr uint32_t kQueryPanel = 128 * kRows, kKeyPanel = 128 * kKeys;
  static constexpr uint32_t kKeysAt = kQueryBytes, kValuesAt = kKeysAt + kStages * kBlockBytes;
  static constexpr uint32_t kBarriersAt = kValuesAt + kStages * kBlockBytes;
  static constexpr int kSharedMemory = kBarriersAt + 8 * (2 + 4 * kStages);
  static_assert(kQueryBytes % 1024 == 0 && kKeyPanel % 1024 == 0, "the swizzle repeats every 1024 bytes");
};

struct PrefillArgs {
  void *out;
  float *lse;  // [batch, heads, queries] or nullptr
  int64_t out_stride[3];
  int32_t queries, keys, heads, group;
  int32_t row_tiles;  // of one head
  int32_t tiles;
  int32_t all_heads;  // batch * heads
  int32_t section;    // heads whose keys and values stay in L2 together
  int32_t causal;
  float multiplier;  // of scores, to log2 units
};

// Full and empty barriers of q and of both rings.
template <typename Tile>
struct PrefillBarriers {
  uint32_t base;

  __device__ uint32_t query_full() const { return base; }
  __device__ uint32_t query_empty() const { return base + 8; }
  __device__ uint32_t key_full(uint32_t stage) const { return base + 16 + 8 * stage; }
  __device__ uint32_t key_empty(uint32_t stage) const { return key_full(stage) + 8 * Tile::kStages; }
  __device__ uint32_t value_full(uint32_t stage) const { return key_full(stage) + 16 * Tile::kStages; }
  __device__ uint32_t value_empty(uint32_t stage) const { return key_full(stage) + 24 * Tile::kStages; }

  __device__ void init() const {
    constexpr int kWarps = 4 * Tile::kGroups;
    mbarrier_init(query_full(), 1);
    mbarrier_init(query_empty(), kWarps);
    for (uint32_t stage = 0; stage < Tile::kStages; ++stage) {
      mbarrier_init(key_full(stage), 1);
      mbarrier_init(key_empty(stage), kWarps);
      mbarrier_init(value_full(stage), 1);
      mbarrier_init(value_empty(stage), kWarps);
    }
    mbarrier_fence_init();
  }
};

struct PrefillWork {
  int row0, head, batch;
  int blocks;  // of keys; at least one, which may be masked altogether
};

// Tiles of a section in order: most keys first, and of one height all heads, those of one KV head side by side. Blocks
// take them to and fro, so that early long ones are made up for by late short ones. False after the last one.
template <typename Tile>
__device__ __forceinline__ bool find_work(const PrefillArgs &a, int round, PrefillWork &work) {
  const int grid = gridDim.x, block = blockIdx.x;
  const int tile = round * grid + (round % 2 == 0 ? block : grid - 1 - block);
  if (tile >= a.tiles) return false;
  const int section = tile / (a.section * a.row_tiles), within = tile - section * (a.section * a.row_tiles);
  const int heads = min(a.section, a.all_heads - section * a.section);
  const int head = section * a.section + within % heads;
  work.row0 = (a.row_tiles - 1 - within / heads) * Tile::kRows;
  work.batch = head / a.heads;
  work.head = head - work.batch * a.heads;
  const int end = min(work.row0 + Tile::kRows, a.queries);
  const int seen = a.causal ? min(a.keys, end + a.keys - a.queries) : a.keys;
  work.blocks = max(1, (seen + Tile::kKeys - 1) / Tile::kKeys);
  return true;
}

// One thread that keeps the rings full.
template <typename Tile>
__device__ __forceinline__ void load_tiles(const PrefillArgs &a, const CUtensorMap &q, const CUtensorMap &k,
                                           const CUtensorMap &v, uint32_t memory) {
  const PrefillBarriers<Tile> barriers{memory + Tile::kBarriersAt};
  RingPosition<Tile::kStages> key_at, value_at;
  PrefillWork work;
  for (int round = 0; find_work<Tile>(a, round, work); ++round) {
    const int kv_head = work.head / a.group;
    const auto load_keys = [&](int block) {
      mbarrier_wait(barriers.key_empty(key_at.stage), key_at.parity ^ 1);
      const uint32_t full = barriers.key_full(key_at.stage);
      mbarrier_arrive_expect(full, Tile::kBlockBytes);
      copy_tile(memory + Tile::kKeysAt + key_at.stage * Tile::kBlockBytes, k, full, block * Tile::kKeys, kv_head,
                work.batch);
      key_at.advance();
    };
    const auto load_values = [&](int block) {
      mbarrier_wait(barriers.value_empty(value_at.stage), value_at.parity ^ 1);
      const uint32_t full = barriers.value_full(value_at.stage);
      mbarrier_arrive_expect(full, Tile::kBlockBytes);
      copy_tile(memory + Tile::kValuesAt + value_at.stage * Tile::kBlockBytes, v, full, block * Tile::kKeys, kv_head,
                work.batch);
      value_at.advance();
    };
    mbarrier_wait(barriers.query_empty(), (round & 1) ^ 1);
    mbarrier_arrive_expect(barriers.query_full(), Tile::kQueryBytes);
    copy_tile(memory, q, barriers.query_full(), work.row0, work.head, work.batch);
    load_keys(work.blocks - 1);
    for (int block = work.blocks - 2; block >= 0; --block) {
      load_keys(block);
      load_values(block + 1);
    }
    load_values(0);
  }
}

// Turns of the computing warpgroups at the tensor cores, in a circle; barrier 1 + g lets warpgroup g in.
template <int kGroups>
struct Turns {
  uint32_t own, next;

  __device__ explicit Turns(int group) : own(1 + group), next(1 + (group + 1) % kGroups) {
    if (group == kGroups - 1) pass();
  }
  __device__ __forceinline__ void wait() const { asm volatile("bar.sync %0, 256;" ::"r"(own) : "memory"); }
  __device__ __forceinline__ void pass() const { asm volatile("bar.arrive %0, 256;" ::"r"(next) : "memory"); }
};

// The online softmax of a thread's two rows, lane / 4 and lane / 4 + 8 of its warp's 16.
struct PrefillSoftmax {
  float highest[2] = {-INFINITY, -INFINITY};  // in log2 units; weights are relative to it
  float sum[2] = {0, 0};                      // of this thread's columns
  float factor[2] = {1, 1};                   // of what was summed up before the last weigh()

  // Scores become weights. A thread's column i of a row is key 8 (i / 2) + i % 2 of the block; kMask: it is there only
  // if that is less than end[row]. True where sums of values have to be multiplied by `factor`.
  template <bool kMask, int kScores>
  __device__ __forceinline__ bool weigh(float (&s)[kScores], float multiplier, const int (&end)[2]) {
    if constexpr (kMask) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) s[i] = 8 * (i / 4) + i % 2 < end[i / 2 % 2] ? s[i] : -INFINITY;
    }
    float top[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) {
      // Two chains: one alone is too slow.
      float even = s[2 * row], odd = s[2 * row + 1];
#pragma unroll
      for (int i = 4 + 2 * row; i < kScores; i += 4) even = fmaxf(even, s[i]), odd = fmaxf(odd, s[i + 1]);
      even = fmaxf(even, odd);
      even = fmaxf(even, __shfl_xor_sync(0xffffffffu, even, 1));
      even = fmaxf(even, __shfl_xor_sync(0xffffffffu, even, 2));
      top[row] = fmaxf(highest[row], even * multiplier);
    }
    // A row's weights may grow to 2^8 before its sums are rescaled. Negated: also true of the first, infinite step.
    const bool moved = !(top[0] - highest[0] <= 8.0f && top[1] - highest[1] <= 8.0f);
    const bool rescale = __any_sync(0xffffffffu, moved);
    if (rescale) {
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        // Each row by itself: its bytes do not depend on the rows beside it.
        if (top[row] - highest[row] <= 8.0f) {
          factor[row] = 1.0f;
          continue;
        }
        factor[row] = exp2_fast(highest[row] - (top[row] == -INFINITY ? 0.0f : top[row]));
        sum[row] *= factor[row];
        highest[row] = top[row];
      }
    }
    float base[2];
#pragma unroll
    for (int row = 0; row < 2; ++row) base[row] = highest[row] == -INFINITY ? 0.0f : highest[row];
    // In one FMA scores are exact while `highest` is rounded: the same factor for the whole row, unless it is so large
    // that 2^error overflows. Then scores are rounded as `highest` was.
    float scale[2] = {multiplier, multiplier};
    const bool huge[2] = {fabsf(base[0]) > 0x1p26f, fabsf(base[1]) > 0x1p26f};
    if (__any_sync(0xffffffffu, huge[0] || huge[1])) {
#pragma unroll
      for (int i = 0; i < kScores; ++i) {
        if (huge[i / 2 % 2]) s[i] = __fmul_rn(s[i], multiplier);
      }
#pragma unroll
      for (int row = 0; row < 2; ++row) {
        if (huge[row]) scale[row] = 1.0f;
      }
    }
    float added[4] = {0, 0, 0, 0};
#pragma unroll
    for (int i = 0; i < kScores; ++i) {
      s[i] = exp2_fast(__fmaf_rn(s[i], scale[i / 2 % 2], -base[i / 2 % 2]));
      added[i % 4] += s[i];
    }
    sum[0] += added[0] + added[1];
    sum[1] += added[2] + added[3];
    return rescale;
  }
};

template <typename T, typename Tile>
struct PrefillRows {
  static constexpr int kDim = Tile::kDim, kKeys = Tile::kKeys;

  uint32_t q, k, v;  // descriptors of this warpgroup's rows and of the first stages
  float out[kDim / 2];
  float scores[kKeys / 2];
  uint32_t weights[kKeys / 4];

  // Starts scores = q k^T.
  __device__ __forceinline__ void start_scores(uint32_t stage) {
    const uint32_t block = k + stage * (Tile::kBlockBytes / 16);
    pin(scores);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      const uint32_t panel = step / 4, inside = step % 4 * 2;
      Wgmma<T, kKeys>::score(scores, q + panel * (Tile::kQueryPanel / 16) + inside,
                             block + panel * (Tile::kKeyPanel / 16) + inside, step > 0);
    }
    wgmma_commit();
  }

  // Starts out += weights v.
  __device__ __forceinline__ void start_values(uint32_t stage) {
    const uint32_t block = v + stage * (Tile::kBlockBytes / 16);
    pin(out);
    pin(weights);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      Wgmma<T, kDim>::weigh(out, weights + 4 * step, block + step * (16 * 128 / 16));
    }
    wgmma_commit();
  }

  __device__ __forceinline__ void pack_weights() {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) weights[i] = pack<T>(scores[2 * i], scores[2 * i + 1]);
  }

  __device__ __forceinline__ void scale_out(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) out[i] *= factor[i / 2 % 2];
  }

  // The four lanes of a row trade their columns so that each stores 16 bytes at once.
  __device__ __forceinline__ void store(const PrefillArgs &a, const PrefillWork &work, int row0,
                                        const PrefillSoftmax &softmax) {
    const int lane = threadIdx.x % 32, corner = lane % 4;
    const bool odd = corner & 1, upper = corner & 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = softmax.sum[half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      const bool empty = sum == 0;
      const float factor = 1.0f / sum;
      const int row = row0 + 8 * half;
      T *to = static_cast<T *>(a.out) + work.batch * a.out_stride[0] + row * a.out_stride[1] +
              work.head * a.out_stride[2] + 8 * corner;
#pragma unroll
      for (int n = 0; n < kDim / 8; n += 4) {
        uint32_t x[4];
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          const float *pair = out + 4 * (n + i) + 2 * half;
          x[i] = empty ? 0u : pack<T>(pair[0] * factor, pair[1] * factor);
        }
        trade<1>(x[0], x[1], odd);
        trade<1>(x[2], x[3], odd);
        trade<2>(x[0], x[2], upper);
        trade<2>(x[1], x[3], upper);
        if (row < a.queries) *reinterpret_cast<uint4 *>(to + 8 * n) = make_uint4(x[0], x[1], x[2], x[3]);
      }
      if (a.lse != nullptr && corner == 0 && row < a.queries) {
        constexpr float kLn2 = 0.693147180559945309f;
        const int64_t at = (static_cast<int64_t>(work.batch) * a.heads + work.head) * a.queries + row;
        a.lse[at] = empty ? -INFINITY : softmax.highest[half] * kLn2 + logf(sum);
      }
    }
  }

 private:
  // The lane without `second` gives its y for the other one's x.
  template <int kDistance>
  __device__ __forceinline__ static void trade(uint32_t &x, uint32_t &y, bool second) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, second ? x : y, kDistance);
    (second ? x : y) = got;
  }
};

// A computing warpgroup: its 64 rows of every tile.
template <typename T, typename Tile>
__device__ __forceinline__ void attend_tiles(const PrefillArgs &a, uint32_t memory, int group) {
  const PrefillBarriers<Tile> barriers{memory + Tile::kBarriersAt};
  const Turns<Tile::kGroups> turns(group);
  const int lane = threadIdx.x % 32;
  const auto release = [&](uint32_t barrier) {
    if (lane == 0) mbarrier_arrive(barrier);
  };
  PrefillRows<T, Tile> rows;
  rows.q = tile_descriptor(memory + group * 64 * 128, 16);
  rows.k = tile_descriptor(memory + Tile::kKeysAt, 16);
  rows.v = tile_descriptor(memory + Tile::kValuesAt, Tile::kKeyPanel);
  RingPosition<Tile::kStages> key_at, value_at;
  PrefillWork work;
  for (int round = 0; find_work<Tile>(a, round, work); ++round) {
    const int first = work.row0 + 64 * group, row0 = first + threadIdx.x % 128 / 32 * 16 + lane / 4;
    const int past = a.keys - a.queries + 1;
    // Keys [0, end) are seen by the row; blocks before `masked` by every row of the warpgroup.
    const int row_end[2] = {a.causal ? min(a.keys, row0 + past) : a.keys,
                            a.causal ? min(a.keys, row0 + 8 + past) : a.keys};
    const int masked = (a.causal ? max(0, min(a.keys, first + past)) : a.keys) / Tile::kKeys;
    PrefillSoftmax softmax;
    int block = work.blocks - 1;
    const auto weigh = [&](auto mask) {
      const int column = block * Tile::kKeys + 2 * (lane % 4);
      const int end[2] = {row_end[0] - column, row_end[1] - column};
      return softmax.weigh<decltype(mask)::value>(rows.scores, a.multiplier, end);
    };

    mbarrier_wait(barriers.query_full(), round & 1);
    mbarrier_wait(barriers.key_full(key_at.stage), key_at.parity);
    turns.wait();
    rows.start_scores(key_at.stage);
    turns.pass();
#pragma unroll
    for (int i = 0; i < Tile::kDim / 2; ++i) rows.out[i] = 0;
    wgmma_wait<0>();
    pin(rows.scores);
    release(barriers.key_empty(key_at.stage));
    key_at.advance();
    if (block == 0) release(barriers.query_empty());
    weigh(std::true_type{});
    rows.pack_weights();

    // Scores of this block and values of the one before it.
    const auto step = [&](auto mask) {
      mbarrier_wait(barriers.key_full(key_at.stage), key_at.parity);
      turns.wait();
      rows.start_scores(key_at.stage);
      mbarrier_wait(barriers.value_full(value_at.stage), value_at.parity);
      rows.start_values(value_at.stage);
      turns.pass();
      wgmma_wait<1>();
      pin(rows.scores);
      release(barriers.key_empty(key_at.stage));
      key_at.advance();
      if (block == 0) release(barriers.query_empty());
      const bool rescale = weigh(mask);
      wgmma_wait<0>();
      pin(rows.out);
      pin(rows.weights);
      release(barriers.value_empty(value_at.stage));
      value_at.advance();
      rows.pack_weights();
      if (rescale) rows.scale_out(softmax.factor);
    };
    for (--block; block >= masked && block >= 0; --block) step(std::true_type{});
#pragma unroll 1
    for (; block >= 0; --block) step(std::false_type{});

    mbarrier_wait(barriers.value_full(value_at.stage), value_at.parity);
    rows.start_values(value_at.stage);
    wgmma_wait<0>();
    pin(rows.out);
    release(barriers.value_empty(value_at.stage));
    value_at.advance();
    rows.store(a, work, row0, softmax);
  }
}

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    prefill_wgmma(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                  const __grid_constant__ CUtensorMap v, const __grid_constant__ PrefillArgs a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // the plan chooses it there only
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const uint32_t memory = shared_address(shared_memory);
  // The same in all lanes, and known to be: descriptors stay in uniform registers.
  const int warpgroup = __shfl_sync(0xffffffffu, static_cast<int>(threadIdx.x) / 128, 0);
  if (threadIdx.x == 0) {
    prefetch_map(q);
    prefetch_map(k);
    prefetch_map(v);
    PrefillBarriers<Tile>{memory + Tile::kBarriersAt}.init();
  }
  __syncthreads();
  if (warpgroup == 0) {
    give_registers<Tile::kLoaderRegisters>();
    if (threadIdx.x == 0) load_tiles<Tile>(a, q, k, v, memory);
  } else {
    take_registers<Tile::kRegisters>();
    attend_tiles<T, Tile>(a, memory, warpgroup - 1);
  }
#endif
}

}  // namespace gqa::cuda::prefill_sm90
