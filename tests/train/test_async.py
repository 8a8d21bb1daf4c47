"""Checkpoints that are written while training goes on: the same bytes, and errors that surface."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from helpers.launcher import differences
from helpers.once import once
from helpers.processes import TESTS, run_python
from helpers.runs import tiny_run
from nemo_hybrid.config.read import dump_config
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import read_json
from nemo_hybrid.train.resume import room_for
from train.conftest import LAYOUT, Unbroken

FAULTY = TESTS / "helpers/faulty.py"
STEPS, EVERY = 6, 3


@pytest.fixture(scope="session")
def slow(unbroken: Unbroken, tmp_path_factory: pytest.TempPathFactory) -> Callable[[bool], Path]:
    """slow(asynchronous): the unbroken run again, with a slow disk."""

    def start(asynchronous: bool) -> Path:
        def make(out: Path) -> None:
            faults = {"slow_write": 0.1, "events": str(out / "events")}
            if asynchronous:
                faults["write_beside"] = [2, 12]
            words = ["pretrain", "--config", unbroken.config, "--run_dir", out / "run", *LAYOUT,
                     "--checkpoint.asynchronous", str(asynchronous).lower()]  # fmt: skip
            run_python([FAULTY, json.dumps(faults), *words], size=2)

        return once(tmp_path_factory, f"slow_{asynchronous}", make)

    return start


def during_writes(events: Path) -> list[int]:
    """Batches begun between the first and the last file of each checkpoint; of the last
    checkpoint, none can be."""
    counts, writing = [], False
    for line in events.read_text().splitlines():
        what, name = line.split()
        if what == "write" and not writing:
            writing = True
            counts.append(0)
        elif name == "manifest.json":
            writing = False
        elif what == "batch" and writing:
            counts[-1] += 1
    return counts


def test_a_thread_that_begins_late_writes_the_state_it_was_given(
    store: Path, tmp_path: Path
) -> None:
    """By then the loop is some steps further on."""
    train = {"max_steps": STEPS, "micro_batch_size": 8, "eval_sequences": 0}
    config = tiny_run(store, train=train)
    config.checkpoint.every = EVERY
    (tmp_path / "run.yaml").write_text(dump_config(config))
    words = ["pretrain", "--config", tmp_path / "run.yaml", "--run_dir", tmp_path / "run"]
    run_python([FAULTY, json.dumps({"late_write": 2.0}), *words])
    checkpoints = tmp_path / "run/checkpoints"
    assert sorted(d.name for d in checkpoints.glob("step_*")) == ["step_00000003", "step_00000006"]
    for step in (EVERY, STEPS):
        state = read_json(checkpoints / f"step_{step:08d}/run_state.json")
        assert (state["step"], state["batches"], state["optimizer_steps"]) == (step,) * 3


@pytest.mark.parametrize("asynchronous", [True, False])
def test_both_ways_of_saving_write_the_same_bytes(
    slow: Callable[[bool], Path], unbroken: Unbroken, asynchronous: bool
) -> None:
    """Also while the weights that are being written change in memory."""
    run_dir = slow(asynchronous) / "run"
    for step in (4, 8, 12):
        assert differences(run_dir, unbroken.run_dir, step) == []
    # What would have been seen if a later step's weights had been written.
    steps = (run_dir / f"checkpoints/step_{step:08d}" for step in (4, 8))
    a, b = ((d / "optimizer-r00001-exp_avg.safetensors").read_bytes() for d in steps)
    assert a != b


def test_training_goes_on_while_a_checkpoint_is_written(slow: Callable[[bool], Path]) -> None:
    first, second, last = during_writes(slow(True) / "events")
    assert first >= 2
    assert second >= 2
    assert last == 0
    assert during_writes(slow(False) / "events") == [0, 0, 0]


# ---- errors while writing, in this process ------------------------------------------------------


CASES = [
    (f"{kind}_{'beside' if asynchronous else 'waiting'}", name, code, asynchronous)
    for kind, name, code in (
        ("full", "optimizer-r00000-master.safetensors", errno.ENOSPC),
        ("broken", "manifest.json", errno.EIO),
        ("pointer", ".tmp-latest", errno.EDQUOT),
    )
    for asynchronous in (True, False)
]


@pytest.fixture(scope="session")
def small(store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small run of one process, unbroken in ``run`` and with errors beside it."""

    def make(out: Path) -> None:
        train = {"max_steps": STEPS, "micro_batch_size": 8, "eval_sequences": 0}
        config = tiny_run(store, train=train)
        config.checkpoint.every = EVERY
        (out / "run.yaml").write_text(dump_config(config))
        defect = ("defect", "optimizer-r00000-master.safetensors", 0, True)
        cases = [("run", "none", 0, True), defect, *CASES]
        script = TESTS / "helpers/write_errors.py"
        run_python([script, out / "run.yaml", out, json.dumps(cases)])

    return once(tmp_path_factory, "small", make)


@pytest.mark.parametrize(("label", "name", "code", "asynchronous"), CASES)
def test_a_write_error_ends_the_run_and_spares_what_was_there(
    small: Path, label: str, name: str, code: int, asynchronous: bool
) -> None:
    result = json.loads((small / f"{label}.json").read_text())
    assert result["statuses"] == [2, 0]
    assert result["message"].count("error: ") == 1
    assert name.removeprefix(".tmp-") in result["message"]
    assert os.strerror(code) in result["message"]
    if name == ".tmp-latest":  # the checkpoint stands, only its pointer does not
        assert result["newest"] == f"step_{STEPS:08d}"
    else:
        assert result["newest"] == f"step_{EVERY:08d}"
        assert result["left"] == ["latest", result["newest"]]
    assert differences(small / label, small / "run", STEPS) == []


def test_a_defect_in_the_writing_thread_is_not_passed_over(small: Path) -> None:
    """Another kind of error than that of a disk ends the run with its traceback."""
    result = json.loads((small / "defect.json").read_text())
    assert result["statuses"] == ["ValueError('a defect')", 0]
    assert result["newest"] == f"step_{EVERY:08d}"
    assert differences(small / "defect", small / "run", STEPS) == []


def test_copies_lie_in_one_block_of_their_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Pinned as a whole: block by block torch would take powers of two."""
    shapes = [(3, 5), (), (0, 7), (33,)]
    tensors = [
        torch.randn(shape).to(d) for shape in shapes for d in (torch.bfloat16, torch.float32)
    ]
    pinned = []

    def register(address: int, size: int, flags: int) -> int:
        pinned.append((address, size, flags))
        return 0

    cudart = SimpleNamespace(cudaHostRegister=register)
    monkeypatch.setattr(torch.cuda, "cudart", lambda: cudart)
    room = room_for(tensors, pinned=True)
    for copy, tensor in zip(room, tensors, strict=True):
        assert torch.equal(copy.copy_(tensor), tensor)
        assert (copy.shape, copy.dtype, copy.data_ptr() % 64) == (tensor.shape, tensor.dtype, 0)
    for copy, tensor in zip(room, tensors, strict=True):  # none lies in another
        assert torch.equal(copy, tensor)
    sizes = sum(t.nbytes for t in tensors)
    assert pinned == [(room[0].data_ptr(), room[0].untyped_storage().nbytes(), 0)]
    assert sizes <= pinned[0][1] < sizes + 64 * len(tensors)
    room_for(tensors, pinned=False)
    assert room_for([], pinned=True) == []
    assert len(pinned) == 1
    cudart.cudaHostRegister = lambda *_: 2
    with pytest.raises(UserError, match=r"cannot be pinned: set .* to false"):
        room_for(tensors, pinned=True)
