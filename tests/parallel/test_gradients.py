"""The reduced gradient as the engine shows it and the zeros in it, against plain PyTorch."""

from __future__ import annotations

import json
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
from safetensors.torch import load_file

from helpers.processes import run_python
from nemo_hybrid.precision.groups import figures
from parallel import equal
from parallel.comparing import TOLERANCES, relative

PRODUCTS = ("_proj.weight", "experts.up_proj", "experts.down_proj")


@pytest.fixture(scope="session")
def plain(store: Path) -> dict[str, torch.Tensor]:
    with patch.dict(equal.TRAIN, {"clip_grad_norm": 1e9}):
        (_, state), _ = equal.reference(store, "sgd", steps=1)
    return {key.split("|")[1]: t for key, t in state.items() if key.startswith("grad0|")}


@pytest.mark.parametrize("zero", [1, 2])
def test_gradients_and_their_zeros(
    tmp_path: Path, store: Path, plain: dict[str, torch.Tensor], zero: int
) -> None:
    program = Path(__file__).with_name("gradients.py")
    run_python([program, store, tmp_path, str(zero)], 2)
    found = {name: torch.full((g.numel(),), torch.nan) for name, g in plain.items()}
    elements = 0
    for rank in (0, 1):
        for key, part in load_file(tmp_path / f"{zero}-{rank}.safetensors").items():
            name, start = key.split("|")
            found[name][int(start) : int(start) + len(part)] = part
            elements += len(part)
    assert elements == sum(g.numel() for g in plain.values())  # each on one rank
    for name, gradient in plain.items():
        assert relative(found[name], gradient.flatten()) < TOLERANCES["gradients"], name

    sampled, other = (json.loads((tmp_path / f"{zero}-{r}.json").read_text()) for r in (0, 1))
    assert sampled == other
    zeros: dict[str, list[int]] = {}
    for name, gradient in plain.items():
        if name.endswith(PRODUCTS):
            count = zeros.setdefault(figures(name.rpartition(".")[0]), [0, 0])
            count[0] += int((gradient == 0).sum())
            count[1] += gradient.numel()
    assert sampled.keys() == zeros.keys()
    assert zeros["experts"][0] >= zeros["experts"][1] / 8 * len(equal.STARVED)
    for group, (count, numel) in zeros.items():
        assert sampled[group] == {"zero_gradients": pytest.approx(count / numel, abs=2 / numel)}
