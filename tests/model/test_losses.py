"""The pre-training objective against computations by hand, and how its shares add up."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.parts import ce_sums
from helpers.tiny_models import loud_model, packed_batch, random_ids, tiny_config
from nemo_hybrid.config.run import TrainOptions
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.router import RoutingStats, balance_loss, routing_stats
from nemo_hybrid.objectives.base import Normalizer
from nemo_hybrid.objectives.next_token import NextToken, count_targets

ROWS = [[7, 1, 2, 3, 6, 1], [4, 16], [20], [1, 1, 1, 17]]
TRAIN = TrainOptions(mtp_loss_weight=0.3, aux_loss_weight=0.05)
GRADIENTS = 1e-4
"""Relative, of one parameter's: as in test_parity.py, a few have terms that cancel."""
NO_AUX = replace(TRAIN, aux_loss_weight=0.0)


def normalizer(batch: Batch, depths: int) -> Normalizer:
    return Normalizer(count_targets(batch, depths), batch.ids_BS.shape[0])


def gradients(model: HybridLM, loss: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    loss.backward()
    return {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def test_objective_equals_a_computation_from_logits() -> None:
    model = loud_model(tiny_config("ME*", mtp_num_depths=2))
    batch = packed_batch(model.config, ROWS)
    ours = NextToken(model, TRAIN)(batch, normalizer(batch, 2))
    our_gradients = gradients(model, ours.loss)

    h_BSD, stats = model.forward_hidden(batch.ids_BS, batch.documents)
    depths, mtp_stats = model.forward_mtp(h_BSD, batch.ids_BS, batch.documents)
    ce = []
    for k, hidden_BSD in enumerate([h_BSD, *depths]):
        logits, labels = [], []
        for row, lengths in enumerate(ROWS):
            start = 0
            for length in lengths:
                for t in range(start, start + length - 1 - k):
                    logits.append(model.lm_head(hidden_BSD[row, t]))
                    labels.append(batch.labels_BS[row, t + k])
                start += length
        ce.append(F.cross_entropy(torch.stack(logits), torch.stack(labels), reduction="none"))
    every = [s for passes in (*stats.values(), *mtp_stats.values()) for s in passes]
    aux = sum(balance(s, batch.ids_BS.shape[1]) for s in every)
    loss = ce[0].mean() + 0.3 / 2 * (ce[1].mean() + ce[2].mean()) + 0.05 * aux / len(ROWS)

    torch.testing.assert_close(ours.loss, loss, rtol=1e-6, atol=0)
    torch.testing.assert_close(ce_sums(ours), torch.stack([c.sum() for c in ce]))
    torch.testing.assert_close(ours.sums["aux"], aux)
    assert not ce_sums(ours).requires_grad
    assert not ours.sums["aux"].requires_grad
    for name, expected in gradients(model, loss).items():
        assert (our_gradients[name] - expected).norm() <= GRADIENTS * expected.norm(), name
    assert set(ours.loads) == {"backbone.layers.1", "mtp.layers.1"}


def test_objective_of_rows_without_documents() -> None:
    """Unpacked rows take the path without document numbers."""
    model = loud_model(tiny_config("M*", mtp_num_depths=1))
    batch = packed_batch(model.config, [[12], [12]])
    assert batch.packing is None
    out = model(batch.ids_BS, mtp=True)
    main = F.cross_entropy(out.logits.flatten(0, 1), batch.labels_BS.flatten())
    mtp = F.cross_entropy(out.mtp_logits[0][:, :-1].flatten(0, 1), batch.labels_BS[:, 1:].flatten())
    ours = NextToken(model, NO_AUX)(batch, normalizer(batch, 1))
    torch.testing.assert_close(ours.loss, main + 0.3 * mtp)


def test_without_multi_token_prediction() -> None:
    model = loud_model(tiny_config("M"))
    batch = packed_batch(model.config, [[12], [12]])
    ours = NextToken(model, TRAIN)(batch, normalizer(batch, 0))
    expected = F.cross_entropy(model(batch.ids_BS).logits.flatten(0, 1), batch.labels_BS.flatten())
    torch.testing.assert_close(ours.loss, expected)


def test_shares_of_unequal_micro_batches_add_up() -> None:
    model = loud_model(tiny_config("ME", mtp_num_depths=2))
    objective = NextToken(model, TRAIN)
    whole = packed_batch(model.config, ROWS)
    parts = [rows_of(whole, 0, 1), rows_of(whole, 1, 4)]
    counts = [count_targets(part, 2) for part in parts]
    assert counts[0][0] * 3 < counts[1][0] * 2  # few targets in the first, many in the second
    shared = normalizer(whole, 2)
    assert torch.equal(sum(counts), shared.counts_N)

    together = objective(whole, shared)
    expected = gradients(model, together.loss)
    model.zero_grad()
    outcomes = [objective(part, shared) for part in parts]
    torch.testing.assert_close(sum(o.loss for o in outcomes), together.loss)
    torch.testing.assert_close(sum(ce_sums(o) for o in outcomes), ce_sums(together))
    torch.testing.assert_close(sum(o.sums["aux"] for o in outcomes), together.sums["aux"])
    for name, counts_E in together.loads.items():
        assert torch.equal(sum(o.loads[name] for o in outcomes), counts_E)
    for outcome in outcomes:
        outcome.loss.backward()
    accumulated = {n: p.grad for n, p in model.named_parameters()}
    for name, gradient in expected.items():
        assert (accumulated[name] - gradient).norm() <= GRADIENTS * gradient.norm(), name

    # Means of means are something else: that would be noticed.
    means = [objective(part, normalizer(part, 2)).loss for part in parts]
    assert abs(sum(means) / 2 - together.loss) > 1e-2


def rows_of(batch: Batch, start: int, end: int) -> Batch:
    """A micro-batch of some rows."""
    rows = slice(start, end)
    return Batch.from_windows(
        torch.cat([batch.ids_BS[rows], batch.labels_BS[rows, -1:]], dim=1),
        torch.cat([batch.positions_BS[rows] == 0, ~batch.loss_mask_BS[rows, -1:]], dim=1),
    )


def balance(stats: RoutingStats, tokens: Tensor | int, top_k: int = 3) -> Tensor:
    """Of rows of so many tokens."""
    return balance_loss(stats.shares_BE, stats.counts_BE, tokens, top_k)


def test_balance_loss_equals_a_loop_over_rows() -> None:
    model = loud_model(tiny_config("E"))
    gate = model.backbone.layers[0].mixer.gate
    experts, k, rows, length = 8, 3, 3, 11
    x_TD = torch.randn(rows * length, 32, generator=torch.Generator().manual_seed(0))
    ids_TK, _, scores_TE = gate(x_TD)
    ours = routing_stats(scores_TE, ids_TK, rows)
    by_hand, counts = torch.zeros(()), [0] * experts
    for row in range(rows):
        tokens = range(row * length, (row + 1) * length)
        for expert in range(experts):
            received = sum(expert in ids_TK[t].tolist() for t in tokens)
            counts[expert] += received
            f = received / (length * k)
            p = sum(scores_TE[t, expert] / scores_TE[t].sum() for t in tokens) / length
            by_hand = by_hand + experts * f * p
    found = balance(ours, length)
    torch.testing.assert_close(found, by_hand)
    assert ours.counts_BE.sum(0).tolist() == counts
    (expected,) = torch.autograd.grad(by_hand, gate.weight, retain_graph=True)
    (gradient,) = torch.autograd.grad(found, gate.weight)
    torch.testing.assert_close(gradient, expected)
    # Over rows, not over the whole batch.
    as_one = balance(routing_stats(scores_TE, ids_TK, 1), rows * length)
    assert abs(as_one * rows - by_hand) > 1e-3


def test_balance_loss_is_one_per_row_at_perfect_balance() -> None:
    scores_TE = torch.full((8, 4), 0.3)
    ids_TK = torch.tensor([[0, 1], [2, 3]]).repeat(4, 1)
    stats = routing_stats(scores_TE, ids_TK, 2)
    assert float(balance(stats, 4, top_k=2)) == pytest.approx(2.0)


def test_balance_loss_pulls_the_router_when_it_is_weighted() -> None:
    model = loud_model(tiny_config("E"))
    batch = packed_batch(model.config, [[12], [12]])

    def gate_gradient(weight: float) -> Tensor:
        objective = NextToken(model, TrainOptions(aux_loss_weight=weight))
        loss = objective(batch, normalizer(batch, 0)).loss
        return gradients(model, loss)["backbone.layers.0.mixer.gate.weight"].clone()

    none, once, twice = gate_gradient(0.0), gate_gradient(1.0), gate_gradient(2.0)
    assert (once - none).norm() > 1e-3 * none.norm()
    torch.testing.assert_close(twice - none, 2 * (once - none), rtol=1e-3, atol=1e-6)


def test_head_gradient_keeps_a_small_share_of_multi_token_prediction_in_bf16() -> None:
    """Shares below half a bf16 ulp of the main loss's gradient vanish when each loss's gradient is
    rounded before they are added; summed in fp32 and rounded once, they survive on average."""
    config = tiny_config("M", mtp_num_depths=1, vocab_size=257, hidden_size=64)
    model = loud_model(config).bfloat16()
    batch = packed_batch(config, [[65]] * 4)

    def head_gradient(weight: float, dtype: torch.dtype) -> Tensor:
        objective = NextToken(
            model.to(dtype), TrainOptions(mtp_loss_weight=weight, aux_loss_weight=0.0)
        )
        loss = objective(batch, normalizer(batch, objective.depths)).loss
        return gradients(model, loss)["lm_head.weight"].clone()

    share = 2.0**-10
    main = head_gradient(0.0, torch.bfloat16)
    with_share = head_gradient(share, torch.bfloat16)
    only_share = (head_gradient(1.0, torch.float32) - head_gradient(0.0, torch.float32)) * share
    assert main.dtype == with_share.dtype == torch.bfloat16
    small = only_share.abs() < 2.0**-10 * main.float().abs()
    assert small.float().mean() > 0.4

    def kept(total: Tensor) -> float:
        """Which fraction of the small shares is found in a total gradient."""
        difference = (total.float() - main.float())[small]
        return float((difference * only_share[small]).sum() / only_share[small].square().sum())

    assert kept(with_share) == pytest.approx(1.0, abs=0.2)
    assert kept(main + only_share.bfloat16()) == 0.0  # rounded apart, they are lost


@pytest.mark.parametrize("pattern", ["M*", "ME"])
def test_a_batch_without_targets_has_no_loss_and_no_gradient(pattern: str) -> None:
    model = loud_model(tiny_config(pattern, mtp_num_depths=2))
    tokens_BW = random_ids(model.config, 2, 13)
    starts_BW = torch.zeros_like(tokens_BW, dtype=torch.bool)
    batch = Batch.from_windows(tokens_BW, starts_BW, keep_B=torch.tensor([False, False]))
    assert count_targets(batch, 2).tolist() == [0, 0, 0]
    objective = NextToken(model, NO_AUX)
    parts = objective(batch, normalizer(batch, 2))
    assert float(parts.loss.detach()) == 0.0
    assert ce_sums(parts).tolist() == [0.0, 0.0, 0.0]
    for name, gradient in gradients(model, parts.loss).items():
        assert gradient.eq(0).all(), name


def test_a_masked_row_adds_nothing_to_the_cross_entropies() -> None:
    model = loud_model(tiny_config("M*", mtp_num_depths=2))
    tokens_BW = random_ids(model.config, 2, 13)
    starts_BW = torch.zeros_like(tokens_BW, dtype=torch.bool)
    both = Batch.from_windows(tokens_BW, starts_BW, keep_B=torch.tensor([True, False]))
    first = Batch.from_windows(tokens_BW[:1], starts_BW[:1])
    objective = NextToken(model, NO_AUX)
    torch.testing.assert_close(
        objective(both, normalizer(both, 2)).loss, objective(first, normalizer(first, 2)).loss
    )


def test_the_mean_over_documents_equals_a_loop_over_them() -> None:
    """Each depth counts its own targets, and the documents that have some; masks count too, and
    micro-batches share one count."""
    model = loud_model(tiny_config("ME*", mtp_num_depths=2))
    batch = packed_batch(model.config, ROWS)
    keep_BS = torch.rand(batch.loss_mask_BS.shape, generator=torch.Generator().manual_seed(1)) < 0.6
    batch = replace(batch, loss_mask_BS=batch.loss_mask_BS & keep_BS)
    counts_N = count_targets(batch, 2, per_document=True)
    ours = NextToken(model, NO_AUX, lambda step: True)(batch, Normalizer(counts_N, 4))
    our_gradients = gradients(model, ours.loss)

    h_BSD, _ = model.forward_hidden(batch.ids_BS, batch.documents)
    depths, _ = model.forward_mtp(h_BSD, batch.ids_BS, batch.documents)
    total = torch.zeros(())
    for k, hidden_BSD in enumerate([h_BSD, *depths]):
        logits_TV = model.lm_head(hidden_BSD).flatten(0, 1)
        labels_T, mask_T = batch.labels_BS.flatten(), batch.loss_mask_BS.flatten()
        means = []
        for start, end in pairwise(batch.documents.cu_seqlens):
            # Position t of depth k targets token t + 1 + k, the label of t + k, with its mask.
            places = [t for t in range(start, int(end) - k) if mask_T[t + k]]
            if places:
                at = torch.tensor(places)
                means.append(F.cross_entropy(logits_TV[at], labels_T[at + k]))
        assert len(means) == int(counts_N[k])
        assert float(ce_sums(ours)[k] / counts_N[k]) == pytest.approx(
            float(torch.stack(means).mean().detach()), rel=1e-5
        )
        total = total + torch.stack(means).mean() * (1.0 if k == 0 else 0.3 / 2)
    assert float(ours.loss) == pytest.approx(float(total.detach()), rel=1e-5)
    for name, gradient in gradients(model, total).items():
        assert (our_gradients[name] - gradient).norm() <= GRADIENTS * gradient.norm(), name

    by_tokens = NextToken(model, NO_AUX)(batch, Normalizer(count_targets(batch, 2), 4))
    assert abs(float(by_tokens.loss - ours.loss)) > 1e-2


def test_padding_has_no_part_in_the_statistics_of_routing() -> None:
    """Rows with padding count as the rows without it would."""
    model = loud_model(tiny_config("E"))
    gate, lengths, width = model.backbone.layers[0].mixer.gate, [9, 4], 12
    x_BSD = torch.randn(2, width, 32, generator=torch.Generator().manual_seed(0))
    real_BS = torch.arange(width) < torch.tensor(lengths)[:, None]
    x_BSD[~real_BS] = 1.0  # all padding goes to the same experts
    ids_TK, _, scores_TE = gate(x_BSD.flatten(0, 1))
    stats = routing_stats(scores_TE, ids_TK, 2, real_BS)
    alone = []
    for x_SD, length in zip(x_BSD, lengths, strict=True):
        ids, _, scores = gate(x_SD[:length])
        alone.append(routing_stats(scores, ids, 1))
    assert torch.equal(stats.counts_BE, torch.cat([one.counts_BE for one in alone]))
    assert stats.counts_BE.sum() == sum(lengths) * 3
    found = balance(stats, torch.tensor(lengths)[:, None])
    expected = sum(balance(one, n) for one, n in zip(alone, lengths, strict=True))
    torch.testing.assert_close(found, expected)
    counted = routing_stats(scores_TE, ids_TK, 2)
    assert (counted.counts_BE - stats.counts_BE).sum(0).max() == 24 - sum(lengths)
    assert abs(float(balance(counted, width) - found)) > 0.1
