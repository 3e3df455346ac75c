"""The logits-to-token step, against reading the logits once."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor

import gqa_kernels
from benchmarks import peers, shapes
from benchmarks.case import OURS, Case, Contestant, Inputs
from benchmarks.shapes import Rows
from benchmarks.timing import Settings

TOP_P, TOP_K, MIN_P = 0.9, 50, 0.05
WARM_COPIES = 64
SLACK = 1e-4  # of probability mass: who is kept at the very edge of top-p depends on the order of float32 sums

SETTINGS: dict[str, dict[str, Any]] = {
    "top-p 0.9": {"top_p": TOP_P},
    "top-k 50, top-p 0.9": {"top_k": TOP_K, "top_p": TOP_P},
    "top-k 50, top-p 0.9, min-p": {"top_k": TOP_K, "top_p": TOP_P, "min_p": MIN_P},
    "greedy": {"temperature": 0.0},
    "penalties, top-p 0.9": {"top_p": TOP_P},
    "bitmask, top-p 0.9": {"top_p": TOP_P},
}
SEEN = 0.02  # the share of the vocabulary that a sequence has drawn


def cases(settings: Settings, quick: bool) -> Iterator[Case]:
    small = shapes.SAMPLE_CPU[:1] if quick else shapes.SAMPLE_CPU
    wanted = shapes.SAMPLE if settings.cuda else small
    for name, options in SETTINGS.items():
        if quick and name != "top-p 0.9":
            continue
        for shape in wanted:
            yield _case(shape, name, options, settings)


def _check(options: dict[str, Any]) -> Callable[[Inputs, Any], None]:
    """Every token must lie in the set that the filters keep, by a float64 sort."""

    def check(x: Inputs, out: Any) -> None:
        ids = (out[0] if isinstance(out, tuple) else out).reshape(-1, 1).long()
        logits = _adjusted(x).double()
        if ids.shape[0] != logits.shape[0] or not bool(((ids >= 0) & (ids < logits.shape[1])).all()):
            raise AssertionError("an id is missing or outside the vocabulary")
        chosen = logits.gather(1, ids)
        if options.get("temperature") == 0.0:
            if not torch.equal(chosen, logits.amax(1, keepdim=True)):
                raise AssertionError("not the largest logit")
            return
        probability, order = logits.softmax(1).sort(1, descending=True)
        last = options.get("top_k", logits.shape[1]) - 1
        mass = torch.where(probability >= probability[:, last : last + 1], probability, 0.0)
        mass /= mass.sum(1, keepdim=True)
        kept = (mass > 0) & (mass.cumsum(1) - mass <= options["top_p"] + SLACK)
        kept &= probability >= options.get("min_p", 0.0) * probability[:, :1] * (1 - SLACK)
        lowest = torch.where(kept, logits.gather(1, order), torch.inf).amin(1, keepdim=True)
        if not bool((chosen >= lowest).all()):
            raise AssertionError("a token outside the kept set")

    return check


def _adjusted(x: Inputs) -> Tensor:
    """The logits after penalties and bitmask, as PyTorch programs change them."""
    z = x["logits"].float()
    if "token_counts" in x:
        counts, repetition = x["token_counts"], x["repetition_penalty"][:, None]
        z = torch.where(counts != 0, torch.where(z > 0, z / repetition, z * repetition), z)
        z = z - x["frequency_penalty"][:, None] * counts.clamp(min=0)
        z = z - x["presence_penalty"][:, None] * (counts > 0)
    if "allowed_bitmask" in x:
        bits = x["allowed_bitmask"][..., None] >> torch.arange(32, dtype=torch.int32, device=z.device) & 1
        z = z.masked_fill(bits.flatten(-2)[:, : z.shape[1]] == 0, -torch.inf)
    return z


def _adjustments(name: str, shape: Rows, device: str) -> Inputs:
    if "penalties" in name:
        seen = torch.rand(shape.rows, shape.width, device=device) < SEEN
        values = {"repetition": 1.2, "frequency": 0.3, "presence": 0.4}
        penalties = {f"{key}_penalty": torch.full((shape.rows,), v, device=device) for key, v in values.items()}
        return {"token_counts": seen.int() * torch.randint(-1, 5, seen.shape, device=device).int(), **penalties}
    if "bitmask" in name:
        words = shape.rows, -(-shape.width // 32)
        return {"allowed_bitmask": torch.randint(-(2**31), 2**31, words, device=device).int()}
    return {}


def _torch_sample(options: dict[str, Any]) -> Callable[[Inputs], Tensor]:
    """Sort, cumulative sum, and an exponential race for the draw, as PyTorch programs do it."""

    def call(x: Inputs) -> Tensor:
        logits, order = _adjusted(x).sort(-1, descending=True)
        if "top_k" in options:
            logits, order = logits[:, : options["top_k"]], order[:, : options["top_k"]]
        p = logits.softmax(-1)
        p = p.masked_fill(p.cumsum(-1) - p > options["top_p"], 0.0)
        if "min_p" in options:
            p = p.masked_fill(p < options["min_p"] * p[:, :1], 0.0)
        race = (p / torch.empty_like(p).exponential_()).argmax(-1, keepdim=True)
        return order.gather(-1, race)[:, 0]

    return call


def _flashinfer_sample(options: dict[str, Any]) -> Callable[[Any], Callable[[Inputs], Any]]:
    def make(flashinfer: Any) -> Callable[[Inputs], Any]:
        def call(x: Inputs) -> Any:
            p = flashinfer.sampling.softmax(x["logits"].float())
            if "top_k" in options:
                return flashinfer.sampling.top_k_top_p_sampling_from_probs(
                    p, options["top_k"], options["top_p"], filter_apply_order="top_k_first"
                )
            return flashinfer.sampling.top_p_sampling_from_probs(p, options["top_p"])

        return call

    return make


def _case(shape: Rows, name: str, options: dict[str, Any], settings: Settings) -> Case:
    dtype = torch.bfloat16 if settings.cuda else torch.float32

    def make() -> Inputs:
        logits = (3 * torch.randn(shape.rows, shape.width, device=settings.device)).to(dtype)
        return {"logits": logits, **_adjustments(name, shape, settings.device)}

    adjusted = name.startswith(("penalties", "bitmask"))
    contestants = [Contestant(OURS, lambda x: gqa_kernels.sample(**x, seed=1, **options))]
    if options.get("temperature") == 0.0:
        contestants.append(Contestant("torch argmax", lambda x: x["logits"].argmax(-1)))
    else:
        contestants.append(Contestant("torch sort", _torch_sample(options)))
        if "min_p" not in options and not adjusted:
            contestants += peers.flashinfer_op(settings.device, _flashinfer_sample(options))
    return Case(
        group="sample",
        op="sample",
        shape=f"{shape.name}, {name}",
        make=make,
        contestants=contestants,
        check=_check(options),
        limit="read",
        traffic=shape.rows * (shape.width * dtype.itemsize + (4 * shape.width if "penalties" in name else 0)),
        most_copies=WARM_COPIES,
    )
