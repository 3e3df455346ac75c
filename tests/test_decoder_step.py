"""decoder_step: against float64, HuggingFace's modules, and itself."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from support.bounds import DTYPES, assert_within_bound, to_numpy
from support.contract import assert_compiles, assert_graph_replays, capture, opcheck, require_sm90
from support.decoder import Arguments, eager, make_step, weights_of
from support.families import make_model
from support.guard import Guard, same_bytes
from support.llama import LAYERS, make_prompt, positions_of
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map_only

import gqa_kernels
from gqa_kernels import decoder_step, explain, record_launches

op = torch.ops.gqa_kernels.decoder_step.default
HALVES = [torch.float16, torch.bfloat16]
NAN = float("nan")


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """The one kernel is that of sm_90."""
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no GPU")
        require_sm90()
    return str(request.param)


@pytest.fixture
def gpu() -> str:
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
    require_sm90()
    return "cuda"


def served(device: str, dtype: torch.dtype) -> None:
    if device == "cuda" and dtype == torch.float32:
        pytest.skip("float32 runs on the CPU alone")


def cloned(call: Arguments) -> Arguments:
    copies: Arguments = tree_map_only(Tensor, torch.clone, call)
    return copies


def assert_step(call: Arguments, what: str = "logits") -> Tensor:
    """Logits and appended rows against float64; of the caches nothing else is written."""
    before, dtype = cloned(call), call["hidden"].dtype
    logits = decoder_step(**call)
    exact, base = eager(before, torch.float64), eager(before, dtype)
    scale = len(call["q_proj"]) * float(exact[0].abs().max())
    assert_within_bound(logits, to_numpy(exact[0]), base[0], attention_extra=scale, what=what)
    lengths = call["cache_seqlens"].tolist()
    rows = list(range(len(lengths)))
    for name, reference, baseline in (("k_caches", exact[1], base[1]), ("v_caches", exact[2], base[2])):
        for i, cache in enumerate(call[name]):
            new = cache[rows, lengths]
            extra = (i + 1) * float(reference[i].abs().max())
            assert_within_bound(new, to_numpy(reference[i]), baseline[i], attention_extra=extra, what=f"{name}[{i}]")
            before[name][i][rows, lengths] = new
            assert same_bytes(cache, before[name][i]), f"{what}: {name}[{i}] was written elsewhere"
    return logits


FEATURES: dict[str, dict[str, Any]] = {
    "plain": {},
    "no rotation": {"rotary": 0},
    "partial rotation": {"rotary": 32},
    "biases": {"bias": True},
    "norms of q and k": {"norms": True},
    "window": {"windows": [-1, 40]},
    "left padding": {"leftpad": [0, 7, 64, 0, 1]},
    "all": {"rotary": 48, "bias": True, "norms": True, "windows": [16, 129], "leftpad": [0, 7, 64, 0, 1]},
}


@pytest.mark.abi
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("features", FEATURES)
def test_p1_accuracy(device: str, dtype: torch.dtype, features: str) -> None:
    served(device, dtype)
    call = make_step(device, dtype, [0, 17, 130, 199, 64], **FEATURES[features])
    with record_launches() as launches:
        assert_step(call, features)
    assert [launch["kernel"] for launch in launches] == ["cpu" if device == "cpu" else "decoder_step"]


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("rows", range(1, 9))
def test_p1_rows(device: str, dtype: torch.dtype, rows: int) -> None:
    lengths = [(37 * b + 11) % 199 for b in range(rows)]
    assert_step(make_step(device, dtype, lengths, tables=dtype, index=torch.int64))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("heads", [(1, 1), (7, 1), (8, 1), (14, 2), (16, 2), (6, 3), (32, 8), (8, 8)])
@pytest.mark.parametrize("dim", [64, 96, 128])
def test_p1_heads(device: str, dtype: torch.dtype, heads: tuple[int, int], dim: int) -> None:
    assert_step(make_step(device, dtype, [150, 20], heads=heads, dim=dim, rotary=dim // 2, bias=True))


@pytest.mark.parametrize("sizes", [(16, 16, 1), (32, 48, 7), (176, 1040, 333), (400, 16, 4099), (1040, 272, 32)])
@pytest.mark.parametrize("rows", [1, 3, 8])
def test_p1_sizes(device: str, sizes: tuple[int, int, int], rows: int) -> None:
    """Matrices with fewer rows than there are blocks; columns that end inside chunks; odd vocabularies."""
    hidden, intermediate, vocabulary = sizes
    lengths = [19 * b for b in range(rows)]
    call = make_step(device, torch.bfloat16, lengths, hidden=hidden, intermediate=intermediate, vocabulary=vocabulary)
    if vocabulary > 1:  # one logit a row is too few for a mean
        assert_step(call)
    assert decoder_step(**call).shape == (rows, vocabulary)


@pytest.mark.parametrize("dim", [64, 128])
@pytest.mark.parametrize("first", [0, 8, 16, 24, 32, 40])
def test_p1_edges_of_tiles(device: str, dim: int, first: int) -> None:
    """Lengths about the edges of tiles, and the last row of the cache."""
    edges = [0, 1, 2, 7, 8, 15, 16, 17, 31, 32, 33, 63, 64, 65, 95, 96, 97, 111, 112, 113, 127, 128, 129, 143, 144, 145]
    edges += [191, 192, 193, 239, 240, 255, 256, 257, 271, 272, 383, 384, 385, 400, 447, 448, 449, 498, 499, 0, 300, 3]
    assert_step(make_step(device, torch.bfloat16, edges[first : first + 8], dim=dim, capacity=500, layers=1))


@pytest.mark.parametrize("length", [0, 1, 127, 128, 129, 255, 256, 1023, 1024, 1025, 4095, 4999])
def test_p1_one_long_row(device: str, length: int) -> None:
    """The keys of one row divided among all blocks."""
    assert_step(make_step(device, torch.bfloat16, [length], heads=(8, 2), dim=64, capacity=5000, layers=2))


@pytest.mark.parametrize("window", [0, 1, 15, 16, 127, 128, 300])
def test_p1_windows(device: str, window: int) -> None:
    lengths = [0, 1, 16, 128, 129, 300, 444, 499]
    for leftpad in (None, [0, 1, 10, 128, 0, 290, 1, 499]):
        windows = [window, -1, window]
        assert_step(make_step(device, torch.float16, lengths, capacity=500, layers=3, windows=windows, leftpad=leftpad))


GEOMETRIES: dict[str, dict[str, Any]] = {
    "Llama-3.1-8B": {"heads": (32, 8), "dim": 128, "hidden": 4096, "intermediate": 14336},
    "Qwen2.5-0.5B": {"heads": (14, 2), "dim": 64, "hidden": 896, "intermediate": 4864, "bias": True},
    "Qwen3-0.6B": {"heads": (16, 8), "dim": 128, "hidden": 1024, "intermediate": 3072, "norms": True},
    "Phi-3-mini": {"heads": (32, 32), "dim": 96, "hidden": 3072, "intermediate": 8192},
}


def is_served(call: Arguments) -> bool:
    try:
        explain("decoder_step", call["hidden"], **{name: x for name, x in call.items() if name != "hidden"})
    except RuntimeError:
        return False
    return True


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("model", GEOMETRIES)
def test_p1_real_geometries(gpu: str, model: str, dtype: torch.dtype) -> None:
    """Two layers, of as many rows as the kernel takes, and of one."""
    lengths = [1499, *((411 * b + 700) % 1500 for b in range(7))]
    eight = make_step(gpu, dtype, lengths, **GEOMETRIES[model], capacity=1500, vocabulary=5003, drawn_on=gpu)

    def of_first(rows: int) -> Arguments:
        parts = {name: eight[name][:rows] for name in ("hidden", "cache_seqlens")}
        return eight | parts | {name: [x[:rows] for x in eight[name]] for name in ("k_caches", "v_caches")}

    most = next(rows for rows in range(8, 0, -1) if is_served(of_first(rows)))
    assert_step(of_first(1))
    assert_step(of_first(most))


def test_a_hundred_layers(device: str) -> None:
    """Wide enough, and with residuals that outweigh a layer's own rounding, for the bound to hold of a mean."""
    call = make_step(
        device, torch.bfloat16, [5, 40, 63, 0], hidden=256, intermediate=256, layers=100, capacity=64, vocabulary=997
    )
    for name in ("o_proj", "down_proj"):
        call[name] = [x / 10 for x in call[name]]
    assert_step(call)


