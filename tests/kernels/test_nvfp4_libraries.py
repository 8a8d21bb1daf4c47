"""NVFP4 bytes against torchao, nvidia-modelopt and compressed-tensors.

On data of fp32 all agree, except in blocks whose scale leaves E4M3's range, which each library
treats in its own way. bf16 data has exact ties (a few values of 8 bits make many equal ratios), and
there the order of fp32 operations decides: every difference must be such a tie.
"""

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.nvfp4_formula import E2M1, E4M3
from nemo_kernels.lowp.packing import unpack
from nemo_kernels.lowp.reference import Quantized, dequantize, quantize, quantize_modelopt

REASON = "is not installed; the dev extra has it"
# fp32 roundings between a value and the one that is compared with a tie, in ulps.
NEAR = 8 * 2.0**-24


def torchao(x: Tensor) -> Quantized:
    module = pytest.importorskip(
        "torchao.prototype.mx_formats.nvfp4_tensor", reason=f"torchao {REASON}"
    )
    tensor_scale = x.abs().max().float() / 2688
    block_scale, data = module.nvfp4_quantize(x, 16, tensor_scale)
    return Quantized(data, block_scale.view(len(x), -1), tensor_scale)


def modelopt(x: Tensor) -> Quantized:
    module = pytest.importorskip(
        "modelopt.torch.quantization.qtensor.nvfp4_tensor", reason=f"nvidia-modelopt {REASON}"
    )
    tensor, block_scale, tensor_scale = module.NVFP4QTensor.quantize(x, 16)
    return Quantized(tensor._quantized_data, block_scale, tensor_scale)


def compressed_tensors(x: Tensor) -> Quantized:
    reason = f"compressed-tensors {REASON}"
    library = pytest.importorskip("compressed_tensors.quantization", reason=reason)
    helpers = pytest.importorskip("compressed_tensors.quantization.utils.helpers", reason=reason)
    nvfp4 = pytest.importorskip("compressed_tensors.compressors.nvfp4.helpers", reason=reason)
    x = x.float()  # as one reads a checkpoint; in bf16 it would round scales to bf16 on the way
    args = library.QuantizationArgs(
        num_bits=4, type="float", strategy="tensor_group", group_size=16, symmetric=True,
        scale_dtype=torch.float8_e4m3fn, zp_dtype=torch.float8_e4m3fn,
    )  # fmt: skip
    global_scale = helpers.generate_gparam(x.min(), x.max())
    blocks = x.view(len(x), -1, 16)
    scale, _ = helpers.calculate_qparams(blocks.amin(-1), blocks.amax(-1), args, global_scale)
    data = nvfp4.quantize_and_pack_fp4(x, scale, global_scale)
    return Quantized(data, scale.to(torch.float8_e4m3fn), 1 / global_scale.squeeze())


LIBRARIES = [torchao, modelopt, compressed_tensors]
libraries = pytest.mark.parametrize("library", LIBRARIES, ids=lambda f: f.__name__)


