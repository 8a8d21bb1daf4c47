"""Fine-tuning against plain PyTorch on transformers' NemotronH: one sample per row, labels by
transformers' own tokenizer and masks."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.bands import SABOTAGE
from helpers.chats import MARKED, conversations, tune, write_base, write_chats
from helpers.commands import Commands, commands_in_one_process
from helpers.corpus import ALL_EXPERTS
from helpers.nemotron_h_oracle import load_theirs
from helpers.processes import run_command
from nemo_hybrid.config.read import dump_config
from nemo_hybrid.data.packing import best_fit
from nemo_hybrid.data.store import Store
from nemo_hybrid.train.metrics import read_metrics

CHATS, STEPS = 17, 3
BAND = 2e-6
"""Relative, of losses and weights: twice what ``helpers.bands.jittered`` moves the weights."""
ALIKE: dict[str, Any] = {"aux_loss_weight": 0.0, "router_bias_rate": 0.0, "train_router": True}
Losses = list[float]


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with commands_in_one_process() as run:
        yield run


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("base") / "hf", mtp_num_depths=0, **ALL_EXPERTS)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", CHATS)


def samples(base: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Ids [n], and labels [n] with -100 where nothing is learnt, by transformers alone."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(base)
    for messages in conversations(CHATS):
        made = tokenizer.apply_chat_template(
            messages, chat_template=MARKED, return_dict=True, return_assistant_tokens_mask=True
        )
        ids = torch.tensor(made["input_ids"])
        yield ids, ids.where(torch.tensor(made["assistant_masks"]) > 0, -100)


@cache
def in_plain_pytorch(base: Path, averages: tuple[str, ...]) -> tuple[Losses, nn.Module]:
    """The loss of every step, and the model after the last one."""
    model, _ = load_theirs(base, torch.float32)
    groups = [
        {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() <= 1], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95), eps=1e-4)
    rows, losses = list(samples(base)), []
    for average in averages:
        sums, counts = [], []
        for ids, labels in rows:
            logits = model(ids[None]).logits[0]
            sums.append(F.cross_entropy(logits[:-1], labels[1:], reduction="sum"))
            counts.append(int((labels[1:] != -100).sum()))
        if average == "tokens":
            loss = torch.stack(sums).sum() / sum(counts)
        else:
            loss = torch.stack([s / c for s, c in zip(sums, counts, strict=True)]).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses, model


def distance(ours: nn.Module, theirs: nn.Module) -> float:
    """The largest difference of a weight, relative to its norm."""
    expected = theirs.state_dict()
    apart = [
        (weight - expected[name]).norm() / expected[name].norm()
        for name, weight in ours.state_dict().items()
    ]
    return float(torch.stack(apart).max())  # NaN if one of them is


def packs(chats: Path, base: Path) -> int:
    lengths = torch.tensor([len(ids) for ids, _ in samples(base)]).numpy()
    return len(best_fit(lengths, 128))


@pytest.mark.parametrize(
    ("averages", "options", "size"),
    [
        (["tokens"] * STEPS, {"loss": "tokens"}, 1),
        pytest.param(
            ["tokens", "samples", "samples"], {"loss": "two_stage", "second_stage_step": 1}, 2,
            marks=pytest.mark.slow,
        ),
        (["samples"] * STEPS, {"loss": "conversations"}, 1),
    ],
)  # fmt: skip
def test_three_steps_are_those_of_plain_pytorch_on_transformers(
    base: Path,
    chats: Path,
    tmp_path: Path,
    commands: Commands,
    averages: list[str],
    options: dict[str, Any],
    size: int,
) -> None:
    """Every step takes all samples, so that their order in packs, micro-batches and ranks says
    nothing: packed, accumulated and divided is the same as one row each."""
    rows = packs(chats, base)
    assert rows % (2 * size) == 0  # two micro-batches at least
    assert rows < CHATS * 2 / 3  # several samples in most packs
    train = ALIKE | options | {"global_batch_size": rows, "max_steps": STEPS}
    config = tune(base, chats, train=train)
    (tmp_path / "run.yaml").write_text(dump_config(config))
    run_dir = tmp_path / "run"
    words = ["finetune", "--config", tmp_path / "run.yaml", "--run_dir", run_dir]
    if size == 1:
        assert commands(*words).status == 0
    else:
        run_command(*words, size=size)

    losses, expected = in_plain_pytorch(base, tuple(averages))
    ours = [row.loss for row in read_metrics(run_dir / "metrics.jsonl")]
    assert ours == pytest.approx(losses, rel=BAND)
    made, info = load_theirs(run_dir / "model", torch.float32)
    assert not any(info.values())
    assert distance(made, expected) < BAND

    # Another average, another weight decay or masks shifted by one would be noticed.
    other = ["samples" if a == "tokens" else "tokens" for a in averages]
    wrong_losses, wrong = in_plain_pytorch(base, tuple(other))
    assert abs(wrong_losses[0] / losses[0] - 1) > SABOTAGE * BAND
    assert distance(wrong, expected) > SABOTAGE * BAND
    store = Store.open(run_dir / "data/train", samples=True)
    theirs = list(samples(base))
    for i in range(CHATS):
        ids, targets = store.sample(i)
        assert ids.tolist() == theirs[i][0].tolist()
        assert targets.tolist() == (theirs[i][1] != -100).tolist()
