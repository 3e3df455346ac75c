"""linear against float64 and torch's own: the kernel that streams weights, or torch's products."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.bounds import DTYPES, Exact, assert_within_bound, concatenate, to_float64
from support.c_interface import LinearParams, call_twin
from support.contract import assert_compiles, assert_graph_replays, opcheck
from support.guard import Guard, same_bytes
from torch import Tensor
from torch.nn import functional as F

from gqa_kernels import explain, linear, record_launches

op = torch.ops.gqa_kernels.linear.default
HALVES = [torch.float16, torch.bfloat16]


def weights_of(guard: Guard, inside: int, outs: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    return [guard.randn(out, inside, dtype=dtype, scale=inside**-0.5) for out in outs]


def scaled_weights_of(guard: Guard, inside: int, outs: tuple[int, ...]) -> tuple[list[Tensor], Tensor]:
    """float8_e4m3fn weights over all of their range, and scales that make their products about as large as x."""
    weights = [(torch.randn(out, inside) * 150).clamp(-448, 448).to(torch.float8_e4m3fn) for out in outs]
    scale = (0.5 + torch.rand(sum(outs))) * inside**-0.5 / 150
    return [guard.place(weight) for weight in weights], guard.place(scale)


def reference(
    x: Tensor, weights: list[Tensor], bias: Tensor | None = None, weight_scale: Tensor | None = None
) -> Exact:
    exact = to_float64(x)
    result = concatenate([exact @ to_float64(weight).T for weight in weights])
    if weight_scale is not None:
        result = result * to_float64(weight_scale)
    return result if bias is None else result + to_float64(bias)


def baseline(
    x: Tensor, weights: list[Tensor], bias: Tensor | None = None, weight_scale: Tensor | None = None
) -> Tensor:
    if weight_scale is not None:
        both = torch.cat([weight.float() for weight in weights]) * weight_scale[:, None]
        return F.linear(x, both.to(x.dtype), bias)
    return F.linear(x, torch.cat(weights), bias)


def kernels(x: Tensor, weights: list[Tensor], **options: Any) -> tuple[Tensor, list[str]]:
    with record_launches() as launches:
        out = linear(x, *weights, **options)
    return out, [launch["kernel"] for launch in launches]


def kernel_for(device: str, dtype: torch.dtype, tokens: int) -> str:
    if device == "cpu":
        return "cpu"
    served = dtype != torch.float32 and torch.cuda.get_device_capability() == (9, 0) and tokens <= 16
    return "linear_stream" if served else "torch"


@pytest.mark.abi
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("shape", [(1, 64), (2, 5, 64), (64,), (0, 64), (4, 1, 4, 64), (17, 64)])
def test_p1_accuracy(guard: Guard, dtype: torch.dtype, with_bias: bool, shape: tuple[int, ...]) -> None:
    x, weights = guard.randn(*shape, dtype=dtype), weights_of(guard, 64, (96, 24, 20), dtype)
    tokens = x.numel() // 64
    for count in (1, 2, 3):
        given = weights[:count]
        bias = guard.randn(sum(len(weight) for weight in given), dtype=dtype) if with_bias else None
        out, names = kernels(x, given, bias=bias)
        assert_within_bound(out, reference(x, given, bias), baseline(x, given, bias))
        assert (out.is_contiguous() and tokens == 0) or names == [kernel_for(guard.device, dtype, tokens)]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(
    "sizes", [(8, (1,)), (264, (40, 7, 3)), (1000, (3, 0, 130)), (4104, (33,)), (896, (896, 128, 128))]
)
def test_p1_sizes(guard: Guard, dtype: torch.dtype, sizes: tuple[int, tuple[int, ...]]) -> None:
    """Rows and columns that end inside tiles and chunks; matrices that end inside a block's group of rows."""
    weights = weights_of(guard, *sizes, dtype)
    bias = guard.randn(sum(sizes[1]), dtype=dtype)
    for tokens in (1, 2, 4, 5, 8, 9, 16):
        x = guard.randn(tokens, sizes[0], dtype=dtype)
        exact, eager = reference(x, weights, bias), baseline(x, weights, bias)
        for static in (False, True):
            out, names = kernels(x, weights, bias=bias, static_weights=static)
            assert_within_bound(out, exact, eager)
            assert names == [kernel_for(guard.device, dtype, tokens)]


