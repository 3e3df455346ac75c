"""swiglu_ffn against float64 and transformers' LlamaMLP: fused kernels, or torch's products around swiglu."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from support.bounds import DTYPES, Exact, assert_within_bound, concatenate, to_float64, to_numpy
from support.c_interface import FfnParams, call_twin
from support.contract import assert_compiles, assert_graph_replays, opcheck
from support.guard import Guard, same_bytes
from torch import Tensor
from torch.nn.functional import linear, silu

from gqa_kernels import explain, record_launches, swiglu_ffn

op = torch.ops.gqa_kernels.swiglu_ffn.default
HALVES = [torch.float16, torch.bfloat16]
FUSED = ["ffn_gate_up", "ffn_down"]


def weights_of(guard: Guard, hidden: int, intermediate: int, out: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    w_gate, w_up = (guard.randn(intermediate, hidden, dtype=dtype, scale=hidden**-0.5) for _ in range(2))
    return w_gate, w_up, guard.randn(out, intermediate, dtype=dtype, scale=intermediate**-0.5)


def scaled_weights_of(
    guard: Guard, hidden: int, intermediate: int, out: int
) -> tuple[tuple[Tensor, Tensor, Tensor], dict[str, Tensor]]:
    """float8_e4m3fn weights over all of their range, and their scales."""

    def make(rows: int, columns: int) -> Tensor:
        return guard.place((torch.randn(rows, columns) * 150).clamp(-448, 448).to(torch.float8_e4m3fn))

    scales = {
        "gate_up_scale": guard.place((0.5 + torch.rand(2 * intermediate)) * hidden**-0.5 / 150),
        "down_scale": guard.place((0.5 + torch.rand(out)) * intermediate**-0.5 / 150),
    }
    return (make(intermediate, hidden), make(intermediate, hidden), make(out, intermediate)), scales


def plain(weights: tuple[Tensor, Tensor, Tensor], scales: dict[str, Tensor]) -> list[Tensor]:
    """What scaled weights stand for, in float32."""
    parts = [*scales["gate_up_scale"].chunk(2), scales["down_scale"]]
    return [weight.float() * scale[:, None] for weight, scale in zip(weights, parts)]


def reference(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Exact:
    x, w_gate, w_up, w_down = (to_float64(part) for part in (x, w_gate, w_up, w_down))
    gate, up = x @ w_gate.T, x @ w_up.T
    return gate / (1 + (torch if isinstance(gate, Tensor) else np).exp(-gate)) * up @ w_down.T


def baseline(x: Tensor, w_gate: Tensor, w_up: Tensor, w_down: Tensor) -> Tensor:
    return linear(silu(linear(x, w_gate)) * linear(x, w_up), w_down)


def kernels(x: Tensor, *weights: Tensor, **options: Any) -> tuple[Tensor, list[str]]:
    with record_launches() as launches:
        out = swiglu_ffn(x, *weights, **options)
    return out, [launch["kernel"] for launch in launches]


def served(device: str, dtype: torch.dtype) -> bool:
    return device == "cuda" and dtype != torch.float32 and torch.cuda.get_device_capability() == (9, 0)


@pytest.mark.abi
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", [(1, 64), (2, 5, 64), (64,), (0, 64), (4, 1, 4, 64), (17, 64)])
def test_p1_accuracy(guard: Guard, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    x, weights = guard.randn(*shape, dtype=dtype), weights_of(guard, 64, 176, 48, dtype)
    both = guard.place(torch.cat(weights[:2]).cpu())
    for given in (weights, (both, weights[2])):
        out, names = kernels(x, *given)
        assert_within_bound(out, reference(x, *weights), baseline(x, *weights))
        tokens = x.numel() // 64
        fused = served(guard.device, dtype) and tokens <= 16
        assert names == (FUSED if fused else ["cpu" if guard.device == "cpu" else "swiglu_rows"]) * (tokens > 0)


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("sizes", [(8, 8, 8), (264, 520, 40), (40, 1000, 3), (1032, 24, 4104), (896, 4864, 896)])
def test_p1_sizes(guard: Guard, dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    """Rows and columns that end inside tiles and chunks; blocks with one output, or none to spare."""
    weights = weights_of(guard, *sizes, dtype)
    for tokens in (1, 2, 7, 8, 9, 16):
        x = guard.randn(tokens, sizes[0], dtype=dtype)
        out, names = kernels(x, *weights)
        assert_within_bound(out, reference(x, *weights), baseline(x, *weights))
        assert names == (FUSED if served(guard.device, dtype) else ["cpu" if guard.device == "cpu" else "swiglu_rows"])


@pytest.mark.abi
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sizes", [(16, 16, 8), (272, 528, 40), (48, 1008, 3), (1040, 32, 4104), (896, 4864, 896)])
def test_p1_scaled_weights(guard: Guard, dtype: torch.dtype, sizes: tuple[int, int, int]) -> None:
    weights, scales = scaled_weights_of(guard, *sizes)
    dense = plain(weights, scales)
    both = guard.place(torch.cat([weight.cpu().view(torch.uint8) for weight in weights[:2]])).view(torch.float8_e4m3fn)
    inputs = [guard.randn(tokens, sizes[0], dtype=dtype) for tokens in (1, 5, 9, 16, 17)]
    exact = concatenate([reference(x, *dense) for x in inputs], 0)
    eager = torch.cat([baseline(x, *(w.to(dtype) for w in dense)) for x in inputs])
    for given in (weights, (both, weights[2])):
        outs = []
        for x in inputs:
            fused = served(guard.device, dtype) and len(x) <= 16
            out, names = kernels(x, *given, **scales)
            assert names == (FUSED if fused else ["cpu" if guard.device == "cpu" else "swiglu_rows"])
            outs.append(out)
        assert_within_bound(torch.cat(outs), exact, eager)  # all at once: some have a few outputs only


@pytest.mark.parametrize("dtype", HALVES)
def test_p1_one_half_scaled(guard: Guard, dtype: torch.dtype) -> None:
    x, (eights, scales) = guard.randn(3, 272, dtype=dtype), scaled_weights_of(guard, 272, 528, 40)
    weights, dense = weights_of(guard, 272, 528, 40, dtype), plain(eights, scales)
    for given, option in (((*eights[:2], weights[2]), "gate_up_scale"), ((*weights[:2], eights[2]), "down_scale")):
        mixed = [dense[i] if given[i] is eights[i] else given[i] for i in range(3)]
        out = swiglu_ffn(x, *given, **{option: scales[option]})
        assert_within_bound(out, reference(x, *mixed), baseline(x, *(w.to(dtype) for w in mixed)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tokens", [1, 9, 17])
def test_p1_residual(guard: Guard, dtype: torch.dtype, tokens: int) -> None:
    """The result is rounded, then the sum."""
    x, weights = guard.randn(tokens, 264, dtype=dtype), weights_of(guard, 264, 520, 40, dtype)
    wide = guard.randn(tokens, 48, dtype=dtype)
    assert same_bytes(swiglu_ffn(x, *weights, residual=wide[:, :40]), wide[:, :40] + swiglu_ffn(x, *weights))


@pytest.mark.parametrize("dtype", HALVES)
def test_p1_a_layer_of_llama(gpu: str, dtype: torch.dtype) -> None:
    guard = Guard(gpu)
    weights = weights_of(guard, 4096, 14336, 4096, dtype)
    eights, scales = scaled_weights_of(guard, 4096, 14336, 4096)
    dense = plain(eights, scales)
    for tokens in (1, 5, 16, 64):
        x = guard.randn(tokens, 4096, dtype=dtype)
        assert_within_bound(swiglu_ffn(x, *weights), reference(x, *weights), baseline(x, *weights))
        out = swiglu_ffn(x, *eights, **scales)
        assert_within_bound(out, reference(x, *dense), baseline(x, *(w.to(dtype) for w in dense)))
    guard.check()


@pytest.mark.parametrize("dtype", HALVES)
def test_p11_layout_does_not_matter(guard: Guard, dtype: torch.dtype) -> None:
    """Rows inside wider ones full of NaN; what the kernels' alignment refuses agrees within the bound."""

    def inside(tensor: Tensor, gap: int) -> Tensor:
        return guard.place(torch.cat([tensor.cpu(), torch.full((len(tensor), gap), float("nan"), dtype=dtype)], 1))

    x, weights = guard.randn(5, 264, dtype=dtype), weights_of(guard, 264, 520, 40, dtype)
    expected, names = kernels(x, *weights)
    views = [inside(tensor, 8)[:, : tensor.shape[1]] for tensor in (x, *weights)]
    out, strided = kernels(*views)
    assert same_bytes(out, expected) and strided == names
    assert same_bytes(swiglu_ffn(x.view(1, 5, 264).expand(1, 5, 264), *weights)[0], expected)
    for i in range(4):
        given = [x, *weights]
        tensor = given[i].cpu()
        for view in (inside(tensor, 3)[:, : tensor.shape[1]], guard.place(tensor, offset=1), guard.place(tensor.T).T):
            given[i] = view
            out, names = kernels(*given)
            assert names == ["cpu" if guard.device == "cpu" else "swiglu_rows"]
            assert_within_bound(out, reference(x, *weights), baseline(x, *weights))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", [3, 12])
