"""P18: the schemas that callers and exported programs rely on, and that their mutation marks are true."""

from __future__ import annotations

import pytest
import torch
from support.calls import random_call
from support.contract import require_sm90
from support.guard import same_bytes
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import gqa_kernels
from gqa_kernels._library import ops
from gqa_kernels.explain import OPS

COMMON = (
    "Tensor? cache_leftpad=None, Tensor? block_table=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None, "
    "Tensor? rotary_positions=None, bool rotary_interleaved=False, float? softmax_scale=None, "
    "SymInt window_left=-1, SymInt window_right=-1, float softcap=0., Tensor? sinks=None, "
    "Tensor? k_scale=None, Tensor? v_scale=None, SymInt num_splits=0, bool batch_invariant=False, "
    "bool return_lse=False, Tensor(c!)? workspace=None"
)
ROTARY = (
    "Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor? rotary_positions=None, bool rotary_interleaved=False"
)
# As of version 0.1. An argument may be added at the end of its kind with a default; nothing else may change.
FROZEN = {
    "add_rmsnorm": "(Tensor x, Tensor residual, Tensor weight, float eps, *, float weight_offset=0., "
    "bool cast_before_weight=True) -> (Tensor, Tensor)",
    "decoder_step": "(Tensor hidden, Tensor(a!)[] k_caches, Tensor(b!)[] v_caches, Tensor[] q_proj, Tensor[] k_proj, "
    "Tensor[] v_proj, Tensor[] o_proj, Tensor[] gate_proj, Tensor[] up_proj, Tensor[] down_proj, "
    "Tensor[] input_norm, Tensor[] mlp_norm, Tensor norm, Tensor head, *, Tensor cache_seqlens, float eps, "
    "Tensor? cache_leftpad=None, Tensor? rotary_cos=None, Tensor? rotary_sin=None, Tensor[]? q_bias=None, "
    "Tensor[]? k_bias=None, Tensor[]? v_bias=None, Tensor[]? q_norm=None, Tensor[]? k_norm=None, "
    "float? softmax_scale=None, SymInt[]? window_left=None) -> Tensor",
    "gqa_attention_decode": "(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k=None, Tensor? v=None, *, "
    f"Tensor cache_seqlens, {COMMON}, Tensor(d!)? out=None, bool static_prefix=False) -> (Tensor, Tensor)",
    "gqa_attention_prefill": "(Tensor q, Tensor? k=None, Tensor? v=None, Tensor(a!)? k_cache=None, "
    "Tensor(b!)? v_cache=None, *, Tensor? cache_seqlens=None, Tensor? cu_seqlens_q=None, Tensor? cu_seqlens_k=None, "
    f"SymInt? max_seqlen_q=None, SymInt? max_seqlen_k=None, {COMMON}, bool causal=True, "
    "Tensor(d!)? out=None) -> (Tensor, Tensor)",
    "kv_cache_append": "(Tensor k, Tensor v, Tensor(a!) k_cache, Tensor(b!) v_cache, *, Tensor cache_seqlens, "
    f"Tensor? cache_leftpad=None, Tensor? block_table=None, {ROTARY}, Tensor? k_scale=None, Tensor? v_scale=None) "
    "-> ()",
    "linear": "(Tensor x, Tensor w1, Tensor? w2=None, Tensor? w3=None, *, Tensor? bias=None, "
    "Tensor? weight_scale=None, Tensor? residual=None, bool static_weights=False) -> Tensor",
    "merge_attention_states": "(Tensor outs, Tensor lses) -> (Tensor, Tensor)",
    "qk_rmsnorm_rope": "(Tensor q, Tensor k, Tensor q_weight, Tensor k_weight, Tensor cos, Tensor sin, *, "
    "float eps=9.9999999999999995e-07, Tensor? position_ids=None, bool interleaved=False, float weight_offset=0., "
    "bool cast_before_weight=True) -> (Tensor, Tensor)",
    "residual_add": "(Tensor x, Tensor residual) -> Tensor",
    "rmsnorm": "(Tensor x, Tensor weight, float eps, *, float weight_offset=0., bool cast_before_weight=True) "
    "-> Tensor",
    "rope": "(Tensor q, Tensor? k, Tensor cos, Tensor sin, *, Tensor? position_ids=None, bool interleaved=False) "
    "-> (Tensor, Tensor)",
    "rope_": "(Tensor(a!) q, Tensor(b!)? k, Tensor cos, Tensor sin, *, Tensor? position_ids=None, "
    "bool interleaved=False) -> ()",
    "sample": "(Tensor logits, *, float temperature=1., SymInt top_k=0, float top_p=1., float min_p=0., "
    "SymInt seed=0, SymInt offset=0, Tensor? temperatures=None, Tensor? top_ks=None, Tensor? top_ps=None, "
    "Tensor? min_ps=None, Tensor? seeds=None, Tensor? offsets=None, Tensor? logit_bias=None, "
    "Tensor? allowed_bitmask=None, Tensor? token_counts=None, Tensor? repetition_penalty=None, "
    "Tensor? frequency_penalty=None, Tensor? presence_penalty=None, bool return_logprob=False) "
    "-> (Tensor, Tensor, Tensor)",
    "swiglu": "(Tensor gate, Tensor? up=None) -> Tensor",
    "swiglu_ffn": "(Tensor x, Tensor w_gate, Tensor? w_up, Tensor w_down, *, Tensor? gate_up_scale=None, "
    "Tensor? down_scale=None, Tensor? residual=None, bool static_weights=False) -> Tensor",
}

