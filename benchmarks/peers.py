"""The others: PyTorch's own kernels, torch.compile, and FlashAttention-3 and FlashInfer where they are installed."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.case import Contestant, Inputs
from benchmarks.shapes import Attention

PAGE = 64  # of FlashInfer's cache


def find(module: str) -> Any | None:
    try:
        return importlib.import_module(module)
    except ImportError:
        return None


def available() -> dict[str, bool]:
    return {name: find(name) is not None for name in ("flash_attn_interface", "flashinfer", "triton")}


def _sdpa(causal: bool) -> Callable[[Inputs], Tensor]:
    def call(x: Inputs) -> Tensor:
        q, k, v = (x[name].transpose(1, 2) for name in ("q", "k", "v"))
        out = functional.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=True)
        return out.transpose(1, 2)

    return call


def _only(backend: SDPBackend) -> Callable[[], AbstractContextManager[Any]]:
    return lambda: sdpa_kernel(backend)


def sdpa(device: str, causal: bool) -> list[Contestant]:
    """q ``[B, Sq, Hq, D]``, k and v ``[B, Sk, Hkv, D]``."""
    if device == "cpu":
        return [Contestant("SDPA", _sdpa(causal))]
    return [
        Contestant("SDPA flash", _sdpa(causal), _only(SDPBackend.FLASH_ATTENTION)),
        Contestant("SDPA cuDNN", _sdpa(causal), _only(SDPBackend.CUDNN_ATTENTION)),
    ]


def _first(result: Any) -> Tensor:
    out: Tensor = result[0] if isinstance(result, (tuple, list)) else result
    return out


def fa3(device: str, causal: bool) -> list[Contestant]:
    """The last query sees all keys, as with ours; in SDPA's causal mask the first one sees the first key."""
    found = find("flash_attn_interface")
    if device == "cpu" or found is None:
        return []
    return [Contestant("FA3", lambda x: _first(found.flash_attn_func(x["q"], x["k"], x["v"], causal=causal)))]


def prefill(shape: Attention, device: str) -> list[Contestant]:
    found = [*sdpa(device, shape.causal), *fa3(device, shape.causal)]
    flashinfer = find("flashinfer")
    if device == "cuda" and flashinfer is not None and shape.batch == 1:

        def single(x: Inputs) -> Tensor:
            out = flashinfer.single_prefill_with_kv_cache(x["q"][0], x["k"][0], x["v"][0], causal=shape.causal)
            return _first(out)[None] if isinstance(out, tuple) else out[None]

        found.append(Contestant("FlashInfer", single))
    return found


def decode(shape: Attention, device: str) -> list[Contestant]:
    """One query token; the caches are full but for ``lengths``."""
    found = [] if shape.lengths else sdpa(device, False)
    flash, flashinfer = find("flash_attn_interface"), find("flashinfer")
    if device == "cuda" and flash is not None:
        found.append(
            Contestant(
                "FA3",
                lambda x: _first(
                    flash.flash_attn_with_kvcache(x["q"], x["k"], x["v"], cache_seqlens=x["lengths"], causal=True)
                ),
            )
        )
    if device == "cuda" and flashinfer is not None and shape.seqlen % PAGE == 0 and not shape.lengths:
        found.append(Contestant("FlashInfer", _flashinfer_decode(flashinfer, shape)))
    return found


def _flashinfer_decode(flashinfer: Any, shape: Attention) -> Callable[[Inputs], Tensor]:
    """Planned once, outside the timing, on the contiguous cache seen as pages."""
    planned: list[Any] = []

    def wrapper(q: Tensor) -> Any:
        if not planned:
            workspace = torch.zeros(128 * 2**20, dtype=torch.uint8, device="cuda")
            new = flashinfer.BatchDecodeWithPagedKVCacheWrapper(workspace, "NHD", use_tensor_cores=True)
            pages = shape.seqlen // PAGE
            new.plan(
                torch.arange(shape.batch + 1, dtype=torch.int32, device="cuda") * pages,
                torch.arange(shape.batch * pages, dtype=torch.int32, device="cuda"),
                torch.full((shape.batch,), PAGE, dtype=torch.int32, device="cuda"),
                shape.q_heads,
                shape.kv_heads,
                shape.head_dim,
                PAGE,
                q_data_type=q.dtype,
                kv_data_type=q.dtype,
            )
            planned.append(new)
        return planned[0]

    def call(x: Inputs) -> Tensor:
        caches = tuple(x[name].reshape(-1, PAGE, shape.kv_heads, shape.head_dim) for name in ("k", "v"))
        out: Tensor = wrapper(x["q"]).run(x["q"][:, 0], caches)
        return out[:, None]

    return call


@contextmanager
def _forgetting() -> Iterator[None]:
    """Shapes that were compiled before count towards a limit, past which calls run eagerly."""
    torch._dynamo.reset()
    yield


def compiled(function: Callable[[Inputs], Any], device: str) -> list[Contestant]:
    """torch.compile, on CUDA: on the CPU it would measure the C++ compiler's presence."""
    if device == "cpu":
        return []
    return [Contestant("torch.compile", torch.compile(function, dynamic=False), _forgetting)]


def flashinfer_op(device: str, make: Callable[[Any], Callable[[Inputs], Any]]) -> list[Contestant]:
    flashinfer = find("flashinfer")
    if device == "cpu" or flashinfer is None:
        return []
    return [Contestant("FlashInfer", make(flashinfer))]
