"""The task of the example checkpoint: sums of two numbers of up to three digits, `123+456=` → `579`.

Training, the accuracy check and the main job all take the prompt format, the held-out pairs and the marking from here.
Standard library only: whoever reads the rules needs no torch.
"""

from __future__ import annotations

import random
from pathlib import Path

CHECKPOINT = Path(__file__).resolve().parent / "checkpoint"

PAD, BOS, EOS, UNK = "<pad>", "<bos>", "<eos>", "<unk>"
SYMBOLS = "0123456789+="  # one token each
LIMIT = 1000  # operands are below it

HELD_OUT_SEED = 20240607
HELD_OUT_COUNT = 1000

# How often an operand has one, two or three digits. Uniform numbers would be nearly all of three digits.
DIGIT_SHARES = {1: 0.1, 2: 0.3, 3: 0.6}

Pair = tuple[int, int]


def numbers_with(digits: int) -> range:
    """All numbers written with so many digits; zero counts as a one-digit number."""
    return range(0 if digits == 1 else 10 ** (digits - 1), 10**digits)


def operand_weights() -> list[float]:
    """The probability of each operand, by its value."""
    return [DIGIT_SHARES[len(str(n))] / len(numbers_with(len(str(n)))) for n in range(LIMIT)]


def prompt_of(pair: Pair) -> str:
    return f"{pair[0]}+{pair[1]}="


def answer_of(pair: Pair) -> str:
    return str(pair[0] + pair[1])


def held_out_pairs(seed: int = HELD_OUT_SEED, count: int = HELD_OUT_COUNT) -> list[Pair]:
    """The pairs that training never sees, in either order.

    Only `random.random()` is drawn from: its sequence is the one that Python promises to keep between versions.
    """
    rng = random.Random(seed)

    def operand() -> int:
        share = rng.random()
        for digits in sorted(DIGIT_SHARES):
            share -= DIGIT_SHARES[digits]
            if share < 0:
                break
        numbers = numbers_with(digits)
        return numbers[int(rng.random() * len(numbers))]

    pairs: dict[frozenset[int], Pair] = {}
    while len(pairs) < count:
        pair = (operand(), operand())
        pairs.setdefault(frozenset(pair), pair)
    return list(pairs.values())


def some_held_out_pairs(count: int, seed: int) -> list[Pair]:
    """A few of the held-out pairs, drawn by a seed of their own."""
    rng = random.Random(seed)
    return sorted(held_out_pairs(), key=lambda _: rng.random())[:count]
