// One token of each of up to 8 rows through all layers of a decoder, from its embedding to its logits.
// A block an SM for the whole step: four warps copy its weights and cached keys through a ring in shared memory, as far
// ahead as there is room, eight compute; blocks hand on activations whose own bits say that they are there.
// Memory order: each weight once, a tile of 16 rows at a time; the cached keys in their turn; activations through L2.
// Limits: sm_90, all blocks resident at once; 16-bit types; dense contiguous weights and caches.
// Determinism: sums in a fixed order; the parts of a row's keys depend on its length and on the number of rows.
#pragma once

#include "cuda/common/silu.cuh"
#include "cuda/decoder_step_sm90/attention.cuh"
#include "cuda/decoder_step_sm90/copies.cuh"
#include "cuda/decoder_step_sm90/product.cuh"

namespace gqa::cuda::decoder_step {

// Where a phase's outputs go.
template <typename T>
struct Outputs {
  const Args &p;
  const Block &t;
  Phase phase;
  int begin, outputs;
  uint16_t *to;
  bool biased;

  __device__ void operator()(int output, int row, float sum, float partner) const {
    const int64_t at = static_cast<int64_t>(row) * outputs + output;
    T value = from_float<T>(sum);
    if (phase == kQkv) {
      if (biased) value = from_float<T>(sum + to_float(t.biases<T>()[output - begin]));
    } else if (phase == kGateUp) {
      value = swiglu(value, from_float<T>(partner));
    } else if (phase == kHead) {
      reinterpret_cast<T *>(p.logits)[at] = value;
      return;
    } else {
      T *mine = t.residual<T>() + row * kStepOwned + output - begin;
      *mine = value = from_float<T>(to_float(value) + to_float(*mine));
    }
    publish(to + at, value);
  }
};

template <typename T>
__device__ __forceinline__ void load_residual(const Args &p, const Block &t, const Slice &slice) {
  const int count = slice.end - slice.begin;
  for (int i = t.thread; i < count * p.rows; i += kConsumers) {
    const int row = i / count, j = i % count;
    t.residual<T>()[row * kStepOwned + j] =
        reinterpret_cast<const T *>(p.input)[static_cast<int64_t>(row) * p.hidden + slice.begin + j];
  }
}

template <typename T>
__device__ __forceinline__ void load_biases(const Layer &layer, const Block &t, const Slice &slice, const Matrix &m) {
  for (int i = t.thread; i < slice.end - slice.begin; i += kConsumers) {
    const int output = slice.begin + i;
    const char *from = output < m.ends[0] ? layer.q_bias : output < m.ends[1] ? layer.k_bias : layer.v_bias;
    const int first = output < m.ends[0] ? 0 : output < m.ends[1] ? m.ends[0] : m.ends[1];
    t.biases<T>()[i] = reinterpret_cast<const T *>(from)[output - first];
  }
}

template <typename T, int kDim>
__device__ void compute_all(const Args &p, Ring &ring, char *shared) {
  Block t(p, shared);
  const Lengths lengths = load_lengths(p, blockIdx.x);
  if (t.thread == 0) {
    *reinterpret_cast<Part *>(shared + kPartAt) = find_part(p, p.layer[0].window_left, blockIdx.x, lengths);
  }
  sync_consumers();
#pragma unroll 1
  for (int i = 0; i <= 4 * p.layers; ++i) {
    const Phase phase = i == 4 * p.layers ? kHead : static_cast<Phase>(i % 4);
    const Layer &layer = p.layer[min(i / 4, p.layers - 1)];
    const Matrix m = matrix_of<kDim>(p, layer, phase);
    const Slice slice = slice_of(shared, phase);
    const int64_t at = i / 4 * p.of_layer;
    t.tag = i / 4 + 1;
    if (slice.begin < slice.end) {
      if (phase == kQkv && layer.q_bias != nullptr) load_biases<T>(layer, t, slice, m);
      if (i == 1) load_residual<T>(p, t, slice);
      if (phase == kO || phase == kDown) {
        receive_inputs(p, t, (phase == kO ? p.attention : p.activated) + at, m.columns);
      } else {
        const char *weight = phase == kQkv ? layer.input_norm : phase == kGateUp ? layer.mlp_norm : p.norm;
        Norm<T> norm;
        norm.load(p, t, weight);
        norm.apply(p, t,
                   i == 0             ? nullptr
                   : phase == kGateUp ? p.after_attention + at
                                      : p.after_layer + at - p.of_layer);
      }
      uint16_t *values = phase == kQkv      ? p.qkv
                         : phase == kO      ? p.after_attention
                         : phase == kGateUp ? p.activated
                                            : p.after_layer;
      const Outputs<T> finish{p, t, phase, slice.begin, m.outputs, values + at, layer.q_bias != nullptr};
      multiply<T>(p, t, ring, slice, m, finish);
    }
    if (phase == kQkv) attend<T, kDim>(p, layer, lengths, t, ring, p.qkv + at, p.attention + at);
  }
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 1) decoder_step(const __grid_constant__ Args p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char shared[];
  Ring ring(p, shared_address(shared));
  if (threadIdx.x == 0) ring.init();
  if (threadIdx.x < 5) {
    reinterpret_cast<int4 *>(shared + kSlicesAt)[threadIdx.x] =
        find_slice(matrix_of<kDim>(p, p.layer[0], static_cast<Phase>(threadIdx.x)), p.stage_bytes);
  }
  __syncthreads();
  if (threadIdx.x >= kConsumers) {
    copy_all<kDim>(p, shared, ring);
  } else {
    compute_all<T, kDim>(p, ring, shared);
  }
#endif
}

}  // namespace gqa::cuda::decoder_step