FAMILIES = ["llama", "mistral", "qwen2", "qwen2 sliding", "qwen3", "phi3", "phi4"]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("family", FAMILIES)
def test_p1_modules_of_huggingface(device: str, dtype: torch.dtype, family: str) -> None:
    """Three tokens after a left-padded prompt, over the cache that the model itself has filled."""
    served(device, dtype)
    model = make_model(family, device, dtype)
    exact = copy.deepcopy(model).double()
    prompt = make_prompt(device, [30, 11, 1, 24])
    mask, length, capacity = prompt["attention_mask"], prompt["input_ids"].shape[1], 40
    leftpad = length - mask.sum(1)
    with torch.no_grad():
        call = weights_of(model, capacity)
        states = [m(**prompt, position_ids=positions_of(mask), use_cache=True).past_key_values for m in (model, exact)]
        call |= {"k_caches": [], "v_caches": [], "cache_leftpad": leftpad}
        for layer in states[0].layers:
            for name, kept in (("k_caches", layer.keys), ("v_caches", layer.values)):
                rows = kept.transpose(1, 2)  # of a window, the last ones
                cache = torch.full((len(rows), capacity, *rows.shape[2:]), NAN, dtype=dtype, device=device)
                cache[:, length - rows.shape[1] : length] = rows
                for b, pad in enumerate(leftpad.tolist()):
                    cache[b, :pad] = NAN
                call[name].append(cache)
        for step in range(3):
            ids = torch.randint(2, 97, (len(leftpad), 1)).to(device)
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
            given = {"input_ids": ids, "attention_mask": mask, "position_ids": positions_of(mask)[:, -1:]}
            baseline, reference = (
                m(**given, past_key_values=state).logits[:, -1] for m, state in zip((model, exact), states)
            )
            call["cache_seqlens"] = torch.full((len(ids),), length + step, device=device)
            logits = decoder_step(model.get_input_embeddings()(ids[:, 0]), **call)
            extra = LAYERS * float(reference.abs().max())
            assert_within_bound(logits, to_numpy(reference), baseline, attention_extra=extra, what=f"token {step}")


