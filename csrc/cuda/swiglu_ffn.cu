// swiglu_ffn for up to 16 tokens: activation = swiglu(x w_gate^T, x w_up^T), then out = activation w_down^T.
// Two launches of one kernel. A block owns consecutive outputs; one warp copies their weight rows, and x, in chunks of
// columns to a ring in shared memory, four warps divide each chunk's columns, multiply on tensor cores and add up.
// Memory order: each weight once, row by row in chunks; x again for every 32 rows, from L2.
// Limits: sm_90; sizes multiples of 8; 16-byte aligned rows. w_down is read before the first kernel ends, x never.
// Determinism: sums in a fixed order, bitwise repeatable; no atomics.
#include "cuda/common/mbarrier.cuh"
#include "cuda/common/mma.cuh"
#include "cuda/common/programmatic_launch.cuh"
#include "cuda/common/silu.cuh"
#include "plan/swiglu_ffn.h"

namespace gqa::cuda {
namespace {

// Other architectures compile an empty kernel: the plan gives their calls to torch.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define GQA_FFN_SM90
#endif

struct Stream {
  const void *weights[2];  // [features, columns]; the second of the gated kernel is w_up
  int64_t weight_stride[2];
  const void *x;  // [tokens, columns]
  int64_t x_stride;
  void *out;  // [tokens, features]
  int32_t features, columns, tokens, chunk, stages;
};

#ifdef GQA_FFN_SM90
constexpr int kTiles = kFfnRows / 16, kConsumers = kFfnConsumers;

// What a block knows of its part of the work and of its shared memory: sums, then the ring's barriers, then the ring.
template <bool kGated, int kTokenTiles>
struct Block {
  static constexpr int kGroup = kGated ? kFfnRows / 2 : kFfnRows;  // outputs computed at a time
  static constexpr int kSumColumns = 8 * kTokenTiles + 1;
  static constexpr int kSums = kConsumers * kFfnRows * kSumColumns;

  const Stream &p;
  int begin, end, chunks, groups;
  uint32_t barriers, ring, pitch, stage_bytes;

  __device__ Block(const Stream &stream, uint32_t shared) : p(stream) {
    begin = static_cast<int>(static_cast<int64_t>(p.features) * blockIdx.x / gridDim.x);
    end = static_cast<int>(static_cast<int64_t>(p.features) * (blockIdx.x + 1) / gridDim.x);
    chunks = (p.columns + p.chunk - 1) / p.chunk;
    groups = (end - begin + kGroup - 1) / kGroup;
    barriers = shared + 2 * kSums * sizeof(float);
    ring = (barriers + 16 * p.stages + 127) & ~127u;
    pitch = 2 * p.chunk + 16;
    stage_bytes = (kFfnRows + p.tokens) * pitch;
  }

  __device__ uint32_t full(int slot) const { return barriers + 16 * slot; }
  __device__ uint32_t empty(int slot) const { return barriers + 16 * slot + 8; }
  __device__ uint32_t stage(int slot) const { return ring + slot * stage_bytes; }
  __device__ int outputs(int group) const { return min(kGroup, end - begin - group * kGroup); }
  __device__ int columns(int chunk) const { return min(p.chunk, p.columns - chunk * p.chunk); }
};

// Starts a copy of contiguous bytes, 16-byte aligned; they are counted at `barrier`.
__device__ __forceinline__ void copy_bytes(uint32_t to, const void *from, uint32_t bytes, uint32_t barrier,
                                           uint64_t policy) {
  asm volatile(
      "cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes.L2::cache_hint [%0], [%1], %2, [%3], %4;" ::
          "r"(to),
      "l"(from), "r"(bytes), "r"(barrier), "l"(policy)
      : "memory");
}

// The warp that fills the ring: a lane copies a row.
template <typename T, bool kGated, int kTokenTiles>
struct Producer {
  const Block<kGated, kTokenTiles> &block;
  const int lane;
  uint64_t once, often;

  __device__ Producer(const Block<kGated, kTokenTiles> &b, int l) : block(b), lane(l) {
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
    asm volatile("createpolicy.fractional.L2::evict_last.b64 %0, 1.0;" : "=l"(often));
  }

