"""Every pair of option values in few combinations."""

from __future__ import annotations

import random
from itertools import combinations
from typing import Any


def pairwise(factors: dict[str, list[Any]], seed: int = 0) -> list[dict[str, Any]]:
    """Combinations in which every value of an option meets every value of every other; the first takes each
    option's first value. Greedy over seeded random candidates, so the same list every time."""
    names = list(factors)
    wanted = {
        (a, i, b, j) for a, b in combinations(names, 2) for i in range(len(factors[a])) for j in range(len(factors[b]))
    }
    source = random.Random(seed)
    chosen: list[dict[str, int]] = []
    candidate = dict.fromkeys(names, 0)
    while wanted:
        if chosen:
            tries = [_through(source.choice(sorted(wanted)), factors, source) for _ in range(30)]
            candidate = max(tries, key=lambda c: len(wanted & _pairs(c)))
        chosen.append(candidate)
        wanted -= _pairs(candidate)
    return [{name: factors[name][i] for name, i in combination.items()} for combination in chosen]


def _through(pair: tuple[str, int, str, int], factors: dict[str, list[Any]], source: random.Random) -> dict[str, int]:
    candidate = {name: source.randrange(len(values)) for name, values in factors.items()}
    candidate[pair[0]], candidate[pair[2]] = pair[1], pair[3]
    return candidate


def _pairs(candidate: dict[str, int]) -> set[tuple[str, int, str, int]]:
    return {(a, candidate[a], b, candidate[b]) for a, b in combinations(candidate, 2)}
