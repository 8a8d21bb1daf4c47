"""Grouped products of emulated operands by Triton kernels, against those expert by expert."""

import pytest
import torch
from torch import Tensor

from helpers.triton_env import DEVICE
from nemo_kernels.lowp import emulation, grouped
from nemo_kernels.lowp.operand import Operand, Rounding
from nemo_kernels.lowp.reference import operands

ENDS = torch.tensor([16, 16, 48, 64], dtype=torch.int32, device=DEVICE)
LAST = 64


def draw(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randn(shape, generator=generator).bfloat16().to(DEVICE)


def rows(width: int) -> Tensor:
    """Of four experts, the second without any; and zeros behind the last."""
    x = draw(80, width)
    x[16:48] *= 9
    x[LAST:] = 0
    return x


def side(x: Tensor, columnwise: bool, ends_E: Tensor | None, kind: str) -> Operand:
    if kind == "bf16":
        return Operand(x, None, columnwise)
    made = operands(x, Rounding(), Rounding(), ends_E)[columnwise]
    assert made is not None
    return made


def distance(a: Tensor, b: Tensor) -> float:
    return float((a.double() - b.double()).norm() / b.double().norm())


@pytest.mark.parametrize("kinds", [("nvfp4", "nvfp4"), ("bf16", "bf16"), ("nvfp4", "bf16")])
@pytest.mark.parametrize("columnwise", [False, True])  # weights as dgrad has them
def test_rows_times_their_experts_weights(kinds: tuple[str, str], columnwise: bool) -> None:
    weights = draw(4, 48, 32).mT.contiguous() if columnwise else draw(4, 48, 32)
    a, b = side(rows(32), False, ENDS, kinds[0]), side(weights, columnwise, None, kinds[1])
    found = grouped.grouped_product(a, b, ENDS, torch.float32)
    wanted = emulation.grouped_product(a, b, ENDS, torch.float32)
    assert found.shape == wanted.shape == (80, 48)
    assert distance(found[:LAST], wanted[:LAST]) < 1e-6
    assert not found[LAST:].any()
    rounded = grouped.grouped_product(a, b, ENDS, torch.bfloat16)
    assert torch.equal(rounded[:LAST], found[:LAST].bfloat16())  # once
    if kinds[0] == "nvfp4":  # another expert's tensor scale is noticed
        assert a.tensor_scale is not None
        other = a._replace(tensor_scale=a.tensor_scale.roll(1))
        assert (
            distance(grouped.grouped_product(other, b, ENDS, torch.float32)[:LAST], wanted[:LAST])
            > 0.1
        )


@pytest.mark.parametrize("kind", ["nvfp4", "bf16"])
def test_gradients_of_the_experts_weights(kind: str) -> None:
    a, b = side(rows(48), True, ENDS, kind), side(rows(32), True, ENDS, kind)
    found = grouped.grouped_wgrad(a, b, ENDS, torch.float32)
    wanted = emulation.grouped_wgrad(a, b, ENDS, torch.float32)
    assert found.shape == wanted.shape == (4, 48, 32)
    assert distance(found, wanted) < 1e-6
    assert not found[1].any()
    shifted = ENDS + torch.tensor([16, 16, 0, 0], dtype=torch.int32, device=DEVICE)
    assert distance(grouped.grouped_wgrad(a, b, shifted, torch.float32), wanted) > 0.1
