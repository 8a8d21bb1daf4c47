"""Stored weights: nvidia-modelopt's bytes from its own pipeline, naive loops, what decodes."""

from __future__ import annotations

import re
import warnings

import pytest
import torch
from torch import Tensor, nn

from helpers.nvfp4_formula import E2M1, E4M3
from nemo_hybrid import UserError
from nemo_hybrid.precision.quantize import Search, decoded, weight_tensors
from nemo_kernels.lowp.packing import unpack
from nemo_kernels.lowp.reference import quantize, quantize_modelopt

REASON = "nvidia-modelopt is not installed; the dev extra has it"


def weight(dtype: torch.dtype = torch.bfloat16, seed: int = 0) -> Tensor:
    """Rows over decades, with zeros, blocks of zeros and blocks whose scale leaves E4M3's range."""
    generator = torch.Generator().manual_seed(seed)
    w = torch.randn(64, 96, generator=generator)
    w *= 10 ** torch.empty(64, 1).uniform_(-2.5, 0.5, generator=generator)
    w[3, :16], w[5], w[7, :32] = 0, 0, w[7, :32] * 1e-5
    w[9, 0] = -0.0
    return w.to(dtype)


@pytest.fixture
def modelopt(monkeypatch):
    """The library's pipeline: (weight, config of the weight quantizer, algorithm) -> tensors. Its
    Triton kernel alone, which needs CUDA, is replaced: by modelopt's own scales and codes."""
    mtq = pytest.importorskip("modelopt.torch.quantization", reason=REASON)
    from modelopt.torch.export import quant_utils
    from modelopt.torch.kernels.quantization.gemm.fp4_kernel import compute_fp4_scales
    from modelopt.torch.quantization.nn.modules import tensor_quantizer
    from modelopt.torch.quantization.qtensor.nvfp4_tensor import NVFP4QTensor

    def fake_quantize(x, amax, global_amax, quantize_scales, most, dtype, _):
        scale = compute_fp4_scales(amax, global_amax, quantize_scales, most).view(-1, 1)
        magnitude = x.float().abs().view(len(scale), -1)
        codes = NVFP4QTensor._cast_fp4(magnitude / torch.where(scale == 0, 1.0, scale))
        values = torch.tensor(E2M1, dtype=torch.float32)[codes.long()] * scale
        return values.view(x.shape).copysign(x).to(dtype)

    def run(w: Tensor, config: dict, algorithm: object) -> list[Tensor]:
        model = nn.Sequential(nn.Linear(w.shape[1], w.shape[0], bias=False)).to(w.dtype)
        model[0].weight.data.copy_(w)
        rules = [
            {"quantizer_name": "*", "enable": False},
            {"quantizer_name": "*weight_quantizer", "enable": True, "cfg": config},
        ]
        mtq.quantize(model, {"quant_cfg": rules, "algorithm": algorithm})
        layer = model[0]
        scale = quant_utils.get_weight_scaling_factor(layer)
        second = quant_utils.get_weight_scaling_factor_2(layer)
        format = quant_utils.get_quantization_format(layer)
        data = quant_utils.to_quantized_weight(layer.weight, scale, format, second, 16)
        return [data.detach(), scale, *([] if second is None else [second])]

    monkeypatch.setattr(tensor_quantizer, "static_blockwise_fp4_fake_quant", fake_quantize)
    warnings.filterwarnings("ignore", module="modelopt")
    return run


STATIC = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "static", "scale_bits": (4, 3)}}
DYNAMIC = {"num_bits": (2, 1), "block_sizes": {-1: 16, "type": "dynamic", "scale_bits": (4, 3)}}
FOUR_OVER_SIX = {**STATIC, "block_sizes": {**STATIC["block_sizes"], "four_over_six": True}}
ULTRA = {"method": "mse", "start_multiplier": 1.0, "stop_multiplier": 1.5, "step_size": 0.5}
RECIPES = {
    "amax": (DYNAMIC, "max"),
    "mse": (STATIC, {"method": "mse", "fp8_scale_sweep": True}),
    "four_over_six": (FOUR_OVER_SIX, ULTRA),
}


