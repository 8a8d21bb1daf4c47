"""NVFP4 by Triton against the reference, bit for bit.

The interpreter's time goes with programs: there most matrices are a part of one tile, and one test
has more than one along rows and columns. On a GPU there are a million values.
"""

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from helpers.nvfp4_formula import decades
from helpers.swizzled import swizzle, unswizzle
from helpers.triton_env import DEVICE, MULTIPLIES_FP4, guarded_memory
from nemo_kernels.backend import Sizes
from nemo_kernels.lowp import kernel, quantize_kernel, reference
from nemo_kernels.lowp.layout import Packed
from nemo_kernels.lowp.operand import Operand, Rounding, multiplier
from nemo_kernels.lowp.quantize_kernel import Result
from nemo_kernels.lowp.reference import Quantized

# Division by a scale of zero, and casts of NaN that are not used, are meant.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
ROWS, COLUMNS = (48, 80) if DEVICE == "cpu" else (1040, 1040)
SQUARE = Rounding((16, 16))
BIG_SEED = 0xF123456789ABCDEF
SIDES: dict[str, tuple[Rounding | None, Rounding | None]] = {
    "rows": (Rounding(), None),
    "columns": (None, Rounding()),
    "both": (Rounding(), Rounding()),
    "activations": (Rounding(), Rounding(rht=True)),
    "gradients": (Rounding(seed=3), Rounding(rht=True, seed=BIG_SEED)),
    "weights": (SQUARE, SQUARE),
    "random weights": (Rounding((16, 16), seed=-5), Rounding((16, 16), seed=6)),
    "transformed columns": (None, Rounding(rht=True)),
}
ENDS = [0, 16, 16, 64]
"""Of four experts' rows, the first and the third without any; 16 more rows are zeros."""


def data(dtype: torch.dtype, rows: int = ROWS, columns: int = COLUMNS) -> Tensor:
    return decades(rows, columns, dtype).to(DEVICE)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal numbers, NaN where NaN; zeros may differ in sign."""
    a, b = a.float(), b.float()
    return a.shape == b.shape and bool(((a == b) | (a.isnan() & b.isnan())).all())


def same_quantized(a: Quantized, b: Quantized) -> bool:
    scales = all(same(x, y) for x, y in zip(a[1:], b[1:], strict=True))
    return torch.equal(a.data, b.data) and scales


def same_operands(found: Any, wanted: Any) -> bool:
    return all(
        a is b is None
        or (
            same(a.values, b.values)
            and same(a.tensor_scale, b.tensor_scale)
            and a.columnwise == b.columnwise
        )
        for a, b in zip(found, wanted, strict=True)
    )


def arguments(how: Rounding, columnwise: bool) -> dict[str, Any]:
    return {**how._asdict(), "columnwise": columnwise}


def plain(side: Result | None, matrix: int = 0) -> Quantized:
    """One matrix of a packed side, with scales in plain order."""
    assert side is not None
    assert side.scale is not None
    codes = side.data[matrix]
    scale = unswizzle(side.scale[matrix], codes.shape[0], codes.shape[1] // 8)
    return Quantized(codes, scale, side.tensor_scale[matrix])


def quantize(x: Tensor, *, columnwise: bool = False, **how: Any) -> Quantized:
    """reference.quantize of a matrix, by the kernels."""
    sides = (None, Rounding(**how)) if columnwise else (Rounding(**how), None)
    return plain(quantize_kernel.quantize(x[None], *sides, packed=True)[columnwise])


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, dtype) for name in SIDES for dtype in DTYPES[:2]),
        *((name, torch.float16) for name in ("both", "transformed columns")),
    ],
    ids=str,
)
def test_codes_scales_and_values_are_the_reference_s(name: str, dtype: torch.dtype) -> None:
    x, sides = data(dtype), SIDES[name]
    for how, columnwise in zip(sides, (False, True), strict=True):
        if how is not None and (name in ("rows", "columns") or dtype == torch.float32):
            with guarded_memory():
                found = quantize(x, **arguments(how, columnwise))
            assert same_quantized(found, reference.quantize(x, **arguments(how, columnwise)))
    with guarded_memory():
        operands = kernel.operands(x, *sides)
    if not kernel.NATIVE:
        assert same_operands(operands, reference.operands(x, *sides))


@pytest.mark.parametrize("name", ["activations", "gradients", "weights"])
@pytest.mark.parametrize("dtype", DTYPES[: 1 if DEVICE == "cpu" else 2], ids=str)
def test_a_million_values(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layout in which training quantizes; reference and TransformerEngine's formula are
    compared on as many in test_nvfp4_formula. The interpreter gets a tile and a bit along rows and
    columns, and fp32 alone: bf16 becomes it when it is read, and the arithmetic is the same."""
    x = data(dtype, *((80, 272) if DEVICE == "cpu" else (1040, 1040)))
    with guarded_memory():
        made = quantize_kernel.quantize(x[None], *SIDES[name], packed=True)
    for how, columnwise, side in zip(SIDES[name], (False, True), made, strict=True):
        assert how is not None
        assert same_quantized(plain(side), reference.quantize(x, **arguments(how, columnwise)))
    monkeypatch.setattr(kernel, "NATIVE", False)
    with guarded_memory():
        decoded = kernel.operands(x, *SIDES[name])
    assert same_operands(decoded, reference.operands(x, *SIDES[name]))