def test_p8_a_token_with_nan_or_infinity_keeps_to_itself(guard: Guard, dtype: torch.dtype, tokens: int) -> None:
    x, weights = torch.randn(tokens, 264).to(dtype), weights_of(guard, 264, 520, 40, dtype)
    clean = swiglu_ffn(guard.place(x), *weights)
    x[1, 77], x[2, 200] = float("nan"), float("inf")
    out = swiglu_ffn(guard.place(x), *weights)
    assert bool(out[1].isnan().all()) and not bool(out[2].isfinite().any())
    keep = [i for i in range(tokens) if i not in (1, 2)]
    assert same_bytes(out[keep], clean[keep])


def test_p14_bitwise_repeatable(guard: Guard) -> None:
    x, weights = guard.randn(16, 896, dtype=torch.bfloat16), weights_of(guard, 896, 4864, 896, torch.bfloat16)
    first = swiglu_ffn(x, *weights)
    for i in range(20):
        assert same_bytes(swiglu_ffn(x, *weights, static_weights=i % 2 == 1), first)


@pytest.mark.parametrize("tokens", [1, 9])
def test_weights_written_just_before(gpu: str, tokens: int) -> None:
    """The kernel before may still be writing any of the tensors when the call is made."""
    x = torch.randn(tokens, 2048, device=gpu, dtype=torch.bfloat16)
    shapes = (tokens, 2048), (8192, 2048), (8192, 2048), (2048, 8192)
    new = [torch.randn(shape, device=gpu).mul_(0.02).bfloat16() for shape in shapes]
    expected = swiglu_ffn(*new)
    for i in range(4):
        given = [tensor.clone() for tensor in new]
        for _ in range(50):
            given[i].fill_(float("nan"))
            given[i].copy_(new[i])
            assert same_bytes(swiglu_ffn(*given), expected)
    assert x.shape == expected.shape


