// swiglu: out = silu(gate) * up, silu rounded to the dtype before the product.
// Rows without gaps are one long row; a thread owns one or four 16-byte runs of it, a block 256 threads.
// Memory order: gate and up of all the thread's runs, then out; each byte once.
// Limits: any width and row strides; unaligned rows go element by element.
// Determinism: no reductions, bitwise repeatable. The arithmetic is torch's: expf, then an IEEE division.
#include "cuda/common/pointwise.cuh"

namespace gqa::cuda {
namespace {

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
    const float x = to_float(gate);
    const T silu = from_float<T>(x / (1.0f + expf(-x)));
    return from_float<T>(to_float(silu) * to_float(up));
  }
};

}  // namespace
}  // namespace gqa::cuda

extern "C" gqa_status gqa_swiglu_cuda(const gqa_swiglu_params *p, CUstream_st *stream) {
  return gqa::cuda::run_pointwise<gqa::cuda::Swiglu>("swiglu", p, stream);
}
