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
#include "cuda/gqa_attention_prefill_sm90/search.cuh"
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

// Without a branch, after which ptxas would no longer know what is the same in all lanes.
__device__ __forceinline__ void store_if(bool wanted, void *to, const uint4 &x) {
  asm volatile("{\n.reg .pred p;\nsetp.ne.s32 p, %0, 0;\n@p st.global.v4.u32 [%1], {%2, %3, %4, %5};\n}" ::"r"(
                   static_cast<int>(wanted)),
               "l"(to), "r"(x.x), "r"(x.y), "r"(x.z), "r"(x.w)
               : "memory");
}

template <typename T, typename Tile>
struct PrefillRows {
  static constexpr int kDim = Tile::kDim, kKeys = Tile::kKeys;

  uint32_t base;  // descriptor of shared memory from its start on
  int group;
  float out[kDim / 2];
  float scores[kKeys / 2];
  uint32_t weights[kKeys / 4];

  // Starts scores = q k^T.
  __device__ __forceinline__ void start_scores(uint32_t query_stage, uint32_t stage) {
    const uint32_t q = base + query_stage * (Tile::kQueryBytes / 16) + group * (64 * Tile::kSwizzle / 16);
    const uint32_t from = base + Tile::kKeysAt / 16 + stage * (Tile::kBlockBytes / 16);
    pin(scores);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kDim / 16; ++step) {
      const uint32_t panel = 16 * step / Tile::kPanel, inside = 16 * step % Tile::kPanel / 8;
      Wgmma<T, kKeys>::template score<Tile::kSwizzle>(scores, q + panel * (Tile::kQueryPanel / 16) + inside,
                                                      from + panel * (Tile::kKeyPanel / 16) + inside, step > 0);
    }
    wgmma_commit();
  }

  // Starts out += weights v; calls `pass` shortly before the end, so that the next warpgroup's products follow at once.
  template <typename Pass>
  __device__ __forceinline__ void start_values(uint32_t stage, Pass &&pass) {
    const uint32_t from =
        base + Tile::kValuesAt / 16 + ((Tile::kKeyPanel >> 4) - 1 << 16) + stage * (Tile::kBlockBytes / 16);
    pin(out);
    pin(weights);
    wgmma_fence();
#pragma unroll
    for (int step = 0; step < kKeys / 16; ++step) {
      if (step == kKeys / 16 - Tile::kEarly) pass();
      Wgmma<T, kDim>::template weigh<Tile::kSwizzle>(out, weights + 4 * step, from + step * Tile::kSwizzle);
    }
    if (Tile::kEarly == 0) pass();
    wgmma_commit();
  }

  __device__ __forceinline__ void pack_weights() {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) weights[i] = pack<T>(scores[2 * i], scores[2 * i + 1]);
  }

  // The warp's scores with a block of keys once more, from memory, and by way of memory: registers are short. Takes the
  // place of weights.
  __device__ __forceinline__ void repeat_scores(const PrefillArgs &a, const PrefillWork &work, int row0, int block) {
    const gqa_attention_params &p = a.p;
    const int lane = afresh(threadIdx.x) % 32, column = 2 * (lane % 4);
    const T *q = static_cast<const T *>(p.q) + work.q_batch * p.q_stride[0] +
                 (work.q_start + max(row0, 0)) * p.q_stride[1] + work.head * p.q_stride[2] + column;
    const auto pair = [](const T *at) { return *reinterpret_cast<const uint32_t *>(at); };
    volatile float again[kKeys / 2];
#pragma unroll 1
    for (int n = 0; n < kKeys / 8; ++n) {
      const T *k = key_row<T>(a, work, a.k, a.k_stride, block * kKeys + 8 * n + lane / 4) + column;
      float four[4] = {0, 0, 0, 0};
#pragma unroll 1
      for (int d = 0; d < p.head_dim; d += 16) {
        // Not kept in registers, which are short.
        const int row = first_row(work, afresh(threadIdx.x));
        const T *lower = q + d + (max(row + 8, 0) - max(row, 0)) * p.q_stride[1];
        const bool both = d + 8 < p.head_dim;
        const auto second = [&](const T *at) { return both ? pair(at + 8) : 0u; };
        const uint32_t x[4] = {pair(q + d), pair(lower), second(q + d), second(lower)};
        multiply_add<T>(four, x, pair(k + d), second(k + d));
      }
      // Pages are multiples of 16 rows, so these 8 keys are of one.
      const bool lacks = lacks_page(a, work, block * kKeys + 8 * n);
#pragma unroll
      for (int i = 0; i < 4; ++i) again[4 * n + i] = lacks ? __int_as_float(0x7fffffff) : four[i];
    }
#pragma unroll
    for (int i = 0; i < kKeys / 2; ++i) scores[i] = again[i];
  }

  // The compiler need not keep weights where this comes before their next use.
  __device__ __forceinline__ void drop_weights() {
#pragma unroll
    for (int i = 0; i < kKeys / 4; ++i) weights[i] = 0;
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
    const int corner = afresh(threadIdx.x) % 4;
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

  // By way of `own`, where the warp's own queries were: so rows are written whole.
  __device__ __forceinline__ void store(const PrefillArgs &a, const PrefillWork &work, int row0,
                                        const PrefillSoftmax &softmax, unsigned char *own) {
    const gqa_attention_params &p = a.p;
    const uint32_t lane = afresh(threadIdx.x) % 32u, corner = lane % 4;  // not kept in registers, which are short
    float factor[2], lse[2];
#pragma unroll
    for (int half = 0; half < 2; ++half) {
      float sum = softmax.sum[half];
      sum += __shfl_xor_sync(0xffffffffu, sum, 1);
      sum += __shfl_xor_sync(0xffffffffu, sum, 2);
      float scale = 1.0f, base = softmax.base[half];
      if (p.sinks != nullptr) add_sink(p, work.head, base, sum, scale);
      const bool empty = sum == 0;
      factor[half] = empty ? 0.0f : __fdividef(scale, sum);
      lse[half] = empty ? -INFINITY : base * kLn2 + __logf(sum);
    }
#pragma unroll
    for (int n = 0; n < kDim / 8; ++n) {
      unsigned char *at = place(own, lane / 4, n) + 4 * corner;
      *reinterpret_cast<uint32_t *>(at) = pack<T>(out[4 * n] * factor[0], out[4 * n + 1] * factor[0]);
      *reinterpret_cast<uint32_t *>(at + 8 * Tile::kSwizzle) =
          pack<T>(out[4 * n + 2] * factor[1], out[4 * n + 3] * factor[1]);
    }
    fence_async_proxy();  // the next queries come by a copy; ahead of stores to memory, which it would wait for
    if (p.lse != nullptr && corner == 0) {
#pragma unroll
      for (int half = 0; half < 2; ++half) {
        if (row0 + 8 * half >= 0) p.lse[lse_at(p, work, row0 + 8 * half)] = lse[half];
      }
    }
    __syncwarp();
    constexpr uint32_t kChunks = kDim / 8;                                       // of 16 bytes in a row
    constexpr uint32_t kWide = kChunks == 12 ? 4 : kChunks, kTall = 32 / kWide;  // a warp's: chunks of so many rows
    constexpr int kSteps = 16 / kTall, kAtOnce = kSteps < 4 ? kSteps : 4;
    const uint32_t chunk = lane % kWide, row = lane / kWide;
    const int first = row0 - static_cast<int>(lane / 4 - row);
    const int64_t step = p.out_stride[1] * kTall;
#pragma unroll
    for (uint32_t beside = 0; beside < kChunks; beside += kWide) {
      T *to = static_cast<T *>(p.out) + work.q_batch * p.out_stride[0] + (work.q_start + first) * p.out_stride[1] +
              work.head * p.out_stride[2] + 8 * (beside + chunk);
      const bool inside = 8 * static_cast<int>(beside + chunk) < p.head_dim;
#pragma unroll
      for (int i = 0; i < kSteps; i += kAtOnce) {
        uint4 some[kAtOnce];
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j) {
          some[j] = *reinterpret_cast<const uint4 *>(place(own, row + (i + j) * kTall, beside + chunk));
        }
#pragma unroll
        for (int j = 0; j < kAtOnce; ++j, to += step) {
          store_if(inside && first + (i + j) * static_cast<int>(kTall) >= 0, to, some[j]);
        }
      }
    }
    __syncwarp();
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

  // A chunk of a row of the warp's 16: chunks are swapped so that neither writes nor reads meet in a bank.
  __device__ __forceinline__ static unsigned char *place(unsigned char *own, uint32_t row, uint32_t chunk) {
    constexpr uint32_t kChunks = Tile::kSwizzle / 16;
    const uint32_t twist = kChunks == 8 ? row % 8 : row / 2 % 4;
    return own + chunk / kChunks * Tile::kQueryPanel + row * Tile::kSwizzle + 16 * (chunk % kChunks ^ twist);
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
    for (int row = max(first, 0) + warp; row < min(first + Tile::kRows, work.queries); row += 4 * Tile::kGroups) {
      T *out = static_cast<T *>(p.out) + work.q_batch * p.out_stride[0] + (work.q_start + row) * p.out_stride[1] +
               work.head * p.out_stride[2];
      for (int d = lane; d < p.head_dim; d += 32) out[d] = from_float<T>(zeros ? 0.0f : nan);
      if (lane == 0 && p.lse != nullptr) p.lse[lse_at(p, work, row)] = zeros ? -INFINITY : nan;
    }
  }
}