@pytest.mark.parametrize("name", ["rows", "activations", "gradients", "weights"])
@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_both_sides_of_packed_operands_with_swizzled_scales(name: str, dtype: torch.dtype) -> None:
    x = data(dtype)
    with guarded_memory():
        made = quantize_kernel.quantize(x[None], *SIDES[name], packed=True)
    for how, columnwise, side in zip(SIDES[name], (False, True), made, strict=True):
        if how is None or side is None:
            assert how is side is None
            continue
        q = reference.quantize(x, **arguments(how, columnwise))
        assert side.scale is not None
        assert same_quantized(plain(side), q)
        assert side.scale is not None
        swizzled = swizzle(q.block_scale.view(torch.uint8))
        assert torch.equal(side.scale[0].view(torch.uint8), swizzled)


@pytest.mark.parametrize("name", ["activations", "gradients", "weights"])
def test_segments_have_their_own_scales(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    x = data(torch.bfloat16, 80, 48)
    x[16:64] *= 30
    x[64:] = 0
    ends_E = torch.tensor(ENDS, dtype=torch.int32, device=DEVICE)
    wanted = reference.operands(x, *SIDES[name], ends_E)
    monkeypatch.setattr(kernel, "NATIVE", False)
    with guarded_memory():
        found = kernel.operands(x, *SIDES[name], ends_E)
    assert same_operands(found, wanted)
    assert not same_operands(kernel.operands(x, *SIDES[name], ends_E[-1:]), wanted)
    # Packed for the same segments.
    made = quantize_kernel.quantize(x[None], *SIDES[name], ends_E, packed=True)
    for side, operand in zip(made, wanted, strict=True):
        assert side is not None
        assert operand is not None
        exact = plain(side)._replace(tensor_scale=torch.ones((), device=DEVICE))
        assert same(reference.dequantize(exact), operand.matrix)
        assert same(side.tensor_scale, operand.tensor_scale)


@pytest.mark.parametrize("dtype", DTYPES[:2], ids=str)
def test_each_expert_s_weights_have_a_scale(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    w_ENK = data(dtype, 96, 48).view(3, 32, 48) * torch.tensor([1, 50, 0.1], device=DEVICE).to(
        dtype
    ).view(3, 1, 1)
    monkeypatch.setattr(kernel, "NATIVE", False)
    for sides in (SIDES["weights"], SIDES["gradients"]):
        with guarded_memory():
            found = kernel.operands(w_ENK, *sides)
        assert same_operands(found, reference.operands(w_ENK, *sides))
    assert found[0].values is not found[1].values
    for sides in (SIDES["weights"], (Rounding(), Rounding(rht=True))):
        made = quantize_kernel.quantize(w_ENK, *sides, packed=True)
        for how, columnwise, side in zip(sides, (False, True), made, strict=True):
            for e in range(3):
                q = reference.quantize(w_ENK[e], **arguments(how, columnwise))
                assert same_quantized(plain(side, e), q)


@pytest.mark.parametrize("shape", [(3, 16), (1, 48), (16, 16), (0, 32), (32, 0)])
def test_other_shapes(shape: tuple[int, int]) -> None:
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(DEVICE)
    for seed in (None, 2):
        wanted = reference.quantize(x, seed=seed)
        with guarded_memory():
            found = quantize(x, seed=seed)
        assert same_quantized(found, wanted)
        assert found.block_scale.shape == wanted.block_scale.shape


@pytest.mark.parametrize("sign", [1, -1])
def test_ties_and_neighbours(sign: int) -> None:
    # With amax 2688 and 6 in every block, both scales are 1: y is x.
    grid = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6])
    ties = (grid[1:] + grid[:-1]) / 2
    above, below = (ties.nextafter(torch.tensor(end)) for end in (math.inf, -math.inf))
    x = torch.zeros(5, 16)
    x[:4, :8] = torch.stack((grid, *(torch.cat((t, grid[-1:])) for t in (ties, above, below))))
    x[4] = 2688
    x = (sign * x).to(DEVICE)
    for seed in (None, 1):
        found = quantize(x, seed=seed)
        assert (found.block_scale[:4].float() == 1).all()
        assert same_quantized(found, reference.quantize(x, seed=seed))
    assert quantize(-0.0 * x.abs()).data.unique().tolist() == [0x88]


@pytest.mark.parametrize(
    ("name", "bad"), [("both", math.nan), ("gradients", math.inf), ("weights", -math.inf)]
)
def test_nan_and_infinity_become_nan(
    name: str, bad: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel, "NATIVE", False)
    x = data(torch.bfloat16, 64, 48)
    x[40, 20] = bad
    for operand in kernel.operands(x, *SIDES[name]):
        assert isinstance(operand, Operand)
        assert operand.values.isnan().all()
        assert operand.tensor_scale.isnan()
    # Of segments, the one with the bad value.
    ends_E = torch.tensor([32, 64], dtype=torch.int32, device=DEVICE)
    found = kernel.operands(x, *SIDES[name], ends_E)
    assert same_operands(found, reference.operands(x, *SIDES[name], ends_E))
    assert found[0].values.isnan().sum() == 32 * 48


