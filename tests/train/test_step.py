"""What is done before a step computes."""

from __future__ import annotations

import os
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from helpers.runs import read_steps, tiny_run
from nemo_hybrid.data.loader import open_blend
from nemo_hybrid.objectives.next_token import count_targets
from nemo_hybrid.train import loop, step


class Reached(Exception):
    """The first collective, with what is given to it."""


def test_samples_are_hashed_before_they_go_to_the_device(store: Path) -> None:
    """A tensor on the meta device cannot be read, as one on a GPU cannot without waiting."""

    def reached(tensor: Tensor) -> Tensor:
        raise Reached(tensor)

    config = tiny_run(store)
    batches = next(read_steps(config, open_blend(config.data, config.model.hybrid())))
    world = SimpleNamespace(device=torch.device("meta"), sum=reached, cp=1, part=0)
    objective = SimpleNamespace(count=lambda batch, step: count_targets(batch, 2))
    run = SimpleNamespace(world=world, engine=None, config=config, objective=objective)
    with pytest.raises(Reached) as caught:
        step.train_step(run, batches, 1e-3)  # type: ignore[arg-type]
    (totals,) = caught.value.args
    assert (totals.device.type, totals.shape) == (
        "meta",
        (6,),
    )  # 3 kinds of targets, tokens, hash, stop
    with pytest.raises(TypeError, match="meta"):
        step._hash([batch.to("meta") for batch in batches])


def test_determinism_reaches_cublas(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "use_deterministic_algorithms", lambda wanted: None)
    monkeypatch.setattr(os, "environ", environment := {})
    loop._set_determinism(False)
    assert environment == {}
    loop._set_determinism(True)
    assert environment == {"CUBLAS_WORKSPACE_CONFIG": ":4096:8"}
    environment["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"  # also deterministic
    loop._set_determinism(True)
    assert environment == {"CUBLAS_WORKSPACE_CONFIG": ":16:8"}