@pytest.mark.abi
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "sizes", [(16, (1,)), (272, (40, 7, 3)), (1008, (3, 0, 130)), (4112, (33,)), (896, (896, 128))]
)
def test_p1_scaled_weights(guard: Guard, dtype: torch.dtype, sizes: tuple[int, tuple[int, ...]]) -> None:
    weights, scale = scaled_weights_of(guard, *sizes)
    bias = guard.randn(sum(sizes[1]), dtype=dtype)
    for tokens in (1, 3, 4, 5, 8, 9, 16, 17):
        x = guard.randn(tokens, sizes[0], dtype=dtype)
        exact, eager = reference(x, weights, bias, scale), baseline(x, weights, bias, scale)
        for static in (False, True):
            out, names = kernels(x, weights, bias=bias, weight_scale=scale, static_weights=static)
            assert_within_bound(out, exact, eager)
            assert names == [kernel_for(guard.device, dtype, tokens)]


@pytest.mark.parametrize("dtype", HALVES)
def test_p8_every_scaled_weight(guard: Guard, dtype: torch.dtype) -> None:
    """Each of the 256 numbers of float8_e4m3fn alone in a row, at every place of a chunk in turn; NaN stays NaN."""
    numbers = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn)
    for place in range(0, 128, 5):
        weights = torch.zeros(256, 128, dtype=torch.float8_e4m3fn)
        weights.view(torch.uint8)[:, place] = numbers.view(torch.uint8)
        x = guard.place(torch.ones(2, 128, dtype=dtype))
        out = linear(x, guard.place(weights), weight_scale=guard.place(torch.full((256,), 0.5)))
        expected = (numbers.to(dtype) / 2).nan_to_num(999.0).expand(2, 256)
        assert torch.equal(out.cpu().nan_to_num(999.0), expected)


@pytest.mark.abi
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("scaled", [False, True])
def test_p1_residual(guard: Guard, dtype: torch.dtype, scaled: bool) -> None:
    """The product is rounded, then the sum."""
    outs = (130, 9)
    weights, scale = scaled_weights_of(guard, 272, outs) if scaled else (weights_of(guard, 272, outs, dtype), None)
    for tokens in (1, 5, 9, 16, 17):
        x, bias = guard.randn(tokens, 272, dtype=dtype), guard.randn(139, dtype=dtype)
        wide = guard.randn(tokens, 150, dtype=dtype)
        out, names = kernels(x, weights, bias=bias, weight_scale=scale, residual=wide[:, :139])
        assert same_bytes(out, wide[:, :139] + linear(x, *weights, bias=bias, weight_scale=scale))
        kernel = kernel_for(guard.device, dtype, tokens)
        assert names[0] == kernel and len(names) == (1 if kernel == "linear_stream" else 2)
        plan = explain("linear", x, *weights, bias=bias, weight_scale=scale, residual=wide[:, :139])
        assert plan.kernel == " + ".join(names)


@pytest.mark.parametrize("dtype", HALVES)
def test_p2_layout_of_scales_and_residual_does_not_matter(guard: Guard, dtype: torch.dtype) -> None:
    weights, scale = scaled_weights_of(guard, 272, (40, 9))
    x, residual = guard.randn(5, 272, dtype=dtype), guard.randn(5, 49, dtype=dtype)
    exact = reference(x, weights, None, scale) + to_float64(residual)
    eager = baseline(x, weights, None, scale) + residual
    expected = linear(x, *weights, weight_scale=scale, residual=residual)
    assert_within_bound(expected, exact, eager)
    # On a GPU torch's product serves the layouts that the kernel refuses.
    apart = guard.place(torch.stack([scale.cpu(), torch.full((49,), float("nan"))], 1))[:, 0]
    assert_within_bound(linear(x, *weights, weight_scale=apart, residual=residual), exact, eager)
    turned = guard.place(residual.T).T
    assert_within_bound(linear(x, *weights, weight_scale=scale, residual=turned), exact, eager)
    given = guard.place(
        torch.cat([weights[0].cpu().view(torch.uint8), torch.full((40, 16), 0x7F, dtype=torch.uint8)], 1)
    )
    views = [given.view(torch.float8_e4m3fn)[:, :272], weights[1]]
    assert same_bytes(linear(x, *views, weight_scale=scale, residual=residual), expected)
    views[0] = guard.place(weights[0], offset=1)
    assert_within_bound(linear(x, *views, weight_scale=scale, residual=residual), exact, eager)