def data(dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Rows over three decades: block scales stay normal numbers of E4M3."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(256, 1024, generator=generator)
    return (x * 10 ** torch.empty(256, 1).uniform_(-1.5, 1.5, generator=generator)).to(dtype)


def differing(a: Quantized, b: Quantized) -> tuple[Tensor, Tensor]:
    """Where codes and block scales differ."""
    scales = a.block_scale.view(torch.uint8) != b.block_scale.view(torch.uint8)
    return unpack(a.data) != unpack(b.data), scales


def distance_from_ties(values: Tensor, table: np.ndarray) -> Tensor:
    """Of each positive value: how far it is from the nearest middle of two neighbours in a table,
    relative to itself."""
    ties = torch.from_numpy((table[1:] + table[:-1]) / 2)
    return ((values[..., None] - ties).abs() / values[..., None]).amin(-1)


@pytest.mark.slow
@libraries
def test_fp32_data_has_the_same_bytes(library) -> None:
    x = data(torch.float32)
    theirs = library(x)
    for ours in (quantize(x), quantize_modelopt(x)):
        codes, scales = differing(ours, theirs)
        assert (int(codes.sum()), int(scales.sum())) == (0, 0)
        assert torch.allclose(ours.tensor_scale, theirs.tensor_scale, rtol=2e-7, atol=0)


@pytest.mark.slow
@libraries
@pytest.mark.parametrize("ours", [quantize, quantize_modelopt], ids=lambda f: f.__name__)
def test_every_difference_on_bf16_data_is_a_tie(library, ours) -> None:
    n_scales = n_codes = 0
    for seed in range(4):
        x = data(torch.bfloat16, seed)
        mine, theirs = ours(x), library(x)
        codes, scales = differing(mine, theirs)
        amax, block_amax = x.abs().max().double(), x.view(256, -1, 16).abs().amax(-1).double()
        wanted = block_amax[scales] / 6 * 2688 / amax
        assert (distance_from_ties(wanted, E4M3) < NEAR).all()
        # Where the scale is the same, a code differs at a tie of its own only.
        codes &= ~scales.repeat_interleave(16, dim=1)
        scale = mine.block_scale.double().repeat_interleave(16, dim=1)[codes]
        wanted = x.double()[codes].abs() / (scale * amax / 2688)
        assert (distance_from_ties(wanted, E2M1) < NEAR).all()
        n_scales, n_codes = n_scales + int(scales.sum()), n_codes + int(codes.sum())
    assert n_scales < 0.01 * 4 * x.numel() / 16
    assert n_codes < 0.002 * 4 * x.numel()


def test_a_wrong_constant_is_no_tie() -> None:
    x = data(torch.bfloat16)
    wanted = x.view(256, -1, 16).abs().amax(-1).double() / 5.99 * 2688 / x.abs().max().double()
    assert (distance_from_ties(wanted, E4M3) > NEAR).float().mean() > 0.99
    _, scales = differing(quantize(x), quantize(x, amax=x.abs().max().float() * 1.001))
    assert scales.float().mean() > 0.005


@pytest.mark.slow
def test_modelopt_has_the_same_bytes_at_ties() -> None:
    # Ties of scales come with some amax only, hence many tensors.
    for seed in range(64):
        x = data(torch.bfloat16, seed)[:32]
        codes, scales = differing(quantize_modelopt(x), modelopt(x))
        assert (int(codes.sum()), int(scales.sum())) == (0, 0)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_modelopt_has_the_same_bytes_for_zero_and_tiny_blocks(dtype: torch.dtype) -> None:
    x = data(dtype, seed=9)
    x[:4, 16:48] = 0
    x[:4, 0], x[:4, 1] = -0.0, -1e-30
    x[4:8] *= 1e-6
    x[8] *= torch.logspace(-7, 0, 1024).to(dtype)
    theirs, ours = modelopt(x), quantize_modelopt(x)
    codes, scales = differing(theirs, ours)
    assert (int(codes.sum()), int(scales.sum())) == (0, 0)
    assert torch.equal(theirs.tensor_scale, ours.tensor_scale)
    # TransformerEngine's formulas treat those blocks differently.
    codes, scales = differing(theirs, quantize(x))
    assert scales[:8].any()
    assert codes[:8].any()


@pytest.mark.slow
def test_modelopt_with_a_common_amax() -> None:
    x = data(torch.float32, seed=1)
    amax = x.abs().max() * 1.3
    module = pytest.importorskip(
        "modelopt.torch.quantization.qtensor.nvfp4_tensor", reason=f"nvidia-modelopt {REASON}"
    )
    tensor, scale, _ = module.NVFP4QTensor.quantize(x, 16, weights_scaling_factor_2=amax / 2688)
    ours = quantize_modelopt(x, amax=amax)
    assert torch.equal(ours.data, tensor._quantized_data)
    assert torch.equal(ours.block_scale.float(), scale.float())
    decoded = tensor.dequantize(
        dtype=torch.float32, scale=scale, double_scale=amax / 2688, block_sizes={-1: 16}
    )
    assert torch.allclose(decoded, dequantize(ours), rtol=1e-6)


def test_modelopts_order_without_modelopt() -> None:
    q = quantize_modelopt(torch.zeros(2, 32))
    assert (q.data == 0).all()
    assert q.block_scale.float().unique().tolist() == [1.0]
    assert dequantize(q).count_nonzero() == 0
    assert dequantize(quantize_modelopt(torch.full((2, 32), torch.nan))).isnan().all()
    with pytest.raises(ValueError, match="last dimension divisible by 16, got 20"):
        quantize_modelopt(torch.ones(3, 20))
