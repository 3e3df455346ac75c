"""The kernels of a Llama-family decoder as torch custom ops, on CPU and CUDA."""

from gqa_kernels.attention import (
    gqa_attention_decode,
    gqa_attention_decode_workspace_size,
    gqa_attention_prefill,
    gqa_attention_prefill_workspace_size,
    kv_cache_append,
    merge_attention_states,
)
from gqa_kernels.explain import Explanation, explain
from gqa_kernels.launch_log import record_launches
from gqa_kernels.residual import residual_add
from gqa_kernels.rmsnorm import add_rmsnorm, rmsnorm
from gqa_kernels.rope import rope, rope_, rope_tables
from gqa_kernels.sampling import sample
from gqa_kernels.swiglu import swiglu, swiglu_ffn
from gqa_kernels.validation import validation

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "add_rmsnorm",
    "explain",
    "gqa_attention_decode",
    "gqa_attention_decode_workspace_size",
    "gqa_attention_prefill",
    "gqa_attention_prefill_workspace_size",
    "kv_cache_append",
    "merge_attention_states",
    "record_launches",
    "residual_add",
    "rmsnorm",
    "rope",
    "rope_",
    "rope_tables",
    "sample",
    "swiglu",
    "swiglu_ffn",
    "validation",
]
