"""The shapes: those that results are published for on CUDA, small ones on the CPU, a handful for --quick."""

from __future__ import annotations

import random
from dataclasses import dataclass


def _length(tokens: int) -> str:
    return f"S{tokens // 1024}k" if tokens % 1024 == 0 else f"S{tokens}"


@dataclass(frozen=True)
class Attention:
    q_heads: int
    kv_heads: int
    head_dim: int
    batch: int
    seqlen: int  # of the keys; in prefill of the queries too
    causal: bool = True
    lengths: tuple[int, ...] = ()  # decode: one per row, instead of seqlen for all

    @property
    def heads(self) -> str:
        return f"{self.q_heads}:{self.kv_heads} D{self.head_dim}"

    @property
    def decode_name(self) -> str:
        if len(self.lengths) > 4:
            return f"{self.heads} B{self.batch} lengths to {_length(self.seqlen)[1:]}"
        if self.lengths:
            return f"{self.heads} B{self.batch} lengths {'/'.join(map(str, self.lengths))}"
        return f"{self.heads} B{self.batch} {_length(self.seqlen)}"

    @property
    def prefill_name(self) -> str:
        return f"{self.heads} {'causal' if self.causal else 'full'} B{self.batch} {_length(self.seqlen)}"


@dataclass(frozen=True)
class Rows:
    rows: int
    width: int

    @property
    def name(self) -> str:
        return f"{self.rows} x {self.width}"


def _decode(heads: tuple[int, int, int], *sizes: tuple[int, int]) -> list[Attention]:
    return [Attention(*heads, batch, seqlen) for batch, seqlen in sizes]


def _prefill(heads: tuple[int, int, int], *sizes: tuple[int, int], causal: bool = True) -> list[Attention]:
    return [Attention(*heads, batch, seqlen, causal) for batch, seqlen in sizes]


def _long_tail(heads: tuple[int, int, int], batch: int, capacity: int) -> Attention:
    """Lengths whose logarithms are uniform, from 1 to the capacity, the last of them at the capacity."""
    drawn = random.Random(0)
    lengths = [int(capacity ** drawn.random()) for _ in range(batch - 1)]
    return Attention(*heads, batch, capacity, lengths=(*lengths, capacity))


K = 1024

DECODE = [
    *_decode((32, 8, 128), (1, K), (1, 4 * K), (1, 16 * K), (1, 128 * K), (8, 4 * K), (16, 2 * K), (64, 4 * K)),
    *_decode((14, 2, 64), (1, 2 * K), (64, 4 * K)),
    *_decode((32, 32, 96), (1, 4 * K), (16, 4 * K)),
    *_decode((8, 8, 64), (16, 2 * K)),
    *_decode((8, 2, 64), (16, 2 * K)),
    *_decode((28, 4, 128), (1, 8 * K), (16, 8 * K)),
    *_decode((32, 1, 128), (32, 8 * K)),
    *_decode((16, 8, 256), (4, 4 * K)),
    Attention(64, 8, 128, 3, 20000, lengths=(5, 777, 20000)),
    _long_tail((32, 8, 128), 16, 32 * K),
    _long_tail((32, 8, 128), 64, 32 * K),
    _long_tail((28, 4, 128), 16, 16 * K),
    _long_tail((14, 2, 64), 64, 8 * K),
]
DECODE_GOALS = {  # microseconds
    "32:8 D128 B1 S1k": 3.9,
    "32:8 D128 B1 S4k": 7.0,
    "32:8 D128 B1 S16k": 18.5,
    "32:8 D128 B1 S128k": 124.0,
    "32:8 D128 B8 S4k": 34.2,
    "32:8 D128 B16 S2k": 34.0,
    "32:8 D128 B64 S4k": 244.0,
    "14:2 D64 B1 S2k": 3.2,
    "14:2 D64 B64 S4k": 35.3,
    "32:32 D96 B1 S4k": 14.8,
    "32:32 D96 B16 S4k": 186.0,
    "8:8 D64 B16 S2k": 19.2,
}
DECODE_WAYS = [  # also called paged, appending, with more tokens ...
    *_decode((32, 8, 128), (1, K), (1, 4 * K), (1, 16 * K), (8, 4 * K), (64, 4 * K)),
    *_decode((14, 2, 64), (1, 2 * K), (64, 4 * K)),
    *_decode((32, 32, 96), (16, 4 * K)),
    *_decode((28, 4, 128), (16, 8 * K)),
]
DECODE_CHAIN = [*_decode((32, 8, 128), (1, K), (1, 4 * K)), *_decode((14, 2, 64), (1, 2 * K))]
DECODE_HOST = _decode((32, 8, 128), (1, K))
DECODE_QUANTISED = [
    *_decode((32, 8, 128), (1, 32 * K), (1, 128 * K), (8, 4 * K), (64, 4 * K)),
    *_decode((14, 2, 64), (64, 4 * K)),
    *_decode((32, 32, 96), (16, 4 * K)),
    *_decode((28, 4, 128), (16, 8 * K)),
    *_decode((16, 8, 256), (4, 4 * K)),
]
DECODE_QUICK = _decode((32, 8, 128), (16, 2 * K))
DECODE_CPU = [
    *_decode((32, 8, 128), (1, K)),
    *_decode((14, 2, 64), (2, K)),
    *_decode((8, 8, 64), (2, 512)),
    Attention(8, 2, 64, 3, 700, lengths=(5, 77, 700)),
]
DECODE_CPU_WAYS = DECODE_CPU[2:3]

