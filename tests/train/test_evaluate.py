"""Held-out losses, also by how many tokens they are predicted from."""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from helpers.tiny_models import loud_model, packed_batch, tiny_config
from nemo_hybrid.config.run import TrainOptions
from nemo_hybrid.objectives.next_token import NextToken
from nemo_hybrid.train.evaluate import heldout_losses

ROWS = [[9, 1, 2, 8], [4, 16], [20], [1, 1, 1, 17]]
WORLD: Any = SimpleNamespace(device=torch.device("cpu"), sum=lambda t: t, part=0, cp=1)


def by_hand(model: Any, batches: list[Any], in_document: bool = True) -> dict[str, float]:
    """Document by document, each read alone."""
    losses: dict[int, list[float]] = defaultdict(list)
    for batch in batches:
        for row, lengths in enumerate(ROWS):
            start = 0
            for length in lengths:
                window = torch.cat([batch.ids_BS[row], batch.labels_BS[row, -1:]])
                ids = window[start : start + length]
                logits = model(ids[None]).logits[0, :-1]
                for at, ce in enumerate(F.cross_entropy(logits, ids[1:], reduction="none")):
                    tokens = at + 1 + (0 if in_document else start)
                    band = next(2**k for k in range(9) if tokens <= 2**k)
                    losses[band].append(float(ce))
                start += length
    return {f"loss_at_{band}": sum(ce) / len(ce) for band, ce in sorted(losses.items())}


@torch.no_grad()
def test_bands_of_positions_are_those_of_documents_read_alone() -> None:
    model = loud_model(tiny_config("ME*", mtp_num_depths=2))
    batches = [packed_batch(model.config, ROWS)] * 2
    objective = NextToken(model, TrainOptions())
    found = heldout_losses(objective, batches, WORLD, positions=True)
    expected = by_hand(model, batches)
    assert list(found) == ["loss", "mtp_1", "mtp_2", *expected]
    assert list(expected) == [f"loss_at_{2**k}" for k in range(6)]
    tolerance = 1e-5
    for name, loss in expected.items():
        assert found[name] == pytest.approx(loss, rel=tolerance)
    # Positions in the row would be other bands.
    in_row = by_hand(model, batches, in_document=False)
    assert any(abs(in_row[n] - loss) > 50 * tolerance * loss for n, loss in expected.items())
    assert heldout_losses(objective, batches, WORLD) == {
        name: found[name] for name in ("loss", "mtp_1", "mtp_2")
    }
