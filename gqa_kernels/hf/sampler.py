"""generate() with :func:`gqa_kernels.sample`, as a LogitsProcessor."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import LogitsProcessor

import gqa_kernels


class GqaSampler(LogitsProcessor):
    """Draws the next token itself: of the scores it returns, that token's is 0 and every other one's is -inf.

    So greedy search, and assisted decoding too, continue with the token that was drawn::

        model.generate(**inputs, do_sample=False, logits_processor=[GqaSampler(temperature=0.7, top_p=0.9, seed=1)])

    It keeps no state: the place in the random stream is the length of the sequence. The same seed gives the same text
    on CPU and CUDA, with any cache, and whether the tokens come one by one or from an assistant; with a seed per row
    also in any batch. It stands last among the processors of a call, and has no meaning for beam search.

    Args:
        temperature, top_k, top_p, min_p, seed: as in :func:`gqa_kernels.sample`: a number, or a tensor with one value
            per row of the batch.
        repetition_penalty: of all tokens before, those of the prompt too, as transformers' own.
        frequency_penalty, presence_penalty: of the tokens after the first ``prompt_length``.
        prompt_length: ``inputs["input_ids"].shape[1]``; the penalties of generated tokens need it.

    Raises:
        ValueError: a penalty of generated tokens without ``prompt_length``.
    """

    def __init__(
        self,
        *,
        temperature: float | Tensor = 1.0,
        top_k: int | Tensor = 0,
        top_p: float | Tensor = 1.0,
        min_p: float | Tensor = 0.0,
        seed: int | Tensor = 0,
        repetition_penalty: float | Tensor | None = None,
        frequency_penalty: float | Tensor | None = None,
        presence_penalty: float | Tensor | None = None,
        prompt_length: int | None = None,
    ) -> None:
        for name, penalty in (("frequency", frequency_penalty), ("presence", presence_penalty)):
            if penalty is not None and prompt_length is None:
                raise ValueError(f"GqaSampler: {name}_penalty needs prompt_length, which tells generated tokens apart")
        self.temperature, self.top_k, self.top_p, self.min_p, self.seed = temperature, top_k, top_p, min_p, seed
        self.repetition_penalty = repetition_penalty
        self.frequency_penalty = frequency_penalty
        self.presence_penalty = presence_penalty
        self.prompt_length = prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        # A seed per row asks for an offset per row, or the rows' places in the batch would count.
        length = input_ids.shape[1]
        offset = torch.full_like(self.seed, length) if isinstance(self.seed, Tensor) else length
        penalties: dict[str, Any] = {
            "repetition_penalty": self.repetition_penalty,
            "frequency_penalty": self.frequency_penalty,
            "presence_penalty": self.presence_penalty,
        }
        if any(penalty is not None for penalty in penalties.values()):
            penalties["token_counts"] = self._counts(input_ids, scores.shape[-1])
        ids: Any = gqa_kernels.sample(
            scores,
            temperature=self.temperature,
            top_k=self.top_k,
            top_p=self.top_p,
            min_p=self.min_p,
            seed=self.seed,
            offset=offset,
            **penalties,
        )
        return torch.full_like(scores, float("-inf")).scatter_(-1, ids[..., None], 0.0)

    def _counts(self, input_ids: Tensor, vocabulary: int) -> Tensor:
        """How often each token was generated; -1 where only the prompt holds it."""
        prompt = input_ids.shape[1] if self.prompt_length is None else self.prompt_length
        counts = torch.zeros((input_ids.shape[0], vocabulary), dtype=torch.int32, device=input_ids.device)
        generated = input_ids[:, prompt:]
        counts.scatter_add_(-1, generated, torch.ones_like(generated, dtype=torch.int32))
        prompted = torch.zeros_like(counts).scatter_(-1, input_ids[:, :prompt], -1)
        return torch.where(counts > 0, counts, prompted)
