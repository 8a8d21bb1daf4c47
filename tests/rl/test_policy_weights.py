"""Weights per token against TRL, against the formulas restated, and against exact gradients.

Shapes: B sequences of S tokens, padded; T = B*S tokens; D hidden, V vocabulary.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.tiny_models import loud_model, packed_batch, tiny_config
from nemo_hybrid.config.rl import PolicyOptions
from nemo_hybrid.config.run import TrainOptions
from nemo_hybrid.objectives.base import Normalizer
from nemo_hybrid.objectives.next_token import NextToken, count_targets
from nemo_hybrid.objectives.policy import (
    Tokens,
    advantages,
    distillation,
    importance,
    kept,
    weights,
)
from nemo_kernels.loss import linear_cross_entropy

B, S = 5, 7
LENGTHS = (7, 3, 5, 1, 6)
EXACT = 1e-12
PLAIN = dict(importance="none", advantage_clip=0.0)


class Case(NamedTuple):
    pi_BS: Tensor
    prox_BS: Tensor
    behav_BS: Tensor
    reference_BS: Tensor
    mask_BS: Tensor
    advantage_B: Tensor


def case(seed: int = 0, apart: float = 0.5) -> Case:
    """Log-probabilities so far apart that every bound is met, fp64."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    pi_BS = -normal(B, S).abs() - 0.1
    others = (pi_BS + apart * normal(B, S) for _ in range(3))
    mask_BS = torch.arange(S) < torch.tensor(LENGTHS)[:, None]
    return Case(pi_BS, *others, mask_BS, normal(B))


def tokens(c: Case, kl: bool = False, pi_T: Tensor | None = None) -> Tokens:
    return Tokens(
        pi_T=c.pi_BS.flatten() if pi_T is None else pi_T,
        prox_T=c.prox_BS.flatten(),
        behav_T=c.behav_BS.flatten(),
        learnt_T=c.mask_BS.flatten(),
        sequence_T=torch.arange(B).repeat_interleave(S),
        sequences=B,
        reference_T=c.reference_BS.flatten() if kl else None,
    )


def ours(c: Case, average: str = "tokens", **options: Any) -> Tensor:
    """Gradient of the loss for the log-probabilities."""
    chosen = PolicyOptions(**PLAIN | options)  # type: ignore[arg-type]
    advantage_T = c.advantage_B.repeat_interleave(S)
    weight_BS = weights(tokens(c, chosen.kl > 0), advantage_T, chosen).view(B, S)
    if average == "tokens":
        return -weight_BS / sum(LENGTHS)
    return -weight_BS / torch.tensor(LENGTHS)[:, None] / B


def off(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm())


# ---- TRL ----------------------------------------------------------------------------------------

TIGHT = {
    "theirs": {"epsilon_low": 0.02, "epsilon_high": 0.02},
    "ours": {"clip_low": 0.02, "clip_high": 0.02},
}
TRL: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "dapo": ({"loss_type": "dapo"}, {}),
    "dapo, importance": ({"loss_type": "dapo", "use_vllm": True}, {"importance": "tis"}),
    "dapo, divergence": ({"loss_type": "dapo", "beta": 0.1}, {"kl": 0.1}),
    "dapo, both": (
        {"loss_type": "dapo", "beta": 0.1, "use_vllm": True},
        {"kl": 0.1, "importance": "tis"},
    ),
    "dapo, other bounds": (
        {"loss_type": "dapo", "epsilon_low": 0.05, "epsilon_high": 0.5},
        {"clip_low": 0.05, "clip_high": 0.5},
    ),
    "bnpo": ({"loss_type": "bnpo"}, {}),
    "grpo": ({"loss_type": "grpo"}, {"average": "samples"}),
    "grpo, divergence": ({"loss_type": "grpo", "beta": 0.2}, {"kl": 0.2, "average": "samples"}),
    "gspo": (
        {"loss_type": "grpo", "importance_sampling_level": "sequence"} | TIGHT["theirs"],
        {"ratio": "sequence", "average": "samples"} | TIGHT["ours"],
    ),
    "gspo by tokens": (
        {"loss_type": "dapo", "importance_sampling_level": "sequence"} | TIGHT["theirs"],
        {"ratio": "sequence"} | TIGHT["ours"],
    ),
    "cispo": (
        {"loss_type": "cispo", "epsilon_high": 1.28},
        {"clip": "cispo", "clip_low": 0.99},
    ),
}
"""Settings of TRL's loss, and ours."""


