// out = x w^T (+ bias), or swiglu(x w_gate^T, x w_up^T), for up to 16 tokens, at the speed of reading the weights.
// A block owns consecutive outputs, 32 weight rows at a time; its warps take chunks of 64 columns in turn, each through
// a ring of its own in shared memory, multiply on tensor cores, and add up once a group.
// Memory order: each weight once, rows side by side in chunks of columns; x again for every 32 rows, from L2.
// Limits: sm_90; columns in multiples of 8; 16-byte aligned rows. x is read after the kernel before has ended.
// Determinism: sums in a fixed order, bitwise repeatable; no atomics; tokens do not see each other.
#include "cuda/common/weight_stream.cuh"

#include "cuda/common/mma.cuh"
#include "cuda/common/programmatic_launch.cuh"
#include "cuda/common/silu.cuh"

namespace gqa::cuda {
namespace {

// Other architectures compile an empty kernel: the plan gives their calls to torch.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define GQA_WEIGHT_STREAM_SM90
#endif

#ifdef GQA_WEIGHT_STREAM_SM90
constexpr int kRowBytes = 2 * kStreamChunk, kPieces = kRowBytes / 16;  // of a row in a stage; pieces of 16 bytes
constexpr int kTiles = kStreamRows / 16;

// Shared address of a piece of a row in a stage. Neighbouring rows swap pieces, so that ldmatrix meets no bank twice.
__device__ __forceinline__ uint32_t piece_of(uint32_t stage, int row, int piece) {
  return stage + row * kRowBytes + ((piece ^ (row % 8)) << 4);
}

__device__ __forceinline__ void copy_piece(uint32_t to, const void *from, int bytes, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from),
               "r"(bytes), "l"(policy)
               : "memory");
}

// The compiler would branch around addresses.
__device__ __forceinline__ uint64_t pick(bool which, uint64_t yes, uint64_t no) {
  uint64_t picked;
  asm("{ .reg .pred p; setp.ne.u32 p, %1, 0; selp.b64 %0, %2, %3, p; }"
      : "=l"(picked)
      : "r"(static_cast<uint32_t>(which)), "l"(yes), "l"(no));
  return picked;
}

// The part of the work that a block has: outputs [begin, end), in groups, each in rounds of one chunk for every warp.
template <bool kGated>
struct Work {
  static constexpr int kGroup = kGated ? kStreamRows / 2 : kStreamRows;
  int begin, end, groups, rounds;

  __device__ explicit Work(const WeightStream &p)
      : begin(static_cast<int>(static_cast<int64_t>(p.features) * blockIdx.x / gridDim.x)),
        end(static_cast<int>(static_cast<int64_t>(p.features) * (blockIdx.x + 1) / gridDim.x)),
        groups((end - begin + kGroup - 1) / kGroup),
        rounds((p.columns + kStreamChunk * kStreamWarps - 1) / (kStreamChunk * kStreamWarps)) {}

  __device__ int outputs(int group) const { return min(kGroup, end - begin - group * kGroup); }
};

// Copies a warp's chunks, in order, to the stages of its ring; a lane copies one piece of every fourth row.
template <typename T, bool kGated>
struct Loader {
  static constexpr int kStep = 32 / kPieces, kGroup = Work<kGated>::kGroup;
  const WeightStream &p;
  const Work<kGated> &work;
  const int warp, row, piece;
  uint64_t once;
  int group = 0, round = 0;            // of the chunk to be copied next
  const T *rows[kStreamRows / kStep];  // of that group: the lane's

  __device__ Loader(const WeightStream &stream, const Work<kGated> &w)
      : p(stream), work(w), warp(threadIdx.x / 32), row(threadIdx.x % 32 / kPieces), piece(threadIdx.x % kPieces) {
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
    find_rows();
  }

  __device__ int column() const { return (round * kStreamWarps + warp) * kStreamChunk + 8 * piece; }
  __device__ bool more() const { return group < work.groups; }
  __device__ void advance() {
    if (++round == work.rounds) round = 0, ++group, find_rows();
  }

  __device__ void follow(const Loader &other) {
    group = other.group, round = other.round;
#pragma unroll
    for (int i = 0; i < kStreamRows / kStep; ++i) rows[i] = other.rows[i];
  }

