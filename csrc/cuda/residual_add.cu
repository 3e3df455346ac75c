// residual_add: out = x + residual, rounded once.
// Rows without gaps are one long row; a thread owns 16 bytes of it, a block 256 threads.
// Memory order: x and residual of the thread's run, then out; each byte once. Starts while the kernel before it ends.
// Limits: any width and row strides; unaligned rows go element by element.
// Determinism: no reductions, bitwise repeatable.
#include "cuda/common/pointwise.cuh"

namespace gqa::cuda {
namespace {

struct Add {
  template <typename T>
  __device__ static const T *first(const gqa_residual_add_params &p, int64_t row) {
    return row_of<T>(p, p.x, p.x_stride, row);
  }

  template <typename T>
  __device__ static const T *second(const gqa_residual_add_params &p, int64_t row) {
    return row_of<T>(p, p.residual, p.residual_stride, row);
  }

  template <typename T>
  __device__ static T apply(T x, T residual) {
    return from_float<T>(to_float(x) + to_float(residual));
  }
};

}  // namespace
}  // namespace gqa::cuda

extern "C" gqa_status gqa_residual_add_cuda(const gqa_residual_add_params *p, CUstream_st *stream) {
  return gqa::cuda::run_pointwise<gqa::cuda::Add>("residual_add", p, stream);
}