@pytest.mark.parametrize("dtype", HALVES)
def test_p1_a_layer_of_llama(gpu: str, dtype: torch.dtype) -> None:
    guard = Guard(gpu)
    weights = weights_of(guard, 4096, (4096, 1024, 1024), dtype)
    eights, scale = scaled_weights_of(guard, 4096, (4096, 1024, 1024))
    for tokens in (1, 5, 16, 64):
        x = guard.randn(tokens, 4096, dtype=dtype)
        assert_within_bound(linear(x, *weights), reference(x, weights), baseline(x, weights))
        out = linear(x, *eights, weight_scale=scale)
        assert_within_bound(out, reference(x, eights, None, scale), baseline(x, eights, None, scale))
    guard.check()


@pytest.mark.parametrize("dtype", HALVES)
def test_p11_layout_does_not_matter(guard: Guard, dtype: torch.dtype) -> None:
    """Rows inside wider ones full of NaN; what the kernel's alignment refuses agrees within the bound."""

    def inside(tensor: Tensor, gap: int) -> Tensor:
        return guard.place(torch.cat([tensor.cpu(), torch.full((len(tensor), gap), float("nan"), dtype=dtype)], 1))

    x, weights = guard.randn(5, 264, dtype=dtype), weights_of(guard, 264, (40, 9), dtype)
    expected, names = kernels(x, weights)
    views = [inside(tensor, 8)[:, : tensor.shape[1]] for tensor in (x, *weights)]
    out, strided = kernels(views[0], views[1:])
    assert same_bytes(out, expected) and strided == names
    assert same_bytes(linear(x.view(1, 5, 264).expand(1, 5, 264), *weights)[0], expected)
    for i in range(3):
        given = [x, *weights]
        tensor = given[i].cpu()
        for view in (inside(tensor, 3)[:, : tensor.shape[1]], guard.place(tensor, offset=1), guard.place(tensor.T).T):
            given[i] = view
            out, names = kernels(given[0], given[1:])
            assert names == ["cpu" if guard.device == "cpu" else "torch"]
            assert_within_bound(out, reference(x, weights), baseline(x, weights))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("tokens", [3, 12])
def test_p8_a_token_with_nan_or_infinity_keeps_to_itself(guard: Guard, dtype: torch.dtype, tokens: int) -> None:
    x, weights = torch.randn(tokens, 264).to(dtype), weights_of(guard, 264, (520, 40), dtype)
    clean = linear(guard.place(x), *weights)
    x[1, 77], x[2, 200] = float("nan"), float("inf")
    out = linear(guard.place(x), *weights)
    assert bool(out[1].isnan().all()) and not bool(out[2].isfinite().any())
    keep = [i for i in range(tokens) if i not in (1, 2)]
    assert same_bytes(out[keep], clean[keep])


def test_p14_bitwise_repeatable(guard: Guard) -> None:
    x, weights = guard.randn(16, 896, dtype=torch.bfloat16), weights_of(guard, 896, (896, 128, 128), torch.bfloat16)
    first = linear(x, *weights)
    eights, scale = scaled_weights_of(guard, 896, (896, 128, 128))
    scaled = linear(x, *eights, weight_scale=scale)
    for i in range(20):
        assert same_bytes(linear(x, *weights, static_weights=i % 2 == 1), first)
        assert same_bytes(linear(x, *eights, weight_scale=scale, static_weights=i % 2 == 1), scaled)


