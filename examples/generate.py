"""Runs a Llama checkpoint through transformers, patched with gqa_kernels and not, and through gqa_kernels.hf.generate.

    python examples/generate.py
        answers held-out sums with the shipped checkpoint; exit status 1 if under 95 % are right or any token differs
        from the unpatched model's

    python examples/generate.py --model meta-llama/Llama-3.2-1B --prompt "The capital of France is" --dtype bfloat16
        continues prompts of your own; the differences are shown, the exit status is 0

Greedy, unless one of --temperature --top-k --top-p --min-p is given: then GqaSampler draws the tokens, and
hf.generate, which gives each prompt a random stream of its own, picks others.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from dataclasses import dataclass
from typing import Any

import torch
from addition import CHECKPOINT, answer_of, prompt_of, some_held_out_pairs
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

import gqa_kernels
import gqa_kernels.hf

SUM_COUNT = 48
SUM_SEED = 1
NEEDED_SHARE = 0.95
WARM_UP_TOKENS = 2  # a prefill and a decode step


@dataclass
class Run:
    """What one way of running the model gave: each prompt's new tokens, up to and with <eos>, and the speed."""

    tokens: list[list[int]]
    tokens_per_second: float


class Generator:
    """A model, a left-padded batch of prompts and the settings that every run shares."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: list[str]) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.inputs = tokenizer(prompts, return_tensors="pt", padding=True, padding_side="left").to(model.device)
        eos = model.generation_config.eos_token_id
        self.eos = set(eos if isinstance(eos, list) else [eos])

    def once(self, whole: bool, max_new_tokens: int, sampling: dict[str, Any] | None) -> Run:
        start = self.now()
        if whole:
            ids, mask = self.inputs.input_ids, self.inputs.attention_mask
            pad, settings = self.tokenizer.pad_token_id, {"do_sample": sampling is not None, **(sampling or {})}
            output = gqa_kernels.hf.generate(
                self.model, ids, mask, max_new_tokens=max_new_tokens, pad_token_id=pad, **settings
            )
        else:
            output = self.model.generate(
                **self.inputs,
                max_new_tokens=max_new_tokens,
                pad_token_id=self.tokenizer.pad_token_id,
                logits_processor=LogitsProcessorList([gqa_kernels.hf.GqaSampler(**sampling)] if sampling else []),
                # The sampler leaves one finite logit, so the greedy pick is its token. The rest overrides what a
                # checkpoint's own generation_config may ask for.
                do_sample=False,
                num_beams=1,
                temperature=1.0,
                top_k=50,
                top_p=1.0,
            )
        seconds = self.now() - start
        tokens = [self.up_to_eos(row) for row in output[:, self.inputs.input_ids.shape[1] :].tolist()]
        return Run(tokens, sum(map(len, tokens)) / seconds)

    def measured(
        self, label: str, max_new_tokens: int, sampling: dict[str, Any] | None, repeats: int, *, whole: bool = False
    ) -> Run:
        """One short run to warm up, then the median speed of the repeats; ``whole`` is by hf.generate."""
        self.once(whole, min(WARM_UP_TOKENS, max_new_tokens), sampling)
        progress = tqdm(range(repeats), desc=label, unit="run", leave=False)
        runs = [self.once(whole, max_new_tokens, sampling) for _ in progress]
        return Run(runs[0].tokens, statistics.median(run.tokens_per_second for run in runs))

    def text(self, tokens: list[int]) -> str:
        return self.tokenizer.decode(tokens, skip_special_tokens=True)

    def up_to_eos(self, row: list[int]) -> list[int]:
        ends = [i for i, token in enumerate(row) if token in self.eos]
        return row[: ends[0] + 1] if ends else row

    def now(self) -> float:
        if self.model.device.type == "cuda":
            torch.cuda.synchronize(self.model.device)
        return time.perf_counter()


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a directory or a Hugging Face id (default: the shipped checkpoint)")
    parser.add_argument("--prompt", nargs="+", help="prompts to continue, as one batch (default: held-out sums)")
    parser.add_argument("--max-new-tokens", type=int, help="default: 8 for the sums, 64 for prompts")
    sampling = parser.add_argument_group("sampling", "any of the first four turns it on")
    sampling.add_argument("--temperature", type=float, help="0 is greedy (default when sampling: 1)")
    sampling.add_argument("--top-k", type=int, help="keep the k likeliest tokens; 0 keeps all")
    sampling.add_argument("--top-p", type=float, help="keep the likeliest tokens that add up to p; 1 keeps all")
    sampling.add_argument("--min-p", type=float, help="keep tokens of at least p times the likeliest; 0 keeps all")
    sampling.add_argument("--seed", type=int, default=0, help="default: 0")
    parser.add_argument(
        "--dtype", choices=["auto", "float32", "float16", "bfloat16"], default="auto", help="default: the checkpoint's"
    )
    parser.add_argument("--device", help="default: cuda if there is one, else cpu")
    args = parser.parse_args(argv)
    if args.model is not None and args.prompt is None:
        parser.error("--model needs a --prompt: the sums are only for the shipped checkpoint")
    if args.max_new_tokens is None:
        args.max_new_tokens = 8 if args.prompt is None else 64
    if args.max_new_tokens < 1:
        parser.error(f"--max-new-tokens must be at least 1, got {args.max_new_tokens}")
    if args.device is None:
        args.device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(args.device)
    except RuntimeError:
        parser.error(f"--device must be cpu, cuda or cuda:N, got {args.device!r}")
    if device.type == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch sees no GPU here")
    return args


def sampling_settings(args: argparse.Namespace) -> dict[str, Any] | None:
    """The sampler's arguments, or None for greedy."""
    if args.temperature is args.top_k is args.top_p is args.min_p is None:
        return None
    return {
        "temperature": 1.0 if args.temperature is None else args.temperature,
        "top_k": args.top_k or 0,
        "top_p": 1.0 if args.top_p is None else args.top_p,
        "min_p": args.min_p or 0.0,
        "seed": args.seed,
    }