  __device__ void weights(int item, int slot) const {
    constexpr int kGroup = Block<kGated, kTokenTiles>::kGroup;
    const Stream &p = block.p;
    const int group = item / block.chunks, chunk = item - group * block.chunks, outputs = block.outputs(group);
    const uint32_t bytes = 2 * block.columns(chunk);
    if (lane == 0) mbarrier_arrive_expect(block.full(slot), (outputs * (kGated ? 2 : 1) + p.tokens) * bytes);
    __syncwarp();
    const int output = lane % kGroup, which = lane / kGroup;
    const T *row = static_cast<const T *>(p.weights[which]) +
                   (block.begin + group * kGroup + output) * p.weight_stride[which] + chunk * p.chunk;
    if (output < outputs) copy_bytes(block.stage(slot) + lane * block.pitch, row, bytes, block.full(slot), once);
  }

  __device__ void inputs(int item, int slot) const {
    const Stream &p = block.p;
    const int chunk = item % block.chunks;
    const T *row = static_cast<const T *>(p.x) + lane * p.x_stride + chunk * p.chunk;
    const uint32_t to = block.stage(slot) + (kFfnRows + lane) * block.pitch;
    if (lane < p.tokens) copy_bytes(to, row, 2 * block.columns(chunk), block.full(slot), often);
  }

  __device__ void run() const {
    const int items = block.groups * block.chunks, ahead = min(block.p.stages, items);
    // The first kernel waits before it lets the second start: so whoever wrote w_down has ended by then.
    if (kGated) wait_for_prerequisites();
    for (int i = 0; i < ahead; ++i) weights(i, i);
    if (!kGated) wait_for_prerequisites();
    for (int i = 0; i < ahead; ++i) inputs(i, i);
    for (int i = ahead, slot = 0, parity = 0; i < items; ++i) {
      mbarrier_wait(block.empty(slot), parity);
      weights(i, slot);
      inputs(i, slot);
      if (++slot == block.p.stages) slot = 0, parity ^= 1;
    }
    // Late: what the next kernel reads ahead should fill the memory's pause at our end, not share our time.
    launch_dependents();
  }
};

// acc += weights x^T over this warp's columns of a stage.
template <typename T, bool kGated, int kTokenTiles>
__device__ __forceinline__ void multiply(const Block<kGated, kTokenTiles> &block, int slot, int columns, int warp,
                                         int lane, float (&acc)[kTiles][kTokenTiles][4]) {
  const uint32_t stage = block.stage(slot), tile = 16 * block.pitch;
  const uint32_t weights = stage + lane % 16 * block.pitch + lane / 16 * 16;
  const int token = min(lane % 8 + lane / 16 * 8, block.p.tokens - 1);  // rows past the last are never looked at
  const uint32_t inputs = stage + (kFfnRows + token) * block.pitch + lane / 8 % 2 * 16;
#pragma unroll 2
  for (int k = 16 * warp; k < columns; k += 16 * kConsumers) {
    uint32_t a[kTiles][4], b[4];
    load_matrices(b, inputs + 2 * k);
#pragma unroll
    for (int t = 0; t < kTiles; ++t) load_matrices(a[t], weights + t * tile + 2 * k);
    if (k + 16 > columns) {  // 8 columns are left; the rest of the stage is of other chunks
      b[1] = b[3] = 0;
#pragma unroll
      for (int t = 0; t < kTiles; ++t) a[t][2] = a[t][3] = 0;
    }
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) multiply_add<T>(acc[t][n], a[t], b[2 * n], b[2 * n + 1]);
    }
  }
}

template <int kTokenTiles>
__device__ __forceinline__ void store_sums(float *sums, int lane, float (&acc)[kTiles][kTokenTiles][4]) {
  constexpr int kColumns = 8 * kTokenTiles + 1;
#pragma unroll
  for (int t = 0; t < kTiles; ++t) {
#pragma unroll
    for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        sums[(16 * t + lane / 4 + i / 2 * 8) * kColumns + 8 * n + lane % 4 * 2 + i % 2] = acc[t][n][i];
        acc[t][n][i] = 0.0f;
      }
    }
  }
}

// Adds up the consumers' sums of a group of outputs, and stores it.
template <typename T, bool kGated, int kTokenTiles>
__device__ __forceinline__ void finish(const Block<kGated, kTokenTiles> &block, const float *sums, int group) {
  using B = Block<kGated, kTokenTiles>;
  const auto total = [&](int row, int token) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kConsumers; ++w) sum += sums[(w * kFfnRows + row) * B::kSumColumns + token];
    return from_float<T>(sum);
  };
  const Stream &p = block.p;
  const int outputs = block.outputs(group);
  for (int i = threadIdx.x; i < B::kGroup * p.tokens; i += 32 * kConsumers) {
    const int output = i % B::kGroup, token = i / B::kGroup;
    if (output >= outputs) continue;
    T value = total(output, token);
    if constexpr (kGated) {
      value = swiglu(value, total(B::kGroup + output, token));
    }
    static_cast<T *>(p.out)[static_cast<int64_t>(token) * p.features + block.begin + group * B::kGroup + output] =
        value;
  }
}
#endif