PREFILL = [
    *_prefill((32, 8, 128), (1, 512), (1, K), (1, 2 * K), (1, 4 * K), (1, 8 * K), (1, 16 * K), (1, 32 * K), (8, 2 * K)),
    *_prefill((32, 8, 128), (2, 8 * K), causal=False),
    *_prefill((28, 4, 128), (1, 8 * K)),
    *_prefill((14, 2, 64), (1, 2 * K), (4, 8 * K)),
    *_prefill((14, 2, 64), (4, 8 * K), causal=False),
    *_prefill((32, 32, 96), (1, 4 * K), (4, 4 * K)),
    *_prefill((32, 32, 96), (4, 4 * K), causal=False),
    *_prefill((16, 8, 256), (1, 8 * K)),
]
PREFILL_QUICK = _prefill((32, 8, 128), (1, 4 * K))
PREFILL_CPU = [*_prefill((8, 2, 64), (1, 256)), *_prefill((14, 2, 64), (1, 128)), Attention(4, 4, 96, 2, 100, False)]

ROWS = [1, 16, 512, 8192]
ROWS_QUICK = [8192]
ROWS_CPU = [1, 512]
HIDDEN, INTERMEDIATE = 4096, 14336
HIDDEN_CPU, INTERMEDIATE_CPU = 1024, 2048
# As many elements as 8192 x 4096 in rows of other widths, and one wide row.
NORMS = [Rows(2**25 // width, width) for width in (896, 3584, 4100, 5120, 14336, 18944, 65536)]
NORMS += [Rows(1, 18944)]
NORMS_CPU = [Rows(100, 900)]
ROPE_HEADS = 32, 8, 128
ROPES = [(8192, (14, 2, 64)), (8192, (32, 32, 96)), (4096, (64, 8, 128)), (4096, (16, 8, 256))]
SWIGLUS = [Rows(2**26 // width, width) for width in (4864, 18944)]
OPS_CHAIN = _decode((32, 8, 128), (1, K))
FFN_TOKENS = [1, 16, 2048]
FFN_TOKENS_CPU = [1]
OPS_GOALS = {  # microseconds
    **{f"rmsnorm {n} x 4096": us for n, us in zip(ROWS, (1.25, 1.35, 3.8, 34.0))},
    **{f"add_rmsnorm {n} x 4096": us for n, us in zip(ROWS, (1.35, 1.5, 5.6, 66.0))},
    **{f"swiglu {n} x 14336": us for n, us in zip(ROWS, (1.35, 2.1, 12.3, 165.0))},
    **{f"rope {n} tokens 32:8 D128": us for n, us in zip(ROWS, (1.3, 1.4, 4.6, 43.0))},
    **{f"swiglu_ffn {n} x 4096/14336": us for n, us in zip(FFN_TOKENS, (82.0, 90.0))},
}

SAMPLE = [Rows(1, 151936), Rows(1, 128256), Rows(16, 128256), Rows(64, 128256)]
SAMPLE_CPU = [Rows(1, 32000), Rows(4, 32000)]


@dataclass(frozen=True)
class Model:
    """A model of transformers with random weights; prompt tokens in the context, new tokens generated."""

    name: str
    family: str  # the prefix of transformers' classes
    hidden: int
    intermediate: int
    layers: int
    q_heads: int
    kv_heads: int
    vocab: int
    prompt: int
    new_tokens: int
    batch: int = 1
    tied: bool = False


MODELS = [
    Model("Qwen2.5-0.5B shape", "Qwen2", 896, 4864, 24, 14, 2, 151936, 2 * K, 64, tied=True),
    Model("Phi-3-mini shape", "Phi3", 3072, 8192, 32, 32, 32, 32064, 2 * K, 64),
    Model("Llama-3.1-8B shape", "Llama", 4096, 14336, 32, 32, 8, 128256, 2 * K, 64),
    Model("Llama-3.1-8B shape, batch 16", "Llama", 4096, 14336, 32, 32, 8, 128256, 2 * K, 64, batch=16),
]
MODELS_CPU = [Model("4 layers of 256, 8:2", "Llama", 256, 688, 4, 8, 2, 1000, 64, 32)]
