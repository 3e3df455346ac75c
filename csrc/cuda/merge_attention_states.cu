// merge_attention_states: out = sum_i w_i outs_i with w_i = exp(lse_i - lse), lse = log sum_i exp(lse_i).
// One warp per (sequence, query, head); lanes over the head's elements.
// Memory order: the row's lse of each part twice (cached), then each part's row once, out.
// Limits: any width and number of parts; contiguous tensors.
// Determinism: parts in order, so bitwise repeatable and independent of other rows.
#include <cmath>

#include "cuda/common/launch.cuh"
#include "cuda/common/vec.cuh"

namespace gqa::cuda {
namespace {

template <typename T>
__global__ void __launch_bounds__(128) merge_rows(const __grid_constant__ gqa_merge_attention_states_params p) {
  const int64_t rows = p.batch * p.seqlen_q * p.num_q_heads;
  const int64_t row = static_cast<int64_t>(blockIdx.x) * (blockDim.x / 32) + threadIdx.x / 32;
  if (row >= rows) return;
  const int64_t head = row % p.num_q_heads, token = row / p.num_q_heads;
  const int64_t at = (token / p.seqlen_q * p.num_q_heads + head) * p.seqlen_q + token % p.seqlen_q;
  const float *lses = p.lses + at;

  // fmaxf passes over a NaN, the sum does not: a NaN part makes the row NaN.
  float highest = -INFINITY;
  for (int64_t i = 0; i < p.parts; ++i) highest = fmaxf(highest, lses[i * rows]);
  const float base = highest == -INFINITY ? 0.0f : highest;
  float sum = 0;
  for (int64_t i = 0; i < p.parts; ++i) sum += expf(lses[i * rows] - base);
  const float inverse = sum == 0 ? 0.0f : 1.0f / sum;

  T *out = static_cast<T *>(p.out) + row * p.head_dim;
  for (int64_t d = threadIdx.x % 32; d < p.head_dim; d += 32) {
    const T *part = static_cast<const T *>(p.outs) + row * p.head_dim + d;
    float value = 0;
    for (int64_t i = 0; i < p.parts; ++i, part += rows * p.head_dim) {
      const float lse = lses[i * rows];
      if (lse != -INFINITY) value += expf(lse - base) * to_float(*part);
    }
    out[d] = from_float<T>(value * inverse);
  }
  if (threadIdx.x % 32 == 0) p.lse[at] = sum == 0 ? -INFINITY : base + logf(sum);
}

}  // namespace
}  // namespace gqa::cuda

extern "C" gqa_status gqa_merge_attention_states_cuda(const gqa_merge_attention_states_params *p, CUstream_st *stream) {
  gqa_plan plan;
  GQA_RETURN_IF_ERROR(gqa_merge_attention_states_plan(p, nullptr, &plan));
  if (plan.num_launches == 0) return GQA_STATUS_OK;
  return gqa::cuda::dispatch_float(p->dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    return gqa::cuda::launch(gqa::cuda::merge_rows<T>, plan.launches[0], stream, *p);
  });
}