def trl_gradient(trainer: Any, c: Case, settings: dict[str, Any]) -> Tensor:
    """Of TRL 1.16's loss on given log-probabilities: a stub stands for the trainer."""
    pi_BS = c.pi_BS.clone().requires_grad_()
    arguments = SimpleNamespace(use_bias_correction_kl=False, delta=None, steps_per_generation=1)
    values = {
        "aux_loss_enabled": False,
        "top_entropy_quantile": 1.0,
        "off_policy_mask_threshold": None,
        "importance_sampling_level": "token",
        "beta": 0.0,
        "epsilon_low": 0.2,
        "epsilon_high": 0.28,
        "use_vllm": False,
        "vllm_importance_sampling_correction": True,
        "current_gradient_accumulation_steps": 1,
        "_entropy_bonus_enabled": False,
        "args": arguments,
        "model": SimpleNamespace(training=True),
        "accelerator": SimpleNamespace(
            num_processes=1, gather=lambda x: x, reduce=lambda x, reduction: x
        ),
        "_metrics": {"train": defaultdict(list)},
        "_get_per_token_logps_and_entropies": lambda *_, **__: (pi_BS, pi_BS.detach(), None),
    }
    mask_BS = c.mask_BS.double()
    inputs = {
        "prompt_ids": mask_BS,
        "prompt_mask": mask_BS,
        "completion_ids": mask_BS,
        "completion_mask": mask_BS,
        "advantages": c.advantage_B,
        "old_per_token_logps": c.prox_BS,
        "ref_per_token_logps": c.reference_BS,
        "importance_sampling_ratio": (c.prox_BS - c.behav_BS).exp().clamp(0.2, 5.0),
        "num_items_in_batch": mask_BS.sum(),
    }
    stub = SimpleNamespace(**values | settings)
    trainer._compute_loss(stub, None, inputs).backward()
    assert pi_BS.grad is not None
    return pi_BS.grad


@pytest.mark.slow  # imports TRL
def test_gradients_equal_those_of_trl() -> None:
    trainer = pytest.importorskip("trl.trainer.grpo_trainer", exc_type=ImportError).GRPOTrainer
    for name, (theirs, options) in TRL.items():
        c = case(seed=len(name))
        expected = trl_gradient(trainer, c, theirs)
        assert off(ours(c, **options), expected) < EXACT, name
        # A flipped sign, and the clip's mask left out, would show.
        assert off(-ours(c, **options), expected) > 1, name
        assert off(ours(c, **options | {"clip": "none"}), expected) > 0.01, name


# ---- the formulas restated ----------------------------------------------------------------------


def surrogate(c: Case, pi_BS: Tensor, o: PolicyOptions) -> Tensor:
    """What is minimised, sums over tokens and sequences written out."""
    loss = torch.zeros((), dtype=torch.float64)
    for b, length in enumerate(LENGTHS):
        lp, prox, behav, ref = (x[b, :length] for x in (pi_BS, *c[1:4]))
        a = c.advantage_B[b].clamp(-o.advantage_clip, o.advantage_clip)
        r = (lp - prox).exp()
        if o.ratio == "sequence":
            r = (lp - prox).mean().exp().expand(length)
        bounded = r.clamp(1 - o.clip_low, 1 + o.clip_high)
        if o.clip == "ppo":
            per_token = torch.maximum(-a * r, -a * bounded)
        elif o.clip == "cispo":
            per_token = -bounded.detach() * a * lp
        else:
            per_token = -a * r
        ratio = (prox - behav).exp()
        if o.importance == "tis":
            per_token = per_token * ratio.clamp(o.importance_low, o.importance_high)
        elif o.importance == "icepop":
            inside = (ratio >= o.importance_low) & (ratio <= o.importance_high)
            per_token = per_token * ratio * inside
        d = ref - lp
        loss = loss + (per_token + o.kl * (d.exp() - 1 - d)).sum()
    return loss / sum(LENGTHS)


