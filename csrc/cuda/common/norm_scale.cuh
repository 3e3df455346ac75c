// A vector of a row to be normalised: moved in chunks that its alignment allows, added to another, and scaled with
// HuggingFace's rounding.
#pragma once

#include "cuda/common/pack.cuh"

namespace gqa::cuda {

// The vector at element `at`, moved kChunk elements at a time; what lies past the end of the row is zero.
template <int kChunk, bool kOnce = false, typename T>
__device__ __forceinline__ Vec<T> load(const T *row, int at, int hidden) {
  if constexpr (kChunk == Vec<T>::kSize) {
    return kOnce ? load_vec_once(row + at) : load_vec(row + at);
  } else {
    Vec<T> vec;
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; i += kChunk) {
      Run<T, kChunk> run{};
      if (at + i < hidden) run = load_run<kChunk>(row + at + i);
#pragma unroll
      for (int j = 0; j < kChunk; ++j) vec.value[i + j] = run.value[j];
    }
    return vec;
  }
}

template <int kChunk, typename T>
__device__ __forceinline__ void store(T *row, int at, int hidden, const Vec<T> &vec, bool past_cache) {
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; i += kChunk) {
    Run<T, kChunk> run;
#pragma unroll
    for (int j = 0; j < kChunk; ++j) run.value[j] = vec.value[i + j];
    if (kChunk == Vec<T>::kSize || at + i < hidden) store_run(row + at + i, run, past_cache);
  }
}

// Added in float32, rounded once.
template <typename T>
__device__ __forceinline__ Vec<T> sum_of(const Vec<T> &a, const Vec<T> &b) {
  Floats<T> x = widen(a);
  const Floats<T> y = widen(b);
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) x.value[i] += y.value[i];
  return narrow(x);
}

// The weights of one vector of x, in their own dtype if it is x's, else as floats.
template <typename T, typename W>
using Weights = std::conditional_t<std::is_same_v<T, W>, Vec<T>, Floats<T>>;

template <int kChunk, typename T, typename W>
__device__ __forceinline__ Weights<T, W> load_weights(const W *weight, int at, int hidden) {
  if constexpr (std::is_same_v<T, W>) {
    return load<kChunk>(weight, at, hidden);
  } else {
    constexpr int kStep = kChunk == 1 ? 1 : kChunk / 2;  // as many bytes as a chunk of x
    Floats<T> floats;
#pragma unroll
    for (int i = 0; i < Vec<T>::kSize; i += kStep) {
      Run<W, kStep> run{};
      if (at + i < hidden) run = load_run<kStep>(weight + at + i);
#pragma unroll
      for (int j = 0; j < kStep; ++j) floats.value[i + j] = run.value[j];
    }
    return floats;
  }
}

template <typename T>
__device__ __forceinline__ Floats<T> as_floats(const Vec<T> &weights) {
  return widen(weights);
}

template <typename T>
__device__ __forceinline__ Floats<T> as_floats(const Floats<T> &weights) {
  return weights;
}

// The parameters of scaled() that Llama's norms have, known to the compiler.
struct LlamaScale {
  static constexpr bool cast_before_weight = true;
  static constexpr float weight_offset = 0;
};

// HuggingFace's rounding: the normalised value rounds to T before the weight, or only the product does.
template <typename T, typename W, typename Params>
__device__ __forceinline__ Vec<T> scaled(const Vec<T> &x, const Weights<T, W> &weights, float rstd, const Params &p) {
  Floats<T> value = widen(x);
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) value.value[i] *= rstd;
  if (sizeof(T) == 2 && p.cast_before_weight) {
    const Vec<T> rounded = narrow(value);
    if constexpr (sizeof(T) == 2 && std::is_same_v<T, W>) {
      if (p.weight_offset == 0) return multiply(rounded, weights);
    }
    value = widen(rounded);
  }
  const Floats<T> factor = as_floats(weights);
#pragma unroll
  for (int i = 0; i < Vec<T>::kSize; ++i) value.value[i] *= factor.value[i] + p.weight_offset;
  return narrow(value);
}

}  // namespace gqa::cuda
