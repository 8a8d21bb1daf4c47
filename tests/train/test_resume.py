"""A run that goes on is the run that never stopped."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest

from helpers.corpus import flip_byte, write_corpus
from helpers.processes import Finished, run_command
from helpers.runs import tiny_run
from nemo_hybrid.cli import main
from nemo_hybrid.config.read import check_home, dump_config, load_config
from nemo_hybrid.config.run import DataOptions, RunConfig
from nemo_hybrid.data.loader import Blend, open_blend
from nemo_hybrid.errors import UserError
from nemo_hybrid.recipes.pretrain import Pretrain
from nemo_hybrid.train.metrics import read_metrics
from nemo_hybrid.train.run_dir import RunLock, claim_run, open_run
from train.conftest import LAYOUT, Unbroken

MEASURED = ("tokens_per_s", "step_seconds", "data_seconds", "mfu", "memory_gb")
"""Fields that tell of the machine, not of the training."""
WITH_PATHS = ("run.yaml", "manifest.json")


def rows(run_dir: Path) -> list[dict[str, Any]]:
    found = [asdict(row) for row in read_metrics(run_dir / "metrics.jsonl")]
    return [{k: v for k, v in row.items() if k not in MEASURED} for row in found]


@pytest.fixture(scope="module")
def resumed(
    unbroken: Unbroken, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, list[Finished]]:
    """The run as if it had been killed while it wrote after its last step: the newest checkpoint
    is damaged, metrics are further than the one before, and the last line is torn."""
    run_dir = unbroken.copy(tmp_path_factory.mktemp("resumed") / "run")
    flip_byte(run_dir / "checkpoints/step_00000012/optimizer-r00001-master.safetensors", -1)
    with (run_dir / "metrics.jsonl").open("a") as file:
        file.write('{"step":13,"loss":')
    words = ["pretrain", "--config", unbroken.config, "--run_dir", run_dir, *LAYOUT]
    return run_dir, run_command(*words, size=2)


def test_damaged_checkpoint_is_named_and_the_one_before_is_taken(
    resumed: tuple[Path, list[Finished]],
) -> None:
    run_dir, finished = resumed
    assert "step_00000012/optimizer-r00001-master.safetensors" in finished[0].stderr
    assert f"going on from {run_dir / 'checkpoints/step_00000008'}" in finished[0].stdout


def test_resumed_run_is_bit_identical(
    unbroken: Unbroken, resumed: tuple[Path, list[Finished]]
) -> None:
    """Weights, router biases, masters, moments and generators, byte by byte."""
    theirs = unbroken.run_dir / "checkpoints/step_00000012"
    ours = resumed[0] / "checkpoints/step_00000012"
    names = {path.name for path in theirs.iterdir()}
    assert {path.name for path in ours.iterdir()} == names
    assert sum(name.startswith("optimizer-r") for name in names) == 6
    for name in names - set(WITH_PATHS):
        assert (ours / name).read_bytes() == (theirs / name).read_bytes(), name
    # What would have been missed: the step before has other bytes in every such file.
    before = unbroken.run_dir / "checkpoints/step_00000008"
    for name in names - set(WITH_PATHS):
        if name.startswith(("model-", "optimizer-r")):
            assert (before / name).read_bytes() != (theirs / name).read_bytes(), name


def test_metrics_are_cut_back_and_go_on_equal(
    unbroken: Unbroken, resumed: tuple[Path, list[Finished]]
) -> None:
    assert rows(resumed[0]) == rows(unbroken.run_dir)
    before, after = (
        (directory / "metrics.jsonl").read_text().splitlines()
        for directory in (unbroken.run_dir, resumed[0])
    )
    assert after[:8] == before[:8]  # kept as they were
    seconds = [json.loads(line)["step_seconds"] for line in before[8:]]
    assert seconds != [json.loads(line)["step_seconds"] for line in after[8:]]  # made again


def test_other_layout_goes_on_with_the_same_samples(unbroken: Unbroken, tmp_path: Path) -> None:
    """From two processes and expert parallel 2 to one process: bf16 rounds differently."""
    run_dir = unbroken.copy(tmp_path / "run", without=(12, 8))
    words = ["pretrain", "--config", unbroken.config, "--run_dir", run_dir]
    finished = run_command(*words, "--train.micro_batch_size", "4")
    assert "going on from" in finished[0].stdout
    ours, theirs = rows(run_dir), rows(unbroken.run_dir)
    assert len(ours) == 12
    assert ours[:4] == theirs[:4]
    for a, b in zip(ours[4:], theirs[4:], strict=True):
        assert a["sample_hash"] == b["sample_hash"]
        assert a["loss"] == pytest.approx(b["loss"], rel=5e-3)
        assert a["mtp_losses"] == pytest.approx(b["mtp_losses"], rel=5e-3)
    # One step further on from the same state, so the first row is closer than the training moves:
    # by twice what bf16 is away from fp32, as in tests/parallel/test_layouts.py.
    assert ours[4]["loss"] == pytest.approx(theirs[4]["loss"], rel=2e-3)


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--train.lr", "0.001"), ["train.lr", "0.001", "0.005"]),
        (("--model.pattern", "ME*E-E"), ["model.pattern", "ME*E-E", "ME*E-M"]),
        (("--precision.recipe", "fp32"), ["precision.recipe"]),
        (("--resume", "never"), ["not empty", "--resume auto"]),
    ],
)
def test_another_run_is_refused(
    unbroken: Unbroken,
    pretrain: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, str],
    named: list[str],
) -> None:
    assert pretrain("--config", unbroken.config, "--run_dir", unbroken.run_dir, *words) == 2
    message = capsys.readouterr().err
    assert str(unbroken.run_dir) in message
    assert all(name in message for name in named), message


def test_other_data_under_the_same_name_is_refused(
    unbroken: Unbroken,
    pretrain: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
    tmp_path: Path,
) -> None:
    """Paths may change, the tokens not."""
    store = write_corpus(tmp_path / "store", seed=1)
    copied = unbroken.copy(tmp_path / "run", without=(12,))
    words = ["--config", unbroken.config, "--run_dir", copied, "--data.path", store]
    assert pretrain(*words) == 2
    message = capsys.readouterr().err
    assert "step_00000008 was written with data [" in message


def test_weights_of_a_blend_are_part_of_the_identity(store: Path) -> None:
    """They decide which samples come next."""
    blend = open_blend(DataOptions(path=str(store), sequence_length=32), tiny_run(store).model)
    two = replace(blend, train=blend.train * 2, phases=((0.0, (0.5, 0.5)),))
    recipe = Pretrain(tiny_run(store))

    def identity(rows: Blend) -> dict[str, Any]:
        recipe.rows = rows
        return recipe.identity()

    other = replace(two, phases=((0.0, (0.7, 0.3)),))
    assert identity(two) == identity(replace(two))
    assert identity(two) != identity(other)
    assert identity(other)["weights"] == [0.7, 0.3]


def test_moved_data_and_older_configurations_are_the_same_run(store: Path, tmp_path: Path) -> None:
    config = tiny_run(store)
    config.run_dir = str(tmp_path / "run")
    lock = RunLock(config)
    claim_run(config, lock)
    saved = tmp_path / "run/config.yaml"
    assert "  weight_decay: 0.1\n" in saved.read_text()
    saved.write_text(saved.read_text().replace("  weight_decay: 0.1\n", ""))
    config.data.path = "/moved"
    assert open_run(config, lock) is None
    config.train.weight_decay = 0.2
    with pytest.raises(UserError, match=r"train.weight_decay: 0.1 there, 0.2 here"):
        open_run(config, lock)


@pytest.mark.parametrize("launcher", ["TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT"])
def test_a_restarted_job_goes_on_whatever_it_was_told_at_first(
    unbroken: Unbroken, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, launcher: str
) -> None:
    run_dir = unbroken.copy(tmp_path / "run")
    config = load_config([unbroken.config], ["--run_dir", str(run_dir), *LAYOUT])
    for resume in ("never", str(run_dir / "checkpoints/step_00000004")):
        config.resume = resume
        for attempts, error in (("0", UserError), ("1", None)):
            monkeypatch.setenv(launcher, attempts)
            with RunLock(config) as lock, pytest.raises(error) if error else nullcontext():
                assert open_run(config, lock) is None
    # Nothing of its own yet: once more from there.
    config.run_dir, config.resume = str(tmp_path / "new"), resume
    with RunLock(config) as lock:
        assert open_run(config, lock) == Path(resume)


def test_the_same_command_goes_on_and_another_runs_checkpoint_does_not_mix(
    unbroken: Unbroken, tmp_path: Path
) -> None:
    theirs = unbroken.run_dir / "checkpoints/step_00000008"
    config = load_config([unbroken.config], ["--resume", str(theirs), *LAYOUT])
    config.run_dir = str(tmp_path / "run")
    with RunLock(config) as lock:
        assert open_run(config, lock) == theirs
        claim_run(config, lock)
    shutil.copytree(unbroken.run_dir / "checkpoints", tmp_path / "run/checkpoints")
    with RunLock(config) as lock:
        assert open_run(config, lock) is None  # as at first: on from its own newest
    config.resume = str(unbroken.run_dir / "checkpoints/step_00000012")
    with RunLock(config) as lock, pytest.raises(UserError, match=r"another run's: go on from"):
        open_run(config, lock)


def test_a_checkpoint_behind_the_end_of_a_new_run_is_no_beginning(
    unbroken: Unbroken, tmp_path: Path
) -> None:
    config = load_config([unbroken.config], ["--train.max_steps", "12"])
    config.run_dir = str(tmp_path / "new")
    config.resume = str(unbroken.run_dir / "checkpoints/step_00000012")
    with RunLock(config) as lock:
        with pytest.raises(UserError, match=r"set train.max_steps \(12\) above 12"):
            open_run(config, lock)
        config.train.max_steps = 13
        assert open_run(config, lock) == Path(config.resume)
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("asynchronous", "first", "last", "lost"),
    [
        (True, 1, 12, True),
        (True, 1, 9, True),
        (True, 1, 8, False),  # the second save waited for the first one
        (False, 1, 5, True),
        (False, 1, 4, False),
        (True, 103, 109, False),  # after a start from a checkpoint of another run
        (True, 103, 111, True),
    ],
)
def test_lost_checkpoints_are_not_taken_for_a_fresh_start(
    unbroken: Unbroken,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    asynchronous: bool,
    first: int,
    last: int,
    lost: bool,
) -> None:
    """With checkpoints every 4 steps. What a kill during the first one leaves is no loss."""
    run_dir = unbroken.copy(tmp_path / "run")
    config = load_config([unbroken.config], ["--run_dir", str(run_dir), *LAYOUT])
    config.checkpoint.asynchronous = asynchronous
    (run_dir / "config.yaml").write_text(dump_config(config))
    (run_dir / "checkpoints").rename(tmp_path / "elsewhere")
    (run_dir / "checkpoints/.tmp-step_00000004").mkdir(parents=True)
    row = json.loads((run_dir / "metrics.jsonl").read_text().splitlines()[0])
    rows = [json.dumps({**row, "step": step}) + "\n" for step in range(first, last + 1)]
    (run_dir / "metrics.jsonl").write_text("".join(rows))
    config.checkpoint.every = 1  # from now on
    with RunLock(config) as lock:
        if lost:
            with pytest.raises(UserError, match=f"up to step {last}, but no check"):
                open_run(config, lock)
        else:
            assert open_run(config, lock) is None
            assert f"holds metrics of {len(rows)} steps, but no checkpoint" in caplog.text


@pytest.mark.parametrize("rows", [0, 1])
def test_a_pointer_says_that_a_checkpoint_stood(
    unbroken: Unbroken, tmp_path: Path, rows: int
) -> None:
    """However few steps were made."""
    run_dir = unbroken.copy(tmp_path / "run", without=(4, 8, 12))
    lines = (run_dir / "metrics.jsonl").read_text().splitlines(keepends=True)
    (run_dir / "metrics.jsonl").write_text("".join(lines[:rows]))
    config = load_config([unbroken.config], ["--run_dir", str(run_dir), *LAYOUT])
    holds = "metrics up to step 1" if rows else "latest"
    with RunLock(config) as lock:
        with pytest.raises(UserError, match=f"holds {holds}, but no checkpoints"):
            open_run(config, lock)
        (run_dir / "checkpoints/latest").unlink()
        assert open_run(config, lock) is None


def test_a_copied_run_goes_on_in_its_own_place(unbroken: Unbroken, tmp_path: Path) -> None:
    """By its own config.yaml, from whatever directory it is started."""
    copy = unbroken.copy(tmp_path / "copy")
    moved = load_config([copy / "config.yaml"])
    assert moved.run_dir == str(copy)
    original = load_config([unbroken.config], LAYOUT)
    assert moved.profile == "3:2"
    assert replace(moved, run_dir=original.run_dir, profile=None) == original


@pytest.mark.parametrize("file", ["config.yaml", "checkpoints/step_00000008/run.yaml"])
def test_a_configuration_that_names_another_place_is_refused(
    unbroken: Unbroken, tmp_path: Path, capsys: pytest.CaptureFixture[str], file: str
) -> None:
    """As those of older versions do in a copied run, and those in all checkpoints."""
    copy = unbroken.copy(tmp_path / "copy")
    config = load_config([unbroken.config], LAYOUT)
    (copy / file).write_text(dump_config(config))
    files = {p: p.read_bytes() for p in unbroken.run_dir.rglob("*") if p.is_file()}
    words = ["pretrain", "--config", str(copy / file)]
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"is of a run in {copy}, but its run_dir is {config.run_dir}" in said
    assert f"--run_dir {copy}" in said
    (tmp_path / "more.yaml").write_text("train: {lr: 1e-3}")
    assert main([*words, "--config", str(tmp_path / "more.yaml")]) == 2
    assert "is of a run in" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in unbroken.run_dir.rglob("*") if p.is_file()} == files
    # A project's own files beside its own checkpoints mean what they say.
    (copy / "tiny.yaml").write_text(dump_config(config))
    check_home([copy / "tiny.yaml"], config.run_dir)
    # What says aloud which place is meant is believed.
    check_home([copy / file], str(copy))
    (tmp_path / "more.yaml").write_text("run_dir: elsewhere")
    check_home([copy / file, tmp_path / "more.yaml"], str(tmp_path / "elsewhere"))
    assert main([*words, "--run_dir", str(copy), "--parallel.ep", "3"]) == 2
    assert "is of a run in" not in capsys.readouterr().err


def test_an_edited_configuration_is_compared_with_that_of_the_checkpoint(
    unbroken: Unbroken, tmp_path: Path
) -> None:
    copy = unbroken.copy(tmp_path / "copy")
    saved = copy / "config.yaml"
    text = saved.read_text()
    saved.write_text(text.replace(f"\n  lr: {load_config([saved]).train.lr}\n", "\n  lr: 0.125\n"))
    config = load_config([saved])
    assert config.train.lr == 0.125
    with (
        RunLock(config) as lock,
        pytest.raises(UserError, match=r"train\.lr: .* 0\.125 here"),
    ):
        open_run(config, lock)
    # Who gives the options that the checkpoint holds is right, whatever stands in the file.
    config = load_config([unbroken.config], ["--run_dir", str(copy), *LAYOUT])
    with RunLock(config) as lock:
        assert open_run(config, lock) is None
    # A damaged copy in the newest checkpoint is not believed.
    resolved = copy / "checkpoints/step_00000012/run.yaml"
    resolved.write_text(resolved.read_text().replace("\n  lr: ", "\n  lr: 1"))
    with RunLock(config) as lock:
        assert open_run(config, lock) is None


def test_a_run_made_meanwhile_is_not_overwritten(store: Path, tmp_path: Path) -> None:
    """The second of two starts on an empty directory, when the first has ended already."""
    config = tiny_run(store)
    config.run_dir = str(tmp_path / "run")
    with RunLock(config) as slow:
        assert open_run(config, slow) is None
        with RunLock(config) as fast:
            assert open_run(config, fast) is None
            claim_run(config, fast)
        with pytest.raises(UserError, match=r"now holds config\.yaml, of a run that was faster"):
            claim_run(config, slow)
    with RunLock(config) as lock:
        assert open_run(config, lock) is None
        claim_run(config, lock)


def test_stores_of_a_blend_may_move_but_not_change_their_weights(tmp_path: Path) -> None:
    config = RunConfig(run_dir=str(tmp_path / "run"))
    config.data.blend = {"/a": 0.7, "/b": 0.3}
    lock = RunLock(config)
    claim_run(config, lock)
    config.data.blend = {"/c": 0.7, "/d": 0.3}
    assert open_run(config, lock) is None
    config.data.blend = {"/a": 0.3, "/b": 0.7}
    with pytest.raises(UserError, match=r"data.blend: \[0.7, 0.3\] there, \[0.3, 0.7\] here"):
        open_run(config, lock)


def test_phases_are_part_of_a_run(tmp_path: Path) -> None:
    config = RunConfig(run_dir=str(tmp_path / "run"))
    config.data.path, config.data.phases = "/a", {100.0: {"/a": 0.7, "/b": 0.3}}
    lock = RunLock(config)
    claim_run(config, lock)
    config.data.phases = {100.0: {"/c": 0.7, "/d": 0.3}}  # moved
    assert open_run(config, lock) is None
    config.data.phases = {200.0: {"/a": 0.7, "/b": 0.3}}
    with pytest.raises(UserError, match=r"data.phases: \{100.0: \[0.7, 0.3\]\} there"):
        open_run(config, lock)
