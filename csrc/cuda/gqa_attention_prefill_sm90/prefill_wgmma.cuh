// softmax(q k^T * scale) v of prompts on Hopper: TMA loads, wgmma products, one warpgroup loading for the others.
// A block walks over tiles of kRows queries of one head; each computing warpgroup has 64 of the rows, and scores,
// weights and sums of values in registers. Turns: while one warpgroup is in its softmax the other one's products run.
// Memory order: q and the last block of keys, then keys one block ahead of values, from the last block to the first.
// Limits: 16-bit types, head_dim at most the tile's, 16-byte aligned rows, lengths below 2^30, scale > 0. Determinism:
// fixed order, no atomics; a row's bytes depend on its own keys and its place in the tile alone.
#pragma once

#include "cuda/common/wgmma.cuh"
#include "cuda/gqa_attention/args.cuh"
#include "cuda/gqa_attention_prefill_sm90/load.cuh"
#include "cuda/gqa_attention_prefill_sm90/softmax.cuh"

namespace gqa::cuda::prefill_sm90 {

// Turns of the computing warpgroups at the tensor cores, in a circle; barrier 1 + g lets warpgroup g in.
template <int kGroups>
struct Turns {
  int group;

  __device__ explicit Turns(int group_) : group(group_) {
    if (group == kGroups - 1) pass();
  }
  __device__ __forceinline__ void wait() const {
    asm volatile("bar.sync %0, 256;" ::"r"(1 + afresh(group)) : "memory");
  }
  __device__ __forceinline__ void pass() const {
    const int own = afresh(group);
    asm volatile("bar.arrive %0, 256;" ::"r"(own == kGroups - 1 ? 1 : 2 + own) : "memory");
  }
};

// The first of a thread's two rows; the other is 8 below.
__device__ __forceinline__ int first_row(const PrefillWork &work, int thread) {
  return work.row0 + (thread / 32 - 4) * 16 + thread % 32 / 4;
}

template <typename T, typename Tile>
struct PrefillRows {
  static constexpr int kDim = Tile::kDim, kKeys = Tile::kKeys;

  uint32_t q, k, v;  // descriptors of this warpgroup's rows, and of the blocks of keys and of values that are next
  uint32_t keys_turn, values_turn;  // sums of the descriptors of both stages
  float out[kDim / 2];
  float scores[kKeys / 2];
  uint32_t weights[kKeys / 4];

  // Starts scores = q k^T.
  __device__ __forceinline__ void start_scores() {
    pin(scores);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      const uint32_t panel = 16 * step / Tile::kPanel, inside = 16 * step % Tile::kPanel / 8;
      Wgmma<T, kKeys>::template score<Tile::kSwizzle>(scores, q + panel * (Tile::kQueryPanel / 16) + inside,
                                                      k + panel * (Tile::kKeyPanel / 16) + inside, step > 0);
    }
    wgmma_commit();
    k = keys_turn - k;
  }

