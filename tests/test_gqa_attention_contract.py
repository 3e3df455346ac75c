"""What the attention ops promise to torch: opcheck, fakes, compile without recompiling, refusals in one sentence."""

from __future__ import annotations

import random
import re
from typing import Any

import pytest
import torch
from support.attention_calls import DECODE_CALLS, FUNCTIONS, PREFILL_CALLS, Call, every_call, make_call
from support.contract import assert_compiles_once, assert_same, flat, opcheck
from support.guard import Guard
from support.kernels import HOPPER
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

import gqa_kernels
from gqa_kernels import gqa_attention_decode, gqa_attention_prefill
from gqa_kernels._library import C
from gqa_kernels.explain import H200


def registered(op: str) -> Any:
    return getattr(torch.ops.gqa_kernels, op).default


@every_call
def test_p16_opcheck(guard: Guard, op: str, call: dict[str, Any]) -> None:
    keywords = make_call(op, call, guard).raw()
    positional = [keywords.pop(name) for name in ("q", "k_cache", "v_cache") if op.endswith("decode")]
    opcheck(registered(op), tuple(positional) or (keywords.pop("q"),), keywords)


@every_call
def test_p19_fake_equals_real(guard: Guard, op: str, call: dict[str, Any]) -> None:
    """Shape, dtype, strides and device, for seeded random batches and heads too."""
    source = random.Random(str(call))
    for _ in range(3):
        heads = source.choice([1, 2, 3])
        sizes = {"batch": source.randrange(1, 5), "heads": (heads * source.choice([1, 2, 7]), heads)}
        keywords = make_call(op, call, guard, **sizes).raw()
        real = registered(op)(**keywords)
        with FakeTensorMode() as mode:
            fakes = {k: mode.from_tensor(v) if isinstance(v, Tensor) else v for k, v in keywords.items()}
            fake = registered(op)(**fakes)
        for a, b in zip(fake, real):
            assert (a.shape, a.dtype, a.stride(), a.device) == (b.shape, b.dtype, b.stride(), b.device)


@every_call
def test_the_calls_for_hopper_reach_its_kernels(op: str, call: dict[str, Any]) -> None:
    keywords = make_call(op, call, Guard("cpu")).keywords
    C.explain_begin("cuda", *H200.values())
    try:
        FUNCTIONS[op](**keywords)
    finally:
        launches = [launch["kernel"] for plan in C.explain_end() for launch in plan["launches"]]
    assert "head_dim" not in call or HOPPER[op] in launches


@pytest.mark.abi
def test_p17_decode_compiles_once(guard: Guard) -> None:
    """Batch, capacity, lengths, window, splits: none of them recompiles."""

    def function(q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, lengths: Tensor, left: int) -> Any:
        keywords: dict[str, Any] = {"cache_seqlens": lengths, "window_size": (left, -1), "return_lse": True}
        return gqa_attention_decode(q, cache_k, cache_v, k, v, num_splits=left % 5 + 1, **keywords)

    given = []
    for batch, queries, capacity, left in ((2, 2, 40, 7), (3, 4, 50, 9), (7, 3, 33, 20)):
        q, k, v = (guard.randn(batch, queries, heads, 64) for heads in (4, 2, 2))
        caches = [guard.randn(batch, capacity, 2, 64) for _ in range(2)]
        lengths = guard.ints(torch.randint(0, capacity - queries, (batch,)))
        given.append((q, k, v, *caches, lengths, left))
    assert_compiles_once(function, given)


def test_p17_paged_decode_compiles_once(guard: Guard) -> None:
    def function(q: Tensor, cache_k: Tensor, cache_v: Tensor, table: Tensor, lengths: Tensor) -> Any:
        return gqa_attention_decode(q, cache_k, cache_v, cache_seqlens=lengths, block_table=table)

    given = []
    for batch, pages, columns in ((2, 9, 3), (3, 12, 4), (5, 30, 6)):
        caches = [guard.randn(pages, 16, 2, 64) for _ in range(2)]
        table = guard.ints(torch.randint(0, pages, (batch, columns)))
        lengths = guard.ints(torch.randint(0, columns * 16, (batch,)))
        given.append((guard.randn(batch, 1, 4, 64), *caches, table, lengths))
    assert_compiles_once(function, given)


