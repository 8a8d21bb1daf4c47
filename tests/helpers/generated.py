"""Texts that a model generates, as tensors."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_hybrid.generation.batched import Generator, Request
from nemo_hybrid.model.hybrid import HybridLM


def greedy(model: HybridLM, prompt_BS: Tensor, new: int, slots: int = 64) -> Tensor:
    """The most probable tokens [B, new] after prompts of one length."""
    requests = [Request(row, ids, new) for row, ids in enumerate(prompt_BS.tolist())]
    texts = {r.request.prompt: r.ids for r in Generator(model, slots).run(requests)}
    return torch.tensor([texts[row] for row in range(len(prompt_BS))])
