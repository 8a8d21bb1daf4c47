"""NVFP4 tensors against TransformerEngine's formula, restated in ``helpers.nvfp4_formula``."""

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.nvfp4_formula import E2M1, Formula, decades, hadamard
from nemo_kernels.lowp.packing import decode, encode, pack, unpack
from nemo_kernels.lowp.reference import Quantized, dequantize, fake_quantize, quantize

LAYOUTS = {
    "1x16": {},
    "16x16": {"tile": (16, 16)},
    "columnwise": {"columnwise": True},
    "columnwise 16x16": {"tile": (16, 16), "columnwise": True},
    "columnwise with RHT": {"columnwise": True, "rht": True},
    "1x16 with RHT": {"rht": True},
}
DTYPES = [torch.float32, torch.bfloat16]


def expected(
    x: Tensor, formula: Formula, tile=(1, 16), columnwise=False, rht=False
) -> tuple[np.ndarray, np.ndarray]:
    values = (x.mT if columnwise else x).float().numpy()
    if rht:
        values = hadamard(values, x.dtype)
    return formula.quantize(values, tile)


def mismatches(q: Quantized, codes: np.ndarray, scales: np.ndarray) -> tuple[int, int]:
    assert q.block_scale.dtype == torch.float8_e4m3fn
    differing_codes = (unpack(q.data).numpy() != codes).sum()
    differing_scales = (q.block_scale.view(torch.uint8).numpy() != scales).sum()
    return int(differing_codes), int(differing_scales)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_million_values_equal_the_formula(layout: str, dtype: torch.dtype) -> None:
    x = decades(1024, 1040, dtype)
    codes, scales = expected(x, Formula(), **LAYOUTS[layout])
    assert set(np.unique(codes)) == set(range(16))
    assert (scales == 0).any()
    assert ((scales > 0) & (scales < 8)).any()
    assert mismatches(quantize(x, **LAYOUTS[layout]), codes, scales) == (0, 0)


@pytest.mark.parametrize("seed", range(8))
def test_the_tensor_scale_is_calculated_as_the_formula_says(seed: int) -> None:
    # 2688 * (1 / amax) instead of 2688 / amax would change one tensor in three or so.
    for k in range(40):
        x = decades(128, 256, torch.float32, seed=100 * seed + k)
        encode = Formula().encode_scale(float(x.abs().max()))
        codes, scales = expected(x, Formula())
        q = quantize(x)
        assert mismatches(q, codes, scales) == (0, 0)
        assert q.tensor_scale == torch.tensor(np.float32(x.abs().max()) / np.float32(2688))
        assert abs(float(q.tensor_scale) * float(encode) - 1) < 2**-22


@pytest.mark.parametrize(
    "changed",
    [
        Formula(e2m1_max=5.99),
        Formula(e4m3_max=447.9),
        Formula(sixth_first=False),
        Formula(rounded_factor=False),
    ],
    ids=str,
)
def test_a_change_of_the_formula_is_noticed(changed: Formula) -> None:
    # The order of operations shows in a few blocks, of tensors with some amax only.
    tensors = [decades(256, 1024, torch.bfloat16, seed) for seed in range(16)]
    assert sum(sum(mismatches(quantize(x), *expected(x, Formula()))) for x in tensors) == 0
    assert sum(sum(mismatches(quantize(x), *expected(x, changed))) for x in tensors) > 100


def test_signs_and_order_of_the_transform_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    x = decades(256, 256, torch.bfloat16)
    layout = {"columnwise": True, "rht": True}
    monkeypatch.setattr("helpers.nvfp4_formula.TE_SIGNS", "+++-+------+-+-+")
    assert mismatches(quantize(x, **layout), *expected(x, Formula(), **layout))[0] > 1000