def test_p17_prefill_compiles_once(guard: Guard) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, offsets: Tensor, longest: int, window: int) -> Any:
        limits = {"max_seqlen_q": longest, "max_seqlen_k": longest, "window_size": (window, window)}
        offset = {"cu_seqlens_q": offsets, "cu_seqlens_k": offsets}
        return gqa_attention_prefill(q, k, v, causal=False, return_lse=True, **offset, **limits)

    given = []
    for lengths, window in (([3, 9, 20], 5), ([17, 2], 11), ([30, 4, 4, 4], 2)):
        q, k, v = (guard.randn(sum(lengths), heads, 64) for heads in (4, 2, 2))
        given.append((q, k, v, guard.ints(torch.tensor([0, *lengths]).cumsum(0)), max(lengths), window))
    assert_compiles_once(function, given)


def test_p17_chunked_prefill_compiles_once(guard: Guard) -> None:
    def function(q: Tensor, k: Tensor, v: Tensor, cache_k: Tensor, cache_v: Tensor, lengths: Tensor) -> Any:
        return gqa_attention_prefill(q, k, v, cache_k, cache_v, cache_seqlens=lengths)

    given = []
    for batch, queries, capacity in ((2, 20, 40), (3, 30, 50), (5, 7, 33)):
        q, k, v = (guard.randn(batch, queries, heads, 64) for heads in (4, 2, 2))
        caches = [guard.randn(batch, capacity, 2, 64) for _ in range(2)]
        given.append((q, k, v, *caches, guard.ints(torch.randint(0, capacity - queries, (batch,)))))
    assert_compiles_once(function, given)


def test_p17_inductor(gpu: str) -> None:
    """The default backend and CUDA graphs give the bytes of eager."""
    q = torch.randn(4, 1, 8, 64, device=gpu, dtype=torch.bfloat16)
    caches = [torch.randn(4, 256, 2, 64, device=gpu, dtype=torch.bfloat16) for _ in range(2)]
    lengths = torch.tensor([5, 256, 0, 77], device=gpu, dtype=torch.int32)

    def function(q: Tensor, lengths: Tensor) -> Tensor:
        return gqa_attention_decode(q * 2, *caches, cache_seqlens=lengths) + 1

    for mode in ("default", "reduce-overhead"):
        torch._dynamo.reset()
        compiled = torch.compile(function, fullgraph=True, mode=mode)
        with torch.no_grad():
            for _ in range(3):
                assert_same(compiled(q, lengths).clone(), function(q, lengths))


def test_p20_grad_is_refused(guard: Guard) -> None:
    q, k = guard.randn(1, 2, 2, 64).requires_grad_(), guard.randn(1, 2, 2, 64)
    lengths = guard.ints([2])
    with pytest.raises(RuntimeError, match=r"^gqa_attention_prefill: q .*grad"):
        gqa_attention_prefill(q, k, k)
    with pytest.raises(RuntimeError, match=r"^gqa_attention_decode: q .*grad"):
        gqa_attention_decode(q, k, k, cache_seqlens=lengths)
    torch._dynamo.reset()
    with pytest.raises(Exception, match="must not require grad"):
        torch.compile(lambda q, k: gqa_attention_prefill(q, k, k), backend="aot_eager", fullgraph=True)(q, k)
    with torch.no_grad():
        gqa_attention_prefill(q, k, k)
    q.requires_grad_(False)


