"""Steps on long rows alternate with steps on short ones that hold as many tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.bands import SABOTAGE, jittered
from helpers.once import once
from helpers.processes import run_python
from helpers.runs import tiny_run
from nemo_hybrid.config.batches import BatchSizes
from nemo_hybrid.config.read import dump_config, load_config
from nemo_hybrid.config.run import RunConfig
from nemo_hybrid.config.short import ShortOptions
from nemo_hybrid.data.alternating import Alternating
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.data.loader import Share, Stored, open_blend
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import read_json
from nemo_hybrid.hub import HybridLM
from nemo_hybrid.train.guard import Bands, Guard
from nemo_hybrid.train.metrics import read_metrics
from nemo_hybrid.train.optim import parameter_groups
from train.alternating import SHORT, STEPS, run_of


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    program = Path(__file__).with_name("alternating.py")
    return once(
        tmp_path_factory,
        "alternating",
        lambda out: run_python([program, store, out], size=2) and None,
    )


# ---- which rows ----------------------------------------------------------------------------------


def alternating(store: Path, share: float, workers: int = 0) -> Alternating:
    config = tiny_run(store)
    blend = open_blend(config.data, config.model.hybrid())
    long, short = (
        Stored(blend, sequence_length=length, seed=7, workers=workers) for length in (32, SHORT)
    )
    return Alternating(long, short, share)


@pytest.mark.parametrize("share", [0.5, 0.08, 0.9])
def test_short_steps_have_their_share_at_any_time(store: Path, share: float) -> None:
    data = alternating(store, share)
    read: dict[str, list[int]] = {"long": [], "short": []}
    data.long.step = lambda number, share: read["long"].append(number) or []  # type: ignore
    data.short.step = lambda number, share: read["short"].append(number) or []  # type: ignore
    for step in range(2000):
        data.step(step, Share(0, 1, BatchSizes(4), 4))
        assert abs(len(read["short"]) - share * (step + 1)) < 1
    # Each kind is read in its own order, without a gap.
    assert all(numbers == list(range(len(numbers))) for numbers in read.values())


def test_every_step_has_the_same_tokens_and_each_length_its_own_samples(store: Path) -> None:
    data = alternating(store, 0.5)
    ahead = [alternating(store, 0.5, workers=2) for _ in range(2)]  # of one process each
    for step in range(STEPS):
        found: list[Batch] = []
        for rank in range(2):
            share = Share(rank, 2, BatchSizes(8), micro_batch_size=2)
            batches = data.step(step, share)
            again = ahead[rank].step(step, share)
            assert all(torch.equal(a.ids_BS, b.ids_BS) for a, b in zip(batches, again, strict=True))
            assert {b.ids_BS.shape for b in batches} == {((2, 32), (8, SHORT))[step % 2]}
            assert {b.in_one for b in batches} == {(1, 4)[step % 2]}
            found += batches
        numbers = sorted(n for batch in found for n in batch.sample_ids)
        rows = (8, 32)[step % 2]
        assert numbers == list(range(step // 2 * rows, (step // 2 + 1) * rows))
        assert data.metrics() == {"sequence_length": (32, SHORT)[step % 2]}


# ---- what is learnt ------------------------------------------------------------------------------


@dataclass
class Plain:
    """What plain PyTorch makes of the same rows."""

    losses: list[float]
    aux: list[float]
    norms: list[float]
    weights: dict[str, Tensor]


def plain(config: RunConfig, counted_as_long: bool = False) -> Plain:
    """``counted_as_long``: balance losses of short steps are divided by the rows of long ones."""
    train, shape, seed = config.train, config.model.hybrid(), config.train.seed
    model = HybridLM(shape, seed=seed)
    blend = open_blend(config.data, shape)
    optimizer = torch.optim.AdamW(
        [{k: v for k, v in g.items() if k != "experts"} for g in parameter_groups(model, train)],
        lr=train.lr,
        betas=(train.beta1, train.beta2),
        eps=train.eps,
    )
    found = Plain([], [], [], {})
    for step in range(STEPS):
        rows, length = ((8, 32), (32, SHORT))[step % 2]
        batch = blend.rows(range(step // 2 * rows, (step // 2 + 1) * rows), length, seed)
        h_BSD, stats = model.forward_hidden(batch.ids_BS, batch.documents)
        depths, more = model.forward_mtp(h_BSD, batch.ids_BS, batch.documents)
        ce = []
        for k, hidden_BSD in enumerate([h_BSD, *depths]):
            # Predicting token t + 1 + k, which has to be of the same document.
            seq_idx_BS = batch.documents.seq_idx_BS
            inside = seq_idx_BS[:, k:] == seq_idx_BS[:, : length - k]
            valid_BS = batch.loss_mask_BS[:, k:] & inside
            logits = F.linear(hidden_BSD[:, : length - k][valid_BS], model.lm_head.weight)
            ce.append(F.cross_entropy(logits, batch.labels_BS[:, k:][valid_BS]))
        routed = [one for passes in (*stats.values(), *more.values()) for one in passes]
        # E / k x the sum over experts of the share of slots and the mean of the scores.
        scale = shape.n_routed_experts / shape.num_experts_per_tok / length**2
        aux = torch.stack([(one.counts_BE * one.shares_BE).sum() * scale for one in routed]).sum()
        per = 8 if counted_as_long else rows
        loss = ce[0] + train.mtp_loss_weight / 2 * (ce[1] + ce[2]) + 0.05 * aux / per
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), train.clip_grad_norm)
        optimizer.step()
        optimizer.zero_grad()
        found.losses.append(float(ce[0]))
        found.aux.append(float(aux) / per / (shape.pattern + shape.mtp_pattern).count("E"))
        found.norms.append(float(norm))
    found.weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    return found


TOLERANCES = {"losses": 4e-6, "aux": 4e-6, "norms": 4e-5, "weights": 4e-6}
"""Relative, of tensors in the norm."""


def distances(ours: Plain, theirs: Plain) -> dict[str, float]:
    found = {
        name: max(abs(a - b) / b for a, b in zip(x, y, strict=True))
        for name in ("losses", "aux", "norms")
        for x, y in [(getattr(ours, name), getattr(theirs, name))]
    }
    pairs = ((ours.weights[n], w) for n, w in theirs.weights.items())
    return found | {"weights": max(float((a - b).norm() / b.norm()) for a, b in pairs)}


def test_steps_equal_plain_pytorch_on_the_same_rows(runs: Path, store: Path) -> None:
    rows = read_metrics(runs / "whole/metrics.jsonl")
    assert [row.further["sequence_length"] for row in rows] == [32, SHORT, 32, SHORT]
    assert [row.tokens for row in rows] == [8 * 32] * STEPS
    last = HybridLM.from_hf(str(runs / f"whole/checkpoints/step_{STEPS:08d}"))
    ours = Plain(
        [row.loss for row in rows],
        [row.aux_loss for row in rows],
        [row.grad_norm for row in rows],
        dict(last.named_parameters()),
    )
    config = run_of(store, 1)
    truth = plain(config)
    found = distances(ours, truth)
    rounding = distances(jittered(lambda: plain(config)), truth)
    assert all(found[name] < tolerance for name, tolerance in TOLERANCES.items()), found
    assert all(2 * rounding[name] < tolerance for name, tolerance in TOLERANCES.items()), rounding
    wrong = distances(ours, plain(config, counted_as_long=True))
    # All experts are chosen, so that the balance loss has no gradient: its figure tells.
    assert wrong["aux"] > SABOTAGE * TOLERANCES["aux"]


def test_it_resumes_to_the_last_bit(runs: Path) -> None:
    def state(name: str) -> dict[str, bytes]:
        last = runs / name / f"checkpoints/step_{STEPS:08d}"
        return {path.name: path.read_bytes() for path in last.glob("*.safetensors")}

    assert len(state("whole")) > 6
    assert state("resumed") == state("whole")
    whole, resumed = (read_metrics(runs / n / "metrics.jsonl") for n in ("whole", "resumed"))
    assert [r.sample_hash for r in resumed] == [r.sample_hash for r in whole]
    assert len({r.sample_hash for r in whole}) == STEPS
    assert resumed[-1].step_seconds != whole[-1].step_seconds  # made again


def test_other_short_rows_are_another_run(runs: Path) -> None:
    share, none = read_json(runs / "refused.json")["refused"]
    assert "'share': 0.5" in share
    assert "'share': 0.25" in share
    assert none.endswith("this run has None; use the same, or another run_dir")
    assert not (runs / "other").exists()


def test_a_spike_shows_among_rows_of_its_length() -> None:
    """One median of losses of 2 and of 4 would take the ones for spikes, or let spikes pass."""
    guard, mixed = (Guard(128, Bands(10.0, 10.0)) for _ in range(2))
    refused = []
    for _ in range(20):
        for loss, of in ((2.0, ""), (4.0, " of short rows")):
            assert guard.judge(loss, 1.0, of) is None
            refused.append(mixed.judge(loss, 1.0))
    assert any(refused)
    assert str(guard.judge(3.5, 1.0)).startswith("loss is 3.5, above")
    assert guard.judge(3.5, 1.0, " of short rows") is None
    assert str(guard.judge(9.0, 1.0, " of short rows")).startswith("loss of short rows is 9")
    other = Guard(128, Bands(10.0, 10.0))
    other.restore(guard.state())
    assert other.judge(3.5, 1.0)
    assert other.judge(3.5, 1.0, " of short rows") is None


# ---- options -------------------------------------------------------------------------------------


def test_options_are_a_section_of_their_own(store: Path, tmp_path: Path) -> None:
    (tmp_path / "short.yaml").write_text("sequence_length: 8\nblend: {../a: 0.3, b: 0.7}\n")
    (tmp_path / "run.yaml").write_text(
        "data:\n  path: x\n  sequence_length: 32\n  short:\n    sequence_length: 16\n    path: y\n"
    )
    config = load_config([tmp_path / "run.yaml"])
    assert config.data.short == ShortOptions(sequence_length=16, path=str(tmp_path / "y"))
    config = load_config(
        [tmp_path / "run.yaml"],
        ["--data.short", str(tmp_path / "short.yaml"), "--data.short.share", "0.08"],
    )
    assert config.data.short == ShortOptions(
        sequence_length=8,
        share=0.08,
        path=str(tmp_path / "y"),
        blend={str(tmp_path.parent / "a"): 0.3, str(tmp_path / "b"): 0.7},
    )
    (tmp_path / "again.yaml").write_text(dump_config(config))
    assert load_config([tmp_path / "again.yaml"]) == config


def test_batches_that_grow_are_a_phase_of_their_own(store: Path) -> None:
    config = run_of(store, 1)
    config.train.batch_warmup = {512.0: 4}
    with pytest.raises(UserError, match=r"batch_warmup and data\.short cannot be had together"):
        config.validate()
    config = run_of(store, 1)
    config.data.blend, config.data.path = {"a": 1.0}, None
    config.data.phases = {1e6: {"b": 1.0}}
    with pytest.raises(UserError, match=r"data\.phases and data\.short cannot be had together"):
        config.validate()


@pytest.mark.parametrize(
    ("short", "why"),
    [
        ({"sequence_length": 12, "path": "x"}, "data.sequence_length (32) must be a multiple of"),
        ({"sequence_length": 32, "path": "x"}, "must be a multiple of data.short.sequence_length"),
        ({"sequence_length": 8}, "give data.short.path or data.short.blend"),
        ({"sequence_length": 8, "path": "x", "blend": {"y": 1.0}}, "give data.short.path or"),
        ({"sequence_length": 8, "blend": {"y": -1.0}}, "the weight of y must be positive, got -1"),
        ({"share": 0.25}, "data.short has no effect without data.short.sequence_length"),
        ({"share": 1.0}, "data.short.share must lie in [0.001, 0.999], got 1.0"),
    ],
)
def test_mistakes_are_named(short: dict[str, Any], why: str) -> None:
    config = tiny_run(Path("store"))
    with pytest.raises(UserError) as error:
        replace(config, data=replace(config.data, short=ShortOptions(**short))).validate()
    assert why in str(error.value)