def test_p2_p3_guarded(device: str) -> None:
    """Canaries around every tensor, and what is read stays as it was; strides between the rows of ``hidden``."""
    guard = Guard(device)
    plain = make_step("cpu", torch.bfloat16, [0, 17, 130], bias=True, norms=True, leftpad=[0, 3, 60])
    expected = decoder_step(**tree_map_only(Tensor, lambda x: x.clone().to(device), plain))
    caches = {id(x) for name in ("k_caches", "v_caches") for x in plain[name]}
    call = tree_map_only(Tensor, lambda x: guard.place(x, writable=id(x) in caches), plain)
    wide = torch.full((3, 2 * 128), NAN, dtype=torch.bfloat16)
    wide[:, :128] = plain["hidden"]
    call["hidden"] = guard.place(wide)[:, :128]
    assert same_bytes(decoder_step(**call), expected)
    guard.check()


@pytest.mark.parametrize("poison", [NAN, float("inf"), 3e4])
def test_p10_what_is_masked_never_matters(device: str, poison: float) -> None:
    """Rows at and beyond the length, before the padding's end and outside of the window."""
    options: dict[str, Any] = {"capacity": 500, "leftpad": [0, 3, 64, 200], "windows": [-1, 30]}
    call = make_step(device, torch.float16, [0, 17, 130, 499], **options)
    other = cloned(call)
    for name in ("k_caches", "v_caches"):
        for i in range(2):
            hidden = call[name][i].isnan()
            call[name][i][hidden], other[name][i][hidden] = 0.0, poison
        for b, length in enumerate((0, 17, 130, 499)):
            other[name][1][b, : max(length - 30, 0)] = poison
    assert same_bytes(decoder_step(**other), decoder_step(**call))


def test_p8_a_nan_reaches_its_row_alone(device: str) -> None:
    call = make_step(device, torch.bfloat16, [30, 60, 150, 40], bias=True)
    clean = decoder_step(**cloned(call))
    call["k_caches"][1][2, 149, 1, 5] = NAN
    call["v_caches"][0][0, 3, 0, 7] = NAN
    logits = decoder_step(**call)
    assert bool(logits[[0, 2]].isnan().all()) and same_bytes(logits[[1, 3]], clean[[1, 3]])