# What is wrong, in which call, and a word of the sentence: the argument.
MISUSES: list[tuple[str, str, dict[str, Any], str]] = [
    ("decode", "q of rank 3", {"q": (2, 4, 32)}, "q"),
    ("decode", "q of 17 tokens", {"q": (2, 17, 4, 32)}, "q"),
    ("decode", "heads not divided", {"q": (2, 1, 5, 32)}, "q"),
    ("decode", "head_dim differs", {"q": (2, 1, 4, 40)}, "k_cache"),
    ("decode", "batch differs", {"q": (3, 1, 4, 32)}, "k_cache"),
    ("decode", "q of int32", {"q": torch.int32}, "q"),
    ("decode", "q of float64", {"q": torch.float64}, "q"),
    ("decode", "k_cache of another dtype", {"k_cache": torch.float16}, "k_cache"),
    ("decode", "v_cache of another shape", {"v_cache": (2, 39, 2, 32)}, "v_cache"),
    ("decode", "k without v", {"k": (2, 1, 2, 32)}, "v"),
    ("decode", "v without k", {"v": (2, 1, 2, 32)}, "k"),
    ("decode", "k of other length", {"k": (2, 2, 2, 32), "v": (2, 2, 2, 32)}, "k"),
    ("decode", "k of other heads", {"k": (2, 1, 1, 32), "v": (2, 1, 1, 32)}, "k"),
    ("decode", "cache_seqlens of float32", {"cache_seqlens": torch.float32}, "cache_seqlens"),
    ("decode", "cache_seqlens of another batch", {"cache_seqlens": ((3,), torch.int32)}, "cache_seqlens"),
    ("decode", "cache_leftpad of int16", {"cache_leftpad": ((2,), torch.int16)}, "cache_leftpad"),
    ("decode", "block_table of rank 1", {"block_table": ((2,), torch.int32)}, "block_table"),
    ("decode", "block_table of another batch", {"block_table": ((3, 4), torch.int32)}, "block_table"),
    ("decode", "cos without sin", {"rotary_cos": (64, 16)}, "rotary_sin"),
    ("decode", "cos wider than head_dim", {"rotary_cos": (64, 17), "rotary_sin": (64, 17)}, "rotary_cos"),
    ("decode", "sin of another shape", {"rotary_cos": (64, 16), "rotary_sin": (63, 16)}, "rotary_sin"),
    ("decode", "gathered for other tokens", {"rotary_cos": (2, 3, 16), "rotary_sin": (2, 3, 16)}, "rotary_cos"),
    ("decode", "positions alone", {"rotary_positions": ((2, 1), torch.int32)}, "rotary_positions"),
    ("decode", "sinks of other heads", {"sinks": (3,)}, "sinks"),
    ("decode", "negative softcap", {"softcap": -1.0}, "softcap"),
    ("decode", "infinite scale", {"softmax_scale": float("inf")}, "softmax_scale"),
    ("decode", "window below -1", {"window_size": (-2, -1)}, "window_size"),
    ("decode", "negative splits", {"num_splits": -1}, "num_splits"),
    ("decode", "quantised cache", {"k_scale": (1,)}, "k_scale"),
    ("decode", "workspace of floats", {"workspace": (64,)}, "workspace"),
    ("prefill", "q of rank 2", {"q": (4, 32)}, "q"),
    ("prefill", "no keys at all", {"k": None, "v": None}, "k"),
    ("prefill", "k of another batch", {"k": (3, 6, 2, 32), "v": (3, 6, 2, 32)}, "k"),
    ("prefill", "v of another length", {"v": (2, 5, 2, 32)}, "v"),
    ("prefill", "v of another dtype", {"v": torch.bfloat16}, "v"),
    ("prefill", "ragged q of rank 4", {"cu_seqlens_q": ((3,), torch.int32), "cu_seqlens_k": ((3,), torch.int32)}, "q"),
    ("prefill", "cu_seqlens_k alone", {"cu_seqlens_k": ((3,), torch.int32)}, "cu_seqlens_k"),
    ("prefill", "cu_seqlens_q alone", {"q": (9, 4, 32), "cu_seqlens_q": ((3,), torch.int32)}, "cu_seqlens_k"),
    ("prefill", "k_cache without v_cache", {"k_cache": (2, 40, 2, 32)}, "v_cache"),
    ("prefill", "lengths without a cache", {"cache_seqlens": ((2,), torch.int32)}, "cache_seqlens"),
    ("prefill", "block table without a cache", {"block_table": ((2, 3), torch.int32)}, "block_table"),
    ("prefill", "value scale", {"v_scale": (1,)}, "v_scale"),
]