  // Starts out += weights v; calls `pass` shortly before the end, so that the next warpgroup's products follow at once.
  template <typename Pass>
  __device__ __forceinline__ void start_values(Pass &&pass) {
    pin(out);
    pin(weights);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      if (step == kKeys / 16 - Tile::kEarly) pass();
      Wgmma<T, kDim>::template weigh<Tile::kSwizzle>(out, weights + 4 * step, v + step * Tile::kSwizzle);
    }
    if (Tile::kEarly == 0) pass();
    wgmma_commit();
    v = values_turn - v;
  }

  __device__ __forceinline__ void pack_weights() {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) weights[i] = pack<T>(scores[2 * i], scores[2 * i + 1]);
  }

  // The warp's scores with a block of keys once more, from memory.
  __device__ __forceinline__ void repeat_scores(const PrefillArgs &a, const PrefillWork &work, int row0, int block) {
    const gqa_attention_params &p = a.p;
    const int lane = threadIdx.x % 32, column = 2 * (lane % 4);
    const T *q = static_cast<const T *>(p.q) + work.q_batch * p.q_stride[0] +
                 (work.q_start + min(row0, work.queries - 1)) * p.q_stride[1] + work.head * p.q_stride[2] + column;
    const auto pair = [](const T *at) { return *reinterpret_cast<const uint32_t *>(at); };
#pragma unroll 1
    for (int n = 0; n < kKeys / 8; ++n) {
      const T *k = key_row<T>(a, work, a.k, a.k_stride, block * kKeys + 8 * n + lane / 4) + column;
      float four[4] = {0, 0, 0, 0};
#pragma unroll 1
      for (int d = 0; d < p.head_dim; d += 16) {
        // Not kept in registers, which are short.
        const int last = work.queries - 1, row = first_row(work, afresh(threadIdx.x));
        const T *lower = q + d + (min(row + 8, last) - min(row, last)) * p.q_stride[1];
        const bool both = d + 8 < p.head_dim;
        const auto second = [&](const T *at) { return both ? pair(at + 8) : 0u; };
        const uint32_t x[4] = {pair(q + d), pair(lower), second(q + d), second(lower)};
        multiply_add<T>(four, x, pair(k + d), second(k + d));
      }
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) scores[i] = i / 4 == n ? four[i % 4] : scores[i];
    }
  }

  // Scores in log2 units, where a product with a positive number alone does not make them.
  __device__ __forceinline__ void transform(const PrefillArgs &a) {
    if (a.p.softcap > 0) {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) scores[i] = a.after_tanh * tanh_fast(scores[i] * a.before_tanh);
    } else {
#pragma unroll
      for (int i = 0; i < kKeys / 2; ++i) scores[i] *= a.before_tanh;
    }
  }

  __device__ __forceinline__ void scale_out(const float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < kDim / 2; ++i) out[i] *= factor[i / 2 % 2];
  }

  // Values that the inspectors took out of blocks which not every row sees, into rows that see them: infinities and NaN
  // are the same at any weight. From memory, as that is the exception.
  __device__ __forceinline__ void add_care(const PrefillArgs &a, const PrefillWork &work, int row0) {
    const int corner = threadIdx.x % 4;
    const int begin[2] = {seen_begin(a, work, row0), seen_begin(a, work, row0 + 8)};
    const int end[2] = {seen_end(a, work, row0), seen_end(a, work, row0 + 8)};
    for (int block = work.first_block; block < work.end_block; ++block) {
      if (block >= work.first_sure && block < work.end_sure) continue;
      const int first = max(block * kKeys, work.first_key), last = min((block + 1) * kKeys, work.keys);
      for (int key = first; key < last; ++key) {
        const T *from = key_row<T>(a, work, a.v, a.v_stride, key) + 2 * corner;
#pragma unroll
        for (int n = 0; n < kDim / 8; ++n) {
          if (8 * n >= a.p.head_dim) break;
          const float2 pair = unpack<T>(*reinterpret_cast<const uint32_t *>(from + 8 * n));
#pragma unroll
          for (int half = 0; half < 2; ++half) {
            if (key < begin[half] || key >= end[half]) continue;
            if (!isfinite(pair.x)) out[4 * n + 2 * half] += pair.x;
            if (!isfinite(pair.y)) out[4 * n + 2 * half + 1] += pair.y;
          }
        }
      }
    }
  }

  // The four lanes of a row trade their columns so that each stores 16 bytes at once.
  __device__ __forceinline__ void store(const PrefillArgs &a, const PrefillWork &work, int row0,
                                        const PrefillSoftmax &softmax) {
    const gqa_attention_params &p = a.p;
    const int lane = threadIdx.x % 32, corner = lane % 4;
    const bool odd = corner & 1, upper = corner & 2;
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = softmax.sum[half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      float scale = 1.0f, base = softmax.base[half];
      if (p.sinks != nullptr) add_sink(p, work.head, base, sum, scale);
      const bool empty = sum == 0;
      const float factor = __fdividef(scale, sum);
      const int row = row0 + 8 * half;
      T *to = static_cast<T *>(p.out) + work.q_batch * p.out_stride[0] + (work.q_start + row) * p.out_stride[1] +
              work.head * p.out_stride[2] + 8 * corner;
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
        if (row < work.queries && 8 * (n + corner) < p.head_dim) {
          *reinterpret_cast<uint4 *>(to + 8 * n) = make_uint4(x[0], x[1], x[2], x[3]);
        }
      }
      if (p.lse != nullptr && corner == 0 && row < work.queries) {
        p.lse[lse_at(p, work, row)] = empty ? -INFINITY : base * kLn2 + logf(sum);
      }
    }
  }

 private:
  // One more weight of the row; what was summed up before is multiplied by `scale`.
  __device__ __forceinline__ static void add_sink(const gqa_attention_params &p, int head, float &base, float &sum,
                                                  float &scale) {
    const bool wide = p.sinks_dtype == GQA_DTYPE_FLOAT32;
    const float logit =
        wide ? static_cast<const float *>(p.sinks)[head] : to_float(static_cast<const T *>(p.sinks)[head]);
    const float sink = logit * kLog2e, together = fmaxf(base, sink), from = together == -INFINITY ? 0.0f : together;
    scale = exp2f(base - from);
    sum = sum * scale + exp2f(sink - from);
    base = together;
  }

  // The lane without `second` gives its y for the other one's x.
  template <int kDistance>
  __device__ __forceinline__ static void trade(uint32_t &x, uint32_t &y, bool second) {
    const uint32_t got = __shfl_xor_sync(0xffffffffu, second ? x : y, kDistance);
    (second ? x : y) = got;
  }
};