BAD = [-1, 200, 201, 2**31 - 1, -(2**31)]


@pytest.mark.parametrize("index", [torch.int32, torch.int64])
def test_p6_bad_lengths(device: str, index: torch.dtype) -> None:
    """The row becomes NaN, its caches stay as they are, its neighbours keep their bytes."""
    bad = [*BAD, *([2**31 + 5, 2**40] if index == torch.int64 else [])]
    for options in ({}, {"norms": True, "windows": [16, -1], "leftpad": [1, 2, 3, 4]}):
        call = make_step(device, torch.bfloat16, [30, 60, 150, 40], index=index, **options)
        good = cloned(call)
        clean = decoder_step(**good)
        for value in bad:
            given = cloned(call)
            given["cache_seqlens"][2] = value
            logits = decoder_step(**given)
            assert bool(logits[2].isnan().all()), value
            assert same_bytes(logits[[0, 1, 3]], clean[[0, 1, 3]]), value
            for name in ("k_caches", "v_caches"):
                for cache, before, after in zip(given[name], call[name], good[name]):
                    assert same_bytes(cache[2], before[2]) and same_bytes(cache[[0, 1, 3]], after[[0, 1, 3]])


@pytest.mark.parametrize("rows", [1, 3])
def test_p6_no_row_is_good(device: str, rows: int) -> None:
    """Narrow layers, so that most blocks have outputs of some phases only."""
    sizes: dict[str, Any] = {"hidden": 32, "intermediate": 48, "layers": 12}
    call = make_step(device, torch.bfloat16, [200, -1, 300][:rows], **sizes)
    before = cloned(call)
    for _ in range(20):
        assert bool(decoder_step(**call).isnan().all())
    assert all(map(same_bytes, call["k_caches"] + call["v_caches"], before["k_caches"] + before["v_caches"]))


def test_p6_bad_padding_and_positions(device: str) -> None:
    """Negative padding is a bad row; a position outside the tables gives NaN; padding up to the token leaves no key."""
    call = make_step(device, torch.bfloat16, [30, 60, 150, 40], leftpad=[0, 0, 0, 0])
    clean = decoder_step(**cloned(call))
    given = cloned(call)
    given["cache_leftpad"][1] = -1
    logits = decoder_step(**given)
    assert bool(logits[1].isnan().all()) and same_bytes(logits[[0, 2, 3]], clean[[0, 2, 3]])
    assert all(same_bytes(x[1], y[1]) for x, y in zip(given["k_caches"], call["k_caches"]))
    given = cloned(call) | {name: call[name][:100].clone() for name in ("rotary_cos", "rotary_sin")}
    logits = decoder_step(**given)
    assert bool(logits[2].isnan().all()) and same_bytes(logits[[0, 1, 3]], clean[[0, 1, 3]])
    assert_step(make_step(device, torch.bfloat16, [30, 60, 150, 40], leftpad=[31, 200, 150, 0]))


def test_rows_do_not_see_each_other(device: str) -> None:
    """With everything of the other rows replaced, a row keeps its bytes."""
    call, other = (make_step(device, torch.bfloat16, lengths) for lengths in ([30, 60, 150, 40], [199, 0, 150, 1]))
    mixed = call | {"hidden": other["hidden"].clone(), "cache_seqlens": other["cache_seqlens"]}
    mixed["hidden"][2] = call["hidden"][2]
    mixed["hidden"][3] = NAN
    for name in ("k_caches", "v_caches"):
        mixed[name] = [x.clone() for x in other[name]]
        for mine, theirs in zip(mixed[name], call[name]):
            mine[2] = theirs[2]
    assert same_bytes(decoder_step(**mixed)[2], decoder_step(**call)[2])


def test_p10_bitwise_repeatable(device: str) -> None:
    call = make_step(device, torch.bfloat16, [30, 60, 150, 40], leftpad=[0, 3, 64, 0], bias=True)
    first = decoder_step(**call)
    assert all(same_bytes(decoder_step(**call), first) for _ in range(5))