// A computing warpgroup: its 64 rows of every tile, in one run of steps: scores of a block, and values of the one
// before it, which at a tile's begin is the last one of the tile before.
template <typename T, typename Tile>
__device__ __forceinline__ void attend_tiles(const PrefillArgs &a, unsigned char *shared, uint32_t memory,
                                             const PrefillWork *shared_work, int group) {
  const PrefillBarriers<Tile> barriers{memory + Tile::kBarriersAt};
  const Turns<Tile::kGroups> turns(group);
  const bool leads = threadIdx.x % 32 == 0;
  const auto release = [&](uint32_t barrier) {
    if (leads) mbarrier_arrive(barrier);
  };
  PrefillRows<T, Tile> rows;
  rows.base = tile_descriptor(memory, 16);
  rows.group = group;
  PrefillSoftmax softmax;
  RingCount<Tile::kStages> at;  // of the keys that come next; their values are at the same place of the other ring
  constexpr uint32_t kNone = ~0u;
  RingCount<kWorkPlaces> work_at, open_at{kNone};  // a tile that lacks its last values
  RingCount<Tile::kQueries> query_at;
  const auto open = [&] { return Tile::kOverlaps && open_at.count != kNone; };
  // Not kept in a register, which are short.
  const auto row0_of = [&](const PrefillWork &work) { return first_row(work, afresh(threadIdx.x)); };
  // The last values are in the sums.
  const auto close = [&](const PrefillSoftmax &done, uint32_t query_stage) {
    const PrefillWork &work = shared_work[open_at.stage()];
    if (work.care) rows.add_care(a, work, row0_of(work));
    rows.store(a, work, row0_of(work), done,
               shared + query_stage * Tile::kQueryBytes + (afresh(threadIdx.x) / 32 - 4) * 16 * Tile::kSwizzle);
    release(barriers.query_empty(query_stage));
    release(barriers.work_empty(open_at.stage()));
  };
  const auto finish = [&](uint32_t query_stage) {
    const RingCount<Tile::kStages> before = at.before();
    mbarrier_wait(barriers.value_full(before.stage()), before.parity());
    rows.start_values(before.stage(), [] {});
    wgmma_wait<0>();
    pin(rows.out);
    release(barriers.value_empty(before.stage()));
    // All four warps are done with the queries, whose place the output takes.
    asm volatile("bar.sync %0, 128;" ::"r"(1 + Tile::kGroups + afresh(group)) : "memory");
    close(softmax, query_stage);
  };
#pragma unroll
  for (int i = 0; i < Tile::kKeys / 4; ++i) rows.weights[i] = 0;
#pragma unroll
  for (int i = 0; i < Tile::kDim / 2; ++i) rows.out[i] = 0;

  for (;; work_at.advance()) {
    mbarrier_wait(barriers.work_full(work_at.stage()), work_at.parity());
    const PrefillWork &work = shared_work[work_at.stage()];
    if (work.task == PrefillTask::kDone) break;
    if (work.task != PrefillTask::kAttend) {
      fill_tile<T, Tile>(a, work, threadIdx.x / 32 - 4);
      __syncwarp();
      release(barriers.work_empty(work_at.stage()));
      continue;
    }
    const int first_block = uniform(work.first_block), first_sure = uniform(work.first_sure);
    const int first_cut = uniform(max(0, seen_end(a, work, work.row0 + 64 * group) - 1) / Tile::kKeys);
    int block = uniform(work.end_block) - 1;
    const auto hide_columns = [&] {
      const int column = block * Tile::kKeys + 2 * (afresh(threadIdx.x) % 4), row = row0_of(work);
      const PrefillMask mask{{seen_begin(a, work, row) - column, seen_begin(a, work, row + 8) - column},
                             {seen_end(a, work, row) - column, seen_end(a, work, row + 8) - column}};
      hide(rows.scores, mask);
    };
    // No row of this warpgroup sees the tile's last block.
    const bool skips =
        uniform(block > first_block && seen_end(a, work, work.row0 + 64 * group + 63) <= block * Tile::kKeys) != 0;
    mbarrier_wait(barriers.query_full(query_at.stage()), query_at.parity());
    if (skips) {
      mbarrier_wait(barriers.key_full(at.stage()), at.parity());
      turns.wait();
      turns.pass();
      release(barriers.key_empty(at.stage()));
      at.advance();
      --block;
    }

    // A block that a mask cuts, or the first one of a tile. Ahead of the first tile of all come values times zero,
    // whose sum is not used.
    const auto careful_step = [&](bool begins) {
      RingCount<Tile::kStages> before = at.before();
      if (begins && skips) before = before.before();
      mbarrier_wait(barriers.key_full(at.stage()), at.parity());
      turns.wait();
      rows.start_scores(query_at.stage(), at.stage());
      if (!begins || open()) mbarrier_wait(barriers.value_full(before.stage()), before.parity());
      rows.start_values(before.stage(), [&] { turns.pass(); });
      wgmma_wait<1>();
      pin(rows.scores);
      release(barriers.key_empty(at.stage()));
      at.advance();
      const PrefillSoftmax done = softmax;
      if (begins) softmax = PrefillSoftmax();
      if (a.transforms) rows.transform(a);
      hide_columns();
      const bool rescale = softmax.weigh_carefully(rows.scores, a.multiplier);
      wgmma_wait<0>();
      pin(rows.out);
      pin(rows.weights);
      if (!begins || open()) release(barriers.value_empty(before.stage()));
      if (begins) {
        if (open()) close(done, query_at.before().stage());
#pragma unroll
        for (int i = 0; i < Tile::kDim / 2; ++i) rows.out[i] = 0;
        if (skips) {
          const RingCount<Tile::kStages> unseen = at.before().before();
          mbarrier_wait(barriers.value_full(unseen.stage()), unseen.parity());
          release(barriers.value_empty(unseen.stage()));
        }
      } else if (rescale) {
        rows.scale_out(softmax.factor);
      }
      rows.pack_weights();
    };
    const auto quick_step = [&] {
      const RingCount<Tile::kStages> before = at.before();
      mbarrier_wait(barriers.key_full(at.stage()), at.parity());
      turns.wait();
      rows.start_scores(query_at.stage(), at.stage());
      mbarrier_wait(barriers.value_full(before.stage()), before.parity());
      rows.start_values(before.stage(), [&] { turns.pass(); });
      wgmma_wait<1>();
      pin(rows.scores);
      release(barriers.key_empty(at.stage()));
      at.advance();
      if (a.transforms) rows.transform(a);
      const auto repeat = [&] {
        wgmma_wait<0>();  // weights are done with: their registers are free
        rows.repeat_scores(a, work, row0_of(work), block);
        if (a.transforms) rows.transform(a);
      };
      const bool rescale = softmax.weigh(rows.scores, a.multiplier, repeat, [&] { rows.drop_weights(); });
      wgmma_wait<0>();
      pin(rows.out);
      pin(rows.weights);
      release(barriers.value_empty(before.stage()));
      rows.pack_weights();
      if (rescale) rows.scale_out(softmax.factor);
    };
    for (bool begins = true; block >= first_block; begins = false) {
#pragma unroll 1
      for (; block >= first_block && (begins || block < first_sure || block >= first_cut); --block, begins = false)
        careful_step(begins);
#pragma unroll 1
      for (; block >= first_sure; --block) quick_step();
    }
    open_at = work_at;
    if (!Tile::kOverlaps) finish(query_at.stage());
    query_at.advance();
  }
  if (open()) finish(query_at.before().stage());
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
  const int warp = uniform(threadIdx.x / 32);
  if (threadIdx.x == 0) PrefillBarriers<Tile>{memory + Tile::kBarriersAt}.init();
  if (warp == 1) touch(a);
  if (threadIdx.x == 32 * (4 - kInspectors)) {
    prefetch_map(q);
    prefetch_map(k);
    prefetch_map(v);
  }
  __syncthreads();
  if (warpgroup == 0) {
    give_registers<Tile::kLoaderRegisters>();
    if (warp == 0) {
      load_tiles<Tile>(a, q, k, v, memory, work);
    } else if (warp == 1) {
      find_tiles<Tile>(a, memory, work);
    } else {
      inspect_values<T, Tile>(shared_memory, memory, work, warp - (4 - kInspectors));
    }
  } else {
    take_registers<Tile::kRegisters>();
    attend_tiles<T, Tile>(a, shared_memory, memory, work, warpgroup - 1);
  }
#endif
}

}  // namespace gqa::cuda::prefill_sm90
