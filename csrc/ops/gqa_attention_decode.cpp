// gqa_attention_decode: checks, then params for the CPU twin or the CUDA kernels.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/attention_params.h"
#include "ops/run.h"

namespace gqa::ops {
namespace {

constexpr auto kOp = "gqa_attention_decode";
constexpr int64_t kMaxQueries = 16;

std::tuple<Tensor, Tensor> gqa_attention_decode(Tensor q, Tensor k_cache, Tensor v_cache, OptionalTensor k,
                                                OptionalTensor v, Tensor cache_seqlens, OptionalTensor cache_leftpad,
                                                OptionalTensor block_table, OptionalTensor rotary_cos,
                                                OptionalTensor rotary_sin, OptionalTensor rotary_positions,
                                                bool rotary_interleaved, std::optional<double> softmax_scale,
                                                int64_t window_left, int64_t window_right, double softcap,
                                                OptionalTensor sinks, OptionalTensor k_scale, OptionalTensor v_scale,
                                                int64_t num_splits, bool batch_invariant, bool return_lse,
                                                OptionalTensor workspace, OptionalTensor out, bool static_prefix) {
  const AttentionArguments args{q,
                                k,
                                v,
                                {k_cache, v_cache, cache_seqlens, cache_leftpad, block_table, k_scale, v_scale},
                                {},
                                {},
                                {},
                                {},
                                {rotary_cos, rotary_sin, rotary_positions, rotary_interleaved},
                                softmax_scale,
                                window_left,
                                window_right,
                                softcap,
                                sinks,
                                num_splits,
                                batch_invariant,
                                return_lse,
                                workspace,
                                out,
                                true,
                                true};
  check_rank(kOp, "q", q, {4}, "[batch, seqlen, num_q_heads, head_dim]");
  if (q.size(1) < 1 || q.size(1) > kMaxQueries) {
    fail(kOp, "q must have 1 to 16 query tokens (longer: gqa_attention_prefill), got " + std::to_string(q.size(1)));
  }
  Kept kept;
  gqa_attention_params p{};
  AttentionOutputs outputs = fill_attention(kOp, args, q.size(1), &p, &kept);
  p.static_prefix = static_prefix;
  if (q.numel() != 0) {
    prepare_workspace(kOp, args, &gqa_attention_decode_workspace_size, &p, &kept);
    run(GQA_ENTRY(kOp, attention_decode, gqa_attention_params), p, q, cpu_row_cost(p));
  }
  return {outputs.out, outputs.lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CPU, m) { m.impl(kOp, TORCH_BOX(&gqa_attention_decode)); }

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CUDA, m) { m.impl(kOp, TORCH_BOX(&gqa_attention_decode)); }

}  // namespace gqa::ops
