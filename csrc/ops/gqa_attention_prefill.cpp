// gqa_attention_prefill: checks, then params for the CPU twin or the CUDA kernels.
#include <torch/csrc/stable/library.h>

#include <tuple>

#include "ops/attention_params.h"
#include "ops/run.h"

namespace gqa::ops {
namespace {

constexpr auto kOp = "gqa_attention_prefill";

// No query, but new keys for the cache.
void append_only(const gqa_attention_params &a, const Tensor &like) {
  gqa_kv_cache_append_params p{};
  p.struct_size = sizeof(p);
  p.dtype = a.dtype;
  p.k = a.k;
  p.v = a.v;
  p.k_cache = a.k_cache;
  p.v_cache = a.v_cache;
  p.cache_seqlens = a.cache_seqlens;
  p.cache_leftpad = a.cache_leftpad;
  p.block_table = a.block_table;
  p.batch = a.batch;
  p.seqlen = a.seqlen_k;
  p.num_kv_heads = a.num_kv_heads;
  p.head_dim = a.head_dim;
  p.cache_capacity = a.cache_capacity;
  p.num_pages = a.num_pages;
  p.page_size = a.page_size;
  std::copy(a.k_stride, a.k_stride + 3, p.k_stride);
  std::copy(a.v_stride, a.v_stride + 3, p.v_stride);
  std::copy(a.k_cache_stride, a.k_cache_stride + 3, p.k_cache_stride);
  std::copy(a.v_cache_stride, a.v_cache_stride + 3, p.v_cache_stride);
  p.rotary = a.rotary;
  p.quantization = a.quantization;
  run(GQA_ENTRY(kOp, kv_cache_append, gqa_kv_cache_append_params), p, like, p.seqlen * p.head_dim);
}

std::tuple<Tensor, Tensor> gqa_attention_prefill(
    Tensor q, OptionalTensor k, OptionalTensor v, OptionalTensor k_cache, OptionalTensor v_cache,
    OptionalTensor cache_seqlens, OptionalTensor cu_seqlens_q, OptionalTensor cu_seqlens_k,
    std::optional<int64_t> max_seqlen_q, std::optional<int64_t> max_seqlen_k, OptionalTensor cache_leftpad,
    OptionalTensor block_table, OptionalTensor rotary_cos, OptionalTensor rotary_sin, OptionalTensor rotary_positions,
    bool rotary_interleaved, std::optional<double> softmax_scale, int64_t window_left, int64_t window_right,
    double softcap, OptionalTensor sinks, OptionalTensor k_scale, OptionalTensor v_scale, int64_t num_splits,
    bool batch_invariant, bool return_lse, OptionalTensor workspace, bool causal, OptionalTensor out) {
  const AttentionArguments args{q,
                                k,
                                v,
                                {k_cache, v_cache, cache_seqlens, cache_leftpad, block_table, k_scale, v_scale},
                                cu_seqlens_q,
                                cu_seqlens_k,
                                max_seqlen_q,
                                max_seqlen_k,
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
                                causal};
  Kept kept;
  gqa_attention_params p{};
  AttentionOutputs outputs = fill_attention(kOp, args, -1, &p, &kept);
  if (q.numel() != 0) {
    prepare_workspace(kOp, args, &gqa_attention_prefill_workspace_size, &p, &kept);
    run(GQA_ENTRY(kOp, attention_prefill, gqa_attention_params), p, q, cpu_row_cost(p));
  } else if (k_cache && k && k->numel() != 0) {
    append_only(p, q);
  }
  return {outputs.out, outputs.lse};
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CPU, m) { m.impl(kOp, TORCH_BOX(&gqa_attention_prefill)); }

STABLE_TORCH_LIBRARY_IMPL(gqa_kernels, CUDA, m) { m.impl(kOp, TORCH_BOX(&gqa_attention_prefill)); }

}  // namespace gqa::ops
