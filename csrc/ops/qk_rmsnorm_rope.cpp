// qk_rmsnorm_rope: checks, then params for the CPU twin or the CUDA kernel.
#include <torch/csrc/stable/library.h>

#include <algorithm>
#include <tuple>

#include "ops/heads.h"
#include "ops/rotary.h"
#include "ops/run.h"

namespace gqa::ops {
namespace {

void check_weight(const char *op, const char *name, const Tensor &weight, const Tensor &q) {
  check_shape(op, name, weight, {q.size(q.dim() - 1)}, "[head_dim]");
  check_weight_dtype(op, name, weight, "q", q);
  check_same_device(op, name, weight, "q", q);
}

std::tuple<Tensor, Tensor> qk_rmsnorm_rope(const Tensor &q, const Tensor &k, const Tensor &q_weight,
                                           const Tensor &k_weight, const Tensor &cos, const Tensor &sin, double eps,
                                           const std::optional<Tensor> &position_ids, bool interleaved,
                                           double weight_offset, bool cast_before_weight) {
  constexpr auto kOp = "qk_rmsnorm_rope";
  check_heads(kOp, q, k);
  check_weight(kOp, "q_weight", q_weight, q);
  check_weight(kOp, "k_weight", k_weight, q);
  check_same_dtype(kOp, "k_weight", k_weight, "q_weight", q_weight);
  check_value(kOp, eps >= 0, "eps", "0 or more", std::to_string(eps));
  const Heads q_in = with_unit_stride(q), k_in = with_unit_stride(k);
  const Rotary rotary = as_rotary(kOp, q, q_in.size[0], q_in.size[1], cos, sin, position_ids, interleaved);
  const Heads q_out = as_heads(new_contiguous(q)), k_out = as_heads(new_contiguous(k));
  const Tensor q_scale = torch::stable::contiguous(q_weight), k_scale = torch::stable::contiguous(k_weight);
  gqa_qk_rmsnorm_rope_params p{};
  p.struct_size = sizeof(p);
  p.dtype = gqa_dtype_of(q);
  p.weight_dtype = gqa_dtype_of(q_weight);
  p.q = q_in.tensor.data_ptr();
  p.k = k_in.tensor.data_ptr();
  p.q_weight = q_scale.data_ptr();
  p.k_weight = k_scale.data_ptr();
  p.q_out = q_out.tensor.data_ptr();
  p.k_out = k_out.tensor.data_ptr();
  p.batch = q_in.size[0];
  p.seqlen = q_in.size[1];
  p.num_q_heads = static_cast<int32_t>(q_in.size[2]);
  p.num_kv_heads = static_cast<int32_t>(k_in.size[2]);
  p.head_dim = static_cast<int32_t>(q_in.size[3]);
  std::copy_n(q_in.stride, 3, p.q_stride);
  std::copy_n(k_in.stride, 3, p.k_stride);
  std::copy_n(q_out.stride, 3, p.q_out_stride);
  std::copy_n(k_out.stride, 3, p.k_out_stride);
  p.rotary = rotary.params;
  p.eps = static_cast<float>(eps);
  p.weight_offset = static_cast<float>(weight_offset);
  p.cast_before_weight = cast_before_weight;
  const int64_t heads = p.num_q_heads + p.num_kv_heads;
  if (p.batch * p.seqlen * heads != 0) {
    run(GQA_ENTRY(kOp, qk_rmsnorm_rope, gqa_qk_rmsnorm_rope_params), p, q, heads * p.head_dim);
  }
  return {q_out.tensor, k_out.tensor};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CPU, m) { m.impl("qk_rmsnorm_rope", TORCH_BOX(&qk_rmsnorm_rope)); }

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CUDA, m) { m.impl("qk_rmsnorm_rope", TORCH_BOX(&qk_rmsnorm_rope)); }

}  // namespace gqa::ops
