"""What fine-tuning is given: mistakes, and what is prepared or edited beforehand."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest

from helpers.chats import TEMPLATE, write_chats
from helpers.commands import Commands
from train.conftest import Finetune


@pytest.mark.parametrize(
    ("sections", "words"),
    [
        ({"model": {"from_hf": None}}, ["model.from_hf is missing"]),
        ({"data": {"path": None}}, ["data.path is missing"]),
        ({"data": {"path": "/gone.jsonl"}}, ["/gone.jsonl", "does not exist"]),
        ({"data": {"sequence_length": 20}}, ["chats.jsonl line 1", "sequence_length"]),
        ({"data": {"chat_template": "/gone.jinja"}}, ["/gone.jinja"]),
        ({"train": {"loss": "two_stage"}}, ["second_stage_step", "belong together"]),
        (
            {"train": {"loss": "two_stage", "second_stage_step": 3}},
            ["second_stage_step (3) must be below the number of steps (3)"],
        ),
        ({"train": {"trained": "mtp", "mtp_loss_weight": 0.0}}, ["mtp_loss_weight is 0"]),
        ({"train": {"trained": "mtp"}, "lora": {"rank": 2}}, ["choose one of the two"]),
        ({"train": {"train_router": True}, "lora": {"rank": 2}}, ["train_router", "frozen"]),
        ({"lora": {"alpha": 4.0}}, ["no effect without lora.rank"]),
        ({"lora": {"rank": 2, "target_modules": ["gate_proj"]}}, ["gate_proj"]),
        (
            {"lora": {"rank": 2, "target_modules": ["mtp.*.q_proj"]},
             "train": {"mtp_loss_weight": 0.0}},
            ["mtp_loss_weight is 0"],
        ),
        ({"train": {"eval_sequences": 8}}, ["no held-out samples", "data.heldout"]),
        (
            {"train": {"max_steps": 0, "global_batch_size": 64}},
            ["fewer than train.global_batch_size (64)"],
        ),
    ],
)  # fmt: skip
def test_a_mistake_is_named_and_nothing_is_left(
    base: Path,
    chats: Path,
    tmp_path: Path,
    finetune: Finetune,
    sections: dict[str, dict[str, Any]],
    words: list[str],
) -> None:
    run = tmp_path / "run"
    ended = finetune(base, chats, "--run_dir", run, **sections)
    assert ended.status == 2, ended.err
    assert ended.err.count("error: ") == 1
    for word in words:
        assert word in ended.err
    left = {path.name for path in run.iterdir()} if run.exists() else set()
    assert left <= {"data", ".lock"}
    assert left <= {".lock"} or "no held-out samples" not in ended.err  # said before any is made
    if left:  # by the last three: it does not stand in the way of the mended command
        mended = finetune(base, chats, "--run_dir", run, train={"max_steps": 1})
        assert mended.status == 0, mended.err


@pytest.mark.slow
def test_answers_that_no_generation_would_end_are_warned_of(
    base: Path, chats: Path, tmp_path: Path, finetune: Finetune
) -> None:
    template = tmp_path / "endless.jinja"
    template.write_text(TEMPLATE.replace("</s>", ""))
    train = {"max_steps": 1}
    said = [
        finetune(base, chats, "--run_dir", tmp_path / name, data=data, train=train).out
        for name, data in (("a", {}), ("b", {"chat_template": str(template)}))
    ]
    assert ["generation ([2])" in out for out in said] == [False, True]
    # The template that was used goes with the model.
    saved = [(tmp_path / name / "model/chat_template.jinja").read_text() for name in "ab"]
    assert saved == [TEMPLATE, template.read_text()]


@pytest.mark.slow
def test_prepared_samples_and_edited_conversations(
    base: Path, chats: Path, tmp_path: Path, finetune: Finetune, commands: Commands
) -> None:
    store, run = tmp_path / "store", tmp_path / "run"
    words = ["prepare", chats, "--for", "finetune", "--tokenizer", base, "--out", store]
    assert commands(*words, "--heldout", "0", "--sequence_length", "128").status == 0
    refused = finetune(base, store, "--run_dir", run, data={"reasoning": "mask"})
    assert refused.status == 2
    assert "data.reasoning has no effect" in refused.err
    ended = finetune(base, store, "--run_dir", run, data={"heldout": 0.03})
    assert ended.status == 0, ended.err
    assert not (run / "data").exists()

    own, other = tmp_path / "own.jsonl", tmp_path / "other"
    shutil.copy(chats, own)
    assert finetune(base, own, "--run_dir", other).status == 0
    write_chats(own, 29)
    refused = finetune(base, own, "--run_dir", other, train={"max_steps": 5})
    assert refused.status == 2
    assert "run_dir" in refused.err
