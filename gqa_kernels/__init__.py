"""The kernels of a Llama-family decoder as torch custom ops, on CPU and CUDA."""

from typing import TYPE_CHECKING, Any

from gqa_kernels.attention import (
    gqa_attention_decode,
    gqa_attention_decode_workspace_size,
    gqa_attention_prefill,
    gqa_attention_prefill_workspace_size,
    kv_cache_append,
    merge_attention_states,
)
from gqa_kernels.decoder_step import decoder_step
from gqa_kernels.explain import Explanation, explain
from gqa_kernels.kv_cache import KVCache, attention_with_kv_cache
from gqa_kernels.launch_log import record_launches
from gqa_kernels.linear import linear
from gqa_kernels.paged_kv_cache import PagedKVCache
from gqa_kernels.qk_rmsnorm_rope import qk_rmsnorm_rope
from gqa_kernels.residual import residual_add
from gqa_kernels.rmsnorm import add_rmsnorm, rmsnorm
from gqa_kernels.rope import rope, rope_, rope_tables
from gqa_kernels.sampling import sample
from gqa_kernels.swiglu import swiglu, swiglu_ffn
from gqa_kernels.validation import validation

if TYPE_CHECKING:
    from gqa_kernels.hf import patch, patched, unpatch

__version__ = "0.1.0"

__all__ = [
    "Explanation",
    "KVCache",
    "PagedKVCache",
    "add_rmsnorm",
    "attention_with_kv_cache",
    "decoder_step",
    "explain",
    "gqa_attention_decode",
    "gqa_attention_decode_workspace_size",
    "gqa_attention_prefill",
    "gqa_attention_prefill_workspace_size",
    "kv_cache_append",
    "linear",
    "merge_attention_states",
    "patch",
    "patched",
    "qk_rmsnorm_rope",
    "record_launches",
    "residual_add",
    "rmsnorm",
    "rope",
    "rope_",
    "rope_tables",
    "sample",
    "swiglu",
    "swiglu_ffn",
    "unpatch",
    "validation",
]


def __getattr__(name: str) -> Any:
    """patch and its kin import transformers, so they are loaded when first asked for."""
    if name in ("patch", "patched", "unpatch"):
        from gqa_kernels import hf

        return getattr(hf, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