def test_p14_repeatable_beside_traffic(gpu: str) -> None:
    """A hundred runs while another stream keeps the memory busy: the same bytes."""
    sizes: dict[str, Any] = {"heads": (14, 2), "hidden": 896, "intermediate": 4864, "layers": 6, "capacity": 2000}
    call = make_step(gpu, torch.bfloat16, [30, 1999, 700, 1], **sizes, vocabulary=20000)
    first = decoder_step(**call)
    keys = [x.clone() for x in call["k_caches"]]
    chunks = torch.zeros(2, 1 << 27, dtype=torch.uint8, device=gpu)
    stream, differs = torch.cuda.Stream(), torch.zeros((), dtype=torch.bool, device=gpu)
    torch.cuda.synchronize()
    for _ in range(100):
        with torch.cuda.stream(stream):
            chunks[0].copy_(chunks[1])
        differs |= (decoder_step(**call).view(torch.int16) != first.view(torch.int16)).any()
    assert not bool(differs) and all(map(same_bytes, call["k_caches"], keys))


def test_p14_on_two_streams_at_once(gpu: str) -> None:
    """Each launch wants every SM: they must take turns, not halves."""
    calls = [make_step(gpu, torch.bfloat16, [30, 150, 40][: i + 1], layers=6, hidden=512) for i in range(2)]
    expected = [decoder_step(**call) for call in calls]
    streams = [torch.cuda.Stream() for _ in calls]
    differs = torch.zeros(2, dtype=torch.bool, device=gpu)
    torch.cuda.synchronize()
    for _ in range(50):
        for i, (call, stream) in enumerate(zip(calls, streams)):
            with torch.cuda.stream(stream):
                differs[i] |= (decoder_step(**call).view(torch.int16) != expected[i].view(torch.int16)).any()
    torch.cuda.synchronize()
    assert not bool(differs.any())


@pytest.mark.parametrize("rows", [1, 5, 8])
def test_p23_graph(gpu: str, rows: int) -> None:
    """Captured once, replayed with other lengths, hidden states and cached keys."""
    call = make_step(gpu, torch.bfloat16, [10] * rows, capacity=500, leftpad=[3] * rows)
    for name in ("k_caches", "v_caches"):
        for cache in call[name]:
            cache.normal_()

    def change() -> None:
        call["hidden"].normal_()
        call["cache_seqlens"].copy_(torch.randint(0, 500, (rows,)))
        call["cache_leftpad"].copy_(torch.randint(0, 60, (rows,)))

    for _ in range(5):
        assert_graph_replays(lambda: decoder_step(**call), change)


def test_p23_a_graph_of_steps(gpu: str) -> None:
    """Lengths that the graph itself moves: a replay a token, equal to eager steps."""
    call = make_step(gpu, torch.bfloat16, [10, 40], capacity=500)
    fresh = cloned(call)

    def step() -> Tensor:
        logits = decoder_step(**call)
        call["cache_seqlens"].add_(1)
        return logits

    start = cloned(call)
    graph, (logits,) = capture(step)
    for name, value in start.items():  # the capture's own call has appended and counted
        for x, y in zip(tree_leaves(call[name]), tree_leaves(value)):
            if isinstance(x, Tensor):
                x.copy_(y)
    for _ in range(100):
        graph.replay()
        expected = decoder_step(**fresh)
        fresh["cache_seqlens"].add_(1)
        assert same_bytes(logits, expected)
    assert all(map(same_bytes, call["k_caches"], fresh["k_caches"]))


def test_p7_large_caches(gpu: str) -> None:
    """More than 2^31 elements: the same keys at the end of a large cache give the same bytes."""
    heads, capacity, window = (8, 8), 1_100_000, 200
    small = make_step(
        gpu, torch.bfloat16, [10, 250], heads=heads, dim=128, layers=1, capacity=300, rotary=0, windows=[window]
    )
    large, last = cloned(small), capacity - 1
    for name in ("k_caches", "v_caches"):
        large[name] = [torch.full((2, capacity, 8, 128), NAN, dtype=torch.bfloat16, device=gpu)]
        large[name][0][0, :10] = small[name][0][0, :10]
        large[name][0][1, last - window : last] = small[name][0][1, 250 - window : 250]
    large["cache_seqlens"][1] = last
    assert same_bytes(decoder_step(**large), decoder_step(**small))
    for name in ("k_caches", "v_caches"):
        assert same_bytes(large[name][0][1, last], small[name][0][1, 250])
        assert bool(large[name][0][0, 11:].isnan().all()) and bool(large[name][0][1, :1000].isnan().all())


