"""What docs/extending.md says of mixers is so: its mixer trains, isolates documents, and reads in
pieces what it reads at once."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helpers.bands import SABOTAGE, band
from helpers.pages import code_of
from helpers.tiny_models import loud_model, random_ids, tiny_config
from nemo_hybrid.config.model import LAYER_LETTERS
from nemo_hybrid.model.cache import commit
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.layer import MIXERS
from nemo_kernels.documents import Documents

Make = Callable[[], HybridLM]


@pytest.fixture
def make(monkeypatch: pytest.MonkeyPatch) -> Make:
    monkeypatch.setitem(LAYER_LETTERS, "G", "decaying mean")
    monkeypatch.setitem(MIXERS, "G", code_of("A new mixer")["DecayingMean"])
    return lambda: loud_model(tiny_config("G*GM", mtp_num_depths=0)).double().eval()


def furthest(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


def read_in_pieces(model: HybridLM, ids_BS: Tensor, pieces: list[tuple[int, int]]) -> Tensor:
    """Logits of the last token of each row, whose tokens come in pieces of other lengths."""
    caches = model.new_caches(2, ids_BS.shape[1] + max(map(max, pieces)))
    for counts in pieces:
        counts_B = torch.tensor(counts)
        given_BS = torch.full((2, max(counts)), 7)
        for row, (begin, count) in enumerate(zip(caches.lengths_B.tolist(), counts, strict=True)):
            given_BS[row, :count] = ids_BS[row, begin : begin + count]
        _, after = model.read(given_BS, counts_B, caches)
        commit(caches, after)
    return model.logits(model.decode(ids_BS[:, -1], caches))


def test_it_reads_in_pieces_what_it_reads_at_once(make: Make) -> None:
    model = make()
    ids_BS = random_ids(model.config, 2, 12)
    with torch.no_grad():
        expected = model(ids_BS).logits[:, -1]
    found = read_in_pieces(model, ids_BS, [(5, 1), (0, 7), (6, 3)])
    # Norms, softmax and logits are fp32; a token that was lost changes everything.
    bound = band(torch.float32, model.config.hidden_size)
    assert furthest(found, expected) < bound
    lost = read_in_pieces(model, ids_BS, [(5, 1), (0, 7), (6, 2)])
    assert furthest(lost, expected) > SABOTAGE * bound


def test_packed_documents_do_not_see_each_other(make: Make) -> None:
    model = make()
    ids_BS = random_ids(model.config, 1, 12)
    starts_BS = torch.zeros(1, 12, dtype=torch.bool)
    starts_BS[:, 5] = True
    documents = Documents.from_starts(starts_BS)
    other_BS = ids_BS.clone()
    other_BS[:, :5] = (ids_BS[:, :5] + 1) % model.config.vocab_size
    with torch.no_grad():
        both = [model.forward_hidden(ids, documents)[0][:, 5:] for ids in (ids_BS, other_BS)]
        seen = [model.forward_hidden(ids)[0][:, 5:] for ids in (ids_BS, other_BS)]
    assert torch.equal(*both)
    assert furthest(*seen) > 1e-3


def test_it_trains(make: Make) -> None:
    model = make()
    ids_BS = random_ids(model.config, 2, 12)
    model(ids_BS).logits.square().mean().backward()
    assert all(p.grad is not None and p.grad.norm() > 0 for p in model.parameters())
