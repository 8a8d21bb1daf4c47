"""Whole runs of the tiny model through the command line."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from helpers.chats import tune, write_base, write_chats
from helpers.commands import Commands, Said, commands_in_one_process
from helpers.corpus import ALL_EXPERTS, write_corpus
from helpers.once import once
from helpers.processes import run_python
from helpers.runs import tiny_run
from nemo_hybrid.config.read import dump_config

Finetune = Callable[..., Said]
LAYOUT = ("--parallel.ep", "2", "--train.micro_batch_size", "2")
"""Of the unbroken run: 2 processes and 2 micro-batches make the 8 sequences of a step."""


@dataclass(frozen=True)
class Unbroken:
    """A finished run of 12 steps, checkpoints after 4, 8 and 12, in bf16 on two processes."""

    run_dir: Path
    config: Path
    stdout: str

    def copy(self, to: Path, without: tuple[int, ...] = ()) -> Path:
        """A copy of the run directory, without the checkpoints of some steps."""
        shutil.copytree(self.run_dir, to)
        for step in without:
            shutil.rmtree(to / f"checkpoints/step_{step:08d}")
        return to


@pytest.fixture(scope="session")
def store(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "corpus", lambda out: write_corpus(out / "store")) / "store"


@pytest.fixture(scope="session")
def unbroken(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Unbroken:
    def make(out: Path) -> None:
        config = tiny_run(
            store,
            recipe="bf16",
            train={
                "max_steps": 12,
                "schedule": "wsd",
                "warmup_steps": 2,
                "decay_steps": 4,
                "eval_every": 6,
                "log_every": 5,
            },
        )
        config.checkpoint.every = 4
        (out / "run.yaml").write_text(dump_config(config))
        words = ["pretrain", "--config", out / "run.yaml", "--run_dir", out / "run", *LAYOUT]
        words += ["--profile", "3:2"]
        # As users start it, not as a fork: the runs compared with it are both.
        finished = run_python(["-m", "nemo_hybrid", *words], size=2, fresh=True)
        (out / "stdout").write_text(finished[0].stdout)
        assert finished[1].stdout == ""
        phases = [
            [line for line in f.stderr.splitlines() if line.endswith(" ...")] for f in finished
        ]
        begin, *others = phases[0]
        assert begin == f"{out / 'run'}: loading libraries ..."
        assert len(others) == 2
        assert phases[1] == []

    made = once(tmp_path_factory, "unbroken", make)
    return Unbroken(made / "run", made / "run.yaml", (made / "stdout").read_text())


@pytest.fixture
def pretrain(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., int]]:
    """pretrain(words): the command in this process, a world of one; gives the exit status."""
    import torch.distributed as dist

    from nemo_hybrid.cli import main

    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    yield lambda *words: main(["pretrain", *map(str, words)])
    if dist.is_initialized():
        dist.destroy_process_group()


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its tokens visit all experts, so that rounding makes no choice."""
    return write_base(tmp_path_factory.mktemp("base") / "hf", **ALL_EXPERTS)


@pytest.fixture(scope="module")
def chats(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_chats(tmp_path_factory.mktemp("chats") / "chats.jsonl", 30)


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with commands_in_one_process() as run:
        yield run


@pytest.fixture
def finetune(commands: Commands, tmp_path: Path) -> Finetune:
    """finetune(base, chats, words, sections): the command; gives status and output."""

    def run(base: Path, chats: Path, *words: str | Path, **sections: dict[str, Any]) -> Said:
        file = tmp_path / "run.yaml"
        file.write_text(dump_config(tune(base, chats, **sections)))
        return commands("finetune", "--config", file, *words)

    return run