// Rows that attend to nothing: NaN in a sequence with unsound lengths, which may have more rows than it has tiles,
// zeros in those of no sequence.
template <typename T, typename Tile>
__device__ __forceinline__ void fill_tile(const PrefillArgs &a, const PrefillWork &work, int warp) {
  const gqa_attention_params &p = a.p;
  const bool zeros = work.task == PrefillTask::kZeros;
  const float nan = __int_as_float(0x7fffffff);
  const int lane = threadIdx.x % 32;
  for (int first = work.row0; first < work.queries; first += a.row_tiles * Tile::kRows) {
    for (int row = first + warp; row < min(first + Tile::kRows, work.queries); row += 4 * Tile::kGroups) {
      T *out = static_cast<T *>(p.out) + work.q_batch * p.out_stride[0] + (work.q_start + row) * p.out_stride[1] +
               work.head * p.out_stride[2];
      for (int d = lane; d < p.head_dim; d += 32) out[d] = from_float<T>(zeros ? 0.0f : nan);
      if (lane == 0 && p.lse != nullptr) p.lse[lse_at(p, work, row)] = zeros ? -INFINITY : nan;
    }
  }
}

// A computing warpgroup: its 64 rows of every tile.
template <typename T, typename Tile>
__device__ __forceinline__ void attend_tiles(const PrefillArgs &a, uint32_t memory, const PrefillWork *shared_work,
                                             int group) {
  const PrefillBarriers<Tile> barriers{memory + Tile::kBarriersAt};
  const Turns<Tile::kGroups> turns(group);
  const int lane = threadIdx.x % 32;
  const auto release = [&](uint32_t barrier) {
    if (lane == 0) mbarrier_arrive(barrier);
  };
  PrefillRows<T, Tile> rows;
  rows.q = tile_descriptor(memory + group * 64 * Tile::kSwizzle, 16);
  rows.k = tile_descriptor(memory + Tile::kKeysAt, 16);
  rows.v = tile_descriptor(memory + Tile::kValuesAt, Tile::kKeyPanel);
  rows.keys_turn = 2 * rows.k + Tile::kBlockBytes / 16;
  rows.values_turn = 2 * rows.v + Tile::kBlockBytes / 16;
  RingPosition<Tile::kStages> at;  // of the keys that come next; their values are at the same place of the other ring
  for (int round = 0;; ++round) {
    mbarrier_wait(barriers.query_full(), round & 1);
    const PrefillWork &work = shared_work[round & 1];
    if (work.task == PrefillTask::kDone) return;
    if (work.task != PrefillTask::kAttend) {
      fill_tile<T, Tile>(a, work, threadIdx.x / 32 - 4);
      __syncwarp();
      release(barriers.query_empty());
      continue;
    }
    const auto row0 = [&] { return first_row(work, threadIdx.x); };
    // Not every row of the warpgroup sees the block; or none after it may have been seen by its first row.
    const auto is_cut = [&](int x) {
      return x < work.first_sure || x >= max(0, seen_end(a, work, work.row0 + 64 * group) - 1) / Tile::kKeys;
    };
    int block = uniform(work.end_block) - 1;
    PrefillSoftmax softmax;
    const auto hide_columns = [&] {
      const int column = block * Tile::kKeys + 2 * (lane % 4);
      const int row = row0();
      const PrefillMask mask{{seen_begin(a, work, row) - column, seen_begin(a, work, row + 8) - column},
                             {seen_end(a, work, row) - column, seen_end(a, work, row + 8) - column}};
      hide(rows.scores, mask);
    };

    mbarrier_wait(barriers.key_full(at.stage), at.parity);
    turns.wait();
    rows.start_scores();
    turns.pass();
#pragma unroll
    for (int i = 0; i < Tile::kDim / 2; ++i) rows.out[i] = 0;
    wgmma_wait<0>();
    pin(rows.scores);
    release(barriers.key_empty(at.stage));
    at.advance();
    if (block == work.first_block) release(barriers.query_empty());
    if (a.transforms) rows.transform(a);
    hide_columns();
    softmax.weigh_carefully(rows.scores, a.multiplier);
    rows.pack_weights();

    // Scores of this block and values of the one before it.
    const auto step = [&](auto masked) {
      const RingPosition<Tile::kStages> before = at.before();
      mbarrier_wait(barriers.key_full(at.stage), at.parity);
      turns.wait();
      rows.start_scores();
      mbarrier_wait(barriers.value_full(before.stage), before.parity);
      rows.start_values([&] { turns.pass(); });
      wgmma_wait<1>();
      pin(rows.scores);
      release(barriers.key_empty(at.stage));
      if (block == work.first_block) release(barriers.query_empty());
      if (a.transforms) rows.transform(a);
      bool rescale;
      if constexpr (decltype(masked)::value) hide_columns();
      if constexpr (decltype(masked)::value || !Tile::kQuick) {
        rescale = softmax.weigh_carefully(rows.scores, a.multiplier);
      } else {
        rescale = softmax.weigh(rows.scores, a.multiplier, [&] {
          rows.repeat_scores(a, work, row0(), block);
          if (a.transforms) rows.transform(a);
        });
      }
      wgmma_wait<0>();
      pin(rows.out);
      pin(rows.weights);
      release(barriers.value_empty(before.stage));
      at.advance();
      rows.pack_weights();
      if (rescale) rows.scale_out(softmax.factor);
    };
    for (--block; block >= work.first_block;) {
#pragma unroll 1
      for (; block >= work.first_block && is_cut(block); --block) step(std::true_type{});
#pragma unroll 1
      for (; block >= work.first_sure; --block) step(std::false_type{});
    }

    const RingPosition<Tile::kStages> before = at.before();
    mbarrier_wait(barriers.value_full(before.stage), before.parity);
    rows.start_values([] {});
    wgmma_wait<0>();
    pin(rows.out);
    if (work.care) rows.add_care(a, work, row0());
    release(barriers.value_empty(before.stage));
    rows.store(a, work, row0(), softmax);
  }
}

