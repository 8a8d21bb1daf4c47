"""Parts of a loss, as the tests compare them."""

from __future__ import annotations

import torch
from torch import Tensor

from nemo_hybrid.objectives.base import LossParts


def ce_sums(parts: LossParts) -> Tensor:
    """Summed cross-entropies [1 + D]: next token, then each depth."""
    depths = sum(name.startswith("mtp_") for name in parts.sums)
    return torch.stack([parts.sums["ce"], *(parts.sums[f"mtp_{k}"] for k in range(1, depths + 1))])