# Into memory of the caller's; attention takes it as an argument of the one schema.
FROZEN_OUT = {
    "add_rmsnorm": "(Tensor x, Tensor residual, Tensor weight, float eps, *, float weight_offset=0., "
    "bool cast_before_weight=True, Tensor(a!) out, Tensor(b!) residual_out) -> ()",
    "rmsnorm": "(Tensor x, Tensor weight, float eps, *, float weight_offset=0., bool cast_before_weight=True, "
    "Tensor(a!) out) -> ()",
    "rope": "(Tensor q, Tensor? k, Tensor cos, Tensor sin, *, Tensor? position_ids=None, bool interleaved=False, "
    "Tensor(a!) q_out, Tensor(b!)? k_out=None) -> ()",
    "swiglu": "(Tensor gate, Tensor? up=None, *, Tensor(a!) out) -> ()",
}


def test_p18_every_op_is_frozen() -> None:
    assert set(FROZEN) == set(OPS)
    assert {op for op in OPS if "out" in getattr(ops, op).overloads()} == set(FROZEN_OUT)


SCHEMAS = [(op, "default", schema) for op, schema in FROZEN.items()]
SCHEMAS += [(op, "out", schema) for op, schema in FROZEN_OUT.items()]


@pytest.mark.abi
@pytest.mark.parametrize("op, overload, schema", SCHEMAS, ids=[f"{op}.{overload}" for op, overload, _ in SCHEMAS])
def test_p18_old_calls_still_mean_the_same(op: str, overload: str, schema: str) -> None:
    name = op if overload == "default" else f"{op}.{overload}"
    old = torch._C.parse_schema(f"gqa_kernels::{name}{schema}")
    new = getattr(getattr(ops, op), overload)._schema
    assert new.is_backward_compatible_with(old), f"{new}\nis not compatible with\n{old}"
    marks = {argument.name: str(argument.alias_info and argument.alias_info.is_write) for argument in old.arguments}
    for argument in new.arguments:
        if argument.name in marks:
            assert str(argument.alias_info and argument.alias_info.is_write) == marks[argument.name], argument.name


def test_p18_a_changed_schema_is_seen() -> None:
    old = torch._C.parse_schema(f"gqa_kernels::rmsnorm{FROZEN['rmsnorm']}")
    for change in (("float eps", "float eps, float more"), ("Tensor weight", "Tensor? weight"), ("x,", "y,")):
        new = torch._C.parse_schema(f"gqa_kernels::rmsnorm{FROZEN['rmsnorm'].replace(*change)}")
        assert new.is_backward_compatible_with(old) == (change[1] == "Tensor? weight"), change


@pytest.mark.parametrize("op", OPS)
def test_mutation_marks_are_true(device: str, op: str) -> None:
    """What is marked as written is written by some call; nothing else ever is."""
    if op == "decoder_step" and device == "cuda":
        require_sm90()
    schema = getattr(ops, op).default._schema
    marked = {a.name for a in schema.arguments if a.alias_info is not None and a.alias_info.is_write}
    names = [a.name for a in schema.arguments if not a.kwarg_only]
    changed: set[str] = set()
    for seed in range(12):
        args, kwargs = random_call(op, seed, device)
        given = {**dict(zip(names, args)), **kwargs}
        before = tree_map_only(Tensor, torch.clone, given)
        getattr(gqa_kernels, op)(*args, **kwargs)
        for name, value in given.items():
            pairs = zip(tree_leaves(value), tree_leaves(before[name]))
            if any(isinstance(x, Tensor) and not same_bytes(x, old) for x, old in pairs):
                changed.add(name)
    assert changed == marked - {"workspace", "out"}