@pytest.mark.parametrize("tokens", [1, 9])
def test_weights_written_just_before(gpu: str, tokens: int) -> None:
    """Without the promise of static weights, the kernel before may still be writing any of the tensors."""
    new = [
        torch.randn(shape, device=gpu).mul_(0.02).bfloat16() for shape in ((tokens, 2048), (8192, 2048), (2048, 2048))
    ]
    expected = linear(*new)
    for i in range(3):
        given = [tensor.clone() for tensor in new]
        for _ in range(50):
            given[i].fill_(float("nan"))
            given[i].copy_(new[i])
            assert same_bytes(linear(*given), expected)


@pytest.mark.parametrize("tokens", [1, 16])
def test_inputs_written_just_before(gpu: str, tokens: int) -> None:
    """With the promise, x may still be what another kernel is writing: here another linear, started early."""
    first, second = (torch.randn(2048, 2048, device=gpu).mul_(0.02).bfloat16() for _ in range(2))
    x = torch.randn(tokens, 2048, device=gpu, dtype=torch.bfloat16)
    expected = x
    for weight in (first, second) * 3:
        expected = linear(expected, weight)
        torch.cuda.synchronize()
    for _ in range(50):
        out = x
        for weight in (first, second) * 3:
            out = linear(out, weight, static_weights=True)
        assert same_bytes(out, expected)


@pytest.mark.parametrize("tokens", [1, 16, 17])
def test_p23_graph(gpu: str, tokens: int) -> None:
    guard = Guard(gpu)
    x = guard.randn(tokens, 264, dtype=torch.bfloat16, writable=True)
    weights = weights_of(guard, 264, (520, 40), torch.bfloat16)
    assert_graph_replays(lambda: linear(x, *weights, static_weights=True), lambda: x.normal_())


@pytest.mark.parametrize("dtype", DTYPES)
def test_p16_opcheck(guard: Guard, dtype: torch.dtype) -> None:
    x, weights = guard.randn(3, 64, dtype=dtype), weights_of(guard, 64, (88, 32, 16), dtype)
    for count, bias in ((1, None), (2, guard.randn(120, dtype=dtype)), (3, None)):
        opcheck(op, (x, *weights[:count]), {"bias": bias})
    opcheck(op, (x[0], weights[0]), {"static_weights": True})
    eights, scale = scaled_weights_of(guard, 64, (88, 32))
    residual = guard.randn(3, 120, dtype=dtype)
    opcheck(op, (x, *eights), {"weight_scale": scale, "residual": residual}, skip="test_schema")


def test_explain_says_why() -> None:
    def call(tokens: int = 4, dtype: torch.dtype = torch.bfloat16, inside: int = 64) -> Any:
        return explain("linear", *(torch.zeros(n, inside, dtype=dtype) for n in (tokens, 88, 24)), device="cuda")

    assert call().kernel == "linear_stream" and call().reason == "few tokens: one kernel streams the weights"
    for plan, reason in (
        (call(tokens=17), "more than 16 tokens"),
        (call(dtype=torch.float32), "float32"),
        (call(inside=60), "in_features is no multiple of 8"),
    ):
        assert plan.kernel == "torch" and plan.reason == f"{reason}: torch's matrix product"
    assert explain("linear", torch.zeros(8, 8), torch.zeros(8, 8)).reason.startswith("on the CPU")


