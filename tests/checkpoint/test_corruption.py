"""Every kind of damage to every file of a checkpoint is seen, named, and passed by."""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from checkpoint.conftest import Toy
from helpers.corruption import cases, undetected
from helpers.once import once
from nemo_hybrid.agreement import Agreement
from nemo_hybrid.checkpoint import directory, manifest, steps
from nemo_hybrid.checkpoint.directory import verify
from nemo_hybrid.config.run import RunConfig
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
    monkeypatch.setattr(steps, "damaged_file", lambda world, directory, records: None)
    flips = [c for c in cases(three) if c.kind == "bit flipped" and c.detail.startswith("model-")]
    assert flips
    for case in flips:
        assert undetected(case, three, tmp_path) == "step_00000003 was taken, not step_00000002"


def test_every_rank_hashes_a_share(
    three: Path, tmp_path: Path, in_ranks: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Damage that one rank alone sees is passed by on all; all files are hashed, each once."""
    checkpoints = Path(shutil.copytree(three, tmp_path / "checkpoints"))
    newest, before, _ = steps.list_steps(checkpoints)
    hashed: list[Path] = []

    def hash_file(path: Path) -> str:
        hashed.append(path)
        return whole(path)

    whole = directory.hash_file
    monkeypatch.setattr(directory, "hash_file", hash_file)

    def find(world: Agreement) -> Path | None:
        return steps.find_latest(checkpoints, world=world)

    names = sorted(p.name for p in newest.iterdir() if p.name != manifest.MANIFEST)
    for size in (1, 3, len(names) + 2):
        hashed.clear()
        assert in_ranks(size, find) == [newest] * size
        assert sorted(path.name for path in hashed) == names
    for name in names:
        content = (newest / name).read_bytes()
        (newest / name).write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        assert in_ranks(3, find) == [before] * 3
        for error in in_ranks(3, lambda world: verify(newest, world=world)):
            assert str(newest / name) in str(error)
        (newest / name).write_bytes(content)


def test_only_a_wrong_checksum_leads_to_an_older_checkpoint(
    three: Path, in_ranks: Callable[..., list[Any]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """One rank that cannot read a file, or sees no manifest, is no reason to lose steps."""
    newest = steps.list_steps(three)[0]

    def read_manifest(directory: Path) -> Any:
        assert threading.current_thread().name == "rank 0"
        return whole(directory)

    def unreadable(path: Path) -> str:
        raise UserError(f"cannot read {path}: Input/output error")

    def find(world: Agreement) -> Path | None:
        threading.current_thread().name = f"rank {world.rank}"
        return steps.find_latest(three, world=world)

    whole = directory.read_manifest
    monkeypatch.setattr(directory, "read_manifest", read_manifest)
    assert in_ranks(2, find) == [newest] * 2
    monkeypatch.setattr(directory, "hash_file", unreadable)
    assert all("Input/output error" in str(error) for error in in_ranks(2, find))


def test_a_start_passes_by_what_is_damaged_or_refuses_it(
    three: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """As `pretrain` does it: by itself, and with a checkpoint that is named."""
    config = RunConfig(run_dir=str(tmp_path / "run"))
    checkpoints = tmp_path / "run/checkpoints"

    def newest() -> Path | None:
        return steps.find_latest(checkpoints)

    with RunLock(config) as lock:
        claim_run(config, lock)
        shutil.copytree(three, checkpoints)
        assert open_run(config, lock) is None
        assert newest() == checkpoints / "step_00000003"
        damaged = checkpoints / "step_00000003/rank-00001.safetensors"
        damaged.unlink()
        assert newest() == checkpoints / "step_00000002"
        assert caplog.text.count(str(damaged)) == 1
        config.resume = str(damaged.parent)
        assert open_run(config, lock) == damaged.parent
        with pytest.raises(UserError, match=str(damaged)):
            verify(damaged.parent)
        for step in (1, 2):
            (checkpoints / f"step_0000000{step}/config.json").unlink()
        with pytest.raises(UserError, match="none of the 3 checkpoints"):
            newest()
    assert steps.find_latest(tmp_path) is None