@pytest.mark.parametrize("sign", [1, -1])
def test_all_codes_and_all_ties(sign: int) -> None:
    # With amax 2688 and 6 in every block, both scales are 1: y is x.
    between = (E2M1[1:] + E2M1[:-1]) / 2
    ties = np.array([0, 1, 1, 2, 2, 3, 3]) * 2  # to the even code: 0.25 to 0, 0.75 to 1 ...
    x = np.concatenate([E2M1, between, np.nextafter(np.float32(between), np.float32(0))])
    x = np.concatenate([x, np.nextafter(np.float32(between), np.float32(9))])
    codes = np.concatenate([np.arange(8), ties, np.arange(7), np.arange(1, 8)])
    x, codes = np.append(x, [6] * 3), np.append(codes, [7] * 3)
    tensor = sign * torch.from_numpy(x).float().view(2, 16)
    tensor[0, 15] = sign * 6.0
    q = quantize(tensor, amax=torch.tensor(2688.0))
    assert q.tensor_scale == 1
    assert q.block_scale.float().tolist() == [[1.0], [1.0]]
    got = unpack(q.data).flatten()
    wanted = torch.from_numpy(codes).to(torch.uint8) + (8 if sign < 0 else 0)
    wanted[15] = 7 if sign > 0 else 15
    assert got.tolist() == wanted.tolist()
    assert torch.equal(dequantize(q).flatten(), decode(wanted))


