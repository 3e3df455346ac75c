"""Drawing tokens from logits: temperature, top-k, top-p (Holtzman et al. 2020, arXiv:1904.09751) and min-p."""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
from torch import Tensor

from gqa_kernels._library import ops, refuse_grad

_SETTINGS = {"temperature": 1.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 0, "offset": 0}
_LIMITS = {"temperature": math.inf, "top_p": 1.0, "min_p": 1.0}


@overload
def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor = 0,
    offset: int | Tensor = 0,
    logit_bias: Tensor | None = None,
    allowed_bitmask: Tensor | None = None,
    token_counts: Tensor | None = None,
    repetition_penalty: float | Tensor | None = None,
    frequency_penalty: float | Tensor | None = None,
    presence_penalty: float | Tensor | None = None,
    return_valid: Literal[False] = False,
    return_logprob: Literal[False] = False,
) -> Tensor: ...


@overload
def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor = 0,
    offset: int | Tensor = 0,
    logit_bias: Tensor | None = None,
    allowed_bitmask: Tensor | None = None,
    token_counts: Tensor | None = None,
    repetition_penalty: float | Tensor | None = None,
    frequency_penalty: float | Tensor | None = None,
    presence_penalty: float | Tensor | None = None,
    return_valid: bool = False,
    return_logprob: bool = False,
) -> tuple[Tensor, ...]: ...


