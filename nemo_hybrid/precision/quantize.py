"""Weights in the formats of `assign`, with nvidia-modelopt's operations in its order, so that bytes
are equal.

NVFP4: a block of 16 has the scale s_b, E4M3, the tensor has t, fp32; a value is code * s_b * t.

    amax            s_b = E4M3(amax_b / (6 t)),              t = amax / 2688
    four_over_six   s_b for amax_b, or for 1.5 amax_b,       t = amax / 1536
    mse             the best s_b of all E4M3 numbers,        t = amax / 2688
    training        s_b of the 16x16 block, by TransformerEngine's formula (nemo_kernels.lowp)

The choices of the middle two minimise the block's sum of squared errors; of equal ones, the first
(1.0, or the smallest) counts. 2688 = 6 * 448; 1536 = 6 * 256 leaves room for 1.5 times as much.
They are modelopt's calibrators ``MseCalibrator`` with the multipliers 1.0 and 1.5 and
``NVFP4MSECalibrator``, and its exporter, which clamps s_b to [2^-9, 448]. The latter fails
where amax is below 4e-7, or its square beyond fp32; here errors are measured in units near amax.

FP8: E4M3(w / scale), scale = amax / 448.

Shapes: N blocks of a part, B = 16.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from torch import Tensor

from nemo_hybrid.errors import UserError
from nemo_hybrid.precision.assign import BLOCK, Format
from nemo_kernels.lowp.packing import encode, pack
from nemo_kernels.lowp.reference import Quantized, dequantize, quantize, quantize_modelopt
from nemo_kernels.lowp.rounding import E2M1_MAX, round_to_nearest_
from nemo_kernels.lowp.scales import E4M3_MAX, Blocks, divide

Search = Literal["amax", "mse", "four_over_six", "training"]
Layout = Literal["modelopt", "compressed-tensors"]
Stored = dict[str, Tensor]
"""Last name part on disk -> tensor, of one weight."""

_LEAST_E4M3 = 2.0**-9
_MOST_FOUR_OVER_SIX = 256.0
# Of amax: below, the tensor scale amax / 2688 is no normal number; above, BF16 cannot hold it.
_LEAST_AMAX = 2688 * torch.finfo(torch.float32).tiny
_MOST_AMAX = torch.finfo(torch.bfloat16).max
_MANTISSA_BITS = 23
_CODES = 126  # finite positive E4M3 numbers, by their bytes 1 to 126
# Candidates around the E4M3 number nearest to amax_b / 6t, in steps of which an octave has eight.
# Further below, the block's largest value alone has a larger error than all have there. Further
# above, half of a candidate is one too, its grid holds all points of the other's in the block's
# range, and it comes first.
_BELOW, _ABOVE = 17, 16


def weight_tensors(
    w: Tensor,
    format: Format,
    layout: Layout = "modelopt",
    amax: Tensor | None = None,
    search: Search = "amax",
) -> Stored:
    """What is stored for a weight [out, in], fp32, bf16 or fp16, besides its input scale; with the
    search amax and one amax each, [E, 1, 1], also for a stack [E, out, in].

    Args:
        amax: fp32 scalar to take for the largest |w|: the one of all weights that an engine fuses.
            0 counts as 1, so that scales are positive.
        search: of NVFP4 scales.

    What is divided into blocks must be divisible, see `assign.check`.

    Raises:
        UserError: w holds NaN or infinity; or amax is beyond bf16, or below 3.2e-35 but not 0.
    """
    own = amax_of(w)
    if not own.isfinite():
        raise UserError("it holds NaN or infinity")
    amax = own if amax is None else amax.to(own.device)
    amax = torch.where(amax == 0, 1.0, amax)
    outside = (amax < _LEAST_AMAX) | (amax > _MOST_AMAX)
    if outside.any():
        raise UserError(
            f"its largest magnitude, {float(amax[outside][0]):.3g}, is beyond what scales can "
            f"express ({_LEAST_AMAX:.1e} to {_MOST_AMAX:.1e})"
        )
    if format == "fp8":
        scale = divide(amax, E4M3_MAX)
        data = (w.float() / scale).clamp_(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        return {"weight": data, "weight_scale": scale}
    q = _nvfp4(w, amax, search)
    if layout == "modelopt":
        return {"weight": q.data, "weight_scale": q.block_scale, "weight_scale_2": q.tensor_scale}
    return {
        "weight_packed": q.data,
        "weight_scale": q.block_scale,
        "weight_global_scale": q.tensor_scale.reciprocal().reshape(1),
    }


def amax_of(*weights: Tensor) -> Tensor:
    """The largest magnitude, as an fp32 scalar, without copies of the weights."""
    return torch.stack([end.float() for w in weights for end in w.detach().aminmax()]).abs().amax()


def decoded(stored: Mapping[str, Tensor]) -> Tensor:
    """The values [out, in] of what `weight_tensors` gave, in fp32."""
    if "weight_packed" in stored:
        tensor_scale = stored["weight_global_scale"].reciprocal().reshape(())
        return dequantize(Quantized(stored["weight_packed"], stored["weight_scale"], tensor_scale))
    if "weight_scale_2" in stored:
        return dequantize(
            Quantized(stored["weight"], stored["weight_scale"], stored["weight_scale_2"])
        )
    return stored["weight"].float() * stored["weight_scale"]


def _nvfp4(w: Tensor, amax: Tensor, search: Search) -> Quantized:
    if search == "amax" and w.dim() > 2:
        return quantize_modelopt(w, amax=amax)
    if search == "training":
        # The amax of a tile grid has two dimensions of 1 where it is not a scalar.
        return quantize(w, tile=(BLOCK, BLOCK), amax=amax)
    w = w.detach().contiguous()
    blocks = Blocks.of(w, (1, BLOCK), columnwise=False)
    block_amax_N = blocks.amax(w).flatten()
    x_NB = w.view(blocks.shape)
    data = torch.empty(len(x_NB), BLOCK // 2, dtype=torch.uint8, device=w.device)
    scale_N = torch.empty_like(block_amax_N)
    most = _MOST_FOUR_OVER_SIX if search == "four_over_six" else E4M3_MAX
    tensor_scale = divide(amax, E2M1_MAX * most)
    # A power of two, so that quotients are exact.
    unit = (amax.view(torch.int32) >> _MANTISSA_BITS << _MANTISSA_BITS).view(torch.float32)
    for part in blocks.parts(w.device):
        x, largest_N = x_NB[part].float(), block_amax_N[part]
        if search == "amax":
            chosen_N = largest_N / (tensor_scale * E2M1_MAX)
            chosen_N = _rounded(torch.where(chosen_N == 0, 1.0, chosen_N))
        else:
            choose = _best_of_all if search == "mse" else _four_or_six
            found_N = choose(x / unit, largest_N / unit, amax / unit)
            chosen_N = _exported(found_N, amax / unit, most, 1 / unit)
        scale_N[part] = chosen_N
        data[part] = pack(_codes(x, chosen_N, tensor_scale))
    grid = blocks.grid
    return Quantized(
        data.view(*w.shape[:-1], -1), scale_N.view(grid).to(torch.float8_e4m3fn), tensor_scale
    )


def _codes(x_NB: Tensor, scale_N: Tensor, tensor_scale: Tensor) -> Tensor:
    y_NB = x_NB / (scale_N * tensor_scale)[:, None]
    # 0 / 0, where both scales are tiny; and -0 becomes 0.
    y_NB.nan_to_num_(nan=0.0).clamp_(-E2M1_MAX, E2M1_MAX).add_(0.0)
    return encode(y_NB, y_NB)


def _exported(block_amax_N: Tensor, amax: Tensor, most: float, one: Tensor) -> Tensor:
    """The block scales, E4M3 values in fp32, that modelopt writes for its calibrated maxima; blocks
    of zeros have ``one`` for what is 1 there."""
    scale_N = divide(block_amax_N, E2M1_MAX)
    scale_N = torch.where(scale_N == 0, one, scale_N)
    return _rounded(scale_N * most / divide(amax, E2M1_MAX))


def _rounded(scale_N: Tensor) -> Tensor:
    return scale_N.clamp_(_LEAST_E4M3, E4M3_MAX).to(torch.float8_e4m3fn).float()


def _emulated(block_amax_N: Tensor, amax: Tensor, most: float) -> Tensor:
    """The products s_b t that modelopt's calibrators measure errors with, for block maxima."""
    largest = amax * (E4M3_MAX / most) / E2M1_MAX
    encode_scale = E4M3_MAX / largest
    scale_N = (block_amax_N / E2M1_MAX * encode_scale).clamp_(-E4M3_MAX, E4M3_MAX)
    return scale_N.to(torch.float8_e4m3fn).float() * (1 / encode_scale)