def test_an_sm_has_room_for_one_block() -> None:
    """Or several blocks of the next kernel would start on the SMs that this one leaves first."""

    def launch(outs: int, inside: int, tokens: int = 1) -> dict[str, Any]:
        x, weight = (torch.zeros(n, inside, dtype=torch.bfloat16) for n in (tokens, outs))
        launches: list[dict[str, Any]] = explain("linear", x, weight, device="cuda").launches
        return launches[0]

    sums, row, half = 4 * 8 * 32 * 9, 128, 232448 // 2
    assert launch(896, 896)["shared_memory"] == launch(1, 64)["shared_memory"] == half
    assert launch(896, 8192)["shared_memory"] == sums + 12 * 8 * (8 + 1) * row  # deep rings where rows are few
    assert launch(4096, 4096)["shared_memory"] == launch(128256, 4096)["shared_memory"] == sums + 6 * 8 * 33 * row


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_cpu_twin(dtype: torch.dtype, scaled: bool) -> None:
    """Of the C interface; the op leaves the CPU's products to torch."""
    guard = Guard("cpu")
    x, residual = guard.randn(5, 40, dtype=dtype), guard.randn(5, 88, dtype=dtype)
    weights, scale = (
        scaled_weights_of(guard, 40, (67, 21)) if scaled else (weights_of(guard, 40, (67, 21), dtype), None)
    )
    bias = guard.randn(88, dtype=dtype)
    out = guard.place(torch.zeros(5, 88, dtype=dtype), writable=True)
    p = LinearParams(DTYPES.index(dtype), x=x.data_ptr(), bias=bias.data_ptr(), out=out.data_ptr())
    p.tokens, p.in_features, p.x_stride, p.out_stride = 5, 40, 40, 88
    if scale is not None:
        p.weight_scale = scale.data_ptr()
    for i, weight in enumerate(weights):
        p.weights[i], p.out_features[i], p.weight_stride[i] = weight.data_ptr(), len(weight), 40
    for first, last in ((0, 2), (2, 5)):
        call_twin("gqa_linear_cpu", p, first, last)
    assert_within_bound(out, reference(x, weights, bias, scale), baseline(x, weights, bias, scale))
    before = out.clone()
    p.residual, p.residual_stride = residual.data_ptr(), 88
    call_twin("gqa_linear_cpu", p, 0, 5)
    assert same_bytes(out, residual + before)
    guard.check()


def test_p17_compile(guard: Guard) -> None:
    x, weights, bias = guard.randn(3, 64), weights_of(guard, 64, (88, 32), torch.float32), guard.randn(120)
    assert_compiles(linear, x, weights[0])
    assert_compiles(lambda *args: linear(*args[:-1], bias=args[-1]), x, *weights, bias)
    assert_compiles(lambda *args: linear(*args[:-1], residual=args[-1]), x, *weights, guard.randn(3, 120))


def test_p20_misuse(device: str) -> None:
    x, w = torch.randn(3, 64, device=device), torch.randn(88, 64, device=device)
    eight, scale = w.to(torch.float8_e4m3fn), torch.ones(88, device=device)
    cases: list[tuple[tuple[Any, ...], dict[str, Any], str]] = [
        ((x, eight), {}, "weight_scale must come with w1 of float8_e4m3fn, got none"),
        ((x, w), {"weight_scale": scale}, "w1 must be float8_e4m3fn to go with weight_scale, got float32"),
        ((x, eight, w), {"weight_scale": scale}, "w2 must be float8_e4m3fn to go with weight_scale, got float32"),
        ((x, eight), {"weight_scale": scale.half()}, "weight_scale must be float32, got float16"),
        ((x, eight), {"weight_scale": scale[1:]}, "weight_scale must be one value for each output, [88], got [87]"),
        ((x, w), {"residual": w[:3]}, "residual must have shape"),
        ((x, w), {"residual": torch.zeros(3, 88, device=device).half()}, "residual must have the dtype of x (float32)"),
        ((x, w, None, w), {}, "w3 must come with a w2, got none"),
        ((x[0, 0], w), {}, "x must be [..., in_features], got shape []"),
        ((x, w[:, :32]), {}, "w1 must have shape [out_features, 64] to match x, got [88, 32]"),
        ((x, w, w[0]), {}, "w2 must have shape [out_features, 64] to match x, got [64]"),
        ((x, w, w, w.half()), {}, "w3 must have the dtype of x (float32), got float16"),
        ((x, w), {"bias": w[:64, 0]}, "bias must have shape [88], one value for each output, got [64]"),
        ((x, w.clone().requires_grad_()), {}, "w1 must not require grad, got requires_grad=True"),
    ]
    for args, options, message in cases:
        with pytest.raises(RuntimeError) as error:
            linear(*args, **options)
        assert str(error.value).startswith(f"linear: {message}"), error.value
