// How weights reach shared memory: a team's chunks of columns, in order, through a ring of stages. A stage is rows of
// 128 bytes of weights and the same columns of each token.
#pragma once

#include "cuda/common/mma.cuh"
#include "cuda/common/weight_stream.cuh"

namespace gqa::cuda {

constexpr int kPieces = kStreamRowBytes / 16;

// Shared address of 16 bytes of a row in a stage. Neighbouring rows swap pieces, so that ldmatrix meets no bank twice.
__device__ __forceinline__ uint32_t piece_of(uint32_t stage, int row, int piece) {
  return stage + row * kStreamRowBytes + ((piece ^ (row % 8)) << 4);
}

// Of 16 bytes of a token's columns. Beside e4m3 weights a lane reads 8 bytes of a token, so that tokens swap pairs.
template <typename C>
__device__ __forceinline__ uint32_t input_piece_of(uint32_t inputs, int tokens, int token, int piece) {
  const int swap = C::kE4m3 ? token % 4 * 2 : token % 8;
  return inputs + (piece / kPieces * tokens + token) * kStreamRowBytes + ((piece % kPieces ^ swap) << 4);
}

__device__ __forceinline__ void copy_piece(uint32_t to, const void *from, int bytes, uint64_t policy) {
  asm volatile("cp.async.cg.shared.global.L2::cache_hint.L2::128B [%0], [%1], 16, %2, %3;" ::"r"(to), "l"(from),
               "r"(bytes), "l"(policy)
               : "memory");
}

__device__ __forceinline__ void commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// The compiler would branch around addresses.
__device__ __forceinline__ uint64_t pick(bool which, uint64_t yes, uint64_t no) {
  uint64_t picked;
  asm("{ .reg .pred p; setp.ne.u32 p, %1, 0; selp.b64 %0, %2, %3, p; }"
      : "=l"(picked)
      : "r"(static_cast<uint32_t>(which)), "l"(yes), "l"(no));
  return picked;
}

// All threads of a team.
template <typename C>
__device__ __forceinline__ void sync_team(int team) {
  if constexpr (C::kTeam == 32)
    __syncwarp();
  else
    asm volatile("bar.sync %0, %1;" ::"r"(team + 1), "n"(C::kTeam) : "memory");
}

// The part of the work that a block has: outputs [begin, end), in groups, each in rounds of one chunk for every team.
template <typename C>
struct Work {
  int begin, end, groups, rounds;

  __device__ explicit Work(const WeightStream &p)
      : begin(static_cast<int>(static_cast<int64_t>(p.features) * blockIdx.x / gridDim.x)),
        end(static_cast<int>(static_cast<int64_t>(p.features) * (blockIdx.x + 1) / gridDim.x)),
        groups((end - begin + C::kGroup - 1) / C::kGroup),
        rounds((p.columns + C::kChunk * kStreamTeams - 1) / (C::kChunk * kStreamTeams)) {}

  __device__ int outputs(int group) const { return min(C::kGroup, end - begin - group * C::kGroup); }
};

// Copies a team's chunks to the stages of its ring; a thread copies one piece of every few rows.
template <typename C>
struct Loader {
  using T = typename C::T;
  using W = typename C::W;
  static constexpr int kStep = C::kTeam / kPieces, kRows = kStreamRows / kStep;
  static constexpr int kInputPieces = kPieces * C::kLines, kInputStep = C::kTeam / kInputPieces;
  const WeightStream &p;
  const Work<C> &work;
  const int team, row, piece, token, part;
  uint64_t once;
  int group = 0, round = 0;  // of the chunk to be copied next
  const W *rows[kRows];      // of that group: the thread's

  __device__ Loader(const WeightStream &stream, const Work<C> &w)
      : p(stream),
        work(w),
        team(threadIdx.x / C::kTeam),
        row(threadIdx.x % C::kTeam / kPieces),
        piece(threadIdx.x % kPieces),
        token(threadIdx.x % C::kTeam / kInputPieces),
        part(threadIdx.x % kInputPieces) {
    asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
    find_rows();
  }

  __device__ int chunk(int of_round) const { return (of_round * kStreamTeams + team) * C::kChunk; }
  __device__ bool more() const { return group < work.groups; }
  __device__ void advance() {
    if (++round == work.rounds) round = 0, ++group, find_rows();
  }

