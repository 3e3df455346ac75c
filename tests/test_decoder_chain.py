"""All ops in a row, as a decoder has them, each started while the one before it still runs: nothing shows it."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.contract import assert_same
from support.kernels import hopper
from torch import Tensor

from gqa_kernels import (
    add_rmsnorm,
    gqa_attention_decode,
    gqa_attention_prefill,
    kv_cache_append,
    linear,
    merge_attention_states,
    qk_rmsnorm_rope,
    residual_add,
    rope_tables,
    sample,
    swiglu_ffn,
)

HEADS, KV_HEADS, DIM = 8, 2, 64
HIDDEN = HEADS * DIM


class Layers:
    """Two layers of a decoder and a drawn token, three times over: every op reads what the kernel just
    before it wrote, weights, tables, lengths and sampling settings too."""

    CAPACITY, VOCAB = 512, 1000

    def __init__(self, rows: int, device: str) -> None:
        half = {"device": device, "dtype": torch.bfloat16}
        self.batch, self.tokens = (rows, 1) if rows <= 16 else (2, 70)
        self.x = torch.randn(self.batch, self.tokens, HIDDEN, **half)
        shapes = {"q": HIDDEN, "k": KV_HEADS * DIM, "v": KV_HEADS * DIM, "o": HIDDEN, "gate": 768, "up": 768}
        self.weights = {name: torch.randn(size, HIDDEN, **half) / 16 for name, size in shapes.items()}
        self.down, self.head = torch.randn(HIDDEN, 768, **half) / 16, torch.randn(self.VOCAB, HIDDEN, **half) / 16
        self.norm, self.norm_q, self.norm_k = (torch.randn(n, **half) for n in (HIDDEN, DIM, DIM))
        self.cos, self.sin = rope_tables(DIM, self.CAPACITY, base=10000.0, device=device)
        self.caches = [torch.randn(self.batch, self.CAPACITY, KV_HEADS, DIM, **half) for _ in range(2)]
        self.lengths = torch.full((self.batch,), 100, device=device, dtype=torch.int32)
        self.temperature = torch.full((), 0.5, device=device)
        state = {**self.weights, "down": self.down, "head": self.head, "norm": self.norm, "norm q": self.norm_q}
        state |= {"norm k": self.norm_k, "cos": self.cos, "sin": self.sin, "temperature": self.temperature}
        state |= {"lengths": self.lengths, "k": self.caches[0], "v": self.caches[1]}
        self.state = [(x, x.clone()) for x in state.values()]

    def reset(self) -> None:
        for x, before in self.state:
            x.copy_(before)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, between: Callable[[], None]) -> tuple[Tensor, Tensor]:
        common = {"k_cache": self.caches[0], "v_cache": self.caches[1], "cache_seqlens": self.lengths}
        if self.tokens == 1:
            return gqa_attention_decode(q, k=k, v=v, **common, return_lse=True)
        kv_cache_append(k, v, *self.caches, cache_seqlens=self.lengths)
        between()
        common["cache_seqlens"] = self.lengths + self.tokens
        between()
        return gqa_attention_prefill(q, **common, return_lse=True)

    def __call__(self, between: Callable[[], None]) -> list[Tensor]:
        outputs, x, residual, w = [], self.x, self.x.flip(0).contiguous(), self.weights
        for step in range(6):
            x, residual = add_rmsnorm(x, residual, self.norm)
            between()
            w["q"].copy_(w["q"].roll(1, 0))
            between()
            sizes = [HIDDEN, KV_HEADS * DIM, KV_HEADS * DIM]
            q, k, v = (y.unflatten(-1, (-1, DIM)) for y in linear(x, w["q"], w["k"], w["v"]).split(sizes, -1))
            between()
            self.norm_q.copy_(q[0, 0, 0])
            between()
            q, k = qk_rmsnorm_rope(q, k, self.norm_q, self.norm_k, self.cos, self.sin)
            between()
            self.lengths.add_(self.tokens if self.tokens == 1 else 7)
            between()
            out, lse = self.attend(q, k, v, between)
            between()
            out, lse = merge_attention_states(torch.stack([out, q]), torch.stack([lse, lse]))
            between()
            y = linear(out.flatten(-2), w["o"])
            between()
            y, residual = add_rmsnorm(y, residual, self.norm)
            between()
            w["gate"].copy_(w["gate"].roll(1, 0))
            between()
            x = swiglu_ffn(y, w["gate"], w["up"], self.down)
            between()
            logits = linear(x[:, -1], self.head)
            between()
            self.temperature.mul_(1.01)
            between()
            ids = sample(logits, temperature=self.temperature, top_k=50, top_p=0.9, seed=step)
            between()
            greedy = sample(logits, temperature=0.0)
            between()
            self.cos.copy_(self.cos.roll(1, 0))
            between()
            x = residual_add(x, (self.head[ids] + self.head[greedy])[:, None].expand_as(x))
            between()
            outputs += [x, residual, q, k, out, lse, logits, ids, greedy]
        return [*outputs, *(x.clone() for x in self.caches)]


ROWS = [1, 3, 16, 140]


@pytest.mark.parametrize("rows", ROWS)
def test_p23_layers_have_the_bytes_of_one_op_at_a_time(gpu: str, rows: int) -> None:
    torch.manual_seed(rows)
    layers = Layers(rows, gpu)
    expected = layers(torch.cuda.synchronize)
    with hopper(gpu):
        for _ in range(10):
            layers.reset()
            assert_same(layers(lambda: None), expected)
    layers.reset()
    with torch.cuda.graph(graph := torch.cuda.CUDAGraph()):
        layers.reset()
        captured = layers(lambda: None)
    for _ in range(20):
        graph.replay()
    assert_same(captured, expected, "captured")
