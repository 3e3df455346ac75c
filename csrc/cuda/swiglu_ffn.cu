// swiglu_ffn for up to 16 tokens: activation = swiglu(x w_gate^T, x w_up^T), then out = activation w_down^T.
// Two launches of one kernel. A block owns consecutive outputs, 32 weight rows at a time; its warps take chunks of 64
// columns in turn, each through a ring of its own in shared memory, multiply on tensor cores, and add up once a group.
// Memory order: each weight once, rows side by side in chunks of columns; x again for every 32 rows, from L2.
// Limits: sm_90; sizes multiples of 8; 16-byte aligned rows. w_down is read before the first kernel ends, x never.
// Determinism: sums in a fixed order, bitwise repeatable; no atomics; tokens do not see each other.
#include "cuda/common/mma.cuh"
#include "cuda/common/programmatic_launch.cuh"
#include "cuda/common/silu.cuh"
#include "plan/swiglu_ffn.h"

namespace gqa::cuda {
namespace {

struct Stream {
  const void *weights[2];  // [features, columns]; the second of the gated kernel is w_up
  int64_t weight_stride[2];
  const void *x;  // [tokens, columns]
  int64_t x_stride;
  void *out;  // [tokens, features]
  int32_t features, columns, tokens;
};

// Other architectures compile an empty kernel: the plan gives their calls to torch.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define GQA_FFN_SM90
#endif

#ifdef GQA_FFN_SM90
constexpr int kRowBytes = 2 * kFfnChunk, kPieces = kRowBytes / 16;  // of a row in a stage; pieces of 16 bytes
constexpr int kTiles = kFfnRows / 16;

// Shared address of a piece of a row in a stage. Neighbouring rows swap pieces, so that ldmatrix meets no bank twice.
__device__ __forceinline__ uint32_t piece_of(uint32_t stage, int row, int piece) {
  return stage + row * kRowBytes + ((piece ^ (row % 8)) << 4);
}

__device__ __forceinline__ void copy_piece(uint32_t to, const void *from, int bytes, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from),
               "r"(bytes), "l"(policy)
               : "memory");
}

// The part of the work that a block has: outputs [begin, end), in groups, each in rounds of one chunk for every warp.
template <bool kGated>
struct Work {
  static constexpr int kGroup = kGated ? kFfnRows / 2 : kFfnRows;
  int begin, end, groups, rounds;

  __device__ explicit Work(const Stream &p)
      : begin(static_cast<int>(static_cast<int64_t>(p.features) * blockIdx.x / gridDim.x)),
        end(static_cast<int>(static_cast<int64_t>(p.features) * (blockIdx.x + 1) / gridDim.x)),
        groups((end - begin + kGroup - 1) / kGroup),
        rounds((p.columns + kFfnChunk * kFfnWarps - 1) / (kFfnChunk * kFfnWarps)) {}

  __device__ int outputs(int group) const { return min(kGroup, end - begin - group * kGroup); }
};

// Copies a warp's chunks, in order, to the stages of its ring; a lane copies one piece of every fourth row.
template <typename T, bool kGated>
struct Loader {
  static constexpr int kStep = 32 / kPieces, kGroup = Work<kGated>::kGroup;
  const Stream &p;
  const Work<kGated> &work;
  const int warp, row, piece;
  uint64_t once;
  int group = 0, round = 0;  // of the chunk to be copied next

  __device__ Loader(const Stream &stream, const Work<kGated> &w)
      : p(stream), work(w), warp(threadIdx.x / 32), row(threadIdx.x % 32 / kPieces), piece(threadIdx.x % kPieces) {
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  }

  __device__ int column() const { return (round * kFfnWarps + warp) * kFfnChunk + 8 * piece; }
  __device__ bool more() const { return group < work.groups; }
  __device__ void advance() {
    if (++round == work.rounds) round = 0, ++group;
  }

  // Past the last column come zeros. Rows past the last output stay as they are: nobody looks at what they give.
  __device__ void weights(uint32_t stage) const {
    const int column = this->column(), bytes = column < p.columns ? 16 : 0, outputs = work.outputs(group);
#pragma unroll
    for (int half = 0; half < (kGated ? 2 : 1); ++half) {
      const int64_t first = work.begin + group * kGroup + row, stride = p.weight_stride[half];
      const T *from = static_cast<const T *>(p.weights[half]) + first * stride + (bytes == 0 ? 0 : column);
#pragma unroll
      for (int i = 0; i < kGroup; i += kStep) {
        if (row + i < outputs)
          copy_piece(piece_of(stage, half * kGroup + row + i, piece), from + i * stride, bytes, once);
      }
    }
  }

  __device__ void inputs(uint32_t stage) const {
    const int column = this->column(), bytes = column < p.columns ? 16 : 0;
    for (int token = row; token < p.tokens; token += kStep) {
      const T *from = static_cast<const T *>(p.x) + token * p.x_stride + (bytes == 0 ? 0 : column);
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(piece_of(stage, kFfnRows + token, piece)),
                   "l"(from), "r"(bytes)
                   : "memory");
    }
  }
};

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kTokenTiles>
struct Sums {
  static constexpr int kColumns = ffn_sum_columns(kTokenTiles);
  float acc[kTiles][kTokenTiles][4] = {};

