// swiglu: out = silu(gate) * up, silu rounded to the dtype before the product.
// Rows without gaps are one long row; a thread owns 16 or 32 bytes of each tensor, in accesses as wide as all rows
// allow. Memory order: gate and up, then out; each byte once. Neighbouring threads' accesses are neighbours in memory.
// Limits: any width, alignment and row strides.
// Determinism: no reductions, bitwise repeatable; the bytes do not depend on the layout.
#include "cuda/common/programmatic_launch.cuh"
#include "cuda/common/silu.cuh"
#include "plan/swiglu.h"

namespace gqa::cuda {
namespace {

// kBytes moved at once, as words.
template <int kBytes>
struct Words {
  using Raw = std::conditional_t<kBytes == 16, uint4, std::conditional_t<kBytes == 8, uint2, uint32_t>>;
  union {
    Raw raw;
    uint32_t word[kBytes / 4];
  };
};

// What a thread takes of a row: kRuns accesses, a warp's width apart.
template <typename T, int kBytes>
struct Run {
  static constexpr int kRuns = swiglu_runs(kBytes), kElements = kBytes / sizeof(T), kStep = 32 * kElements;

  __device__ static void apply(const T *gate, const T *up, T *out, int64_t first, int64_t end) {
    if constexpr (kBytes < 4) {
      T g[kRuns], u[kRuns];
#pragma unroll
      for (int i = 0; i < kRuns; ++i) {
        if (first + i * kStep < end) g[i] = gate[first + i * kStep], u[i] = up[first + i * kStep];
      }
#pragma unroll
      for (int i = 0; i < kRuns; ++i) {
        if (first + i * kStep < end) out[first + i * kStep] = swiglu(g[i], u[i]);
      }
    } else {
      using Raw = typename Words<kBytes>::Raw;
      Words<kBytes> g[kRuns], u[kRuns];
#pragma unroll
      for (int i = 0; i < kRuns; ++i) {
        if (first + i * kStep >= end) continue;
        g[i].raw = *reinterpret_cast<const Raw *>(gate + first + i * kStep);
        u[i].raw = *reinterpret_cast<const Raw *>(up + first + i * kStep);
      }
#pragma unroll
      for (int i = 0; i < kRuns; ++i) {
        if (first + i * kStep >= end) continue;
#pragma unroll
        for (int j = 0; j < kBytes / 4; ++j) g[i].word[j] = swiglu_word<T>(g[i].word[j], u[i].word[j]);
        *reinterpret_cast<Raw *>(out + first + i * kStep) = g[i].raw;
      }
    }
  }
};

// The x of block and thread walk a row, y and z the rows; dense tensors are one row. What is left of a row after its
// whole accesses goes one by one.
template <typename T, int kBytes, bool kDense>
__global__ void __launch_bounds__(256) swiglu_rows(const __grid_constant__ gqa_swiglu_params p) {
  using R = Run<T, kBytes>;
  launch_dependents();
  wait_for_prerequisites();
  const T *gate = static_cast<const T *>(p.gate), *up = static_cast<const T *>(p.up);
  T *out = static_cast<T *>(p.out);
  if constexpr (!kDense) {
    const int64_t row = (static_cast<int64_t>(blockIdx.z) * gridDim.y + blockIdx.y) * blockDim.y + threadIdx.y;
    if (row >= p.rows[0] * p.rows[1]) return;
    const int64_t outer = p.rows[0] == 1 ? 0 : row / p.rows[1], inner = row - outer * p.rows[1];
    gate += outer * p.gate_stride[0] + inner * p.gate_stride[1];
    up += outer * p.up_stride[0] + inner * p.up_stride[1];
    out += outer * p.out_stride[0] + inner * p.out_stride[1];
  }
  const int64_t of_warp = static_cast<int64_t>(blockIdx.x) * blockDim.x + (threadIdx.x & ~31u);
  const int64_t first = (of_warp * R::kRuns + threadIdx.x % 32) * R::kElements;
  const int64_t whole = p.hidden - p.hidden % R::kElements;
  R::apply(gate, up, out, first, whole);
  if constexpr (R::kElements > 1) {
    if (blockIdx.x + 1 != gridDim.x) return;
    for (int64_t at = whole + threadIdx.x; at < p.hidden; at += blockDim.x) out[at] = swiglu(gate[at], up[at]);
  }
}

template <typename T, bool kDense>
auto kernel_of(int32_t access) {
  if constexpr (sizeof(T) == 2) {
    if (access == 2) return swiglu_rows<T, 2, kDense>;
  }
  return access == 4 ? swiglu_rows<T, 4, kDense> : access == 8 ? swiglu_rows<T, 8, kDense> : swiglu_rows<T, 16, kDense>;
}

}  // namespace
}  // namespace gqa::cuda

extern "C" gqa_status gqa_swiglu_cuda(const gqa_swiglu_params *p, CUstream_st *stream) {
  using namespace gqa::cuda;
  gqa_plan plan;
  GQA_RETURN_IF_ERROR(gqa_swiglu_plan(p, nullptr, &plan));
  if (plan.num_launches == 0) return GQA_STATUS_OK;
  const gqa_launch &shape = plan.launches[0];
  return dispatch_float(p->dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const gqa_swiglu_params flat = gqa::flattened(*p);
    auto *kernel = gqa::is_one_row(flat) ? kernel_of<T, true>(shape.variant) : kernel_of<T, false>(shape.variant);
    return launch_programmatic(kernel, shape, stream, flat);
  });
}