@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_p23_graph(gpu: str, tokens: int) -> None:
    guard = Guard(gpu)
    x = guard.randn(tokens, 264, dtype=torch.bfloat16, writable=True)
    weights = weights_of(guard, 264, 520, 40, torch.bfloat16)
    assert_graph_replays(lambda: swiglu_ffn(x, *weights), lambda: x.normal_())


@pytest.mark.parametrize("dtype", DTYPES)
def test_p16_opcheck(guard: Guard, dtype: torch.dtype) -> None:
    x, (w_gate, w_up, w_down) = guard.randn(3, 64, dtype=dtype), weights_of(guard, 64, 88, 32, dtype)
    both = guard.place(torch.cat([w_gate, w_up]).cpu())
    for args in ((x, w_gate, w_up, w_down), (x, both, None, w_down), (x[0], w_gate, w_up, w_down)):
        opcheck(op, args)
    eights, scales = scaled_weights_of(guard, 64, 88, 32)
    opcheck(op, (x, *eights), {**scales, "residual": guard.randn(3, 32, dtype=dtype)}, skip="test_schema")


def test_explain_says_why() -> None:
    def call(tokens: int = 4, dtype: torch.dtype = torch.bfloat16, sizes: tuple[int, int] = (64, 176)) -> Any:
        x, w, w_down = (torch.zeros(shape, dtype=dtype) for shape in ((tokens, sizes[0]), sizes[::-1], (32, sizes[1])))
        return explain("swiglu_ffn", x, w, w, w_down, device="cuda")

    assert call().kernel == "ffn_gate_up + ffn_down" and call().reason == "few tokens: two kernels stream the weights"
    for plan, reason in (
        (call(tokens=17), "more than 16 tokens"),
        (call(dtype=torch.float32), "float32"),
        (call(sizes=(60, 176)), "sizes are no multiples of 8"),
    ):
        assert plan.kernel == "swiglu_rows" and plan.launches[0]["op"] == "swiglu"
        assert plan.reason == f"{reason}: torch's matrix products around swiglu"
    assert explain("swiglu_ffn", *(torch.zeros(8, 8) for _ in range(4))).reason.startswith("on the CPU")


