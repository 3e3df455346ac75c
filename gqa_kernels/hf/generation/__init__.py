"""Whole-model generation over a HuggingFace model's own weights: one CUDA graph per token.

record.py is what a step knows of a model; weights.py reads it, and watch.py sees when it no longer holds. state.py has
what changes, rotary.py the tables beside it. step.py is the forward from one to the other, prefill.py takes prompts
through it, drawing.py draws the next token, graphs.py captures the step and keeps it. session.py is one generation,
stopping.py finds where its rows end. generate.py is what users call, loop.py what a patched model's generate() does.
"""

from __future__ import annotations

from gqa_kernels.hf.generation.generate import generate
from gqa_kernels.hf.generation.graphs import release

__all__ = ["generate", "release"]
