"""MXFP8 against torchao and against the formula in float64."""

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.nvfp4_formula import E4M3, nearest
from nemo_kernels.lowp import mxfp8


def data(dtype: torch.dtype) -> Tensor:
    x = torch.randn(64, 256, generator=torch.Generator().manual_seed(0))
    x *= torch.logspace(-28, 28, 64)[:, None]
    x[5, :32] = 0
    x[6] = 448 * 2.0**-3  # fits exactly
    x[7] = 449 * 2.0**5
    x[8, ::2] *= 2.0**-16  # flushed to zero or subnormal in E4M3
    return x.to(dtype)


def formula(block: np.ndarray) -> np.ndarray:
    """One block in float64."""
    amax = np.abs(block).max()
    scale = 2.0 ** np.ceil(np.log2(amax / 448)) if amax else 2.0**-127
    return np.copysign(E4M3[nearest(np.abs(block) / scale, E4M3)], block) * scale


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_of_torchao(dtype: torch.dtype) -> None:
    mx = pytest.importorskip("torchao.prototype.mx_formats.mx_tensor", reason="torchao is missing")
    config = pytest.importorskip("torchao.prototype.mx_formats.config")
    x = data(dtype)
    for columnwise, side in ((False, x), (True, x.mT.contiguous())):
        theirs = mx.MXTensor.to_mx(
            side, torch.float8_e4m3fn, 32, config.ScaleCalculationMode.RCEIL
        ).dequantize(torch.float32)
        ours = mxfp8.operand(x, columnwise)
        assert ours.columnwise == columnwise
        assert torch.equal(ours.matrix.float(), theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_are_those_of_the_formula(dtype: torch.dtype) -> None:
    x = data(dtype)
    rows = mxfp8.operand(x, columnwise=False)
    blocks = x.double().view(-1, 32).numpy()
    wanted = np.stack([formula(block) for block in blocks])
    assert np.array_equal(rows.values.double().view(-1, 32).numpy(), wanted)
    # The other rule for the scale would be noticed.
    smaller = np.stack([formula(block * 1.5) / 1.5 for block in blocks])
    assert (smaller != wanted).mean() > 0.1


def test_weights_of_experts_are_quantized_one_by_one() -> None:
    x = data(torch.bfloat16).view(2, 32, 256)
    for columnwise in (False, True):
        together = mxfp8.operand(x, columnwise)
        for e in range(2):
            assert torch.equal(together.values[e], mxfp8.operand(x[e], columnwise).values)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_nan_and_infinity_make_their_blocks_nan(bad: float) -> None:
    x = data(torch.float32)
    x[3, 40] = bad
    rows, columns = mxfp8.operand(x, columnwise=False), mxfp8.operand(x, columnwise=True)
    wanted = torch.zeros_like(x, dtype=torch.bool)
    wanted[3, 32:64] = True
    assert torch.equal(rows.values.isnan(), wanted)
    wanted.zero_()[:32, 40] = True
    assert torch.equal(columns.values.isnan(), wanted)


def test_a_width_that_blocks_do_not_divide_is_refused() -> None:
    with pytest.raises(ValueError, match=r"divisible by 32, got \[64, 48\]"):
        mxfp8.operand(torch.zeros(64, 48), columnwise=False)