OPTIONS = [
    PolicyOptions(advantage_clip=0.7, kl=0.05),
    PolicyOptions(importance="icepop", importance_low=0.5),
    PolicyOptions(importance="none", clip="cispo"),
    PolicyOptions(ratio="sequence", clip_low=0.1, clip_high=0.1),
    PolicyOptions(clip="none", kl=0.3),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_gradients_through_the_head_are_those_of_the_surrogate(options: PolicyOptions) -> None:
    generator = torch.Generator().manual_seed(1)
    h_TD = torch.randn(B * S, 6, generator=generator, dtype=torch.float64).requires_grad_()
    head_VD = torch.randn(11, 6, generator=generator, dtype=torch.float64).requires_grad_()
    labels_T = torch.randint(11, (B * S,), generator=generator)
    pi_T = F.linear(h_TD, head_VD).log_softmax(-1).gather(1, labels_T[:, None])[:, 0]
    c = case(2)
    shift_BS = pi_T.detach().view(B, S) - c.pi_BS  # the others stay as far apart as they were
    c = Case(*(x + shift_BS for x in c[:4]), *c[4:])
    expected = torch.autograd.grad(surrogate(c, pi_T.view(B, S), options), (h_TD, head_VD))

    def gradients(chosen: PolicyOptions) -> tuple[Tensor, ...]:
        known = tokens(c, chosen.kl > 0, pi_T.detach())
        weight_T = weights(known, c.advantage_B.repeat_interleave(S), chosen)
        loss, _ = linear_cross_entropy(h_TD, head_VD, labels_T, weight_T / sum(LENGTHS))
        return torch.autograd.grad(loss, (h_TD, head_VD))

    for ours, theirs in zip(gradients(options), expected, strict=True):
        assert off(ours, theirs) < EXACT
    if options.clip != "none":
        unclipped = PolicyOptions(**vars(options) | {"clip": "none"})
        assert off(gradients(unclipped)[1], expected[1]) > 0.01


@pytest.mark.parametrize(
    ("right", "up", "down"),
    [(1, 4.0, -0.258), (2, 3.61, -0.38), (8, 1.03, -1.03), (14, 0.38, -3.61), (15, 0.258, -4.0)],
)
def test_advantages_of_sixteen_samples(right: int, up: float, down: float) -> None:
    """By hand; who is alone right is divided by the deviation of all, 1/4."""
    rewards = torch.tensor([[1.0] * right + [0.0] * (16 - right)])
    found = advantages(rewards, "others")[0]
    assert found[:right].tolist() == pytest.approx([up] * right, abs=0.01)
    assert found[right:].tolist() == pytest.approx([down] * (16 - right), abs=0.01)


def test_advantages_are_leave_one_out() -> None:
    rewards = torch.rand(3, 5, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for p, row in enumerate(rewards.tolist()):
        for n, reward in enumerate(row):
            others = torch.tensor(row[:n] + row[n + 1 :], dtype=torch.float64)
            apart = reward - float(others.mean())
            by = {"others": others.std(), "group": rewards[p].std(), "none": 1 - 1e-6}
            for std, sigma in by.items():
                expected = apart / (float(sigma) + 1e-6)
                assert advantages(rewards, std)[p, n].item() == pytest.approx(expected, rel=1e-12)


def test_what_teaches_nothing() -> None:
    nan = float("nan")
    equal = torch.full((1, 6), 0.1)  # whose mean may round to something else
    assert advantages(equal, "others").eq(0).all()
    assert advantages(torch.tensor([[1.0, nan, nan]]), "others").eq(0).all()
    # A sample without a reward changes nothing for the others.
    some = advantages(torch.tensor([[1.0, 0.0, nan, 0.5]]), "others")
    torch.testing.assert_close(
        some[0, [0, 1, 3]], advantages(torch.tensor([[1.0, 0.0, 0.5]]), "others")[0]
    )
    assert some[0, 2] == 0


def test_filter_and_importance_of_what_is_no_number() -> None:
    c = case()
    broken_BS = c.behav_BS.clone()
    broken_BS[0, 0], broken_BS[2, 0] = float("nan"), -float("inf")
    c = c._replace(behav_BS=broken_BS)
    known, options = tokens(c), PolicyOptions(sequence_filter=1.9)
    expected = [
        bool((c.behav_BS - c.prox_BS)[b, :n].abs().exp().mean() <= 1.9)
        for b, n in enumerate(LENGTHS)
    ]
    assert kept(known, options).tolist() == expected
    assert len(set(expected)) == 2
    c_BS = importance(known, options).view(B, S)
    assert c_BS[0, 0] == c_BS[2, 0] == 0
    assert c_BS[1].min() >= 0.2
    assert c_BS.max() <= 5
    assert weights(known, c.advantage_B.repeat_interleave(S), options).isfinite().all()


# ---- distillation -------------------------------------------------------------------------------


def test_distillation_on_a_bandit_is_the_reverse_divergence() -> None:
    """Expected over the arms the gradient is exact; sampled, as near as its variance says."""
    generator = torch.Generator().manual_seed(3)
    logits, teacher = (torch.randn(6, generator=generator, dtype=torch.float64) for _ in range(2))
    logits.requires_grad_()
    lp_K, teacher_K = logits.log_softmax(-1), teacher.log_softmax(-1)
    divergence = F.kl_div(teacher_K, lp_K, log_target=True, reduction="sum")
    (exact_K,) = torch.autograd.grad(divergence, logits, retain_graph=True)
    p_K = lp_K.detach().exp()
    advantage_K = distillation(teacher_K, lp_K.detach())

    def gradient(shares_K: Tensor, advantage_K: Tensor) -> Tensor:
        everything = torch.ones(6, dtype=torch.bool)
        known = Tokens(*[lp_K.detach()] * 3, everything, torch.arange(6), 6)
        weight_K = weights(known, advantage_K, PolicyOptions())
        loss = -(shares_K * weight_K * lp_K).sum()
        return torch.autograd.grad(loss, logits, retain_graph=True)[0]

    assert off(gradient(p_K, advantage_K), exact_K) < EXACT
    assert off(gradient(p_K, -advantage_K), exact_K) > 1
    scores_KK = advantage_K[:, None] * (torch.eye(6, dtype=torch.float64) - p_K)
    variance = (p_K[:, None] * (scores_KK + exact_K).square()).sum()
    for draws in (100, 10_000):
        arms = torch.multinomial(p_K, draws, replacement=True, generator=generator)
        shares_K = arms.bincount(minlength=6) / draws
        error = (gradient(shares_K, advantage_K) - exact_K).norm()
        assert error < 5 * (variance / draws).sqrt()


def test_a_teacher_like_the_student_moves_nothing() -> None:
    c = case()
    known = tokens(c)
    advantage_T = distillation(known.prox_T, known.prox_T)
    assert weights(known, advantage_T, PolicyOptions()).eq(0).all()


# ---- in the objective ---------------------------------------------------------------------------


def test_shares_of_weighted_micro_batches_add_up() -> None:
    """Over the global count; with a local one they would not."""
    model = loud_model(tiny_config("M*", mtp_num_depths=1))
    objective = NextToken(model, TrainOptions(mtp_loss_weight=0.3, aux_loss_weight=0.0))
    rows = ([[7, 5], [9, 3]], [[2, 2, 2, 2, 2, 2], [3, 3, 3, 3]])
    parts, plain = [], []
    for number, layout in enumerate(rows):
        batch = packed_batch(model.config, layout)
        generator = torch.Generator().manual_seed(number)
        weight_BS = torch.randn(batch.ids_BS.shape, generator=generator)
        plain.append(batch)
        parts.append(replace(batch, weight_BS=weight_BS))
    counts = [count_targets(part, 1) for part in parts]
    assert counts[0][0] > counts[1][0]
    whole = Normalizer(sum(counts), 4)

    expected = torch.zeros(())
    for part in parts:
        h_BSD, _ = model.forward_hidden(part.ids_BS, part.packing)
        lp_BSV = model.lm_head(h_BSD).log_softmax(-1)
        ce_BS = -lp_BSV.gather(-1, part.labels_BS[..., None])[..., 0]
        expected = expected + (ce_BS * part.weight_BS * part.loss_mask_BS).sum()
    found = [objective(part, whole) for part in parts]
    mtp = [objective(part, whole).sums["mtp_1"] for part in plain]
    assert [f.sums["mtp_1"] for f in found] == mtp  # which no weight concerns
    depth = 0.3 * sum(mtp) / whole.counts_N[1]
    torch.testing.assert_close(
        sum(f.loss for f in found) - depth, expected / whole.counts_N[0], rtol=1e-4, atol=1e-5
    )
    local = sum(
        objective(part, Normalizer(count, 2)).sums["ce"] / count[0]
        for part, count in zip(parts, counts, strict=True)
    )
    assert abs(local / 2 - expected / whole.counts_N[0]) > 1e-3