def misuse(op: str, change: dict[str, Any], device: str) -> str:
    """The sentence that refuses a good call with some arguments changed."""
    shapes: dict[str, Any] = {"q": (2, 6, 4, 32), "k": (2, 6, 2, 32), "v": (2, 6, 2, 32)}
    if op == "decode":
        shapes = {"q": (2, 1, 4, 32), "k_cache": (2, 40, 2, 32), "v_cache": (2, 40, 2, 32)}
        shapes["cache_seqlens"] = ((2,), torch.int32)
    given: dict[str, Any] = {}
    for name, value in {**shapes, **change}.items():
        if isinstance(value, torch.dtype):
            known = shapes[name] if isinstance(shapes[name][0], int) else shapes[name][0]
            given[name] = torch.zeros(known, dtype=value, device=device)
        elif isinstance(value, tuple) and name != "window_size":
            shape, dtype = value if isinstance(value[0], tuple) else (value, torch.float32)
            given[name] = torch.zeros(shape, dtype=dtype, device=device)
        else:
            given[name] = value
    with pytest.raises(RuntimeError) as error:
        FUNCTIONS[f"gqa_attention_{op}"](**given)
    return str(error.value)


@pytest.mark.parametrize("op, what, change, word", MISUSES, ids=[f"{op} {what}" for op, what, _, _ in MISUSES])
def test_p20_one_sentence(device: str, op: str, what: str, change: dict[str, Any], word: str) -> None:
    """op, argument, wanted, got; the same on CPU and CUDA, without paths or C++."""
    sentence = misuse(op, change, device)
    assert re.match(rf"gqa_attention_{op}: {re.escape(word)}\b.* must .*, got ", sentence), sentence
    assert "\n" not in sentence and "::" not in sentence and ".cpp" not in sentence, sentence
    assert sentence.replace("cuda:0", "cpu") == misuse(op, change, "cpu")
    good = torch.ones(1, 1, 1, 8, device=device)
    assert bool((gqa_attention_prefill(good, good, good) == 1).all()), "the device is not healthy after a refusal"


def test_p19_tensors_on_two_devices(gpu: str) -> None:
    q, k = torch.zeros(1, 1, 1, 8, device=gpu), torch.zeros(1, 1, 1, 8)
    with pytest.raises(RuntimeError, match=r"^gqa_attention_prefill: k must be on the device of q \(cuda:0\), got cpu"):
        gqa_attention_prefill(q, k, k)


def test_launches_are_logged(guard: Guard) -> None:
    call = make_call("gqa_attention_decode", DECODE_CALLS[0], guard)
    with gqa_kernels.record_launches() as launches:
        gqa_attention_decode(**call.keywords)
    assert launches and {launch["op"] for launch in launches} == {"gqa_attention_decode"}


def test_outputs_are_a_pair_only_with_lse(guard: Guard) -> None:
    for op, function in FUNCTIONS.items():
        call = make_call(op, (DECODE_CALLS if op.endswith("decode") else PREFILL_CALLS)[0], guard)
        assert len(flat(function(**call.keywords))) == 2
        alone = Call(op, {**call.keywords, "return_lse": False})
        assert isinstance(function(**alone.keywords), Tensor)
        assert [part.numel() for part in registered(op)(**alone.raw())][1] == 0
