// swiglu: out = silu(gate) * up, silu rounded to the dtype before the product.
// Rows without gaps are one long row; a thread owns one or four 16-byte runs of it, a block 256 threads.
// Memory order: gate and up of all the thread's runs, then out; each byte once.
// Limits: any width and row strides; unaligned rows go element by element.
// Determinism: no reductions, bitwise repeatable. The bytes are torch's: expf, then an IEEE division, then rounding to
// the dtype; approximations take their place only where they can't round to another value.
#include "cuda/common/pointwise.cuh"

namespace gqa::cuda {
namespace {

template <typename T>
__device__ T exact_silu(float x) {
  return from_float<T>(x / (1.0f + expf(-x)));
}

// For |x| < 8 the approximation is off by less than 16 units in the last place of float32, so unless it lies that near
// to the middle between two values of T, or T is denormal there, it rounds as the exact quotient does.
template <typename T>
__device__ T silu(float x) {
  constexpr bool kHalf = std::is_same_v<T, __half>;
  constexpr uint32_t kDropped = kHalf ? 0x1fff : 0xffff, kMiddle = (kDropped + 1) / 2, kNear = 16;
  constexpr float kSmallest = kHalf ? 0x1p-14f : 0x1p-120f;
  const float approximate = __fdividef(x, 1.0f + __expf(-x));
  const uint32_t from_middle = (__float_as_uint(approximate) & kDropped) - kMiddle;
  const bool safe = fabsf(x) < 8.0f && fabsf(approximate) > kSmallest && from_middle + kNear > 2 * kNear;
  return safe ? from_float<T>(approximate) : exact_silu<T>(x);
}

template <>
__device__ float silu<float>(float x) {
  return exact_silu<float>(x);
}

struct Swiglu {
  template <typename T>
  __device__ static const T *first(const gqa_swiglu_params &p, int64_t row) {
    return row_of<T>(p, p.gate, p.gate_stride, row);
  }

  template <typename T>
  __device__ static const T *second(const gqa_swiglu_params &p, int64_t row) {
    return row_of<T>(p, p.up, p.up_stride, row);
  }

  template <typename T>
  __device__ static T apply(T gate, T up) {
    return from_float<T>(to_float(silu<T>(to_float(gate))) * to_float(up));
  }
};

}  // namespace
}  // namespace gqa::cuda

extern "C" gqa_status gqa_swiglu_cuda(const gqa_swiglu_params *p, CUstream_st *stream) {
  return gqa::cuda::run_pointwise<gqa::cuda::Swiglu>("swiglu", p, stream);
}