def test_weights_by_name() -> None:
    x, weights = torch.randn(3, 64), (torch.randn(88, 64), torch.randn(88, 64), torch.randn(32, 88))
    expected, both = swiglu_ffn(x, *weights), torch.cat(weights[:2])
    names = ("w_gate", "w_up", "w_down")
    for given in range(4):
        assert same_bytes(swiglu_ffn(x, *weights[:given], **dict(zip(names[given:], weights[given:]))), expected)
    assert same_bytes(swiglu_ffn(x, w_gate_up=both, w_down=weights[2]), expected)
    assert same_bytes(swiglu_ffn(x, both, weights[2]), expected)
    with pytest.raises(TypeError, match="swiglu_ffn: no such argument, or given twice: w_out"):
        swiglu_ffn(x, *weights, w_out=x)  # type: ignore[call-overload]


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cpu_twin(dtype: torch.dtype, scaled: bool) -> None:
    """Of the C interface; the op leaves the CPU's products to torch."""
    guard = Guard("cpu")
    x, weights, scales = guard.randn(5, 40, dtype=dtype), weights_of(guard, 40, 67, 21, dtype), {}
    dense = list(weights)
    if scaled:
        weights, scales = scaled_weights_of(guard, 40, 67, 21)
        dense = plain(weights, scales)
    residual = guard.randn(5, 21, dtype=dtype)
    activation = guard.place(torch.zeros(5, 67, dtype=dtype), writable=True)
    out = guard.place(torch.zeros(5, 21, dtype=dtype), writable=True)
    tensors = dict(zip(("x", "w_gate", "w_up", "w_down"), (x, *weights)))
    pointers = {name: tensor.data_ptr() for name, tensor in {**tensors, "activation": activation, "out": out}.items()}
    strides = {f"{name}_stride": tensor.stride(0) for name, tensor in tensors.items()}
    p = FfnParams(DTYPES.index(dtype), **pointers, **strides)
    p.tokens, p.hidden, p.intermediate, p.out_features = 5, 40, 67, 21
    if scaled:
        p.w_gate_scale, p.w_down_scale = (scale.data_ptr() for scale in scales.values())
        p.w_up_scale = p.w_gate_scale + 4 * 67
    for first, last in ((0, 2), (2, 5)):
        call_twin("gqa_swiglu_ffn_cpu", p, first, last)
    assert_within_bound(out, reference(x, *dense), baseline(x, *(w.to(dtype) for w in dense)))
    before = out.clone()
    p.residual, p.residual_stride = residual.data_ptr(), 21
    call_twin("gqa_swiglu_ffn_cpu", p, 0, 5)
    assert same_bytes(out, residual + before)
    guard.check()