  // += weights x^T over the columns of a stage.
  template <typename T>
  __device__ void multiply(uint32_t stage, int tokens) {
    const int lane = threadIdx.x % 32;
    const int token = min(lane % 8 + lane / 16 * 8, tokens - 1);  // columns of sums past the last are never looked at
#pragma unroll
    for (int k = 0; k < kFfnChunk / 16; ++k) {
      uint32_t a[kTiles][4], b[4];
      load_matrices(b, piece_of(stage, kFfnRows + token, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int t = 0; t < kTiles; ++t) load_matrices(a[t], piece_of(stage, 16 * t + lane % 16, 2 * k + lane / 16));
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
#pragma unroll
        for (int n = 0; n < kTokenTiles; ++n) multiply_add<T>(acc[t][n], a[t], b[2 * n], b[2 * n + 1]);
      }
    }
  }

  // To this warp's place in shared memory, and from zero again.
  __device__ void flush(float *shared) {
    const int lane = threadIdx.x % 32;
    float *to = shared + threadIdx.x / 32 * kFfnRows * kColumns;
#pragma unroll
    for (int t = 0; t < kTiles; ++t) {
#pragma unroll
      for (int n = 0; n < kTokenTiles; ++n) {
#pragma unroll
        for (int i = 0; i < 4; ++i) {
          to[(16 * t + lane / 4 + i / 2 * 8) * kColumns + 8 * n + lane % 4 * 2 + i % 2] = acc[t][n][i];
          acc[t][n][i] = 0.0f;
        }
      }
    }
  }

  template <typename T>
  __device__ static T total(const float *shared, int row, int token) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kFfnWarps; ++w) sum += shared[(w * kFfnRows + row) * kColumns + token];
    return from_float<T>(sum);
  }
};
#endif

template <typename T, bool kGated, int kTokenTiles, int kStages>
__global__ void __launch_bounds__(32 * kFfnWarps) ffn_stream(const __grid_constant__ Stream p) {
#ifdef GQA_FFN_SM90
  extern __shared__ __align__(128) float shared[];
  const Work<kGated> work(p);
  Loader<T, kGated> loader(p, work);
  const uint32_t stage_bytes = (kFfnRows + p.tokens) * kRowBytes;
  const uint32_t ring = shared_address(shared) + ffn_sums_size(kTokenTiles) + loader.warp * kStages * stage_bytes;
  // The first kernel waits before it lets the second start: so whoever wrote w_down has ended by then.
  if constexpr (kGated) {
    wait_for_prerequisites();
  } else {
    Loader<T, kGated> ahead = loader;
    for (int stage = 0; stage < kStages - 1 && ahead.more(); ++stage, ahead.advance()) {
      ahead.weights(ring + stage * stage_bytes);
    }
    wait_for_prerequisites();
  }
  launch_dependents();
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (loader.more()) {
      if constexpr (kGated) loader.weights(ring + stage * stage_bytes);
      loader.inputs(ring + stage * stage_bytes);
      loader.advance();
    }
    commit();
  }
  Sums<kTokenTiles> sums;
  int stage = 0, free = kStages - 1;  // the one to multiply next, and the one that was multiplied last
  for (int group = 0; group < work.groups; ++group) {
    for (int round = 0; round < work.rounds; ++round) {
      asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
      __syncwarp();
      if (loader.more()) {
        loader.weights(ring + free * stage_bytes);
        loader.inputs(ring + free * stage_bytes);
        loader.advance();
      }
      commit();
      sums.template multiply<T>(ring + stage * stage_bytes, p.tokens);
      __syncwarp();
      free = stage;
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    sums.flush(shared);
    __syncthreads();
    const int first = work.begin + group * work.kGroup, outputs = work.outputs(group);
    for (int i = threadIdx.x; i < work.kGroup * p.tokens; i += 32 * kFfnWarps) {
      const int output = i % work.kGroup, token = i / work.kGroup;
      if (output >= outputs) continue;
      T value = sums.template total<T>(shared, output, token);
      if constexpr (kGated) value = swiglu(value, sums.template total<T>(shared, work.kGroup + output, token));
      static_cast<T *>(p.out)[static_cast<int64_t>(token) * p.features + first + output] = value;
    }
    __syncthreads();
  }
#endif
}

template <typename T, bool kGated>
gqa_status launch_stream(const gqa_launch &plan, const Stream &p, cudaStream_t stream) {
  auto *kernel = plan.variant == kFfnFour    ? ffn_stream<T, kGated, 1, ffn_stages(kFfnFour)>
                 : plan.variant == kFfnEight ? ffn_stream<T, kGated, 1, ffn_stages(kFfnEight)>
                                             : ffn_stream<T, kGated, 2, ffn_stages(kFfnSixteen)>;
  return launch_programmatic(kernel, plan, stream, p);
}

template <typename T>
gqa_status run(const gqa_plan &plan, const gqa_swiglu_ffn_params &p, cudaStream_t stream) {
  const auto tokens = static_cast<int32_t>(p.tokens), hidden = static_cast<int32_t>(p.hidden);
  const auto intermediate = static_cast<int32_t>(p.intermediate), out_features = static_cast<int32_t>(p.out_features);
  const Stream first{{p.w_gate, p.w_up},
                     {p.w_gate_stride, p.w_up_stride},
                     p.x,
                     p.x_stride,
                     p.activation,
                     intermediate,
                     hidden,
                     tokens};
  GQA_RETURN_IF_ERROR((launch_stream<T, true>(plan.launches[0], first, stream)));
  const Stream second{{p.w_down}, {p.w_down_stride}, p.activation, p.intermediate,
                      p.out,      out_features,      intermediate, tokens};
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
  return p->dtype == GQA_DTYPE_BFLOAT16 ? run<__nv_bfloat16>(plan, *p, stream) : run<__half>(plan, *p, stream);
}