  __device__ void follow(const Loader &other) {
    group = other.group, round = other.round;
#pragma unroll
    for (int i = 0; i < kRows; ++i) rows[i] = other.rows[i];
  }

  // Past the last output comes nothing.
  __device__ void find_rows() {
    const int outputs = more() ? work.outputs(group) : 0;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      const int half = C::kGated ? i * kStep / C::kGroup : 0, in_group = row + i * kStep - half * C::kGroup;
      const W *row_weights = weights_of(half, min(work.begin + group * C::kGroup + in_group, p.features - 1));
      rows[i] = in_group < outputs ? row_weights : nullptr;
    }
  }

  // Of an output: a row of w_gate or w_up, or of one matrix among those side by side.
  __device__ const W *weights_of(int half, int output) const {
    if constexpr (C::kGated) return static_cast<const W *>(p.weights[half]) + output * p.weight_stride[half];
    const bool second = output >= p.ends[0], third = output >= p.ends[1];
    const auto stride = static_cast<int64_t>(pick(third, p.weight_stride[2], p.weight_stride[1]));
    const int first = third ? p.ends[1] : p.ends[0];
    const uint64_t beyond =
        pick(third, reinterpret_cast<uint64_t>(p.weights[2]), reinterpret_cast<uint64_t>(p.weights[1]));
    const uint64_t weights = pick(second, beyond, reinterpret_cast<uint64_t>(p.weights[0]));
    const auto step = static_cast<int64_t>(pick(second, stride, p.weight_stride[0]));
    return reinterpret_cast<const W *>(weights) + (output - (second ? first : 0)) * step;
  }

  // Past the last column come zeros. Rows past the last output stay as they are: nobody looks at what they give.
  __device__ void weights(uint32_t stage) const {
    const int column = chunk(round) + C::kChunk / kPieces * piece, bytes = column < p.columns ? 16 : 0;
    const int from = bytes == 0 ? 0 : column;
#pragma unroll
    for (int i = 0; i < kRows; ++i) {
      if (rows[i] != nullptr) copy_piece(piece_of(stage, row + i * kStep, piece), rows[i] + from, bytes, once);
    }
  }

  __device__ uint32_t inputs_of(uint32_t stage, int of_token, int of_part) const {
    return input_piece_of<C>(stage + p.rows * kStreamRowBytes, p.tokens, of_token, of_part);
  }

  __device__ void inputs(uint32_t stage) const {
    const int column = chunk(round) + 8 * part, bytes = column < p.columns ? 16 : 0;
    for (int of = token; of < p.tokens; of += kInputStep) {
      const T *from = static_cast<const T *>(p.x) + of * p.x_stride + (bytes == 0 ? 0 : column);
      asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(inputs_of(stage, of, part)), "l"(from),
                   "r"(bytes)
                   : "memory");
    }
  }

  // The inputs of the next chunks while copies of their weights are under way: by loads, as asynchronous copies would
  // be waited for together with all of those.
  __device__ void inputs_at_once(uint32_t ring, uint32_t stage_bytes) const {
    constexpr int kChunks = C::kStages - 1, kEach = C::kTokens / kInputStep;
    uint4 values[kChunks][kEach] = {};
    int group = this->group, round = this->round, chunks = 0;
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
      const int column = chunk(round) + 8 * part;
      chunks += group < work.groups;
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int of = token + j * kInputStep;
        const T *from = static_cast<const T *>(p.x) + of * p.x_stride + column;
        if (column < p.columns && of < p.tokens) values[i][j] = __ldcg(reinterpret_cast<const uint4 *>(from));
      }
      if (++round == work.rounds) round = 0, ++group;
    }
#pragma unroll
    for (int i = 0; i < kChunks; ++i) {
#pragma unroll
      for (int j = 0; j < kEach; ++j) {
        const int of = token + j * kInputStep;
        const uint4 value = values[i][j];
        if (i < chunks && of < p.tokens) {
          asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};" ::"r"(inputs_of(ring + i * stage_bytes, of, part)),
                       "r"(value.x), "r"(value.y), "r"(value.z), "r"(value.w)
                       : "memory");
        }
      }
    }
  }
};

}  // namespace gqa::cuda
