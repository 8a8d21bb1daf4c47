"""Packed documents do not see each other.

Without MoE layers nothing of one document may move another one by a single bit: not its hidden
states, not those of multi-token prediction (positions without prediction included), not the
gradients of its embeddings. Experts work on groups of tokens whose sizes depend on all documents,
so with them other documents change the order of sums, and equality holds up to rounding.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from helpers.tiny_models import CHUNK, CONV, document_numbers, loud_model, random_ids, tiny_config
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.mtp import shift_left
from nemo_kernels.documents import Documents

LENGTHS = [1, CONV - 1, CONV, CONV + 1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK]
NO_MOE = tiny_config("M*-M", mtp_pattern="**", mtp_num_depths=2)
MOE = tiny_config("ME*E", mtp_pattern="*E", mtp_num_depths=2)


def outputs(model: HybridLM, ids_BS: Tensor, seq_idx_BS: Tensor) -> list[Tensor]:
    """Hidden states [B, S, D] of the backbone and of each depth."""
    documents = Documents.from_numbers(seq_idx_BS)
    h_BSD, _ = model.forward_hidden(ids_BS, documents)
    return [h_BSD, *model.forward_mtp(h_BSD, ids_BS, documents)[0]]


def with_embedding_gradients(
    model: HybridLM, ids_BS: Tensor, seq_idx_BS: Tensor, document: int
) -> tuple[list[Tensor], list[Tensor]]:
    """Hidden states, and the gradients [B, S, D] that a loss of one document sends to what the
    embedding returned: once for the backbone and once for each depth."""
    embedded: list[Tensor] = []
    handle = model.backbone.embeddings.register_forward_hook(
        lambda _m, _a, out: embedded.append(out.requires_grad_())
    )
    hidden = outputs(model, ids_BS, seq_idx_BS)
    handle.remove()
    mine_BS1 = (seq_idx_BS == document)[..., None]
    probe = torch.randn(hidden[0].shape, generator=torch.Generator().manual_seed(9))
    loss = sum((h * probe * mine_BS1).sum() for h in hidden)
    return [h.detach() for h in hidden], list(torch.autograd.grad(loss, embedded))


def with_other_tokens(ids_BS: Tensor, where_BS: Tensor, vocab: int) -> Tensor:
    """Every token there becomes another one."""
    generator = torch.Generator().manual_seed(77)
    shift_BS = torch.randint(1, vocab - 2, ids_BS.shape, generator=generator)
    return torch.where(where_BS, (ids_BS - 1 + shift_BS) % (vocab - 1) + 1, ids_BS)


def largest(x: Tensor) -> float:
    return float(x.abs().max()) if x.numel() else 0.0


def leaks(model: HybridLM, lengths: tuple[int, ...]) -> dict[str, float]:
    """For every document: change all the others. The largest change seen in its hidden states and
    in the gradients of its loss, and the largest gradient that its loss sends to the others."""
    seq_idx_BS = document_numbers(*lengths)
    ids_BS = random_ids(model.config, 1, sum(lengths))
    worst = {"hidden": 0.0, "gradient": 0.0, "elsewhere": 0.0}
    for document in range(len(lengths)):
        mine_BS = seq_idx_BS == document
        other_BS = with_other_tokens(ids_BS, ~mine_BS, model.config.vocab_size)
        assert (other_BS != ids_BS).equal(~mine_BS)
        before = with_embedding_gradients(model, ids_BS, seq_idx_BS, document)
        after = with_embedding_gradients(model, other_BS, seq_idx_BS, document)
        assert len(before[0]) == len(before[1]) == 1 + model.config.mtp_num_depths
        for kind, old, new in zip(("hidden", "gradient"), before, after, strict=True):
            for a, b in zip(old, new, strict=True):
                assert largest(a[mine_BS]) > 1e-2
                worst[kind] = max(worst[kind], largest((a - b)[mine_BS]))
        for gradient in before[1]:
            worst["elsewhere"] = max(worst["elsewhere"], largest(gradient[~mine_BS]))
    return worst


@pytest.mark.parametrize("length", LENGTHS)
def test_not_a_bit_passes_between_documents(length: int) -> None:
    """Documents of each length stand first, in the middle and last, on and off the chunk grid."""
    model = loud_model(NO_MOE)
    for lengths in ((length, 5, length), (CHUNK, length, 2)):
        assert leaks(model, lengths) == {"hidden": 0.0, "gradient": 0.0, "elsewhere": 0.0}


def test_documents_of_other_rows_do_not_pass_a_bit_either() -> None:
    model = loud_model(NO_MOE)
    seq_idx_BS = torch.cat(
        [document_numbers(4, 9), document_numbers(9, 3, 1), document_numbers(13)]
    )
    ids_BS = random_ids(model.config, 3, 13)
    mine_BS = torch.zeros_like(ids_BS, dtype=torch.bool)
    mine_BS[1, 9:12] = True
    other_BS = with_other_tokens(ids_BS, ~mine_BS, model.config.vocab_size)
    with torch.no_grad():
        before, after = (outputs(model, ids, seq_idx_BS) for ids in (ids_BS, other_BS))
    for a, b in zip(before, after, strict=True):
        assert torch.equal(a[mine_BS], b[mine_BS])


def test_with_experts_only_rounding_passes() -> None:
    model = loud_model(MOE)
    worst = leaks(model, (CONV + 1, CHUNK + 1, 3, 2 * CHUNK))
    assert worst["hidden"] < 1e-5
    assert worst["gradient"] < 1e-4
    assert worst["elsewhere"] == 0.0


@pytest.mark.parametrize("config", [NO_MOE, MOE], ids=["no-moe", "moe"])
@torch.no_grad()
def test_packed_equals_separate(config: HybridConfig) -> None:
    model = loud_model(config)
    ids_BS = random_ids(config, 1, sum(LENGTHS))
    packed = outputs(model, ids_BS, document_numbers(*LENGTHS))
    start = 0
    for length in LENGTHS:
        piece = slice(start, start + length)
        for together, alone in zip(packed, outputs_alone(model, ids_BS[:, piece]), strict=True):
            assert (together[:, piece] - alone).norm() < 1e-5 * alone.norm()
        start += length


def outputs_alone(model: HybridLM, ids_BS: Tensor) -> list[Tensor]:
    h_BSD, _ = model.forward_hidden(ids_BS)
    return [h_BSD, *model.forward_mtp(h_BSD, ids_BS)[0]]


def without_documents(function: Callable[..., Any]) -> Callable[..., Any]:
    """The same operation, but the last argument, the documents, is dropped."""
    return lambda *args: function(*args[:-1], None)


@pytest.mark.parametrize(
    "place",
    [
        "nemo_hybrid.model.sequence.causal_conv1d",
        "nemo_hybrid.model.sequence.ssd_scan",
        "nemo_hybrid.model.sequence.attention",
    ],
)
def test_a_mixer_without_documents_is_noticed(place: str) -> None:
    model = loud_model(NO_MOE)
    module, _, name = place.rpartition(".")
    operation = getattr(importlib.import_module(module), name)
    with patch(place, without_documents(operation)):
        worst = leaks(model, (5, CHUNK + 1, 4))
    assert min(worst.values()) > 1e-2


def test_a_shift_across_documents_is_noticed() -> None:
    """At the end of a document, where depth k has no prediction, it would read the next one."""

    def across(x_BS: Tensor, k: int, _: Tensor | None, fill: int = 0) -> Tensor:
        return shift_left(x_BS, k, None, fill)

    model = loud_model(NO_MOE)
    with patch("nemo_hybrid.model.hybrid.shift_left", across):
        assert leaks(model, (5, CHUNK + 1, 4))["hidden"] > 1e-2


def test_one_differenced_cumulative_sum_is_noticed() -> None:
    """The usual chunked scan takes exp(cs_i - cs_j) of one sum over the whole chunk: equal in
    exact arithmetic, but the rounding of the sum carries bits over. This test must see them."""
    model = loud_model(tiny_config("M", mtp_pattern="*", mtp_num_depths=1))

    def usual(x, dt, A, B, C, D, chunk, documents):  # type: ignore[no-untyped-def]
        heads = x.shape[2] // B.shape[2]
        B, C = B.repeat_interleave(heads, 2), C.repeat_interleave(heads, 2)
        cs = (dt * A).cumsum(1)
        decay = (cs[:, :, None] - cs[:, None]).exp() * dt[:, None]
        seq_idx = documents.seq_idx_BS
        mask = (seq_idx[:, :, None] == seq_idx[:, None]).tril()[..., None]
        M = (torch.einsum("blhn,bshn->blsh", C, B) * decay).masked_fill(~mask, 0.0)
        return torch.einsum("blsh,bshp->blhp", M, x) + D[:, None] * x, None

    lengths = (CHUNK - 1, CHUNK + 1, 4)
    assert max(leaks(model, lengths).values()) == 0.0
    with patch("nemo_hybrid.model.sequence.ssd_scan", usual):
        worst = leaks(model, lengths)
    assert 0.0 < worst["hidden"] < 1e-4