template <typename T, typename Tile>
__global__ void __launch_bounds__(Tile::kThreads, 1)
    prefill_wgmma(const __grid_constant__ CUtensorMap q, const __grid_constant__ CUtensorMap k,
                  const __grid_constant__ CUtensorMap v, const __grid_constant__ PrefillArgs a) {
#ifdef __CUDA_ARCH_FEAT_SM90_ALL  // the plan chooses it there only
  extern __shared__ __align__(1024) unsigned char shared_memory[];
  const uint32_t memory = uniform(shared_address(shared_memory));
  PrefillWork *const work = reinterpret_cast<PrefillWork *>(shared_memory + Tile::kWorkAt);
  // The same in all lanes, and known to be: descriptors stay in uniform registers.
  const int warpgroup = uniform(threadIdx.x / 128);
  if (threadIdx.x == 0) {
    prefetch_map(q);
    prefetch_map(k);
    prefetch_map(v);
    PrefillBarriers<Tile>{memory + Tile::kBarriersAt}.init();
  }
  __syncthreads();
  if (warpgroup == 0) {
    give_registers<Tile::kLoaderRegisters>();
    const int warp = uniform(threadIdx.x / 32);
    if (warp > 0) {
      inspect_values<T, Tile>(shared_memory, memory, work, warp - 1);
    } else if (threadIdx.x == 0) {
      load_tiles<Tile>(a, q, k, v, memory, work);
    }
  } else {
    take_registers<Tile::kRegisters>();
    attend_tiles<T, Tile>(a, memory, work, warpgroup - 1);
  }
#endif
}

}  // namespace gqa::cuda::prefill_sm90