def load(name: str, dtype: str, device: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=dtype)
    except OSError as error:
        raise SystemExit(f"cannot load {name}: {error}") from error
    if tokenizer.pad_token is None:  # Llama's own tokenizers have none; padding is masked, so any token does
        tokenizer.pad_token = tokenizer.eos_token
    return model.to(device).eval(), tokenizer


def first_difference(run: Run, unpatched: Run) -> tuple[int, int] | None:
    """(prompt, token) where the two runs part, or None."""
    for i, (ours, theirs) in enumerate(zip(run.tokens, unpatched.tokens, strict=True)):
        if ours != theirs:
            same = 0
            while same < min(len(ours), len(theirs)) and ours[same] == theirs[same]:
                same += 1
            return i, same
    return None


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    sampling = sampling_settings(args)
    pairs = some_held_out_pairs(SUM_COUNT, SUM_SEED) if args.prompt is None else []
    prompts = args.prompt or [prompt_of(pair) for pair in pairs]
    model, tokenizer = load(args.model or str(CHECKPOINT), args.dtype, args.device)
    generator = Generator(model, tokenizer, prompts)

    repeats = 5 if pairs else 1
    unpatched = generator.measured("unpatched", args.max_new_tokens, sampling, repeats)
    report = gqa_kernels.patch(model)
    try:
        patched = generator.measured("patched", args.max_new_tokens, sampling, repeats)
    finally:
        gqa_kernels.unpatch(model)
    whole = generator.measured("hf.generate", args.max_new_tokens, sampling, repeats, whole=True)

    answers = [generator.text(tokens) for tokens in patched.tokens]
    right = [answer == answer_of(pair) for answer, pair in zip(answers, pairs, strict=False)]
    if pairs:
        for prompt, answer, mark in zip(prompts, answers, right, strict=True):
            print(f"{prompt:>8}{answer:<5} {'✓' if mark else '✗'}")
    else:
        for prompt, answer in zip(prompts, answers, strict=True):
            print(f"{prompt}{answer}\n")

    print(f"\n{report}\n")
    dtype = str(model.dtype).removeprefix("torch.")
    print(f"{len(prompts)} prompts as one left-padded batch, {dtype} on {model.device}")
    for label, run in (("unpatched", unpatched), ("patched", patched), ("hf.generate", whole)):
        print(f"{label:12} {run.tokens_per_second:10,.0f} tokens/s")
    difference = first_difference(patched, unpatched) or (None if sampling else first_difference(whole, unpatched))
    if difference is None:
        print("tokens: all the same as the unpatched model's")
    else:
        print(f"tokens: prompt {difference[0]} differs from the unpatched model's at new token {difference[1]}")
    if not pairs:
        return 0
    share = sum(right) / len(right)
    print(f"right: {sum(right)} of {len(right)} ({share:.1%})")
    # Sampled tokens may rightly differ, or be wrong: only greedy answers are judged.
    return 0 if sampling or (share >= NEEDED_SHARE and difference is None) else 1


if __name__ == "__main__":
    sys.exit(main())