def test_tiny_and_large_tensors() -> None:
    x = data(torch.float32, 16, 48)
    for factor in (0.0, 1e-44, 1e-42, 1e-38, 1e-37, 1e-20, 1e-3, 1e35):
        assert same_quantized(quantize(x * factor), reference.quantize(x * factor))


def test_what_the_kernels_do_not_take_goes_to_the_reference() -> None:
    x, rows = data(torch.bfloat16, 64, 48), Rounding(rht=True)
    assert same_operands(kernel.operands(x, rows, None), reference.operands(x, rows, None))


def test_sides_with_different_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernel, "NATIVE", False)
    x, sides = data(torch.bfloat16, 64, 48), (SQUARE, Rounding(rht=True))
    assert same_operands(kernel.operands(x, *sides), reference.operands(x, *sides))


@pytest.mark.parametrize(
    ("shape", "sides", "message"),
    [
        ((16, 24), SIDES["rows"], "last dimension divisible by 16, got 24"),
        ((24, 16), SIDES["columns"], "second to last dimension divisible by 16, got 24"),
        ((24, 16), SIDES["weights"], "second to last dimension divisible by 16, got 24"),
        ((16, 16), (None, Rounding((16, 16), rht=True)), "rht: expected tile"),
        ((16, 16), (Rounding((16, 1)), None), r"tile: expected \(1, 16\) or \(16, 16\)"),
        ((2, 2, 16, 16), SIDES["rows"], r"x: expected \[M, N\], or"),
    ],
)
def test_wrong_arguments_are_named(shape: tuple[int, ...], sides: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        kernel.operands(torch.ones(shape, device=DEVICE), *sides)


def test_differences_are_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    x = data(torch.bfloat16, 64, 48)
    options: dict[str, Any] = {"columnwise": True, "rht": True, "seed": 1}
    found = quantize(x, **options)
    assert same_quantized(found, reference.quantize(x, **options))
    for change in ({"seed": 2}, {"seed": None}, {"rht": False}):
        other = reference.quantize(x, **{**options, **change})
        assert (found.data != other.data).sum() > 30
    monkeypatch.setattr("nemo_kernels.lowp.hadamard._MINUS", 1)
    assert (found.data != reference.quantize(x, **options).data).sum() > 30


@pytest.mark.slow
@pytest.mark.skipif(not MULTIPLIES_FP4, reason="needs the interpreter or an sm_100 GPU")
def test_native_products_of_packed_operands(monkeypatch: pytest.MonkeyPatch) -> None:
    x = torch.randn(256, 48, generator=torch.Generator().manual_seed(0)).bfloat16().to(DEVICE)
    w_ENK = torch.randn(2, 32, 48, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    ends_E = torch.tensor([128, 256], dtype=torch.int32, device=DEVICE)
    sides = (Rounding(), Rounding(rht=True))
    results = []
    for native in (False, True):
        monkeypatch.setattr(kernel, "NATIVE", native)
        rows, columns = kernel.operands(x, *sides)
        weight, _ = kernel.operands(w_ENK[0], SQUARE, SQUARE)
        grouped_rows, grouped_columns = kernel.operands(x, *sides, ends_E)
        weights, transposed = kernel.operands(w_ENK, SQUARE, SQUARE)
        wide, _ = kernel.operands(x[:, :32].contiguous(), Rounding(), None, ends_E)
        made = (rows, columns, weight, grouped_rows, grouped_columns, weights, transposed, wide)
        assert all(isinstance(operand, Packed if native else Operand) for operand in made)
        by = multiplier(kernel, rows, weight)
        results.append(
            [
                by.product(rows, weight, torch.float32),
                by.product(columns, columns, torch.float32),
                by.grouped_product(grouped_rows, weights, ends_E, torch.float32),
                by.grouped_product(wide, transposed, ends_E, torch.float32),
                by.grouped_wgrad(grouped_columns, grouped_columns, ends_E, torch.float32),
            ]
        )
    for emulated, native_result in zip(*results, strict=True):
        torch.testing.assert_close(native_result, emulated, rtol=1e-4, atol=1e-4)
    with pytest.raises(ValueError, match="expected both emulated or neither"):
        multiplier(kernel, reference.operands(x, Rounding(), None)[0], weight)


@pytest.mark.slow
def test_self_check_passes_and_notices(monkeypatch: pytest.MonkeyPatch) -> None:
    small = Sizes(tokens=128)
    assert kernel.self_check(DEVICE, small) < 1e-5
    monkeypatch.setattr(quantize_kernel, "_side", without_seed(quantize_kernel._side))
    assert kernel.self_check(DEVICE, small) == math.inf


def without_seed(side: Any) -> Any:
    def arguments(how: Rounding | None, *rest: Any) -> Any:
        return side(None if how is None else how._replace(seed=0), *rest)

    return arguments
