"""Trackers, on stand-ins that have the signatures of wandb 0.31 and trackio 0.43: the points that
they get, and that nothing they do wrong stops a run."""

from __future__ import annotations

import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from helpers.tiny_models import tiny_config
from nemo_hybrid.config.run import RunConfig
from nemo_hybrid.errors import UserError
from nemo_hybrid.train import track
from nemo_hybrid.train.guard import Counters
from nemo_hybrid.train.loop import Display, train
from nemo_hybrid.train.metrics import Timing
from nemo_hybrid.train.run import Outcome, Position
from nemo_hybrid.train.track import Tracker


def wandb_init(
    entity=None, project=None, dir=None, id=None, name=None, notes=None, tags=None, config=None,
    config_exclude_keys=None, config_include_keys=None, allow_val_change=None, group=None,
    job_type=None, mode=None, force=None, anonymous=None, reinit=None, resume=None,
    resume_from=None, fork_from=None, save_code=None, tensorboard=None, sync_tensorboard=None,
    monitor_gym=None, settings=None,
):  # fmt: skip
    return locals()


def trackio_init(
    project, name=None, group=None, space_id=None, server_url=None, dataset_id=None,
    bucket_id=None, config=None, resume="never", settings=None, private=None, embed=True,
    auto_log_gpu=None, gpu_log_interval=10.0, auto_log_cpu=None, cpu_log_interval=10.0,
    webhook_url=None, webhook_min_level=None,
):  # fmt: skip
    return locals()


class Service:
    """What a library was told."""

    def __init__(self, init: Any) -> None:
        self.begun: list[dict[str, Any]] = []
        self.points: list[tuple[int, dict[str, float]]] = []
        self.finished = 0
        self.init = lambda **given: self.begun.append(init(**given))

    def log(self, data: dict[str, float], step: int | None = None) -> None:
        assert step is not None
        self.points.append((step, data))

    def finish(self) -> None:
        self.finished += 1


@pytest.fixture(params=["wandb", "trackio"])
def service(request, monkeypatch) -> tuple[str, Service]:
    found = Service({"wandb": wandb_init, "trackio": trackio_init}[request.param])
    monkeypatch.setitem(sys.modules, request.param, found)
    return request.param, found


def test_a_run_that_goes_on_keeps_its_name(service, tmp_path) -> None:
    kind, library = service
    for step in (1, 2):
        tracker = Tracker(kind, tmp_path, {"train": {"lr": 0.1}})
        tracker.log({0: {"heldout/loss": 3.0}, step: {"loss/train": 2.0}})
        tracker.close()
    first, second = library.begun
    assert first == second
    assert first["name"].startswith(f"{tmp_path.name}-")
    assert first["resume"] == "allow"
    assert first["config"] == {"train": {"lr": 0.1}}
    assert kind == "trackio" or (first["id"], first["dir"]) == (first["name"], str(tmp_path))
    assert library.points[:2] == [(0, {"heldout/loss": 3.0}), (1, {"loss/train": 2.0})]
    assert library.finished == 2

    other = tmp_path / "other"
    other.mkdir()
    Tracker(kind, other, {})
    assert library.begun[2]["name"] != first["name"]


@pytest.mark.parametrize("when", ["init", "log", "finish"])
def test_a_failure_is_one_warning(service, tmp_path, caplog, when) -> None:
    kind, library = service

    def fail(*_: Any, **__: Any) -> None:
        raise RuntimeError("no network")

    setattr(library, when, fail)
    tracker = Tracker(kind, tmp_path, {})
    for step in range(3):
        tracker.log({step: {"loss/train": 2.0}})
    tracker.close()
    assert [record.message for record in caplog.records] == [
        f"{kind} failed (no network): the run goes on without it"
    ]
    assert len(library.points) == (3 if when == "finish" else 0)


def test_the_loop_gives_it_the_points_of_tensorboard(service, tmp_path) -> None:
    kind, library = service
    config = RunConfig(track=kind, run_dir=str(tmp_path))
    run = SimpleNamespace(
        config=config,
        model=SimpleNamespace(config=tiny_config("M")),
        world=SimpleNamespace(size=1, device=torch.device("cpu")),
        guard=SimpleNamespace(counters=Counters()),
        data=SimpleNamespace(metrics=lambda: {"reward": 0.5}),
        peak=None,
    )
    outcome = Outcome({"loss": 2.0, "ce": 2.0}, 1.0, {}, 1, 1, None, False)
    with Display(run, Position()) as display:
        display.step(
            Position(1), 0.1, outcome, Timing(1.0, 0.0, {"loss": 4.0}, {"loss": 3.0}), True
        )
    (before, start), (after, points) = library.points
    assert (before, start) == (0, {"heldout/loss": 4.0})
    assert (after, points["heldout/loss"], points["run/reward"]) == (1, 3.0, 0.5)
    assert library.finished == 1
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert set(events.Tags()["scalars"]) == {*points}
    for name, value in points.items():
        assert events.Scalars(name)[-1].value == pytest.approx(value), name


def test_without_a_tracker_nothing_is_written(tmp_path) -> None:
    tracker = Tracker("none", tmp_path, {})
    tracker.log({1: {"loss/train": 2.0}})
    tracker.close()
    assert not any(tmp_path.iterdir())


def test_a_library_that_is_not_there_is_named_before_all_else(monkeypatch) -> None:
    monkeypatch.setattr(track, "find_spec", lambda name: None)
    config = RunConfig(track="wandb", run_dir="/nonexistent/run")
    with pytest.raises(UserError, match="track is wandb, which is not installed: pip install"):
        train(SimpleNamespace(check=lambda: None, config=config), 0)
    assert not Path("/nonexistent").exists()