def bytes_of(tensors: list[Tensor]) -> list[bytes]:
    return [t.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() for t in tensors]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("search", RECIPES)
def test_nvfp4_bytes_are_modelopts(modelopt, search: Search, dtype) -> None:
    for seed in range(3):
        w = weight(dtype, seed)
        theirs = modelopt(w, *RECIPES[search])
        ours = weight_tensors(w, "nvfp4", search=search)
        assert list(ours) == ["weight", "weight_scale", "weight_scale_2"]
        assert [t.shape for t in ours.values()] == [(64, 48), (64, 6), ()]
        assert bytes_of(list(ours.values())) == bytes_of(theirs)
    for other in RECIPES:
        same = bytes_of(list(weight_tensors(w, "nvfp4", search=other).values())) == bytes_of(theirs)
        assert same == (other == search)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_fp8_bytes_are_modelopts(modelopt, dtype) -> None:
    w = weight(dtype)
    theirs = modelopt(w, {"num_bits": (4, 3), "axis": None}, "max")
    ours = weight_tensors(w, "fp8")
    assert (ours["weight"].dtype, ours["weight_scale"].shape) == (torch.float8_e4m3fn, ())
    assert bytes_of(list(ours.values())) == bytes_of(theirs)
    rough = (w / ours["weight_scale"]).to(torch.float8_e4m3fn)
    assert (bytes_of([rough]) == bytes_of(theirs[:1])) == (dtype == torch.float32)


def naive_error(block: Tensor, scale: float) -> float:
    grid = torch.tensor(E2M1, dtype=torch.float64) * scale
    return float((block.abs()[:, None] - grid).abs().amin(1).square().sum())


@pytest.mark.parametrize("amax_factor", [1.0, 3.0])
def test_searches_find_what_a_loop_finds(amax_factor) -> None:
    """In float64, over all scales; of a tensor with a larger common amax, too."""
    w = weight(torch.float32)[:8]
    amax = w.abs().max() * amax_factor
    for search, most in (("mse", 448.0), ("four_over_six", 256.0)):
        stored = weight_tensors(w, "nvfp4", amax=amax, search=search)
        t = float(amax.double() / 6 / most)
        assert float(stored["weight_scale_2"]) == pytest.approx(t, rel=1e-6)
        for block, scale in zip(
            w.double().view(-1, 16), stored["weight_scale"].double().flatten(), strict=True
        ):
            candidates = [float(e) for e in E4M3 if e > 0]
            if search == "four_over_six":
                base = torch.tensor([1.0, 1.5]).double() * block.abs().max() / 6 / t
                candidates = base.clamp(2**-9, 448).to(torch.float8_e4m3fn).tolist()
            least = min(naive_error(block, candidate * t) for candidate in candidates)
            found = naive_error(block, float(scale) * t)
            assert found <= least * (1 + 1e-5) + 1e-30
    plain, best = (
        decoded(weight_tensors(w, "nvfp4", amax=amax, search=s)) for s in ("amax", "mse")
    )
    assert (best - w).square().sum() < 0.95 * (plain - w).square().sum()


def test_without_modelopt_the_largest_values_give_the_specification() -> None:
    for amax in (None, torch.tensor(9.0)):
        ours = weight_tensors(weight(), "nvfp4", amax=amax)
        assert bytes_of(list(ours.values())) == bytes_of(
            list(quantize_modelopt(weight(), amax=amax))
        )


@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
def test_a_stack_is_its_matrices(format) -> None:
    stack = torch.stack([weight(seed=seed) for seed in range(3)])
    amax = stack.abs().amax((1, 2), keepdim=True).float()
    values = decoded(weight_tensors(stack, format, amax=amax))
    assert torch.equal(values, torch.stack([decoded(weight_tensors(w, format)) for w in stack]))


def test_training_scales_are_those_of_training() -> None:
    w = weight()
    stored = weight_tensors(w, "nvfp4", search="training")
    q = quantize(w, tile=(16, 16))
    assert bytes_of(list(stored.values())) == bytes_of(list(q))
    by_block = stored["weight_scale"].float().view(4, 16, 6)
    assert (by_block == by_block[:, :1]).all()


