"""One of two processes that share a model's heads: run by torch.distributed.run over saved models."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
import torch.distributed as dist

sys.path.insert(0, str(Path(__file__).parents[1]))

from transformers import AutoModelForCausalLM

import gqa_kernels
from support.llama import make_prompt


class Recorded:
    """Calls an attention op of the package, and remembers with how many heads."""

    def __init__(self, name: str) -> None:
        self.name, self.op, self.heads = name, getattr(gqa_kernels, name), set()
        setattr(gqa_kernels, name, self)

    def __call__(self, q: torch.Tensor, k: torch.Tensor, *args: object, **kwargs: object) -> object:
        self.heads.add((q.shape[2], k.shape[2]))
        return self.op(q, k, *args, **kwargs)


def main(folders: list[str]) -> None:
    dist.init_process_group("gloo")
    prompt = make_prompt("cpu", [11, 26])
    ops = [Recorded(name) for name in ("gqa_attention_prefill", "gqa_attention_decode")]
    for folder in folders:
        whole = AutoModelForCausalLM.from_pretrained(folder).eval()
        model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
        config = model.config
        expected, shared = (m.generate(**prompt, max_new_tokens=6, do_sample=False) for m in (whole, model))
        with gqa_kernels.patched(model) as report:
            actual = model.generate(**prompt, max_new_tokens=6, do_sample=False)
        assert torch.equal(actual, shared) and torch.equal(actual, expected), folder
        assert not report.fallbacks, str(report)
        for op in ops:
            assert op.heads == {(config.num_attention_heads // 2, config.num_key_value_heads // 2)}, (folder, op.heads)
            op.heads.clear()
        print(f"rank {dist.get_rank()}: {config.model_type} is the same", flush=True)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1:])
