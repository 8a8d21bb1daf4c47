"""Boosting against a loop over tokens, in fp64 from the same hidden states."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.bands import SABOTAGE, band
from helpers.tiny_models import document_numbers, loud_model, packed_batch, tiny_config
from nemo_hybrid.config.finetune import BoostOptions
from nemo_hybrid.config.run import TrainOptions
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.objectives.base import LossParts, Normalizer
from nemo_hybrid.objectives.boost import Boosted, draw, mixed

DEPTHS = 3
CONFIG = tiny_config("M-", mtp_pattern="*", mtp_num_depths=1)
TRAIN = TrainOptions(mtp_loss_weight=0.5, aux_loss_weight=0.0)


def made(loss: str, **options: object) -> tuple[Boosted, Batch]:
    model = loud_model(CONFIG, 2)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("mtp."))
    boost = BoostOptions(loss=loss, depths=DEPTHS, mixing=False, **options)  # type: ignore[arg-type]
    batch = replace(packed_batch(CONFIG, [[9, 2, 6], [17]]), sample_ids=(5, 8))
    return Boosted(model, TRAIN, lambda step: False, boost), batch


def learnt(objective: Boosted, batch: Batch) -> tuple[LossParts, Normalizer]:
    unit = Normalizer(objective.count(batch, 0), 2)
    parts = objective(batch, unit)
    parts.loss.backward()
    return parts, unit


def one(loss: str, z_V: Tensor, own_V: Tensor, target: int, t: float) -> Tensor:
    """``own_V``: the backbone's logits for the same token."""
    if loss == "ce":
        return F.cross_entropy(z_V[None], torch.tensor([target]))
    if loss == "lk":
        return -torch.minimum(z_V.softmax(0), own_V.softmax(0)).sum().log()
    logs = ((x / t).log_softmax(0) for x in (z_V, own_V))
    return t**2 * F.kl_div(*logs, reduction="sum", log_target=True)


def naive(model: HybridLM, batch: Batch, loss: str, t: float, late: int = 0) -> list[Tensor]:
    """The sum of each depth, one token after the other; ``late``: a mistake in places."""
    h_BSD, _ = model.forward_hidden(batch.ids_BS, batch.documents)
    hidden, _ = model.forward_mtp(h_BSD, batch.ids_BS, batch.documents, DEPTHS)
    head_VD, sums = model.lm_head.weight.double(), []
    for k, d_BSD in enumerate(hidden, 1):
        total = torch.zeros((), dtype=torch.float64)
        seq_idx_BS = batch.documents.seq_idx_BS
        for b, mask_S in enumerate(batch.loss_mask_BS):
            for s in range(len(mask_S) - k):
                if seq_idx_BS[b, s] == seq_idx_BS[b, s + k] and mask_S[s + k]:
                    z_V, own_V = (
                        head_VD @ h.double() for h in (d_BSD[b, s], h_BSD[b, s + k - late])
                    )
                    total = total + one(loss, z_V, own_V, int(batch.labels_BS[b, s + k]), t)
        sums.append(total)
    return sums


@pytest.mark.parametrize("loss", ["kl", "lk", "ce"])
def test_losses_and_gradients(loss: str) -> None:
    objective, batch = made(loss, **({"temperature": 3.0} if loss == "kl" else {}))
    model = objective.model
    parts, unit = learnt(objective, batch)
    ours = {n: p.grad for n, p in model.named_parameters() if p.grad is not None}
    assert set(ours) == {n for n, _ in model.named_parameters() if n.startswith("mtp.")}
    model.zero_grad()
    sums = naive(model, batch, loss, 3.0)
    rough = band(torch.float32, 200)
    for k, total in enumerate(sums, 1):
        assert float(parts.sums[f"mtp_{k}"]) == pytest.approx(float(total.detach()), rel=rough)
    whole = sum(0.5 / DEPTHS * s / n for s, n in zip(sums, unit.counts_N[1:], strict=True))
    assert float(parts.loss.detach()) == pytest.approx(float(whole.detach()), rel=rough)
    whole.backward()
    for name, gradient in ours.items():
        theirs = model.get_parameter(name).grad
        assert (gradient - theirs).norm() < 10 * rough * theirs.norm(), name
    means = objective.means(parts.sums, unit)
    assert means["loss"] == pytest.approx(sum(means[f"mtp_{k}"] for k in range(1, 4)) / 3)
    if loss != "ce":  # the backbone's prediction of the token before
        wrong = naive(model, batch, loss, 3.0, late=1)
        assert all(abs(a / b - 1) > SABOTAGE * rough for a, b in zip(wrong, sums, strict=True))


def test_a_block_that_says_what_the_backbone_says_learns_nothing() -> None:
    """Where both are the same distribution both losses are 0."""
    for loss in ("kl", "lk"):
        objective, _ = made(loss)
        h_RD = torch.randn(6, CONFIG.hidden_size, generator=torch.Generator().manual_seed(0))
        assert abs(float(objective._apart(h_RD, h_RD.clone(), torch.ones(6)))) < 1e-5


def test_mixing_takes_states_that_aim_at_the_same_token() -> None:
    rows, lengths = 2, (4, 3, 5)
    seq_idx_BS = document_numbers(*lengths).repeat(rows, 1)
    S, width = sum(lengths), 3
    states = [torch.randn(rows, S, width) for _ in range(4)]
    drawn_BS = draw(torch.tensor([[3], [4]]), S, 4)
    found = mixed(states, drawn_BS, seq_idx_BS)
    older = 0
    for b in range(rows):
        for s in range(S):
            j = int(drawn_BS[b, s])
            ahead = s + 3 - j  # state j at position u aims at token u + 1 + j
            inside = ahead < S and seq_idx_BS[b, ahead] == seq_idx_BS[b, s]
            older += inside and j < 3
            expected = states[j][b, ahead] if inside else states[3][b, s]
            assert torch.equal(found[b, s], expected)
    assert older > 5
    newest = mixed(states, torch.full_like(drawn_BS, 3), seq_idx_BS)
    assert torch.equal(newest, states[3])


def test_draws_are_uniform_and_belong_to_the_row() -> None:
    streams_B1 = torch.tensor([[11], [12]])
    counts = draw(streams_B1, 3000, 3).flatten().bincount(minlength=3)
    assert ((counts - 2000).abs() < 5 * 2000**0.5).all()
    assert torch.equal(draw(streams_B1, 50, 3).flip(0), draw(streams_B1.flip(0), 50, 3))
    assert not torch.equal(draw(streams_B1, 50, 3)[0], draw(streams_B1, 50, 3)[1])


def test_mixing_changes_the_loss_and_does_not_depend_on_the_layout() -> None:
    plain, batch = made("kl")
    objective, _ = made("kl")
    objective.options.mixing = True
    unit = Normalizer(objective.count(batch, 0), 2)
    whole = objective(batch, unit).sums
    assert whole["mtp_1"] == pytest.approx(plain(batch, unit).sums["mtp_1"])  # nothing to choose
    assert abs(whole["mtp_3"] / plain(batch, unit).sums["mtp_3"] - 1) > 1e-3
    assert abs(objective(batch, unit._replace(step=1)).sums["mtp_3"] / whole["mtp_3"] - 1) > 1e-3
    alone = replace(packed_batch(CONFIG, [[9, 2, 6], [17]]), sample_ids=(8, 5))
    assert abs(objective(alone, unit).sums["mtp_3"] / whole["mtp_3"] - 1) > 1e-3
