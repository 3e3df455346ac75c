// merge_attention_states: checks, then params for the CPU twin or the CUDA kernel.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/attention_params.h"
#include "ops/run.h"

namespace gqa::ops {
namespace {

constexpr auto kOp = "merge_attention_states";

std::tuple<Tensor, Tensor> merge_attention_states(Tensor outs, Tensor lses) {
  check_device(kOp, "outs", outs);
  check_float_dtype(kOp, "outs", outs);
  const bool ragged = outs.dim() == 4 && lses.dim() == 3;
  if (outs.dim() != 5 && !ragged) {
    fail(kOp,
         "outs must be [parts, batch, seqlen, num_heads, head_dim], or [parts, tokens, num_heads, head_dim] where "
         "lses is [parts, num_heads, tokens], got shape " +
             shape_string(outs));
  }
  check_head_dim(kOp, "outs", outs);
  check_value(kOp, outs.size(0) > 0, "outs", "one part or more", "shape " + shape_string(outs));
  const int64_t parts = outs.size(0), batch = ragged ? 1 : outs.size(1);
  const int64_t tokens = outs.size(outs.dim() - 3), heads = outs.size(outs.dim() - 2);
  if (ragged) {
    check_shape(kOp, "lses", lses, {parts, heads, tokens}, "[parts, num_heads, tokens]");
  } else {
    check_shape(kOp, "lses", lses, {parts, batch, heads, tokens}, "[parts, batch, num_heads, seqlen]");
  }
  check_value(kOp, lses.scalar_type() == ScalarType::Float, "lses", "float32", dtype_string(lses));
  check_same_device(kOp, "lses", lses, "outs", outs);

  const Tensor rows = torch::stable::contiguous(outs), weights = torch::stable::contiguous(lses);
  const auto out_shape = outs.sizes().slice(1), lse_shape = lses.sizes().slice(1);
  Tensor out = new_tensor(outs, out_shape);
  Tensor lse = new_tensor(lses, lse_shape);
  gqa_merge_attention_states_params p{};
  p.struct_size = sizeof(p);
  p.dtype = gqa_dtype_of(outs);
  p.outs = rows.data_ptr();
  p.lses = static_cast<const float *>(weights.data_ptr());
  p.out = out.data_ptr();
  p.lse = static_cast<float *>(lse.data_ptr());
  p.parts = static_cast<int32_t>(parts);
  p.num_q_heads = static_cast<int32_t>(heads);
  p.head_dim = static_cast<int32_t>(outs.size(outs.dim() - 1));
  p.batch = batch;
  p.seqlen_q = tokens;
  if (out.numel() != 0) {
    run(GQA_ENTRY(kOp, merge_attention_states, gqa_merge_attention_states_params), p, outs, parts * p.head_dim);
  }
  return {out, lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CPU, m) { m.impl(kOp, TORCH_BOX(&merge_attention_states)); }

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CUDA, m) { m.impl(kOp, TORCH_BOX(&merge_attention_states)); }

}  // namespace gqa::ops