  // Past the last output comes nothing.
  __device__ void find_rows() {
    const int outputs = more() ? work.outputs(group) : 0;
#pragma unroll
    for (int i = 0; i < kStreamRows / kStep; ++i) {
      const int half = kGated ? i * kStep / kGroup : 0, in_group = row + i * kStep - half * kGroup;
      const T *row_weights = weights_of(half, min(work.begin + group * kGroup + in_group, p.features - 1));
      rows[i] = in_group < outputs ? row_weights : nullptr;
    }
  }

  // Of an output: a row of w_gate or w_up, or of one matrix among those side by side.
  __device__ const T *weights_of(int half, int output) const {
    if constexpr (kGated) return static_cast<const T *>(p.weights[half]) + output * p.weight_stride[half];
    const bool second = output >= p.ends[0], third = output >= p.ends[1];
    const auto stride = static_cast<int64_t>(pick(third, p.weight_stride[2], p.weight_stride[1]));
    const int first = third ? p.ends[1] : p.ends[0];
    const uint64_t beyond =
        pick(third, reinterpret_cast<uint64_t>(p.weights[2]), reinterpret_cast<uint64_t>(p.weights[1]));
    const uint64_t weights = pick(second, beyond, reinterpret_cast<uint64_t>(p.weights[0]));
    const auto step = static_cast<int64_t>(pick(second, stride, p.weight_stride[0]));
    return reinterpret_cast<const T *>(weights) + (output - (second ? first : 0)) * step;
  }

  // Past the last column come zeros. Rows past the last output stay as they are: nobody looks at what they give.
  __device__ void weights(uint32_t stage) const {
    const int column = this->column(), bytes = column < p.columns ? 16 : 0, from = bytes == 0 ? 0 : column;
#pragma unroll
    for (int i = 0; i < kStreamRows / kStep; ++i) {
      if (rows[i] != nullptr) copy_piece(piece_of(stage, row + i * kStep, piece), rows[i] + from, bytes, once);
    }
  }

  __device__ void inputs(uint32_t stage) const {
    const int column = this->column(), bytes = column < p.columns ? 16 : 0;
    for (int token = row; token < p.tokens; token += kStep) {
      const T *from = static_cast<const T *>(p.x) + token * p.x_stride + (bytes == 0 ? 0 : column);
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(piece_of(stage, p.rows + token, piece)),
                   "l"(from), "r"(bytes)
                   : "memory");
    }
  }

  // The inputs of the next chunks while copies of their weights are under way: by loads, as asynchronous copies would
  // be waited for together with all of those.
  template <int kChunks, int kTokens>
  __device__ void inputs_at_once(uint32_t ring, uint32_t stage_bytes) const {
    constexpr int kEach = kTokens / kStep;
    uint4 values[kChunks][kEach] = {};
    int group = this->group, round = this->round, chunks = 0;
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
      const int column = (round * kStreamWarps + warp) * kStreamChunk + 8 * piece;
      chunks += group < work.groups;
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int token = row + i * kStep;
        const T *from = static_cast<const T *>(p.x) + token * p.x_stride + column;
        if (column < p.columns && token < p.tokens) values[chunk][i] = __ldcg(reinterpret_cast<const uint4 *>(from));
      }
      if (++round == work.rounds) round = 0, ++group;
    }
#pragma unroll
    for (int chunk = 0; chunk < kChunks; ++chunk) {
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int token = row + i * kStep;
        const uint4 value = values[chunk][i];
        if (chunk < chunks && token < p.tokens) {
          asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(
                           piece_of(ring + chunk * stage_bytes, p.rows + token, piece)),
                       "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
                       : "memory");
        }
      }
    }
  }
};

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kTokenTiles>
struct Sums {
  static constexpr int kColumns = stream_sum_columns(kTokenTiles);
  float acc[kTiles][kTokenTiles][4] = {};