def test_packing_puts_the_even_element_in_the_low_nibble() -> None:
    codes = torch.arange(16, dtype=torch.uint8)
    assert pack(codes).tolist() == [0x10, 0x32, 0x54, 0x76, 0x98, 0xBA, 0xDC, 0xFE]
    assert torch.equal(unpack(pack(codes)), codes)
    values = decode(codes)
    assert values.tolist() == [*E2M1, *-E2M1]
    assert torch.equal(encode(values, values), codes)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("seed", [None, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_fake_quantize_holds_what_quantize_decodes_to(
    layout: str, seed: int | None, dtype: torch.dtype
) -> None:
    x = decades(160, 1040, dtype)
    q = quantize(x, **LAYOUTS[layout], seed=seed)
    values, tensor_scale = fake_quantize(x, **LAYOUTS[layout], seed=seed)
    assert values.dtype == torch.bfloat16
    decoded = values.float() * tensor_scale
    assert torch.equal(decoded.mT if "columnwise" in layout else decoded, dequantize(q))


@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 48), (2, 32, 48)])
def test_shapes_of_the_result(shape: tuple[int, ...]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    q = quantize(x)
    assert (q.data.shape, q.data.dtype) == ((*shape[:-1], shape[-1] // 2), torch.uint8)
    assert q.block_scale.shape == (*shape[:-1], shape[-1] // 16)
    assert (q.tensor_scale.shape, q.tensor_scale.dtype) == ((), torch.float32)
    assert dequantize(q).shape == shape
    assert (dequantize(q) - x).norm() < 0.12 * x.norm()
    if len(shape) == 3 and shape[1] % 16 == 0:
        q = quantize(x, columnwise=True)
        assert q.data.shape == (2, 48, 16)
        assert q.block_scale.shape == (2, 48, 2)
        assert all(torch.equal(a, b) for a, b in zip(q, quantize(x.mT), strict=True))


def test_weights_have_the_same_values_in_both_directions() -> None:
    w = decades(256, 128, torch.float32)
    forward, backward = (quantize(w, tile=(16, 16), columnwise=c) for c in (False, True))
    assert torch.equal(dequantize(forward), dequantize(backward).mT)
    # Blocks of 1x16 would not have them.
    forward, backward = (quantize(w, columnwise=c) for c in (False, True))
    assert not torch.equal(dequantize(forward), dequantize(backward).mT)


def test_zeros_and_nothing() -> None:
    q = quantize(torch.tensor([0.0, -0.0]).repeat(4, 16))
    assert q.tensor_scale == 0
    assert q.block_scale.float().count_nonzero() == 0
    assert set(unpack(q.data).flatten().tolist()) == {0, 8}
    assert dequantize(q).count_nonzero() == 0
    for shape, layout in (((0, 32), {}), ((0, 32), {"columnwise": True}), ((16, 0), {})):
        empty = quantize(torch.empty(shape), **layout)
        assert (empty.data.numel(), empty.block_scale.numel()) == (0, 0)
        assert empty.tensor_scale == 0


def test_a_tiny_block_has_the_scale_zero_and_saturated_codes() -> None:
    x = torch.ones(2, 16)
    x[1] = -1e-6
    q = quantize(x)
    assert q.block_scale.float().tolist() == [[448.0], [0.0]]
    assert unpack(q.data)[1].tolist() == [15] * 16
    assert dequantize(q)[1].tolist() == [0.0] * 16


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_nan_and_infinity_become_nan(layout: str, bad: float) -> None:
    x = decades(64, 64, torch.bfloat16)
    x[40, 50] = bad
    q, (values, tensor_scale) = (f(x, **LAYOUTS[layout]) for f in (quantize, fake_quantize))
    assert dequantize(q).isnan().all()
    assert q.tensor_scale.isnan()
    assert tensor_scale.isnan()
    assert values.isnan().all()
    # With a given amax, the blocks with the bad value do, and those alone (but for 16x16's tile).
    q = quantize(x, **LAYOUTS[layout], amax=torch.tensor(9.0))
    at = (50, 40) if LAYOUTS[layout].get("columnwise") else (40, 50)
    nan = dequantize(q).isnan()
    assert nan[at[0], at[1] // 16 * 16 : at[1] // 16 * 16 + 16].all()
    assert int(nan.sum()) == (256 if "16x16" in layout else 16)


def test_stochastic_rounding_keeps_nan() -> None:
    x = torch.randn(4, 32)
    x[1, 3] = torch.nan
    assert dequantize(quantize(x, seed=1)).isnan().all()
    assert fake_quantize(x, seed=1)[0].isnan().all()


@pytest.mark.parametrize("layout", [name for name in LAYOUTS if "RHT" not in name])
def test_stacked_matrices_with_their_own_amax_equal_separate_ones(layout: str) -> None:
    parts = [decades(128, 256, torch.bfloat16, seed=s) * 10.0**s for s in range(3)]
    amax = torch.stack([p.abs().max().float() for p in parts])
    stacked = quantize(torch.stack(parts), **LAYOUTS[layout], amax=amax.view(3, 1, 1))
    alone = [quantize(p, **LAYOUTS[layout]) for p in parts]
    assert torch.equal(stacked.data, torch.stack([q.data for q in alone]))
    assert torch.equal(dequantize(stacked), torch.stack([dequantize(q) for q in alone]))
    together = quantize(torch.stack(parts), **LAYOUTS[layout])
    assert not torch.equal(dequantize(stacked), dequantize(together))


def test_values_beyond_a_given_amax_saturate() -> None:
    x = torch.tensor([1.0, -8.0] + [0.5] * 14)
    assert dequantize(quantize(x, amax=torch.tensor(4.0)))[1] == -4.0


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((4, 24), {}, "last dimension divisible by 16, got 24"),
        ((24, 16), {"columnwise": True}, "second to last dimension divisible by 16, got 24"),
        ((24, 16), {"tile": (16, 16)}, "second to last dimension divisible by 16, got 24"),
        ((16, 16), {"tile": (16, 1)}, r"tile: expected \(1, 16\) or \(16, 16\), got \(16, 1\)"),
        ((16,), {"columnwise": True}, "x: expected at least 2 dimensions, got 1"),
        ((), {}, "x: expected at least 1 dimensions, got 0"),
        ((16, 16), {"tile": (16, 16), "rht": True}, "rht: expected tile"),
        ((16, 32), {"amax": torch.ones(16, 1)}, r"amax: expected float32 \[\] or \[1, 1\], got"),
        ((2, 16, 32), {"amax": torch.ones(3, 1, 1)}, r"amax: .* \[2, 1, 1\], got .* \[3, 1, 1\]"),
        ((16, 32), {"amax": torch.ones((), dtype=torch.bfloat16)}, "amax: expected float32"),
    ],
)
def test_wrong_arguments_are_named(shape: tuple[int, ...], options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        quantize(torch.ones(shape), **options)


def test_integers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"x: expected float32, bfloat16 or float16, got torch.in"):
        quantize(torch.ones(16, 16, dtype=torch.int32))