def sample(
    logits: Tensor,
    *,
    temperature: float | Tensor = 1.0,
    top_k: int | Tensor = 0,
    top_p: float | Tensor = 1.0,
    min_p: float | Tensor = 0.0,
    seed: int | Tensor = 0,
    offset: int | Tensor = 0,
    logit_bias: Tensor | None = None,
    allowed_bitmask: Tensor | None = None,
    token_counts: Tensor | None = None,
    repetition_penalty: float | Tensor | None = None,
    frequency_penalty: float | Tensor | None = None,
    presence_penalty: float | Tensor | None = None,
    return_valid: bool = False,
    return_logprob: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Draws one token per row from ``softmax(logits / temperature)`` after its filters.

    Penalties, bias and bitmask change the logits first, in this order, in float32: of a token whose count is not 0, a
    logit above 0 is divided by ``repetition_penalty``, any other multiplied by it; if the count is above 0,
    ``frequency_penalty * count`` is subtracted, then ``presence_penalty``; ``logit_bias`` is added; a token whose bit
    of the mask is 0 becomes -inf. All that follows, the log-probability too, is of these logits.

    Each setting from temperature to offset is a number, or a tensor on the device of ``logits``: of no dimensions (one
    value for all rows), or with one value per row, in the shape of ``logits`` without its last dimension. Tensors can
    change between the replays of a CUDA graph. ``torch.compile`` takes other values and other numbers without compiling
    again, except where a number becomes its default or ceases to be it. Filters apply in the order of the arguments,
    each to what the one before has kept, and a token that ties with the last one kept is kept too.

    Args:
        logits: ``[..., vocab]`` float32, float16 or bfloat16, any strides, vocab up to 262144.
        temperature: divides the logits; 0 is greedy: the largest logit, the lowest id on ties. float32 as a tensor,
            where a value that is not above 0 is greedy.
        top_k: keeps the k largest logits; 0 or less keeps all. int32 or int64 as a tensor.
        top_p: keeps the most probable tokens, up to and including the one with which their probability reaches
            ``top_p``, relative to what top-k kept; 1 keeps all. float32 as a tensor, where a value that is not
            above 0 keeps the most probable token and its ties.
        min_p: keeps tokens at least ``min_p`` times as probable as the most probable one; 0 keeps all. float32 as a
            tensor, where 1 is the most and less than 0 is 0.
        seed, offset: the random stream and the place in it, 64 bits each; use a new offset for each token of a
            sequence. If neither has one value per row, rows differ by their index in the batch. If one has, only
            these two decide: the row draws the same token alone (as row 0 of a call with numbers) or in any batch.
            int32 or int64 as tensors.
        logit_bias: added to the logits, float32 or in their dtype: ``[vocab]`` for all rows, or in the shape of
            ``logits``.
        allowed_bitmask: int32 ``[ceil(vocab / 32)]`` for all rows, or ``[..., ceil(vocab / 32)]``; bit ``i % 32`` of
            word ``i // 32`` is 0 where token ``i`` is forbidden, the layout of xgrammar and llguidance.
        token_counts: int32 ``[vocab]`` or in the shape of ``logits``: how often each token has been generated; what the
            penalties, and nothing else, look at. A count below 0 marks a token that the prompt holds and that has not
            been generated: the repetition penalty sees it, the other two do not, as in vLLM. So of a prompt
            ``counts.scatter_(-1, prompt, -1)``, and after each step
            ``counts.scatter_(-1, ids, counts.gather(-1, ids).clamp(min=0) + 1)`` with ``ids[..., None]``.
        repetition_penalty, frequency_penalty, presence_penalty: need ``token_counts``; 1, 0 and 0 change nothing.
            float32 tensors of one value or one per row. A number is put on the device by a small launch of its own.
        return_valid: also return whether the row had something to draw from.
        return_logprob: also return the log-probability of the token.

    Returns:
        ``ids``, int64 ``[...]``, always in ``[0, vocab)``; or a tuple ``(ids, valid, logprob)`` of what was asked for.
        ``valid`` is bool: False for a row that holds a NaN or has no logit above -inf, as when every token is
        forbidden; its id is that of its largest logit (0 if all are NaN, or all -inf) and its logprob is NaN.
        ``logprob`` is float32, the natural logarithm of the token's probability after the filters: 0 for a greedy row.
        Tokens at -inf, or less probable than 2^-43 times the most probable one, are never drawn; tokens at +inf are
        drawn alone, equally often.

    Raises:
        RuntimeError: a wrong shape, dtype, device or number, or an input that requires grad.

    The same logits, settings, seed and offset give the same token on CPU and CUDA: probabilities are summed as
    integers. They are within 1e-6 (total variation) of the exact softmax.

    PyTorch equivalent: ``torch.multinomial(torch.softmax(logits / temperature, -1), 1)[..., 0]``.
    """
    given = {
        "temperature": temperature,
        "top_k": top_k,
        "top_p": top_p,
        "min_p": min_p,
        "seed": seed,
        "offset": offset,
    }
    options: dict[str, Any] = {}
    for name, value in given.items():
        if isinstance(value, Tensor):
            options[name + "s"] = value
        elif value != _SETTINGS[name]:
            if isinstance(value, float) and torch.compiler.is_compiling() and 0.0 < value < _LIMITS[name]:
                # An op's float argument is a constant of the compiled graph; a tensor's value is not.
                options[name + "s"] = logits.new_zeros((), dtype=torch.float32) + value
            else:
                options[name] = value
    tensors = {
        "logit_bias": logit_bias,
        "allowed_bitmask": allowed_bitmask,
        "token_counts": token_counts,
        "repetition_penalty": _on_device(repetition_penalty, logits),
        "frequency_penalty": _on_device(frequency_penalty, logits),
        "presence_penalty": _on_device(presence_penalty, logits),
    }
    refuse_grad("sample", logits=logits, **tensors)
    options.update({name: value for name, value in tensors.items() if value is not None})
    if return_logprob:
        options["return_logprob"] = True
    result: tuple[Tensor, Tensor, Tensor] = ops.sample(logits, **options)
    ids, valid, logprob = result
    if not return_valid and not return_logprob:
        return ids
    return (ids, *([valid] if return_valid else []), *([logprob] if return_logprob else []))


def _on_device(value: float | Tensor | None, logits: Tensor) -> Tensor | None:
    if value is None or isinstance(value, Tensor):
        return value
    return torch.full((), value, dtype=torch.float32, device=logits.device)


@torch.library.register_fake("gqa_kernels::sample")
def _sample_fake(
    logits: Tensor,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    seed: int = 0,
    offset: int = 0,
    temperatures: Tensor | None = None,
    top_ks: Tensor | None = None,
    top_ps: Tensor | None = None,
    min_ps: Tensor | None = None,
    seeds: Tensor | None = None,
    offsets: Tensor | None = None,
    logit_bias: Tensor | None = None,
    allowed_bitmask: Tensor | None = None,
    token_counts: Tensor | None = None,
    repetition_penalty: Tensor | None = None,
    frequency_penalty: Tensor | None = None,
    presence_penalty: Tensor | None = None,
    return_logprob: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    shape = logits.shape[:-1]
    return (
        logits.new_empty(shape, dtype=torch.int64),
        logits.new_empty(shape, dtype=torch.bool),
        logits.new_empty(shape if return_logprob else (0,), dtype=torch.float32),
    )
