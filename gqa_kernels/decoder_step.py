"""One token of each row through a whole decoder: every layer, the last norm and the head, in one kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gqa_kernels._library import ops, refuse_grad
from gqa_kernels.attention_options import validate
from gqa_kernels.validation import validating


def decoder_step(
    hidden: Tensor,
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    q_proj: Sequence[Tensor],
    k_proj: Sequence[Tensor],
    v_proj: Sequence[Tensor],
    o_proj: Sequence[Tensor],
    gate_proj: Sequence[Tensor],
    up_proj: Sequence[Tensor],
    down_proj: Sequence[Tensor],
    input_norm: Sequence[Tensor],
    mlp_norm: Sequence[Tensor],
    norm: Tensor,
    head: Tensor,
    *,
    cache_seqlens: Tensor,
    eps: float,
    cache_leftpad: Tensor | None = None,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    q_bias: Sequence[Tensor] | None = None,
    k_bias: Sequence[Tensor] | None = None,
    v_bias: Sequence[Tensor] | None = None,
    q_norm: Sequence[Tensor] | None = None,
    k_norm: Sequence[Tensor] | None = None,
    softmax_scale: float | None = None,
    window_left: Sequence[int] | None = None,
) -> Tensor:
    """The logits of each row's next token, of a Llama-family decoder; the token's keys and values go to the caches.

    Each sequence holds a tensor of every layer, contiguous, of the dtype of ``hidden``.

    Args:
        hidden: ``[batch, hidden]`` float32, float16 or bfloat16, the embedding of each row's token.
        k_caches, v_caches: ``[batch, capacity, kv_heads, head_dim]``; the token is written at row ``cache_seqlens[b]``.
        q_proj, k_proj, v_proj: ``[heads * head_dim, hidden]``; parts of a fused matrix are slices of its rows.
        o_proj: ``[hidden, q_heads * head_dim]``.
        gate_proj, up_proj: ``[intermediate, hidden]``.
        down_proj: ``[hidden, intermediate]``.
        input_norm, mlp_norm: ``[hidden]``, of the RMSNorms before attention and before the feed-forward block.
        norm: ``[hidden]``, of the last RMSNorm.
        head: ``[vocabulary, hidden]``.
        cache_seqlens: ``[batch]`` int32 or int64, tokens in each row's cache before this one.
        eps: of every norm.
        cache_leftpad: ``[batch]`` int32 or int64, rows of the cache before it are padding; a token's position is its
            row less this.
        rotary_cos, rotary_sin: ``[positions, R/2]``, float32 or the dtype of ``hidden``; None: no rotation.
        q_bias, k_bias, v_bias: ``[heads * head_dim]``.
        q_norm, k_norm: ``[head_dim]``, of an RMSNorm of each head before the rotation.
        softmax_scale: None for ``1 / sqrt(head_dim)``.
        window_left: of each layer, how many keys before its own a query sees; -1: all.

    Returns:
        Logits ``[batch, vocabulary]``.

    Raises:
        RuntimeError: a wrong shape, dtype or device; an input that requires grad; or, on CUDA, a call that the kernel
            does not serve, with the reason. It takes up to 8 rows of float16 or bfloat16 on sm_90, head_dim 64, 96 or
            128, and up to 8 query heads a KV head. Elsewhere the ops for each part do.

    Everything rounds where the ops for each part round: ``rmsnorm``, ``linear``, ``qk_rmsnorm_rope``,
    ``gqa_attention_decode``, ``residual_add``, ``swiglu_ffn``. A row whose length is negative or leaves no room in the
    cache becomes NaN, and its caches stay as they are.

    PyTorch equivalent: a decoder model's forward for one token of each row.
    """
    if torch.is_grad_enabled():
        lists = {"k_caches": k_caches, "v_caches": v_caches, "q_proj": q_proj, "k_proj": k_proj, "v_proj": v_proj,
                 "o_proj": o_proj, "gate_proj": gate_proj, "up_proj": up_proj, "down_proj": down_proj,
                 "input_norm": input_norm, "mlp_norm": mlp_norm, "q_bias": q_bias, "k_bias": k_bias,
                 "v_bias": v_bias, "q_norm": q_norm, "k_norm": k_norm}  # fmt: skip
        layers = {f"{name}[{i}]": x for name, given in lists.items() for i, x in enumerate(given or ())}
        refuse_grad("decoder_step", hidden=hidden, norm=norm, head=head, **layers)
    if validating():
        token = k_caches[0][:, :1]
        validate(
            "decoder_step", token, token, k_cache=k_caches[0], cache_seqlens=cache_seqlens,
            cache_leftpad=cache_leftpad, rotary_cos=rotary_cos,
        )  # fmt: skip
    result: Tensor = ops.decoder_step(
        hidden,
        k_caches,
        v_caches,
        q_proj,
        k_proj,
        v_proj,
        o_proj,
        gate_proj,
        up_proj,
        down_proj,
        input_norm,
        mlp_norm,
        norm,
        head,
        cache_seqlens=cache_seqlens,
        eps=eps,
        cache_leftpad=cache_leftpad,
        rotary_cos=rotary_cos,
        rotary_sin=rotary_sin,
        q_bias=q_bias,
        k_bias=k_bias,
        v_bias=v_bias,
        q_norm=q_norm,
        k_norm=k_norm,
        softmax_scale=softmax_scale,
        window_left=window_left,
    )
    return result


@torch.library.register_fake("gqa_kernels::decoder_step")
def _decoder_step_fake(
    hidden: Tensor,
    k_caches: Sequence[Tensor],
    v_caches: Sequence[Tensor],
    q_proj: Sequence[Tensor],
    k_proj: Sequence[Tensor],
    v_proj: Sequence[Tensor],
    o_proj: Sequence[Tensor],
    gate_proj: Sequence[Tensor],
    up_proj: Sequence[Tensor],
    down_proj: Sequence[Tensor],
    input_norm: Sequence[Tensor],
    mlp_norm: Sequence[Tensor],
    norm: Tensor,
    head: Tensor,
    **_: object,
) -> Tensor:
    return hidden.new_empty((hidden.shape[0], head.shape[0]))
