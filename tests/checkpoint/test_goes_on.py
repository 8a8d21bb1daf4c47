"""Reading the checkpoints of a run that goes on, and removes them meanwhile."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.chats import write_base
from nemo_hybrid import HybridLM, UserError
from nemo_hybrid.checkpoint import load, steps, weights
from nemo_hybrid.checkpoint.directory import remove_directory
from nemo_hybrid.cli import main


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two models that tell from each other, old and new."""
    root = tmp_path_factory.mktemp("models")
    for name in ("old", "new"):
        write_base(root / name)
    model = HybridLM.from_hf(str(root / "new"))
    with torch.no_grad():
        model.lm_head.weight.zero_()
    shutil.rmtree(root / "new")
    model.save_hf(str(root / "new"))
    return root


class Run:
    """A run with a checkpoint; it writes the next ones when `go_on` is called, and keeps one."""

    def __init__(self, models: Path, root: Path) -> None:
        self.models, self.root, self.step = models, root, 4
        self.checkpoints = root / "checkpoints"
        shutil.copytree(models / "old", self.newest)
        steps.point_latest(self.checkpoints, self.newest)

    @property
    def newest(self) -> Path:
        return self.checkpoints / steps.step_name(self.step)

    def go_on(self) -> None:
        before, self.step = self.newest, self.step + 4
        shutil.copytree(self.models / "new", self.newest)
        steps.point_latest(self.checkpoints, self.newest)
        assert remove_directory(before)


@pytest.fixture
def run(models: Path, tmp_path: Path) -> Run:
    return Run(models, tmp_path / "run")


def going_on(run: Run, monkeypatch: pytest.MonkeyPatch, times: int = 1) -> None:
    """Let the run go on just before weights are read, so many times."""
    real, left = weights.read_headers, [None] * times

    def read_headers(directory: Path) -> Any:
        if left:
            left.pop()
            run.go_on()
        return real(directory)

    monkeypatch.setattr(load, "read_headers", read_headers)


def is_new(directory: Path) -> bool:
    return not HybridLM.from_hf(str(directory)).lm_head.weight.any()


READERS: dict[str, Callable[[Path, Path], object]] = {
    "from_hf": lambda run, out: HybridLM.from_hf(str(run)).save_hf(str(out)),
    "export": lambda run, out: main(["export", "--from", f"{run}", "--out", f"{out}",
                                     "--format", "bf16"]),
    "import": lambda run, out: main(["import", f"{run}/checkpoints", "--out", f"{out}"]),
    "inspect": lambda run, out: main(["inspect", f"{run}/checkpoints/latest"]),
    "generate": lambda run, out: main(["generate", "--from", f"{run}", "--prompt", "a",
                                       "--max_new_tokens", "1"]),
}  # fmt: skip


@pytest.mark.parametrize("reader", READERS)
def test_the_next_checkpoint_is_read_where_one_is_removed(
    run: Run,
    tmp_path: Path,
    reader: str,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
    capsys: pytest.CaptureFixture[str],
) -> None:
    removed = run.newest
    going_on(run, monkeypatch)
    assert READERS[reader](run.root, tmp_path / "out") in (None, 0), capsys.readouterr().err
    assert f"{removed} was removed while it was read; reading {run.newest}" in caplog.text
    if (tmp_path / "out").exists():
        assert is_new(tmp_path / "out")


def test_a_run_that_removes_them_faster_is_named(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    going_on(run, monkeypatch, times=5)
    with pytest.raises(UserError, match=r"step_00000008 was removed while it was read: .*keep"):
        HybridLM.from_hf(str(run.root))


@pytest.mark.parametrize("when", ["before", "meanwhile"])
def test_a_removed_checkpoint_that_was_asked_for_is_said_to_be(
    run: Run, monkeypatch: pytest.MonkeyPatch, when: str
) -> None:
    """And another one is not taken for it."""
    asked = run.newest
    if when == "before":
        run.go_on()
    else:
        going_on(run, monkeypatch)
    with pytest.raises(UserError) as refused:
        HybridLM.from_hf(str(asked))
    assert f"{asked} is not there: a run that goes on removes" in str(refused.value)
    assert "checkpoint.keep" in str(refused.value)
    assert run.newest.name in str(refused.value)
    assert "hub" not in str(refused.value)


def test_a_link_to_a_checkpoint_is_the_checkpoint(run: Run, tmp_path: Path) -> None:
    """Its run may remove it, and what it leads to then is named."""
    link = tmp_path / "best"
    link.symlink_to(run.newest)
    (run.root / "config.yaml").write_text("checkpoint: {keep: 2}")
    assert steps.keeps(link) == 2
    run.go_on()
    with pytest.raises(UserError) as refused:
        steps.resolve(link)
    assert f"{link} is not there: a run that goes on removes" in str(refused.value)
    assert f"{run.root} has {run.newest.name} now" in str(refused.value)


@pytest.mark.parametrize("name", ["gone", "a" * 300, "gone/checkpoints/latest"])
def test_a_path_to_nothing_is_a_mistake(name: str) -> None:
    with pytest.raises(UserError, match=rf"^{name} (does not exist|is not there): "):
        steps.resolve(name)


def test_a_checkpoint_removed_while_a_path_is_resolved(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, left = steps.read_latest, [None]

    def read_latest(checkpoints: Path) -> Path | None:
        found = real(checkpoints)
        if left:
            left.pop()
            run.go_on()
        return found

    def find_latest(checkpoints: Path, deep: bool) -> None:
        raise UserError("none of them is there any more")

    monkeypatch.setattr(steps, "read_latest", read_latest)
    monkeypatch.setattr(steps, "find_latest", find_latest)
    assert steps.resolve(run.root) == run.newest
    (run.newest / "config.json").unlink()
    with pytest.raises(UserError, match="none of them"):
        steps.resolve(run.root)


def test_what_a_run_will_remove(run: Run, tmp_path: Path) -> None:
    settings = run.root / "config.yaml"
    assert steps.keeps(run.newest) == 0  # of no run
    for text, kept in (
        ("checkpoint: {keep: 2}", 2),
        ("checkpoint: {keep: 0}", 0),
        ("train: {}", 3),  # the default of older versions
        ("][", 3),
    ):
        settings.write_text(text)
        assert steps.keeps(run.newest) == kept, text
    (run.root / "model").mkdir()
    assert steps.keeps(run.root / "model") == 0