template <typename T, bool kGated, int kTokenTiles>
__global__ void __launch_bounds__(32 * (kFfnConsumers + 1)) ffn_stream_rows(const __grid_constant__ Stream p) {
#ifdef GQA_FFN_SM90
  extern __shared__ __align__(128) float sums[];
  const Block<kGated, kTokenTiles> block(p, shared_address(sums));
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  if (threadIdx.x == 0) {
    for (int slot = 0; slot < p.stages; ++slot) {
      mbarrier_init(block.full(slot), 1);
      mbarrier_init(block.empty(slot), kConsumers);
    }
    mbarrier_fence_init();
  }
  __syncthreads();
  if (warp == kConsumers) {
    Producer<T, kGated, kTokenTiles>(block, lane).run();
    return;
  }
  float acc[kTiles][kTokenTiles][4] = {};
  for (int group = 0, slot = 0, parity = 0; group < block.groups; ++group) {
    for (int chunk = 0; chunk < block.chunks; ++chunk) {
      mbarrier_wait(block.full(slot), parity);
      multiply<T>(block, slot, block.columns(chunk), warp, lane, acc);
      __syncwarp();
      if (lane == 0) mbarrier_arrive(block.empty(slot));
      if (++slot == p.stages) slot = 0, parity ^= 1;
    }
    // Two groups take turns in the sums: nobody stores a third before all have read the first.
    float *group_sums = sums + group % 2 * block.kSums;
    store_sums<kTokenTiles>(group_sums + warp * kFfnRows * block.kSumColumns, lane, acc);
    asm volatile("bar.sync 1, %0;" ::"n"(32 * kConsumers) : "memory");
    finish<T>(block, group_sums, group);
  }
#endif
}

template <typename T, bool kGated>
gqa_status launch_stream(const gqa_launch &plan, const Stream &p, cudaStream_t stream) {
  auto *kernel = p.tokens > 8 ? ffn_stream_rows<T, kGated, 2> : ffn_stream_rows<T, kGated, 1>;
  return launch_programmatic(kernel, plan, stream, p);
}

Stream stream_of(const gqa_swiglu_ffn_params &p, int64_t features, int64_t columns, const gqa_device &device) {
  const FfnStream shape = ffn_stream(features, columns, p.tokens, device);
  Stream s{};
  s.features = static_cast<int32_t>(features);
  s.columns = static_cast<int32_t>(columns);
  s.tokens = static_cast<int32_t>(p.tokens);
  s.chunk = static_cast<int32_t>(shape.chunk);
  s.stages = static_cast<int32_t>(shape.stages);
  return s;
}

template <typename T>
gqa_status run(const gqa_plan &plan, const gqa_swiglu_ffn_params &p, const gqa_device &device, cudaStream_t stream) {
  Stream first = stream_of(p, p.intermediate, p.hidden, device);
  first.weights[0] = p.w_gate, first.weight_stride[0] = p.w_gate_stride;
  first.weights[1] = p.w_up, first.weight_stride[1] = p.w_up_stride;
  first.x = p.x, first.x_stride = p.x_stride;
  first.out = p.activation;
  GQA_RETURN_IF_ERROR((launch_stream<T, true>(plan.launches[0], first, stream)));
  Stream second = stream_of(p, p.out_features, p.intermediate, device);
  second.weights[0] = p.w_down, second.weight_stride[0] = p.w_down_stride;
  second.x = p.activation, second.x_stride = p.intermediate;
  second.out = p.out;
  return launch_stream<T, false>(plan.launches[1], second, stream);
}

}  // namespace
}  // namespace gqa::cuda

extern "C" gqa_status gqa_swiglu_ffn_cuda(const gqa_swiglu_ffn_params *p, CUstream_st *stream) {
  using namespace gqa::cuda;
  GQA_RETURN_IF_ERROR(gqa::check_params(p));
  gqa_device device;
  GQA_RETURN_IF_ERROR(current_device(&device));
  gqa_plan plan;
  GQA_RETURN_IF_ERROR(gqa_swiglu_ffn_plan(p, &device, &plan));
  if (plan.num_launches == 0) return GQA_STATUS_OK;
  return p->dtype == GQA_DTYPE_BFLOAT16 ? run<__nv_bfloat16>(plan, *p, device, stream)
                                        : run<__half>(plan, *p, device, stream);
}
