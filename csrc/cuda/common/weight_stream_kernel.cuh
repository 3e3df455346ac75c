// out = residual + (x w^T + bias), or swiglu(x w_gate^T, x w_up^T), for up to 16 tokens, at the speed of reading the
// weights, which are of x's dtype, or of e4m3 with a scale for each output.
// A block owns consecutive outputs, 32 weight rows at a time; its 8 teams of warps take chunks of columns in turn, each
// through a ring of its own in shared memory, multiply on tensor cores, and add up once a group.
// Memory order: each weight once, rows side by side in chunks of 128 bytes; x again for every 32 rows, from L2.
// Limits: sm_90; rows of whole and aligned 16 bytes. x and residual are read after the kernel before has ended.
// Determinism: sums in a fixed order, bitwise repeatable; no atomics; tokens do not see each other.
#pragma once

#include "cuda/common/programmatic_launch.cuh"
#include "cuda/common/silu.cuh"
#include "cuda/common/weight_sums.cuh"

namespace gqa::cuda {

// Other architectures compile an empty kernel: the plan gives their calls to torch.
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
#define GQA_WEIGHT_STREAM_SM90
#endif

// What the sums of a group become. A thread has one output of a group, of every few tokens, so that it finds what that
// output needs while the group's weights are still on their way.
template <typename C>
struct Outputs {
  using T = typename C::T;
  static constexpr bool kGated = C::kGated;
  static constexpr int kGroup = C::kGroup, kStep = C::kThreads / kGroup, kEach = (C::kTokens + kStep - 1) / kStep;
  const WeightStream &p;
  const int own, token;
  int output = -1;  // of all, or none
  float scale[2], bias;
  T residual[kEach];

  __device__ explicit Outputs(const WeightStream &stream)
      : p(stream), own(threadIdx.x % kGroup), token(threadIdx.x / kGroup) {}

  __device__ void find(int first, int outputs) {
    output = own < outputs && token < p.tokens ? first + own : -1;
    scale[0] = scale[1] = 1.0f, bias = 0.0f;
    if (output < 0) return;
    if constexpr (C::kE4m3) {
      scale[0] = __ldcg(p.scale[0] + output);
      if (kGated) scale[1] = __ldcg(p.scale[1] + output);
    }
    if constexpr (!kGated) {
      if (p.bias != nullptr) bias = to_float(__ldcg(static_cast<const T *>(p.bias) + output));
#pragma unroll
      for (int i = 0; i < kEach; ++i) {
        const int of = token + i * kStep;
        if (p.residual == nullptr || of >= p.tokens) continue;
        residual[i] = __ldcg(static_cast<const T *>(p.residual) + of * p.residual_stride + output);
      }
    }
  }

  __device__ void store(const float *shared) const {
    if (output < 0) return;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int of = token + i * kStep;
      if (of >= p.tokens) break;
      const float sum = Sums<C>::total(shared, own, of);
      T value;
      if constexpr (kGated) {
        const float up = Sums<C>::total(shared, kGroup + own, of);
        value = swiglu(from_float<T>(sum * scale[0]), from_float<T>(up * scale[1]));
      } else {
        value = from_float<T>(fmaf(sum, scale[0], bias));
        if (p.residual != nullptr) value = from_float<T>(to_float(residual[i]) + to_float(value));
      }
      static_cast<T *>(p.out)[of * p.out_stride + output] = value;
    }
  }
};

template <typename C>
__global__ void __launch_bounds__(C::kThreads, 1) weight_stream(const __grid_constant__ WeightStream p) {
#ifdef GQA_WEIGHT_STREAM_SM90
  constexpr int kStages = C::kStages;
  extern __shared__ __align__(128) float shared[];
  const Work<C> work(p);
  Loader<C> loader(p, work);
  const uint32_t stage_bytes = (p.rows + p.tokens * C::kLines) * kStreamRowBytes;
  const uint32_t ring = shared_address(shared) + stream_sums_size(C::kTokenTiles) + loader.team * p.ring * stage_bytes;
  // A gated kernel whose weights may not be read early answers for w_down too, which the kernel after it reads early:
  // it lets that one start when everything before has ended.
  const bool answers = C::kGated && !p.early;
  if (!answers) launch_dependents();
  if (p.early) {
    Loader<C> ahead = loader;
#pragma unroll 1
    for (int stage = 0; stage < kStages - 1; ++stage) {
      if (ahead.more()) {
        ahead.weights(ring + stage * stage_bytes);
        ahead.advance();
      }
      commit();
    }
    wait_for_prerequisites();
    loader.inputs_at_once(ring, stage_bytes);
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
  Sums<C> sums;
  Outputs<C> outputs(p);
  int stage = 0, free = kStages - 1;  // the one to multiply next, and the one that was multiplied last
  for (int group = 0; group < work.groups; ++group) {
    outputs.find(work.begin + group * C::kGroup, work.outputs(group));
    for (int round = 0; round < work.rounds; ++round) {
      asm volatile("cp.async.wait_group %0;" ::"n"(kStages - 2) : "memory");
      sync_team<C>(loader.team);
      if (loader.more()) {
        loader.weights(ring + free * stage_bytes);
        loader.inputs(ring + free * stage_bytes);
        loader.advance();
      }
      commit();
      const uint32_t at = ring + stage * stage_bytes;
      const auto input = [&](int token, int piece) { return loader.inputs_of(at, token, piece); };
      if (loader.chunk(round) < p.columns) sums.multiply(at, p.rows, p.tokens, input);
      free = stage;
      stage = stage + 1 == kStages ? 0 : stage + 1;
    }
    sums.flush(shared);
    __syncthreads();
    outputs.store(shared);
    __syncthreads();
  }
#endif
}

template <typename T, typename W, bool kGated, StreamVariant kVariant>
gqa_status launch_variant(const gqa_launch &plan, const WeightStream &p, cudaStream_t stream) {
  using C = StreamConfig<T, W, kGated, stream_tokens(kVariant), stream_stages(kVariant, sizeof(W) == 1)>;
  return launch_programmatic(weight_stream<C>, plan, stream, p);
}

template <typename T, typename W, bool kGated>
gqa_status launch_for(const gqa_launch &plan, const WeightStream &p, cudaStream_t stream) {
  switch (plan.variant) {
    case kStreamFour: return launch_variant<T, W, kGated, kStreamFour>(plan, p, stream);
    case kStreamEight: return launch_variant<T, W, kGated, kStreamEight>(plan, p, stream);
    default: return launch_variant<T, W, kGated, kStreamSixteen>(plan, p, stream);
  }
}

template <typename T, typename W>
gqa_status launch_stream(const gqa_launch &plan, WeightStream p, cudaStream_t stream) {
  gqa_device device;
  GQA_RETURN_IF_ERROR(current_device(&device));
  const StreamShape shape{p.gated, sizeof(W) == 1, p.tokens, p.features, p.columns};
  p.rows = static_cast<int32_t>(stream_rows(shape, device.num_sms));
  p.ring = static_cast<int32_t>(stream_ring(shape, device.num_sms));
  if (plan.variant == kStreamNarrow) return launch_variant<T, W, false, kStreamNarrow>(plan, p, stream);
  return p.gated ? launch_for<T, W, true>(plan, p, stream) : launch_for<T, W, false>(plan, p, stream);
}

}  // namespace gqa::cuda
