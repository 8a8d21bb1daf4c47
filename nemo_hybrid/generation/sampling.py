"""Texts token by token: one is drawn from the model's prediction, and read.

Shapes: B rows, S tokens of the prompt, D hidden, V vocabulary.
"""

from collections.abc import Iterator

import torch
from torch import Tensor

from nemo_hybrid.errors import UserError
from nemo_hybrid.model.cache import commit
from nemo_hybrid.model.hybrid import HybridLM

_PIECE = 2048
"""Tokens of a prompt that are read at once: so much bounds the memory that it takes."""
_ROOM = 256
"""New tokens that caches have room for at first."""


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

    ``prompt_BS`` holds prompts of equal length of at least one token. Raises UserError where the
    model gives no finite logits.
    """
    generator = torch.Generator(prompt_BS.device).manual_seed(seed)
    rows, length = prompt_BS.shape
    caches = model.new_caches(rows, length + min(max_new_tokens, _ROOM))
    for ids_BS in prompt_BS.split(_PIECE, dim=1):
        counts_B = torch.full((rows,), ids_BS.shape[1], device=ids_BS.device)
        h_BSD, after = model.read(ids_BS, counts_B, caches)
        commit(caches, after)
    h_BD = h_BSD[:, -1]
    for count in range(1, max_new_tokens + 1):
        logits_BV = model.logits(h_BD)
        if not logits_BV.isfinite().all():
            raise UserError(
                f"the logits of new token {count} are not finite, though the weights are: the "
                "model is broken"
            )
        ids_B = sample(logits_BV, temperature, top_p, generator)
        yield ids_B
        if count < max_new_tokens:
            caches.reserve(length + count)
            h_BD = model.decode(ids_B, caches)
