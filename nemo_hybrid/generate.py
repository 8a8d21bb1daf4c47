"""Continue text with a trained model.

Mamba-2 layers carry a state of fixed size and attention layers a key/value cache, so a new token
costs the same however much the Mamba-2 layers have seen.

Shapes: B batch, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from nemo_hybrid.model.hybrid import HybridLM


def sample(
    logits_BV: Tensor, temperature: float, top_p: float, generator: torch.Generator | None = None
) -> Tensor:
    """Next token ids [B]: the most probable at temperature 0, else a draw.

    ``top_p``: only from the fewest most probable tokens that together have at least this
    probability (Holtzman et al. 2020, arXiv 1904.09751); ties keep the smaller id.
    """
    if temperature == 0:
        return logits_BV.argmax(-1)
    # In float64, and with no positive exponent, so that no temperature is too small.
    below_BV = logits_BV.double() - logits_BV.amax(-1, keepdim=True).double()
    probabilities_BV = (below_BV / temperature).softmax(-1)
    if top_p < 1:
        ordered_BV, order_BV = probabilities_BV.sort(dim=-1, descending=True, stable=True)
        before_BV = ordered_BV.cumsum(-1) - ordered_BV
        ordered_BV = ordered_BV.masked_fill(before_BV >= top_p, 0.0)
        probabilities_BV = torch.zeros_like(ordered_BV).scatter(-1, order_BV, ordered_BV)
    return torch.multinomial(probabilities_BV, 1, generator=generator).squeeze(-1)


def generate(
    model: HybridLM,
    prompt_BS: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seed: int = 0,
) -> Iterator[Tensor]:
    """Yield one token id per row [B] at a time, ``max_new_tokens`` times.

    ``prompt_BS`` holds prompts of equal length of at least one token.
    """
    generator = torch.Generator(prompt_BS.device).manual_seed(seed)
    logits_BV, caches = model.prefill(prompt_BS)
    for count in range(1, max_new_tokens + 1):
        ids_B = sample(logits_BV, temperature, top_p, generator)
        yield ids_B
        if count < max_new_tokens:
            logits_BV = model.decode(ids_B, caches)


def stop_ids(directory: Path, default: int) -> list[int]:
    """Ids that end a text: of generation_config.json, else of config.json, else ``default``.

    Raises UserError for ids that are none.
    """
    from nemo_hybrid.checkpoint.companions import read_companions

    companions = read_companions(directory)
    return companions.stop_ids or companions.eos_token_ids or [default]
