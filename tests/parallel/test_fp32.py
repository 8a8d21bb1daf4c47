"""Numbers that must not pass through bf16: a few parameters, and all sums of gradients."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_hybrid.config.model import FP32_NAMES

LR = 1e-5


@pytest.fixture(params=[1, 2], ids=["zero1", "zero2"])
def found(request: pytest.FixtureRequest, results: Callable[[int], Path]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((results(2) / f"precision-{request.param}.json").read_text())
    return found


def test_parameters_of_the_list_are_fp32_in_every_forward_pass(found: dict[str, Any]) -> None:
    assert len(found["dtypes"]) >= 4  # two mixers, before and after a step
    for dtypes in found["dtypes"]:
        assert set(dtypes) == {"A_log", "D", "dt_bias"} <= set(FP32_NAMES)
        assert set(dtypes.values()) == {"torch.float32"}
    assert found["other_dtypes"] == ["torch.bfloat16"]


def test_an_update_of_1e_5_arrives_and_shows_in_the_output(found: dict[str, Any]) -> None:
    for name, moved in found["moved"].items():
        assert moved == pytest.approx(LR, rel=0.1), name
    for kind in ("A_log", "D", "dt_bias"):
        shown = [shows for name, shows in found["shows"].items() if name.endswith(kind)]
        assert any(shown), f"{kind}: {found['shows']}"
    # The same update of the same values in bf16 is lost, so the comparison above says something.
    assert not any(found["shows_in_bf16"].values())


def test_gradients_are_summed_in_fp32(found: dict[str, Any]) -> None:
    """Shares of 1, 2^-12 (ranks of micro-batch 0), 2^-11 and 2^-10 (micro-batch 1) all count."""
    first, second, third, fourth = 1.0, 2.0**-12, 2.0**-11, 2.0**-10
    everything = first + second + third + fourth
    for rank, experts in enumerate((first + third, second + fourth)):
        for name, values in found["accumulated"][rank].items():
            expected = experts if ".experts." in name else everything
            assert values == pytest.approx([expected], rel=1e-6), name
    # What sums in bf16 would have given:
    assert (torch.tensor(first).bfloat16() + torch.tensor(third).bfloat16()).item() == first
    assert torch.tensor(everything).bfloat16().item() == first


@pytest.mark.parametrize(
    ("zero", "rounded"), [(1, "communication"), (2, "communication"), (1, "accumulation")]
)
def test_sums_in_bf16_are_noticed(results: Callable[[int], Path], zero: int, rounded: str) -> None:
    """The same shares, with DeepSpeed told to use bf16 between ranks or between micro-batches.
    (Under ZeRO-2 the latter changes nothing: there our order of the groups decides.)"""
    found = json.loads((results(2) / f"precision-{zero}-{rounded}.json").read_text())
    everything, least = 1 + 2.0**-12 + 2.0**-11 + 2.0**-10, 2.0**-12
    for rank in found["accumulated"]:
        for name in ("layer.dense", "layer.matrix"):
            assert rank[name][0] < everything - 0.99 * least, name
