"""Trains the small Llama in examples/checkpoint to add two numbers of up to three digits.

    python examples/train_checkpoint.py

1,000 pairs are held out by a fixed seed before anything else happens; the run fails unless the saved checkpoint,
loaded again from its files, answers at least 97 % of them exactly.
"""

from __future__ import annotations

import argparse
import json
import shlex
import sys
import time
from pathlib import Path

import numpy as np
import tokenizers
import torch
import transformers
from addition import (
    BOS,
    CHECKPOINT,
    EOS,
    HELD_OUT_COUNT,
    HELD_OUT_SEED,
    LIMIT,
    PAD,
    SYMBOLS,
    UNK,
    answer_of,
    held_out_pairs,
    operand_weights,
    prompt_of,
)
from torch import Tensor
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

NEEDED_ACCURACY = 0.97
MAX_WEIGHT_BYTES = 4_000_000
MAX_LENGTH = 256  # far beyond any sum: room for tests that go on after <eos>
IGNORED = -100  # the target that cross_entropy skips
PEAK_LEARNING_RATE = 2e-3
WARMUP_STEPS = 100
DECAY_SHARE = 0.7  # the last part of the run, over which the learning rate falls to nothing


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token per character, `<bos>` in front, padded on the left."""
    vocabulary = {token: i for i, token in enumerate([PAD, BOS, EOS, UNK, *SYMBOLS])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocabulary, unk_token=UNK))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Split(tokenizers.Regex("."), "isolated")
    tokenizer.decoder = tokenizers.decoders.Fuse()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single=f"{BOS} $A", special_tokens=[(BOS, vocabulary[BOS])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNK,
        padding_side="left",
        model_max_length=MAX_LENGTH,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=3,
        num_attention_heads=8,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=MAX_LENGTH,
        initializer_range=0.04,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
    )
    return LlamaForCausalLM(config)


def all_rows(tokenizer: PreTrainedTokenizerFast) -> Tensor:
    """Token ids of every sum, [LIMIT², longest], uint8: <bos> prompt answer <eos>, padded on the right.

    Right padding needs no mask under causal attention. RoPE sees only distances, so what is learnt holds under left
    padding too.
    """
    numbers = range(LIMIT)
    texts = [f"^{prompt_of((a, b))}{answer_of((a, b))}$" for a in numbers for b in numbers]
    id_of_byte = np.full(256, tokenizer.unk_token_id, dtype=np.uint8)
    for symbol, token in [("\0", PAD), ("^", BOS), ("$", EOS), *((s, s) for s in SYMBOLS)]:
        id_of_byte[ord(symbol)] = tokenizer.convert_tokens_to_ids(token)
    longest = max(map(len, texts))
    packed = b"".join(text.encode().ljust(longest, b"\0") for text in texts)
    return torch.from_numpy(id_of_byte[np.frombuffer(packed, dtype=np.uint8)].reshape(-1, longest))


def draw_rows(count: int, generator: torch.Generator) -> Tensor:
    """Indices into all_rows for the whole training, none of them held out."""
    weight = torch.tensor(operand_weights(), dtype=torch.float64)
    weights = torch.outer(weight, weight)
    held_out = torch.zeros(LIMIT, LIMIT, dtype=torch.bool)
    for a, b in held_out_pairs():
        held_out[a, b] = held_out[b, a] = True
    weights[held_out] = 0
    rows = torch.multinomial(weights.flatten(), count, replacement=True, generator=generator)
    if held_out.flatten()[rows].any():
        raise RuntimeError("a held-out pair was drawn for training")
    return rows


def learning_rate_factor(step: int, steps: int) -> float:
    return min(1.0, (step + 1) / WARMUP_STEPS, (steps - step) / (DECAY_SHARE * steps))


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, batches: Tensor, device: torch.device) -> None:
    """batches: [steps, batch] indices into all_rows."""
    rows = all_rows(tokenizer).to(device)
    batches = batches.to(device)
    steps = len(batches)
    equals, pad = tokenizer.convert_tokens_to_ids("="), tokenizer.pad_token_id
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=PEAK_LEARNING_RATE, betas=(0.9, 0.98), weight_decay=0.05, fused=True
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, steps))
    model.train()
    progress = tqdm(batches, desc="training", unit="step")
    for step, batch in enumerate(progress):
        ids = rows[batch].long()
        inputs, targets = ids[:, :-1], ids[:, 1:]
        is_answer = ((inputs == equals).cumsum(1) > 0) & (targets != pad)
        logits = model(input_ids=inputs, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), targets.masked_fill(~is_answer, IGNORED).flatten()
        )
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 50 == 49:  # reading the loss waits for the device, so not at every step
            progress.set_postfix(loss=f"{loss.item():.5f}")
    model.eval()


@torch.inference_mode()
def exact_match(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerBase, device: torch.device
) -> tuple[float, list[str]]:
    """Share of the held-out prompts answered exactly, as one left-padded batch, and the wrong answers in words."""
    pairs = held_out_pairs()
    inputs = tokenizer([prompt_of(pair) for pair in pairs], return_tensors="pt", padding=True).to(device)
    tokens = model.generate(**inputs, max_new_tokens=8, do_sample=False)
    texts = tokenizer.batch_decode(tokens[:, inputs.input_ids.shape[1] :], skip_special_tokens=True)
    wrong = [
        f"{prompt_of(pair)}{text} (right: {answer_of(pair)})"
        for pair, text in zip(pairs, texts, strict=True)
        if text != answer_of(pair)
    ]
    return 1 - len(wrong) / len(pairs), wrong


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="Train the small addition Llama of the examples.")
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="where to save (default: examples/checkpoint)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=512)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse_arguments(argv)
    device = torch.device(args.device)
    start = time.perf_counter()
    torch.manual_seed(args.seed)
    tokenizer = make_tokenizer()
    # Weights and draws come from the CPU's generator: a seed means the same start and the same data on every device.
    model = make_model(tokenizer).to(device)
    generator = torch.Generator().manual_seed(args.seed)
    batches = draw_rows(args.steps * args.batch_size, generator).view(args.steps, args.batch_size)
    train(model, tokenizer, batches, device)
    seconds = time.perf_counter() - start

    model.save_pretrained(args.out)
    tokenizer.save_pretrained(args.out)
    weight_bytes = (args.out / "model.safetensors").stat().st_size
    loaded = AutoModelForCausalLM.from_pretrained(args.out).to(device)
    accuracy, wrong = exact_match(loaded, AutoTokenizer.from_pretrained(args.out), device)
    facts = {
        "command": shlex.join(["python", "examples/train_checkpoint.py", *(sys.argv[1:] if argv is None else argv)]),
        "seed": args.seed,
        "steps": args.steps,
        "batch_size": args.batch_size,
        "held_out_seed": HELD_OUT_SEED,
        "held_out_pairs": HELD_OUT_COUNT,
        "held_out_exact_match": accuracy,
        "parameters": model.num_parameters(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else device.type,
        "training_seconds": round(seconds, 1),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
    }
    (args.out / "training.json").write_text(json.dumps(facts, indent=2) + "\n")

    for line in wrong:
        print(f"wrong: {line}")
    print(f"{accuracy:.1%} of {HELD_OUT_COUNT} held-out sums exact after {seconds:.0f} s; saved in {args.out}")
    if weight_bytes > MAX_WEIGHT_BYTES:
        print(f"failed: model.safetensors has {weight_bytes} bytes, at most {MAX_WEIGHT_BYTES} wanted", file=sys.stderr)
        return 1
    if accuracy < NEEDED_ACCURACY:
        print(f"failed: at least {NEEDED_ACCURACY:.0%} wanted", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