  // += weights x^T over the columns of a stage.
  template <typename T>
  __device__ void multiply(uint32_t stage, int rows, int tokens) {
    const int lane = threadIdx.x % 32;
    const int token = min(lane % 8 + lane / 16 * 8, tokens - 1);  // columns of sums past the last are never looked at
#pragma unroll
    for (int k = 0; k < kStreamChunk / 16; ++k) {
      uint32_t a[kTiles][4], b[4];
      load_matrices(b, piece_of(stage, rows + token, 2 * k + lane / 8 % 2));
#pragma unroll
      for (int t = 0; t < kTiles; ++t) {
        const int row = min(16 * t + lane % 16, rows - 1);  // sums of rows past the last are never looked at
        load_matrices(a[t], piece_of(stage, row, 2 * k + lane / 16));
      }
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
    float *to = shared + threadIdx.x / 32 * kStreamRows * kColumns;
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

  __device__ static float total(const float *shared, int row, int token) {
    float sum = 0.0f;
#pragma unroll
    for (int w = 0; w < kStreamWarps; ++w) sum += shared[(w * kStreamRows + row) * kColumns + token];
    return sum;
  }
};
#endif

template <typename T, bool kGated, StreamVariant kVariant>
__global__ void __launch_bounds__(32 * kStreamWarps) weight_stream(const __grid_constant__ WeightStream p) {
#ifdef GQA_WEIGHT_STREAM_SM90
  constexpr int kStages = stream_stages(kVariant), kTokens = stream_tokens(kVariant);
  constexpr int kTokenTiles = kTokens > 8 ? 2 : 1;
  extern __shared__ __align__(128) float shared[];
  const Work<kGated> work(p);
  Loader<T, kGated> loader(p, work);
  const uint32_t stage_bytes = (p.rows + p.tokens) * kRowBytes;
  const uint32_t ring = shared_address(shared) + stream_sums_size(kTokenTiles) + loader.warp * p.ring * stage_bytes;
  // A gated kernel whose weights may not be read early answers for w_down too, which the kernel after it reads early:
  // it lets that one start when everything before has ended.
  const bool answers = kGated && !p.early;
  if (!answers) launch_dependents();
  if (p.early) {
    Loader<T, kGated> ahead = loader;
#pragma unroll 1
    for (int stage = 0; stage < kStages - 1; ++stage) {
      if (ahead.more()) {
        ahead.weights(ring + stage * stage_bytes);
        ahead.advance();
      }
      commit();
    }
    wait_for_prerequisites();
    loader.template inputs_at_once<kStages - 1, kTokens>(ring, stage_bytes);
    loader.follow(ahead);
  } else {
    wait_for_prerequisites();
    if (answers) launch_dependents();
#pragma unroll 1
    for (int stage = 0; stage < kStages - 1; ++stage) {
      if (loader.more()) {
        loader.weights(ring + stage * stage_bytes);
        loader.inputs(ring + stage * stage_bytes);
        loader.advance();
      }
      commit();
    }
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
      sums.template multiply<T>(ring + stage * stage_bytes, p.rows, p.tokens);
      __syncwarp();
      free = stage;
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    sums.flush(shared);
    __syncthreads();
    const int first = work.begin + group * work.kGroup, outputs = work.outputs(group);
    for (int i = threadIdx.x; i < work.kGroup * p.tokens; i += 32 * kStreamWarps) {
      const int output = i % work.kGroup, token = i / work.kGroup;
      if (output >= outputs) continue;
      const float sum = sums.total(shared, output, token);
      T value;
      if constexpr (kGated) {
        value = swiglu(from_float<T>(sum), from_float<T>(sums.total(shared, work.kGroup + output, token)));
      } else {
        const T *bias = static_cast<const T *>(p.bias);
        value = from_float<T>(bias == nullptr ? sum : sum + to_float(bias[first + output]));
      }
      static_cast<T *>(p.out)[token * p.out_stride + first + output] = value;
    }
    __syncthreads();
  }
#endif
}

template <typename T, bool kGated>
gqa_status launch_for(const gqa_launch &plan, const WeightStream &p, cudaStream_t stream) {
  auto *kernel = plan.variant == kStreamFour    ? weight_stream<T, kGated, kStreamFour>
                 : plan.variant == kStreamEight ? weight_stream<T, kGated, kStreamEight>
                                                : weight_stream<T, kGated, kStreamSixteen>;
  return launch_programmatic(kernel, plan, stream, p);
}

}  // namespace

gqa_status launch_weight_stream(const gqa_launch &plan, int32_t dtype, WeightStream p, cudaStream_t stream) {
  gqa_device device;
  GQA_RETURN_IF_ERROR(current_device(&device));
  p.rows = static_cast<int32_t>(stream_rows(p.gated, p.features, device.num_sms));
  p.ring = static_cast<int32_t>(stream_ring(p.gated, p.tokens, p.features, p.columns, device.num_sms));
  if (dtype == GQA_DTYPE_BFLOAT16) {
    return p.gated ? launch_for<__nv_bfloat16, true>(plan, p, stream)
                   : launch_for<__nv_bfloat16, false>(plan, p, stream);
  }
  return p.gated ? launch_for<__half, true>(plan, p, stream) : launch_for<__half, false>(plan, p, stream);
}

}  // namespace gqa::cuda
