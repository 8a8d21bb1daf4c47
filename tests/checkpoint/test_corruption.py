"""Every kind of damage to every file of a checkpoint is seen, named, and passed by."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from checkpoint.conftest import Toy
from helpers.corruption import cases, undetected
from helpers.once import once
from nemo_hybrid.checkpoint import files
from nemo_hybrid.config import RunConfig
from nemo_hybrid.errors import UserError
from nemo_hybrid.train.run_dir import RunLock, claim_run, open_run

KINDS = [
    "truncated",
    "bit flipped",
    "deleted",
    "swapped between two steps",
    "wrong manifest",
    "wrong `latest`",
    "empty directory of a step",
    "all damaged",
]


@pytest.fixture(scope="session")
def three(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of three states, each written by two ranks."""

    def make(out: Path) -> None:
        for step in (1, 2, 3):
            Toy(seed=step).save(out, step, 2, 2)

    return once(tmp_path_factory, "three", make)


@pytest.mark.parametrize("kind", KINDS)
def test_damage_is_named_and_the_checkpoint_before_is_taken(
    three: Path, tmp_path: Path, kind: str
) -> None:
    met = [case for case in cases(three) if case.kind == kind]
    assert met
    assert {
        case.detail: wrong for case in met if (wrong := undetected(case, three, tmp_path))
    } == {}


def test_all_kinds_and_all_files_are_met(three: Path) -> None:
    met = list(cases(three))
    assert {case.kind for case in met} == set(KINDS)
    names = {p.name for p in (three / "step_00000003").iterdir()}
    assert sum(name.startswith(("model-", "optimizer-r", "rank-")) for name in names) >= 6
    for kind in ("truncated", "bit flipped", "deleted"):
        assert len([case for case in met if case.kind == kind]) == len(names)
    assert len([case for case in met if case.kind.startswith("swapped")]) >= 4


def test_the_matrix_notices_damage_that_is_not_detected(
    three: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without the checksums, a flipped bit of a weight goes through."""
    verify = files.verify
    monkeypatch.setattr(files, "verify", lambda directory, deep: verify(directory, deep=False))
    flips = [c for c in cases(three) if c.kind == "bit flipped" and c.detail.startswith("model-")]
    assert flips
    for case in flips:
        assert undetected(case, three, tmp_path) == "step_00000003 was taken, not step_00000002"


def test_a_start_passes_by_what_is_damaged_or_refuses_it(
    three: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Through the door that `pretrain` uses: by itself, and with a checkpoint that is named."""
    config = RunConfig(run_dir=str(tmp_path / "run"))
    checkpoints = tmp_path / "run/checkpoints"
    shutil.copytree(three, checkpoints)
    with RunLock(config) as lock:
        claim_run(config, lock)
        assert open_run(config, lock) == checkpoints / "step_00000003"
        damaged = checkpoints / "step_00000003/rank-00001.safetensors"
        damaged.unlink()
        assert open_run(config, lock) == checkpoints / "step_00000002"
        assert str(damaged) in caplog.text
        config.resume = str(damaged.parent)
        with pytest.raises(UserError, match=str(damaged)):
            open_run(config, lock)
        config.resume = "auto"
        for step in (1, 2):
            (checkpoints / f"step_0000000{step}/config.json").unlink()
        with pytest.raises(UserError, match="none of the 3 checkpoints"):
            open_run(config, lock)