def test_p9_no_rows(device: str) -> None:
    assert decoder_step(**make_step(device, torch.bfloat16, [])).shape == (0, 131)


def test_p16_opcheck(device: str) -> None:
    for options in ({}, {"bias": True, "norms": True, "windows": [-1, 16], "leftpad": [0, 1]}):
        call = make_step(device, torch.bfloat16, [3, 20], **options)
        for name in ("k_caches", "v_caches"):  # it compares by value
            call[name] = [torch.nan_to_num(x) for x in call[name]]
        names = [argument.name for argument in op._schema.arguments if not argument.kwarg_only]
        opcheck(op, tuple(call.pop(name) for name in names), call)


def test_p17_compile(device: str) -> None:
    call = make_step(device, torch.bfloat16, [3, 20], bias=True, windows=[-1, 16])
    hidden = call.pop("hidden")
    assert_compiles(lambda x: decoder_step(x, **call), hidden)


def test_validation_names_the_length(device: str) -> None:
    call = make_step(device, torch.bfloat16, [3, 20], leftpad=[0, 0])
    with gqa_kernels.validation():
        decoder_step(**call)
        for name, value, sentence in (
            ("cache_seqlens", 200, r"cache_seqlens\[1\] must be from 0 to 199 \(200 rows, 1 new\), got 200"),
            ("cache_leftpad", -1, r"cache_leftpad\[1\] must be 0 or more, got -1"),
        ):
            bad = cloned(call)
            bad[name][1] = value
            with pytest.raises(RuntimeError, match=f"decoder_step: {sentence}"):
                decoder_step(**bad)


REFUSED: list[tuple[dict[str, Any], str]] = [
    ({"lengths": [1] * 9}, "more than 8 rows"),
    ({"dtype": torch.float32}, "float32"),
    ({"dim": 256}, "head_dim is not 64, 96 or 128"),
    ({"heads": (9, 1)}, "more than 8 query heads a KV head"),
    ({"hidden": 136}, "sizes are no multiples of 16"),
    ({"intermediate": 200}, "sizes are no multiples of 16"),
    ({"layers": 101, "hidden": 16, "intermediate": 16}, "more than 100 layers"),
]


@pytest.mark.parametrize("change, reason", REFUSED)
def test_p20_what_the_kernel_does_not_serve(device: str, change: dict[str, Any], reason: str) -> None:
    """The CPU serves it; CUDA refuses it with the plan's reason, and so does explain()."""
    given = {"dtype": torch.bfloat16, "lengths": [5, 7], "capacity": 16, **change}
    call = make_step(device, **given)
    sentence = f"decoder_step: its CUDA kernel does not serve this call: {reason}"
    hidden = call.pop("hidden")
    with pytest.raises(RuntimeError) as error:
        explain("decoder_step", hidden, **call, device="cuda")
    assert str(error.value) == sentence
    if device == "cuda":
        with pytest.raises(RuntimeError) as error:
            decoder_step(hidden, **call)
        assert str(error.value) == sentence
    elif "layers" in change:  # so narrow and deep that rounding alone decides
        assert bool(decoder_step(hidden, **call).isfinite().all())
    else:
        assert_step({"hidden": hidden, **call})


def test_p11_misaligned_weights(device: str) -> None:
    """The CPU gives the same bytes, CUDA refuses."""
    call = make_step(device, torch.bfloat16, [3, 20])
    expected, guard = decoder_step(**cloned(call)), Guard(device)
    for name in ("q_proj", "down_proj", "v_caches"):
        given = cloned(call)
        given[name][1] = guard.place(call[name][1], offset=1, writable=True)
        if device == "cpu":
            assert same_bytes(decoder_step(**given), expected)
        else:
            with pytest.raises(RuntimeError, match="not serve this call: tensors are not 16-byte aligned"):
                decoder_step(**given)


def test_explain_says_what_is_launched() -> None:
    call = make_step("cpu", torch.bfloat16, [5, 7])
    plan = explain("decoder_step", call.pop("hidden"), **call, device="cuda")
    assert plan.kernel == "decoder_step" and plan.launches[0]["grid"] == (132, 1, 1)
    assert plan.reason == "few rows: one kernel stays for the whole step" and plan.workspace_size > 0