def test_compressed_tensors_decodes_the_same(modelopt) -> None:
    library = pytest.importorskip("compressed_tensors.compressors.nvfp4.base", reason=REASON)
    scheme = pytest.importorskip("compressed_tensors.quantization").QuantizationScheme(
        targets=["Linear"],
        weights=dict(num_bits=4, type="float", strategy="tensor_group", group_size=16),
    )
    w = weight()
    stored = weight_tensors(w, "nvfp4", "compressed-tensors")
    assert [t.shape for t in stored.values()] == [(64, 48), (64, 6), (1,)]
    packed = weight_tensors(w, "nvfp4")
    assert torch.equal(stored["weight_packed"], packed["weight"])
    theirs = library.NVFP4PackedCompressor.decompress(stored, scheme)["weight"]
    assert torch.allclose(theirs.float(), decoded(stored), rtol=2e-2, atol=0)  # in bf16
    assert torch.allclose(decoded(stored), decoded(packed), rtol=3e-7, atol=0)


@pytest.mark.parametrize("search", ["amax", "mse", "four_over_six", "training"])
@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_zeros_and_common_scales(search, layout) -> None:
    zeros = weight_tensors(torch.zeros(16, 32), "nvfp4", layout, search=search)
    assert all(t.float().isfinite().all() for t in zeros.values())
    assert decoded(zeros).count_nonzero() == 0
    w = weight()
    amax = w.abs().max().float() * 2
    stored = weight_tensors(w, "nvfp4", layout, amax, search)
    last = list(stored.values())[-1].float()
    most = 1536 if search == "four_over_six" else 2688
    assert float(last if layout == "modelopt" else 1 / last) == pytest.approx(float(amax) / most)
    error = (decoded(stored) - w.float()).norm() / w.float().norm()
    assert 0.03 < error < 0.16


@pytest.mark.parametrize("exponent", [-110, -60, -30, 30, 60, 120])
def test_magnitude_does_not_matter(exponent) -> None:
    """Powers of two go into the tensor's scale alone, as far as fp32 holds what is to be stored."""
    w, factor = weight(torch.float32) / 8, 2.0**exponent
    w = w.where(w.abs() > 2.0**-14, 2.0**-14)  # so that nothing underflows, and no block is 0
    for search in ("amax", "mse", "four_over_six", "training"):
        for layout in ("modelopt", "compressed-tensors"):
            *plain, scale = weight_tensors(w, "nvfp4", layout, search=search).values()
            *found, other = weight_tensors(w * factor, "nvfp4", layout, search=search).values()
            assert bytes_of(found) == bytes_of(plain)
            assert torch.equal(other, scale * (factor if layout == "modelopt" else 1 / factor))
    fp8 = decoded(weight_tensors(w * factor, "fp8"))
    assert torch.equal(fp8, decoded(weight_tensors(w, "fp8")) * factor)


@pytest.mark.parametrize("amax", [1e-42, 3e-35, 3.4e38])
def test_what_no_scale_can_express(amax) -> None:
    for w in (
        torch.full((16, 16), amax),
        torch.tensor([1.0, amax]).view(2, 1, 1).expand(2, 16, 16),
    ):
        own = None if w.dim() == 2 else w.amax((1, 2), keepdim=True)
        for format in ("fp8", "nvfp4"):
            with pytest.raises(UserError, match=rf"magnitude, {re.escape(f'{amax:.3g}')}, is bey"):
                weight_tensors(w, format, amax=own)


def test_decoded_fp8_and_bad_input() -> None:
    w = weight()
    values = decoded(weight_tensors(w, "fp8"))
    assert (values - w.float()).abs().max() <= w.abs().max() / 28
    assert decoded(weight_tensors(torch.zeros(4, 4), "fp8")).count_nonzero() == 0
    for bad in (torch.nan, torch.inf):
        for format in ("fp8", "nvfp4"):
            broken = w.clone()
            broken[4, 4] = bad
            with pytest.raises(UserError, match="it holds NaN or infinity"):
                weight_tensors(broken, format)
    codes = unpack(weight_tensors(-w.abs(), "nvfp4")["weight"])
    assert (codes[0] > 8).float().mean() > 0.5
