// One token of each of up to 8 rows through all layers of a decoder, from its embedding to its logits.
// One block an SM stays for the whole step: one warp copies the block's weights and cached keys through a ring in
// shared memory, as far ahead as the ring allows, the others compute; the grid meets between phases.
// Memory order: each weight once, a tile of 16 rows at a time; the cached keys in their turn; activations through L2.
// Limits: sm_90, all blocks resident at once; 16-bit types; dense contiguous weights and caches.
// Determinism: sums in a fixed order; the parts of a row's keys depend on its length and on the number of rows.
#pragma once

#include "cuda/common/silu.cuh"
#include "cuda/decoder_step_sm90/attention.cuh"
#include "cuda/decoder_step_sm90/copies.cuh"
#include "cuda/decoder_step_sm90/product.cuh"

namespace gqa::cuda::decoder_step {

template <int kDim>
__device__ __forceinline__ Matrix qkv_of(const Args &p, const Layer &l) {
  const int q = p.q_heads * kDim, kv = p.kv_heads * kDim;
  return {{l.q, l.k, l.v}, {q, q + kv}, q + 2 * kv, p.hidden};
}
template <int kDim>
__device__ __forceinline__ Matrix o_of(const Args &p, const Layer &l) {
  return {{l.o, nullptr, nullptr}, {p.hidden, p.hidden}, p.hidden, p.q_heads * kDim};
}
__device__ __forceinline__ Matrix gate_up_of(const Args &p, const Layer &l) {
  return {{l.gate, l.up, nullptr}, {0, 0}, p.intermediate, p.hidden};
}
__device__ __forceinline__ Matrix down_of(const Args &p, const Layer &l) {
  return {{l.down, nullptr, nullptr}, {p.hidden, p.hidden}, p.hidden, p.intermediate};
}
__device__ __forceinline__ Matrix head_of(const Args &p) {
  return {{p.head, nullptr, nullptr}, {p.vocabulary, p.vocabulary}, p.vocabulary, p.hidden};
}

template <int kDim>
__device__ void copy_all(const Args &p, Ring &ring) {
  uint64_t once;
  asm volatile("createpolicy.fractional.L2::evict_first.b64 %0, 1.0;" : "=l"(once));
  for (int i = 0; i < p.layers; ++i) {
    const Layer &layer = p.layer[i];
    copy_weights<false>(qkv_of<kDim>(p, layer), ring, once);
    copy_keys<kDim>(p, layer, ring, once);
    copy_weights<false>(o_of<kDim>(p, layer), ring, once);
    copy_weights<true>(gate_up_of(p, layer), ring, once);
    copy_weights<false>(down_of(p, layer), ring, once);
  }
  copy_weights<false>(head_of(p), ring, once);
}

template <typename T, int kDim>
__device__ void compute_all(const Args &p, Ring &ring, char *shared) {
  Block t(shared);
  Norm<T> norm;
  const int q_outputs = p.q_heads * kDim, kv_outputs = p.kv_heads * kDim, qkv_outputs = q_outputs + 2 * kv_outputs;
  const char *residual = p.input;
  const auto add = [&](int output, int row, float sum) {
    const int64_t at = static_cast<int64_t>(row) * p.hidden + output;
    const T before = from_float<T>(to_float(reinterpret_cast<const T *>(residual)[at]));
    reinterpret_cast<T *>(p.residual)[at] = from_float<T>(to_float(from_float<T>(sum)) + to_float(before));
  };
  for (int i = 0; i < p.layers; ++i) {
    const Layer &layer = p.layer[i];
#ifdef TRACE
    t.layer = i;
#endif
    t.mark(p, 0);
    norm.load(p, t, layer.input_norm);
    if (i > 0) t.wait_for_grid(p);
    t.mark(p, 1);
    norm.apply(p, t, residual);
    t.mark(p, 2);
    multiply<T, false>(p, t, ring, qkv_of<kDim>(p, layer), [&](int output, int row, float sum) {
      const bool q = output < q_outputs, k = output < q_outputs + kv_outputs;
      const char *bias = q ? layer.q_bias : k ? layer.k_bias : layer.v_bias;
      const int at = output - (q ? 0 : k ? q_outputs : q_outputs + kv_outputs);
      if (bias != nullptr) sum += to_float(reinterpret_cast<const T *>(bias)[at]);
      reinterpret_cast<T *>(p.qkv)[static_cast<int64_t>(row) * qkv_outputs + output] = from_float<T>(sum);
    });
    t.mark(p, 3);
    t.wait_for_grid(p);
    t.mark(p, 4);
    attend<T, kDim>(p, layer, i, t, ring);
    t.mark(p, 5);
    t.wait_for_grid(p);
    t.mark(p, 6);
    load_inputs<T>(p, t, p.attention, q_outputs);
    t.mark(p, 7);
    multiply<T, false>(p, t, ring, o_of<kDim>(p, layer), add);
    t.mark(p, 8);
    residual = p.residual;
    norm.load(p, t, layer.mlp_norm);
    t.wait_for_grid(p);
    t.mark(p, 9);
    norm.apply(p, t, residual);
    t.mark(p, 10);
    multiply<T, true>(p, t, ring, gate_up_of(p, layer), [&](int output, int row, float gate, float up) {
      reinterpret_cast<T *>(p.activated)[static_cast<int64_t>(row) * p.intermediate + output] =
          swiglu(from_float<T>(gate), from_float<T>(up));
    });
    t.mark(p, 11);
    t.wait_for_grid(p);
    t.mark(p, 12);
    load_inputs<T>(p, t, p.activated, p.intermediate);
    t.mark(p, 13);
    multiply<T, false>(p, t, ring, down_of(p, layer), add);
    t.mark(p, 14);
  }
  norm.load(p, t, p.norm);
  t.wait_for_grid(p);
  norm.apply(p, t, residual);
  multiply<T, false>(p, t, ring, head_of(p), [&](int output, int row, float sum) {
    reinterpret_cast<T *>(p.logits)[static_cast<int64_t>(row) * p.vocabulary + output] = from_float<T>(sum);
  });
}

template <typename T, int kDim>
__global__ void __launch_bounds__(kThreads, 1) decoder_step(const __grid_constant__ Args p) {
#if !defined(__CUDA_ARCH__) || __CUDA_ARCH__ >= 900
  extern __shared__ __align__(128) char shared[];
  Ring ring(p, shared_address(shared));
  if (threadIdx.x == 0) ring.init();
  __syncthreads();
  if (threadIdx.x / 32 == kWarps) {
    copy_all<kDim>(p, ring);
  } else {
    compute_all<T, kDim>(p, ring, shared);
  }
#endif
}

}  // namespace gqa::cuda::decoder_step