def _squared_error(magnitude_NB: Tensor, scale_N: Tensor) -> Tensor:
    """[N], of rounding to E2M1 times the scale; a scale of 0 makes zeros."""
    safe_N1 = torch.where(scale_N == 0, 1.0, scale_N)[:, None]
    y_NB = round_to_nearest_((magnitude_NB / safe_N1).clamp_max_(E2M1_MAX)).mul_(scale_N[:, None])
    return torch.sum(y_NB.sub_(magnitude_NB).square_(), dim=1)


def _four_or_six(x_NB: Tensor, block_amax_N: Tensor, amax: Tensor) -> Tensor:
    """The block maxima, or 1.5 times as much, so that 4 stands for the largest value."""
    magnitude_NB, six_N, four_N = x_NB.abs(), block_amax_N * 1.0, block_amax_N * 1.5
    errors = [
        _squared_error(magnitude_NB, _emulated(a_N, amax, _MOST_FOUR_OVER_SIX))
        for a_N in (six_N, four_N)
    ]
    return torch.where(errors[1] < errors[0], four_N, six_N)


def _best_of_all(x_NB: Tensor, block_amax_N: Tensor, amax: Tensor) -> Tensor:
    """The block maxima for which the scale is the best E4M3 number."""
    magnitude_NB = x_NB.abs()
    e4m3 = torch.arange(_CODES + 1, dtype=torch.uint8, device=x_NB.device)
    share = e4m3.view(torch.float8_e4m3fn).float() / E4M3_MAX
    scales = _emulated(torch.ones_like(share) * (amax * share), amax, E4M3_MAX)
    around_N = divide(block_amax_N, E2M1_MAX) / divide(amax, E2M1_MAX * E4M3_MAX)
    around_N = around_N.clamp_(0, E4M3_MAX).to(torch.float8_e4m3fn).view(torch.uint8).int()
    best_N = torch.full_like(block_amax_N, torch.inf)
    code_N = torch.zeros_like(around_N)
    for step in range(-_BELOW, _ABOVE):
        tried_N = (around_N + step).clamp_(1, _CODES)
        error_N = _squared_error(magnitude_NB, scales[tried_N])
        better_N = error_N < best_N
        best_N = torch.where(better_N, error_N, best_N)
        code_N = torch.where(better_N, tried_N, code_N)
    return torch.ones_like(block_amax_N) * (amax * share[code_N])
