// Every op schema, on one screen. (a!) marks what an op writes in place.
#include <torch/csrc/stable/library.h>

#define GQA_ATTENTION_COMMON                                                                                 \
  "Tensor? cache_leftpad=None, Tensor? block_table=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None, " \
  "Tensor? rotary_positions=None, bool rotary_interleaved=False, float? softmax_scale=None, "                \
  "SymInt window_left=-1, SymInt window_right=-1, float softcap=0.0, Tensor? sinks=None, "                   \
  "Tensor? k_scale=None, Tensor? v_scale=None, SymInt num_splits=0, bool batch_invariant=False, "            \
  "bool return_lse=False, Tensor(c!)? workspace=None"

STABLE_TORCH_LIBRARY(gqa_kernels, m) {
  m.def(
      "gqa_attention_prefill(Tensor q, Tensor? k=None, Tensor? v=None, Tensor(a!)? k_cache=None, "
      "Tensor(b!)? v_cache=None, *, Tensor? cache_seqlens=None, Tensor? cu_seqlens_q=None, "
      "Tensor? cu_seqlens_k=None, SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, " GQA_ATTENTION_COMMON
      ", bool causal=True, Tensor(d!)? out=None) -> (Tensor, Tensor)");
  m.def(
      "gqa_attention_decode(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k=None, Tensor? v=None, *, "
      "Tensor cache_seqlens, " GQA_ATTENTION_COMMON
      ", Tensor(d!)? out=None, bool static_prefix=False) -> (Tensor, Tensor)");
  m.def(
      "kv_cache_append(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, *, Tensor cache_seqlens, "
      "Tensor? cache_leftpad=None, Tensor? block_table=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None, "
      "Tensor? rotary_positions=None, bool rotary_interleaved=False, Tensor? k_scale=None, Tensor? v_scale=None) "
      "-> ()");
  m.def("merge_attention_states(Tensor outs, Tensor lses) -> (Tensor, Tensor)");
  m.def(
      "rope(Tensor q, Tensor? k, Tensor cos, Tensor sin, *, Tensor? position_ids=None, bool interleaved=False) "
      "-> (Tensor, Tensor)");
  m.def(
      "rope.out(Tensor q, Tensor? k, Tensor cos, Tensor sin, *, Tensor? position_ids=None, bool interleaved=False, "
      "Tensor(a!) q_out, Tensor(b!)? k_out=None) -> ()");
  m.def(
      "rope_(Tensor(a!) q, Tensor(b!)? k, Tensor cos, Tensor sin, *, Tensor? position_ids=None, "
      "bool interleaved=False) -> ()");
  m.def(
      "qk_rmsnorm_rope(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, *, "
      "float eps=1e-06, Tensor? position_ids=None, bool interleaved=False, float weight_offset=0.0, "
      "bool cast_before_weight=True) -> (Tensor, Tensor)");
  m.def(
      "rmsnorm(Tensor x, Tensor weight, float eps, *, float weight_offset=0.0, bool cast_before_weight=True) "
      "-> Tensor");
  m.def(
      "rmsnorm.out(Tensor x, Tensor weight, float eps, *, float weight_offset=0.0, bool cast_before_weight=True, "
      "Tensor(a!) out) -> ()");
  m.def(
      "add_rmsnorm(Tensor x, Tensor residual, Tensor weight, float eps, *, float weight_offset=0.0, "
      "bool cast_before_weight=True) -> (Tensor, Tensor)");
  m.def(
      "add_rmsnorm.out(Tensor x, Tensor residual, Tensor weight, float eps, *, float weight_offset=0.0, "
      "bool cast_before_weight=True, Tensor(a!) out, Tensor(b!) residual_out) -> ()");
  m.def("residual_add(Tensor x, Tensor residual) -> Tensor");
  m.def("swiglu(Tensor gate, Tensor? up=None) -> Tensor");
  m.def("swiglu.out(Tensor gate, Tensor? up=None, *, Tensor(a!) out) -> ()");
  m.def(
      "swiglu_ffn(Tensor x, Tensor w_gate, Tensor? w_up, Tensor w_down, *, Tensor? gate_up_scale=None, "
      "Tensor? down_scale=None, Tensor? residual=None, bool static_weights=False) -> Tensor");
  m.def(
      "linear(Tensor x, Tensor w1, Tensor? w2=None, Tensor? w3=None, *, Tensor? bias=None, "
      "Tensor? weight_scale=None, Tensor? residual=None, bool static_weights=False) -> Tensor");
  m.def(
      "sample(Tensor logits, *, float temperature=1.0, SymInt top_k=0, float top_p=1.0, float min_p=0.0, "
      "SymInt seed=0, SymInt offset=0, Tensor? temperatures=None, Tensor? top_ks=None, Tensor? top_ps=None, "
      "Tensor? min_ps=None, Tensor? seeds=None, Tensor? offsets=None, Tensor? logit_bias=None, "
      "Tensor? allowed_bitmask=None, Tensor? token_counts=None, Tensor? repetition_penalty=None, "
      "Tensor? frequency_penalty=None, Tensor? presence_penalty=None, bool return_logprob=False) "
      "-> (Tensor, Tensor, Tensor)");
  m.def(
      "decoder_step(Tensor hidden, Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, Tensor[] q_proj, Tensor[] k_proj, "
      "Tensor[] v_proj, Tensor[] o_proj, Tensor[] gate_proj, Tensor[] up_proj, Tensor[] down_proj, "
      "Tensor[] input_norm, Tensor[] mlp_norm, Tensor norm, Tensor head, *, Tensor cache_seqlens, float eps, "
      "Tensor? cache_leftpad=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor[]? q_bias=None, "
      "Tensor[]? k_bias=None, Tensor[]? v_bias=None, Tensor[]? q_norm=None, Tensor[]? k_norm=None, "
      "float? softmax_scale=None, SymInt[]? window_left=None) -> Tensor");
}
