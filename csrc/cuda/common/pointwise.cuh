// One kernel for elementwise ops of two inputs over strided rows; plan/pointwise.h lays it out.
#pragma once

#include "cuda/common/programmatic_launch.cuh"
#include "cuda/common/vec.cuh"
#include "plan/pointwise.h"

namespace gqa::cuda {

template <typename T, typename Params>
__device__ T *row_of(const Params &p, const void *data, const int64_t (&stride)[2], int64_t row) {
  const int64_t outer = p.rows[0] == 1 ? 0 : row / p.rows[1];
  return static_cast<T *>(const_cast<void *>(data)) + outer * stride[0] + (row - outer * p.rows[1]) * stride[1];
}

// A thread takes one run of N elements: blocks that walk memory side by side leave DRAM the longest stretches. What is
// left of a row after its whole runs goes element by element.
template <typename Op, typename T, int N, typename Params>
__global__ void __launch_bounds__(256) pointwise(const __grid_constant__ Params p, uint32_t spans_per_row) {
  launch_dependents();
  const int64_t row = static_cast<int64_t>(blockIdx.x / spans_per_row) * blockDim.y + threadIdx.y;
  const uint32_t span = blockIdx.x % spans_per_row;
  const int64_t at = (static_cast<int64_t>(span) * blockDim.x + threadIdx.x) * N, whole = p.hidden / N * N;
  wait_for_prerequisites();
  if (row >= p.rows[0] * p.rows[1]) return;
  const T *a = Op::template first<T>(p, row), *b = Op::template second<T>(p, row);
  T *out = row_of<T>(p, p.out, p.out_stride, row);
  if (at < whole) {
    Run<T, N> x = load_run<N>(a + at);
    const Run<T, N> y = load_run<N>(b + at);
#pragma unroll
    for (int i = 0; i < N; ++i) x.value[i] = Op::apply(x.value[i], y.value[i]);
    store_run(out + at, x);
  }
  if constexpr (N > 1) {
    if (span + 1 != spans_per_row) return;
#pragma unroll 1
    for (int64_t i = whole + threadIdx.x; i < p.hidden; i += blockDim.x) out[i] = Op::apply(a[i], b[i]);
  }
}

template <typename Op, typename Params>
gqa_status run_pointwise(const char *op, const Params *p, cudaStream_t stream) {
  gqa_plan plan;
  GQA_RETURN_IF_ERROR(check_pointwise(p));
  const Params flat = flattened(*p);
  GQA_RETURN_IF_ERROR(plan_pointwise(op, flat, &plan));
  if (plan.num_launches == 0) return GQA_STATUS_OK;
  const gqa_launch &shape = plan.launches[0];
  const int64_t row_groups = ceil_div<int64_t>(flat.rows[0] * flat.rows[1], shape.block[1]);
  const uint32_t spans_per_row = static_cast<uint32_t>(shape.grid[0] / row_groups);
  return dispatch_float(p->dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    auto *kernel = shape.variant == kScalar ? pointwise<Op, T, 1, Params> : pointwise<Op, T, Vec<T>::kSize, Params>;
    return launch_programmatic(kernel, shape, stream, flat, spans_per_row);
  });
}

}  // namespace gqa::cuda
