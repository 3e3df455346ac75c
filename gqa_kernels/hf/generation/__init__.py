"""Whole-model generation over a HuggingFace model's own weights: one CUDA graph per token.

weights.py reads the model into a record of tensors; state.py holds what changes; step.py is the forward from one to the
other; drawing.py draws the next token; graphs.py captures the step and keeps it; session.py is one generation;
stopping.py finds where rows end; generate.py is what users call.
"""

from __future__ import annotations

from gqa_kernels.hf.generation.generate import generate
from gqa_kernels.hf.generation.graphs import release

__all__ = ["generate", "release"]
