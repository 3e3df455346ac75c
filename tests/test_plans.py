"""Plans are pure functions of integers: tested here for GPUs that are not in this machine."""

from __future__ import annotations

import itertools
from collections.abc import Iterator

import pytest
import torch
from support.calls import random_call
from support.kernels import HOPPER
from torch import Tensor

import gqa_kernels
from gqa_kernels._library import C
from gqa_kernels.explain import H200, OPS

A100 = {"compute_capability": 80, "num_sms": 108, "max_shared_memory": 166912, "l2_size": 41943040}
RTX3090 = {"compute_capability": 86, "num_sms": 82, "max_shared_memory": 101376, "l2_size": 6291456}
PARTS = {"swiglu_ffn": "swiglu"}  # ops that may run as another one between torch's own
GPUS = {"H200": H200, "A100": A100, "RTX 3090": RTX3090}


def plan_for(gpu: dict[str, int], op: str, *args: object, **kwargs: object) -> dict[str, object]:
    C.explain_begin("cuda", *gpu.values())
    try:
        getattr(gqa_kernels, op)(*args, **kwargs)
    finally:
        plans = C.explain_end()
    assert len(plans) == 1
    return plans[0]


def splits(plan: dict[str, object]) -> int:
    return max(launch["num_splits"] for launch in plan["launches"])


