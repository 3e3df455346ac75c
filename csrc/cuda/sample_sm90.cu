// sample on Hopper: one token per row, by the definition of common/sampling.h; the same token as the CPU twin's.
// One cluster of 1 to 16 blocks per row; a block holds a stretch of the row's aligned 16-byte vectors, a warp a stretch
// of the block's. One more warp a block decides. Memory order: the row once, into shared memory; every pass after that
// reads there. Blocks push sums to each other. Limits: sm_90; vocab <= 2^18; any alignment and row stride. No block
// waits for another outside its cluster. Determinism: integer sums, so any order and any number of blocks gives the
// same bytes; rows do not see each other.
#include "cuda/common/sample_sm90.cuh"
#include "cuda/sample_sm90/adjusted_part.cuh"
#include "cuda/sample_sm90/controller.cuh"
#include "cuda/sample_sm90/worker.cuh"

namespace gqa::cuda {
namespace {

// Other architectures compile an empty kernel: the plan gives their calls to the portable one.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define GQA_SAMPLE_SM90
#endif

// What the launcher works out of a plan. extras: that a block has place for; inverse: of the number of blocks.
struct Shape {
  Stretch stretch;
  uint32_t extras, inverse;
};

// The largest of the blocks' values, half by half, in every warp; the controllers send them.
[[maybe_unused]] __device__ __forceinline__ u64 row_ends(const Exchange &exchange, bool sends, u64 of_block,
                                                         u64 *of_blocks, Message message) {
  if (sends && lane() < exchange.blocks) exchange.send(lane(), of_blocks + exchange.rank, message, of_block);
  exchange.receive(message);
  return max_of_halves(lane() < exchange.blocks ? own_word(of_blocks) : 0);
}

// Held: the type of what a block holds. kAdjusted: with penalties, a bias or a bitmask.
template <typename T, typename Held, int kThreads, bool kAdjusted>
__global__ void __launch_bounds__(kThreads + 32, kThreads > kSampleClusterFew || sizeof(T) == 4 ? 1 : 2)
    sample_cluster(const __grid_constant__ gqa_sample_params p, const __grid_constant__ Settings of_call,
                   const __grid_constant__ Shape shape) {
#ifdef GQA_SAMPLE_SM90
  extern __shared__ __align__(16) unsigned char cluster_memory[];
  __shared__ Shared shared;
  [[maybe_unused]] __shared__ AdjustedRow<T> adjusted_row;
  Cells *cells = reinterpret_cast<Cells *>(cluster_memory);
  launch_dependents();
  const Exchange exchange(&shared, shape.inverse);
  const bool controls = warp() == kThreads / 32;
  if (controls) exchange.open();
  __syncwarp();
  cluster_arrive_relaxed();
  // Where blocks are small, this one may have started ahead of what it waits for.
  constexpr bool kClearsEarly = kThreads == kSampleClusterFew;
  if (kClearsEarly && !controls) clear_cells<kThreads>(cells->histogram);
  wait_for_prerequisites();

  const int64_t at = cluster_id();
  const T *z = static_cast<const T *>(p.logits) + at * p.logits_stride;
  const Held *aligned_like = nullptr;
  if constexpr (!kAdjusted) aligned_like = z;
  unsigned char *held = reinterpret_cast<unsigned char *>(cells->told(2, exchange.blocks, 0));
  auto apart = [&] {
    if constexpr (kHasExtras<Held, kThreads>) {
      if (threadIdx.x == kThreads) {
        adjusted_row = {z, load_adjustments<T>(p, at)};
        shared.extras = 0;
        shared.of_warp[kOfExtras] = 0;
      }
      const int per_block = static_cast<int>(shape.stretch.vectors * kColumns * Vec<T>::kSize);
      Extra *list = reinterpret_cast<Extra *>(held + (shape.stretch.vectors | 1) * kColumns * sizeof(Vec<T>));
      return Extras<T>(&adjusted_row, list, &shared.extras, shared.of_warp + kOfExtras, shape.extras,
                       exchange.rank * per_block, p.vocab);
    } else {
      return NoExtras{};
    }
  }();
  Part<Held, kThreads> part(aligned_like, static_cast<int>(p.vocab), exchange, shape.stretch, held, apart);
  if constexpr (kHasExtras<Held, kThreads>) __syncthreads();  // the first may be found
  Worker<Held, kThreads> worker(exchange, part, &shared, cells);
  if (controls) {
    u64 edges = 0;
    if constexpr (!kAdjusted) edges = max_of_halves(part.load_edges().ends());
    if (lane() == 0) {
      shared.of_warp[kThreads / 32] = edges;
      shared.listed = 0;
      shared.settings = load_settings(p, of_call, at);
      shared.random = load_random(p, at);
    }
  } else {
    const auto meanwhile = [&] {
      if (!kClearsEarly) clear_cells<kThreads>(cells->histogram);
    };
    if constexpr (kAdjusted) {
      worker.tell_ends(load_adjusted(&part, z, load_adjustments<T>(p, at), p.vocab, meanwhile));
    } else {
      worker.tell_ends(part.load(meanwhile).ends());
    }
  }
  __syncthreads();
  cluster_wait();
  const bool has_ends = lane() <= kThreads / 32 || (kHasExtras<Held, kThreads> && lane() == kOfExtras);
  u64 of_block = controls ? max_of_halves(has_ends ? own_word(shared.of_warp) : 0) : 0;
  const u64 ends = row_ends(exchange, controls, of_block, shared.ends, kEnds);
  const uint32_t least_key = ~static_cast<uint32_t>(ends);
  Top top{static_cast<uint32_t>(ends >> 32), false};
  if (top.key == kAll) {
    if (!controls) worker.find_numbers();
    __syncthreads();
    of_block = controls ? max_of_halves(lane() < kThreads / 32 ? own_word(shared.of_warp) : 0) : 0;
    top = {static_cast<uint32_t>(row_ends(exchange, controls, of_block, shared.numbers, kNumbers) >> 32), true};
  }

  if (!controls) {
    if (is_drawn(top, shared.settings)) {
      worker.weigh_all(shared.settings, key_to_logit(top.key), key_to_logit(least_key));
    }
    worker.serve();
    return;
  }
  Controller<Held, kThreads> row(exchange, part, &shared, cells, top, least_key, p.logprob != nullptr);
  const Drawn drawn = row.decide(shared.settings, p.vocab, top, least_key);
  if (row.writes() && lane() == 0) {
    p.ids[at] = drawn.id;
    if (p.valid != nullptr) p.valid[at] = drawn.valid;
    if (p.logprob != nullptr) p.logprob[at] = drawn.logprob();
  }
  row.dismiss();
#else
  __trap();
#endif
}

}  // namespace

gqa_status launch_sample_cluster(const gqa_sample_params &p, const gqa_launch &plan, cudaStream_t stream) {
  return dispatch_float(p.dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto kernel = plan.block[0] == kSampleClusterFew + 32 ? sample_cluster<T, T, kSampleClusterFew, false>
                                                          : sample_cluster<T, T, kSampleClusterMany, false>;
    if (is_widened(p)) {
      kernel = sample_cluster<T, float, kSampleClusterAdjusted, true>;
    } else if (is_adjusted(p)) {
      kernel = sample_cluster<T, T, kSampleClusterAdjusted, true>;
    }
    const auto vectors = static_cast<uint32_t>(sample_stretch(&p, plan.variant));
    const int64_t left = plan.shared_memory - sample_cluster_memory(&p, plan.variant);
    const Shape shape{{vectors, static_cast<uint32_t>((uint64_t{1} << 32) / vectors + 1)},
                      static_cast<uint32_t>(left / sizeof(Extra)),
                      ((1u << kSampleInverseBits) + plan.variant - 1) / plan.variant};
    return launch_clusters(kernel, plan, stream, p, settings_of(p), shape);
  });
}

}  // namespace gqa::cuda