@pytest.mark.parametrize("dtype", DTYPES)
def test_matches_llama_mlp(guard: Guard, dtype: torch.dtype) -> None:
    llama = pytest.importorskip("transformers.models.llama.modeling_llama")
    config = llama.LlamaConfig(hidden_size=64, intermediate_size=176)
    with torch.no_grad():
        mlp = llama.LlamaMLP(config).to(guard.device, dtype)
        x = guard.randn(3, 7, 64, dtype=dtype)
        hidden = mlp.act_fn(mlp.gate_proj(x)) * mlp.up_proj(x)
        exact = to_numpy(hidden) @ to_numpy(mlp.down_proj.weight).T
        out = swiglu_ffn(x, mlp.gate_proj.weight, mlp.up_proj.weight, mlp.down_proj.weight)
        assert_within_bound(out, exact, mlp(x))


def test_p17_compile(guard: Guard) -> None:
    x, w, w_down = guard.randn(3, 64), guard.randn(88, 64), guard.randn(32, 88)
    assert_compiles(swiglu_ffn, x, w, w, w_down)
    both = guard.place(torch.cat([w, w]).cpu())
    assert_compiles(swiglu_ffn, x, both, w_down)


def test_p20_misuse(device: str) -> None:
    x, w, w_down = (torch.randn(*shape, device=device) for shape in ((3, 64), (88, 64), (32, 88)))
    cases: list[tuple[tuple[Any, ...], str]] = [
        ((x, w), "weights must be w_gate, w_up, w_down or w_gate_up, w_down, got 1 tensors"),
        ((x, w, w, w, w_down), "weights must be w_gate, w_up, w_down or w_gate_up, w_down, got 4 tensors"),
        ((x[0, 0], w, w, w_down), "x must be [..., hidden], got shape []"),
        ((x, w[:, :32], w, w_down), "w_gate must have shape [intermediate, 64] to match x, got [88, 32]"),
        ((x, w, w[0], w_down), "w_up must have shape [intermediate, 64] to match x, got [64]"),
        ((x, w, w[:80], w_down), "w_up must have the shape of w_gate [88, 64], got [80, 64]"),
        ((x, w[:87], w_down), "w_gate_up must have an even number of rows, got 87"),
        ((x, w, w_down), "w_down must have shape [any, 44], got [32, 88]"),
        ((x, w, w, w_down.T), "w_down must have shape [any, 88], got [88, 32]"),
        ((x, w.clone().requires_grad_(), w, w_down), "w_gate must not require grad, got requires_grad=True"),
    ]
    for args, message in cases:
        with pytest.raises(RuntimeError) as error:
            swiglu_ffn(*args)
        assert str(error.value).startswith(f"swiglu_ffn: {message}"), error.value
    eight, ones = w.to(torch.float8_e4m3fn), torch.ones(176, device=device)
    scaled: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((x, eight, eight, w_down), {}, "gate_up_scale must come with w_gate of float8_e4m3fn, got none"),
        ((x, eight, w, w_down), {"gate_up_scale": ones}, "w_up must be float8_e4m3fn to go with gate_up_scale"),
        ((x, w, w, w_down), {"down_scale": ones[:32]}, "w_down must be float8_e4m3fn to go with down_scale"),
        (
            (x, eight, eight, w_down),
            {"gate_up_scale": ones[:88]},
            "gate_up_scale must be one value for each output, [176], got [88]",
        ),
        ((x, w, w, w_down), {"residual": x}, "residual must have shape"),
    ]
    for args, options, message in scaled:
        with pytest.raises(RuntimeError) as error:
            swiglu_ffn(*args, **options)
        assert str(error.value).startswith(f"swiglu_ffn: {message}"), error.value