def wide(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
    """A tensor of any size in a few bytes: its tokens are one and the same."""
    return torch.zeros(shape[0], 1, *shape[2:], dtype=dtype).expand(shape)


def decode(
    batch: int,
    capacity: int,
    *,
    heads: tuple[int, int] = (32, 8),
    seqlen: int = 1,
    gpu: str = "H200",
    **options: object,
) -> dict[str, object]:
    lengths = options.pop("lengths", torch.zeros(batch, dtype=torch.int32))
    q, cache = wide(batch, seqlen, heads[0], 128), wide(batch, capacity, heads[1], 128)
    return plan_for(GPUS[gpu], "gqa_attention_decode", q, cache, cache, cache_seqlens=lengths, **options)


@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("op", OPS)
def test_every_plan_fits_the_device(op: str, gpu: str) -> None:
    for seed in range(20):
        args, kwargs = random_call(op, seed, "cpu")
        if op == "decoder_step" and GPUS[gpu]["compute_capability"] != 90:
            with pytest.raises(RuntimeError, match="not sm_90"):
                plan_for(GPUS[gpu], op, *args, **kwargs)
            continue
        plan = plan_for(GPUS[gpu], op, *args, **kwargs)
        assert 1 <= len(plan["launches"]) <= 4 and plan["workspace_size"] >= 0
        assert str(plan["reason"]) and not str(plan["reason"]).endswith(".")
        for launch in plan["launches"]:
            assert launch["op"] in (op.rstrip("_"), PARTS.get(op)), (op, seed)  # rope_ is rope onto itself
            assert launch["block"][0] * launch["block"][1] * launch["block"][2] <= 1024
            assert launch["shared_memory"] <= GPUS[gpu]["max_shared_memory"]
            assert all(size <= 65535 for size in launch["grid"][1:])


@pytest.mark.parametrize("op", HOPPER)
def test_random_calls_reach_the_hopper_kernels(op: str) -> None:
    """Of the first four, which most tests of every op make; a quantised cache among them."""
    reached = []
    for seed in range(4):
        args, kwargs = random_call(op, seed, "cpu")
        plan = plan_for(H200, op, *args, **kwargs)
        if HOPPER[op] in [launch["kernel"] for launch in plan["launches"]]:
            reached.append("quantised" if "k_scale" in kwargs else "as it is")
    assert set(reached) == ({"quantised", "as it is"} if op == "gqa_attention_decode" else {"as it is"})


@pytest.mark.parametrize("op", OPS)
def test_a_plan_is_repeatable(op: str) -> None:
    args, kwargs = random_call(op, 3, "cpu")
    assert plan_for(H200, op, *args, **kwargs) == plan_for(H200, op, *args, **kwargs)


@pytest.fixture
def portable() -> Iterator[None]:
    C.set_kernel_override(1)
    yield
    C.set_kernel_override(0)


@pytest.mark.usefixtures("portable")
@pytest.mark.parametrize("gpu", GPUS)
@pytest.mark.parametrize("heads", [(32, 8), (14, 2), (8, 8), (32, 1)])
def test_splits_grow_with_the_capacity(gpu: str, heads: tuple[int, int]) -> None:
    counts = [splits(decode(1, 2**power, heads=heads, gpu=gpu)) for power in range(4, 18)]
    assert counts == sorted(counts), counts
    assert counts[0] == 1 and counts[-1] > 1


@pytest.mark.usefixtures("portable")
def test_splits_shrink_with_the_batch() -> None:
    """Enough sequences fill the device alone."""
    counts = [splits(decode(2**power, 8192)) for power in range(9)]
    assert counts[0] > 1 and counts[-1] == 1
    assert counts == sorted(counts, reverse=True), counts


@pytest.mark.usefixtures("portable")
def test_split_blocks_fill_the_device_but_not_much_more() -> None:
    for batch, capacity in ((1, 4096), (1, 131072), (3, 20000), (8, 4096)):
        plan = decode(batch, capacity)
        blocks = max(launch["grid"][0] * launch["grid"][1] * launch["grid"][2] for launch in plan["launches"])
        assert blocks >= H200["num_sms"] // 2, (batch, capacity)
        assert blocks <= 8 * H200["num_sms"], (batch, capacity)


@pytest.mark.parametrize("batch_invariant", [False, True])
def test_lengths_are_never_read(batch_invariant: bool) -> None:
    """The plan knows the capacity only, so that a captured graph serves every length."""
    plans = [
        decode(4, 8192, lengths=torch.full((4,), length, dtype=torch.int32), batch_invariant=batch_invariant)
        for length in (0, 1, 100, 8191, -5, 10**6)
    ]
    assert all(plan == plans[0] for plan in plans)


def test_batch_invariant_splits_do_not_depend_on_the_batch() -> None:
    counts = {splits(decode(batch, 8192, batch_invariant=True)) for batch in (1, 2, 5, 64, 300)}
    assert len(counts) == 1
    assert {cluster(decode(batch, 8192, batch_invariant=True)) for batch in (1, 64)} == counts
    assert len({splits(decode(batch, 2048)) for batch in (1, 2, 5, 64, 300)}) > 1


def test_given_splits_are_taken() -> None:
    for wanted in (1, 2, 7, 16):
        plan = decode(2, 8192, num_splits=wanted)
        assert splits(plan) == wanted
        assert (plan["workspace_size"] > 0) == (wanted > 1)


def test_workspace_holds_the_partial_results() -> None:
    """A float32 output row and its log-sum-exp per split, query head and token; not much more."""
    for batch, seqlen, count in ((1, 1, 4), (3, 2, 8), (2, 16, 3)):
        size = decode(batch, 8192, seqlen=seqlen, num_splits=count)["workspace_size"]
        least = count * batch * seqlen * 32 * (128 + 1) * 4
        assert least <= size <= 1.1 * least + 4096


def cluster(plan: dict[str, object]) -> int:
    """Blocks that share the keys of a sequence and KV head; 0 where the kernel for sm_90 is not chosen."""
    launch = plan["launches"][0]
    if launch["kernel"] != "decode_ring":
        return 0
    assert len(plan["launches"]) == 1 and plan["workspace_size"] == 0
    assert launch["grid"][0] == launch["num_splits"]
    return launch["num_splits"]


@pytest.mark.parametrize(
    "heads, batch, capacity, blocks, threads",
    [
        ((32, 8), 1, 2048, 8, 192),
        ((32, 8), 1, 16384, 8, 192),
        ((32, 8), 1, 32768, 8, 256),
        ((32, 8), 2, 4096, 4, 192),
        ((28, 4), 1, 8192, 16, 192),
        ((32, 8), 1, 256, 2, 192),
        ((32, 8), 8, 4096, 2, 128),
        ((32, 8), 16, 2048, 1, 256),
        ((32, 8), 64, 1024, 1, 256),
        ((32, 8), 64, 2048, 4, 128),
        ((32, 8), 256, 2048, 4, 128),
        ((32, 8), 16, 32768, 16, 128),
        ((64, 8), 3, 20000, 16, 128),
        ((32, 8), 64, 8192, 8, 128),
    ],
)
def test_clusters(heads: tuple[int, int], batch: int, capacity: int, blocks: int, threads: int) -> None:
    plan = decode(batch, capacity, heads=heads)
    assert (cluster(plan), plan["launches"][0]["block"][0]) == (blocks, threads)


def test_sequences_of_unlike_length_take_turns() -> None:
    """From the batch, heads and capacity alone: a fixed number of clusters, whatever the batch."""

    def grid(batch: int, capacity: int, **options: object) -> list[int]:
        return list(decode(batch, capacity, **options)["launches"][0]["grid"])

    for batch in (2, 8, 16, 33):
        assert grid(batch, 16384) == grid(batch, 32768) == [16, 18, 1]
    assert grid(16, 4096, heads=(32, 8)) == [2, 8, 16] and grid(16, 8192, heads=(28, 4)) == [2, 4, 16]
    assert grid(1, 32768)[1:] == [8, 1] and grid(64, 8192)[1:] == [8, 64]
    assert grid(16, 32768, batch_invariant=True) == [8, 8, 16]


@pytest.mark.parametrize("head_dim, kind, blocks", [(96, torch.bfloat16, 2), (96, torch.int8, 4), (64, torch.int8, 2)])
def test_narrow_rows_are_read_several_heads_at_a_time(head_dim: int, kind: torch.dtype, blocks: int) -> None:
    for heads in (1, 2, 3, 8, 32):
        q, cache = wide(2, 1, heads, head_dim), torch.zeros(2, 512, heads, head_dim, dtype=kind)
        lengths = torch.zeros(2, dtype=torch.int32)
        plan = plan_for(H200, "gqa_attention_decode", q, cache, cache, cache_seqlens=lengths)
        assert list(plan["launches"][0]["grid"][1:]) == [-(-heads // blocks), 2]


@pytest.mark.parametrize("heads", [(32, 8), (14, 2), (8, 8), (16, 1)])
def test_clusters_grow_with_the_capacity_and_fill_the_device(heads: tuple[int, int]) -> None:
    counts = [cluster(decode(1, 2**power, heads=heads)) for power in range(4, 18)]
    assert counts == sorted(counts) and counts[0] >= 1 and counts[-1] > 1, counts
    for batch in range(1, 80):
        plan = decode(batch, 8192, heads=heads)
        resident = 1 if plan["launches"][0]["shared_memory"] > 116000 else 2
        # A cluster of 16 finds room in each of seven groups of SMs, one of 8 in two places of each.
        if batch * heads[1] * cluster(plan) <= 132:
            assert batch * heads[1] <= resident * {1: 132, 2: 66, 4: 30, 8: 15, 16: 7}[cluster(plan)]


def test_clusters_take_what_they_were_built_for() -> None:
    def small(gpu: dict[str, int], dtype: torch.dtype, head_dim: int = 64) -> dict[str, object]:
        q, cache = torch.zeros(2, 1, 4, head_dim, dtype=dtype), torch.zeros(2, 300, 2, head_dim, dtype=dtype)
        lengths = torch.zeros(2, dtype=torch.int32)
        return plan_for(gpu, "gqa_attention_decode", q, cache, cache, cache_seqlens=lengths)

    assert cluster(small(H200, torch.bfloat16))
    assert cluster(decode(2, 4096)) and cluster(decode(2, 4096, seqlen=4, heads=(16, 4)))
    refused = [
        decode(2, 4096, seqlen=5, heads=(16, 4)),
        decode(2, 4096, num_splits=3),
        decode(2, 4096, gpu="A100"),
        small({**H200, "num_sms": 60}, torch.bfloat16),
        small(H200, torch.float32),
        small(H200, torch.bfloat16, head_dim=80),
    ]
    assert not any(cluster(plan) for plan in refused)
    assert all(plan["reason"] for plan in refused)


@pytest.mark.parametrize("batch", [1, 4, 40])
def test_p12_pages_are_divided_as_a_contiguous_cache(batch: int) -> None:
    for capacity in (112, 2048, 5000):
        contiguous = decode(batch, capacity, heads=(8, 2))
        for page in (7, 16, 64):
            columns = -(-capacity // page)
            if columns * page // 256 != capacity // 256:
                continue
            pool, q = wide(batch * columns, page, 2, 128), wide(batch, 1, 8, 128)
            table, lengths = torch.zeros(batch, columns, dtype=torch.int32), torch.zeros(batch, dtype=torch.int32)
            options = {"cache_seqlens": lengths, "block_table": table}
            paged = plan_for(H200, "gqa_attention_decode", q, pool, pool, **options)
            for key in ("kernel", "grid", "block", "num_splits"):
                assert paged["launches"][0][key] == contiguous["launches"][0][key], (capacity, page)


@pytest.mark.parametrize("causal", [False, True])
def test_prefill_launches_follow_the_work(causal: bool) -> None:
    def blocks(batch: int, seqlen: int) -> int:
        q, k = wide(batch, seqlen, 32, 128), wide(batch, seqlen, 8, 128)
        tiles_are_blocks = {**H200, "compute_capability": 80}
        plan = plan_for(tiles_are_blocks, "gqa_attention_prefill", q, k, k, causal=causal)
        launch = plan["launches"][0]
        return int(launch["grid"][0] * launch["grid"][1] * launch["grid"][2])

    assert blocks(2, 4096) == 2 * blocks(1, 4096)
    assert 1.9 * blocks(1, 4096) <= blocks(1, 8192) <= 2.1 * blocks(1, 4096)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab", [1, 1000, 32000, 128256, 151936, 1 << 18])
def test_sample_on_hopper_holds_the_row_in_a_cluster(vocab: int, dtype: torch.dtype) -> None:
    """Its blocks share the row: fewer the more rows there are, but enough to hold it beside the histograms."""
    blocks = []
    for rows in (1, 7, 8, 16, 64, 66, 67, 1000):
        logits = torch.zeros(1, vocab, dtype=dtype).expand(rows, vocab)
        (launch,) = plan_for(H200, "sample", logits, top_p=0.9)["launches"]
        assert launch["kernel"] == "sample_cluster" and launch["grid"][0] % rows == 0
        blocks.append(launch["grid"][0] // rows)
        held = launch["shared_memory"] * blocks[-1]
        assert held > vocab * dtype.itemsize and launch["shared_memory"] + 11 * 1024 <= H200["max_shared_memory"]
        (greedy,) = plan_for(H200, "sample", logits, temperature=0.0)["launches"]
        assert greedy["kernel"] == "sample_greedy" and greedy["shared_memory"] == 0
        assert greedy["grid"][0] // rows in (1, 2, 4, 8, 16) and greedy["grid"][0] % rows == 0
        (portable,) = plan_for(A100, "sample", logits, top_p=0.9)["launches"]
        assert portable["kernel"] == "sample_row" and tuple(portable["grid"]) == (rows, 1, 1)
    assert blocks == sorted(blocks, reverse=True) and set(blocks) <= {1, 2, 4, 6, 8, 16}
    assert vocab < 128256 or (blocks[:3] == [16, 16, 8] and blocks[3] in (6, 8))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("vocab", [1, 1000, 128256, 1 << 18])
def test_sample_on_hopper_holds_adjusted_rows(vocab: int, dtype: torch.dtype) -> None:
    """As float32 with a bias, else as what they are; counts that no penalty looks at are none of it."""
    one = torch.ones(())
    for rows in (1, 16, 64, 1000):
        logits = torch.zeros(1, vocab, dtype=dtype).expand(rows, vocab)
        counts = torch.zeros(vocab, dtype=torch.int32)
        adjustments: list[dict[str, Tensor]] = [
            {"logit_bias": torch.zeros(vocab)},
            {"allowed_bitmask": torch.zeros(-(-vocab // 32), dtype=torch.int32)},
            *({name + "_penalty": one, "token_counts": counts} for name in ("repetition", "frequency", "presence")),
        ]
        plain = plan_for(H200, "sample", logits)["launches"][0]
        assert plan_for(H200, "sample", logits, token_counts=counts)["launches"][0] == plain
        for options in adjustments:
            (launch,) = plan_for(H200, "sample", logits, temperature=0.0, **options)["launches"]
            assert launch["kernel"] == "sample_cluster"
            held = launch["shared_memory"] * launch["grid"][0] // rows
            size = 4 if "logit_bias" in options else dtype.itemsize
            assert held > size * vocab and launch["shared_memory"] + 11 * 1024 <= H200["max_shared_memory"]
            (portable,) = plan_for(A100, "sample", logits, **options)["launches"]
            assert portable["kernel"] == "sample_row"


@pytest.mark.usefixtures("portable")
def test_the_portable_sampler_can_be_asked_for() -> None:
    assert plan_for(H200, "sample", torch.zeros(4, 1000))["launches"][0]["kernel"] == "sample_row"


def norm_launch(gpu: dict[str, int], op: str, x: Tensor) -> dict[str, object]:
    weight = torch.empty(x.shape[-1], dtype=x.dtype)
    (launch,) = plan_for(gpu, op, *[x] * (2 if op == "add_rmsnorm" else 1), weight)["launches"]
    return launch


NORM_WIDTHS = (1, 7, 32, 128, 256, 264, 268, 896, 4096, 4100, 5120, 14336, 18944, 32768, 65536)


@pytest.mark.parametrize("op", ["rmsnorm", "add_rmsnorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_hold_their_rows(op: str, dtype: torch.dtype) -> None:
    """A row's vectors fit its threads' registers, 4 each, or registers and shared memory together, up to 65536 wide."""
    for rows, hidden in itertools.product((2, 5000), NORM_WIDTHS):
        launch = norm_launch(H200, op, torch.empty(1, hidden, dtype=dtype).expand(rows, hidden))
        threads, rows_a_block, _ = launch["block"]
        vectors = -(-hidden * dtype.itemsize // 16)
        assert launch["kernel"] == ("norm_narrow_rows" if vectors <= 32 else "norm_rows")
        assert launch["grid"][0] * rows_a_block >= rows and threads * rows_a_block <= 1024
        assert (threads * rows_a_block) % 32 == 0
        held = 1 if vectors <= 32 else 4
        beyond = max(0, vectors - held * threads) * 16
        assert launch["shared_memory"] >= (beyond if beyond < 90000 else 0) and launch["shared_memory"] <= 96 * 1024


@pytest.mark.parametrize("op", ["rmsnorm", "add_rmsnorm"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_norms_of_rows_without_gaps(op: str, dtype: torch.dtype) -> None:
    """Up to four loads a thread; wide rows are spread over a cluster where there are any."""
    vector = 16 // dtype.itemsize
    for rows, hidden in itertools.product((1, 1000, 5000), (*NORM_WIDTHS, 512, 1024)):
        x = torch.empty(rows, hidden, dtype=dtype)
        launch, portable = (norm_launch(gpu, op, x) for gpu in (H200, A100))
        kernel, (threads, rows_a_block, _) = launch["kernel"], launch["block"]
        whole = hidden % vector == 0
        vectors = -(-hidden // vector) if whole else hidden // vector
        blocks, few = launch["grid"][0] // rows, rows <= 1056
        if whole and vectors <= 128:
            name = "narrow_rows" if vectors <= 32 else "warp_pairs" if vectors <= 64 else "warp_rows"
            assert launch == portable and kernel == f"norm_dense_{name}"
            assert launch["grid"][0] * (2 if vectors <= 64 else 1) * rows_a_block >= rows
            assert threads * rows_a_block in (32, 64, 128, 256) and threads * 4 >= vectors
        elif hidden % (vector // 2) == 0 and hidden > 32 * vector and vectors <= (8192 if whole else 1023):
            assert kernel == ("norm_dense_rows" if whole else "norm_dense_half_rows")
            assert launch["shared_memory"] == 0
            large = rows > 264 and x.nbytes * (2 if op == "rmsnorm" else 4) >= 2**26
            held = 4 if op == "rmsnorm" and (vectors > 1024 or (not few and (vectors > 512 or not whole))) else 2
            held = 4 if large and not whole else held
            assert threads % 32 == 0 and threads <= 1024 // held and threads * blocks * held >= vectors
            assert (blocks == 1) == (vectors <= 1024) and blocks <= 8
            if 1536 < vectors <= 2048:
                assert blocks == (2 if op == "rmsnorm" and not few else 4)
            assert portable == launch if blocks == 1 else portable["kernel"] == "norm_rows"
        else:
            assert kernel in ("norm_rows", "norm_narrow_rows")


def test_qk_rmsnorm_rope_takes_vectors_where_a_head_fits_a_warp() -> None:
    def kernel(head_dim: int, pairs: int, dtype: torch.dtype = torch.bfloat16, interleaved: bool = False) -> str:
        q, weight, cos = wide(9, 1, 4, head_dim, dtype=dtype), torch.zeros(head_dim), torch.zeros(9, pairs)
        plan = plan_for(H200, "qk_rmsnorm_rope", q, q, weight, weight, cos, cos, interleaved=interleaved)
        (launch,) = plan["launches"]
        assert launch["block"][0] * launch["block"][1] * launch["block"][2] <= 320
        return str(launch["kernel"])

    dense, vector, scalar = (f"qk_rmsnorm_rope_{name}" for name in ("dense", "vector", "scalar"))
    assert {kernel(d, d // 2) for d in (16, 32, 48, 64, 80, 96, 128, 256)} == {dense}
    assert kernel(128, 64, torch.float32) == dense
    assert kernel(128, 32) == kernel(96, 32) == kernel(128, 64, interleaved=True) == vector
    assert kernel(256, 128, torch.float32) == kernel(264, 132) == kernel(8, 4) == kernel(96, 36) == scalar
    assert kernel(8, 4, interleaved=True) == kernel(96, 36, interleaved=True) == vector


@pytest.mark.parametrize("kind", [torch.float8_e4m3fn, torch.int8], ids=str)
def test_quantised_caches(kind: torch.dtype) -> None:
    """Where decode_ring serves a 16-bit cache it serves a quantised one too; prefill is the portable kernels'."""
    lengths = torch.zeros(2, dtype=torch.int32)
    for heads, head_dim in itertools.product(((32, 8), (8, 8), (16, 1), (32, 1)), (64, 96, 128, 256)):
        q, like = wide(2, 1, heads[0], head_dim), wide(2, 4096, heads[1], head_dim)
        cache = torch.zeros(2, 1, heads[1], head_dim, dtype=torch.uint8).view(kind).expand(2, 4096, heads[1], head_dim)
        plain = plan_for(H200, "gqa_attention_decode", q, like, like, cache_seqlens=lengths)["launches"]
        quantised = plan_for(H200, "gqa_attention_decode", q, cache, cache, cache_seqlens=lengths)["launches"]
        assert [launch["kernel"] for launch in quantised] == [launch["kernel"] for launch in plain]
        for launch in quantised:
            assert launch["dtype"] == f"bfloat16, {str(kind).removeprefix('torch.')} cache"
            assert launch["shared_memory"] <= H200["max_shared_memory"]
        portable = plan_for(A100, "gqa_attention_decode", q, cache, cache, cache_seqlens=lengths)["launches"]
        assert portable[0]["kernel"].startswith("attend_")
        long = wide(2, 512, heads[0], head_dim)
        plan = plan_for(H200, "gqa_attention_prefill", long, None, None, cache, cache, cache_seqlens=lengths)
        assert plan["launches"][0]["kernel"] == "attend_many_rows" and "quantised" in str(plan["reason"])
