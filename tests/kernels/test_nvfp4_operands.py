"""Operands with a tensor scale per expert, and their emulated products."""

import pytest
import torch
from torch import Tensor

from nemo_kernels.lowp import emulation
from nemo_kernels.lowp.operand import Operand, Rounding
from nemo_kernels.lowp.reference import fake_quantize, operands

ENDS = torch.tensor([32, 32, 64, 80], dtype=torch.int32)
ROWS = [slice(0, 32), slice(32, 32), slice(32, 64), slice(64, 80)]
HOW = [
    (Rounding(), Rounding(rht=True)),
    (Rounding((16, 16)), Rounding((16, 16))),
]


def draw(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def segments() -> Tensor:
    """Rows of four experts, the second without any, and zeros behind."""
    x = draw(96, 64)
    x[32:64] *= 30
    x[80:] = 0
    return x


def made(x: Tensor, how: tuple[Rounding, Rounding], ends: Tensor | None) -> list[Operand]:
    return [operand for operand in operands(x, *how, ends) if operand is not None]


@pytest.mark.parametrize("how", HOW, ids=["1x16", "16x16"])
def test_each_segment_is_quantized_as_if_it_were_alone(how: tuple[Rounding, Rounding]) -> None:
    x = segments()
    for operand, rounding in zip(made(x, how, ENDS), how, strict=True):
        scale = operand.tensor_scale
        assert scale is not None
        assert scale.shape == ENDS.shape
        for e, rows in enumerate(ROWS):
            values, alone = fake_quantize(
                x[rows], tile=rounding.tile, rht=rounding.rht, columnwise=operand.columnwise
            )
            assert torch.equal(operand.values[rows], values)
            assert scale[e] == alone
        assert not operand.values[80:].any()
        # One scale for all would be another rounding.
        assert not torch.equal(operand.values[:32], made(x, how, ENDS[-1:])[0].values[:32])


def test_random_bits_go_by_the_place_among_all_rows() -> None:
    x, seeded = segments(), Rounding(seed=4)
    rows, columns = made(x, (seeded, seeded), ENDS)
    alone = fake_quantize(x[:32], seed=4)[0]
    assert torch.equal(rows.values[:32], alone)
    assert not torch.equal(rows.values[64:80], fake_quantize(x[64:80], seed=4)[0])
    assert columns.columnwise


@pytest.mark.parametrize("how", [Rounding(), Rounding((16, 16)), Rounding(seed=1)])
def test_each_experts_weights_have_a_scale(how: Rounding) -> None:
    weights = draw(3, 32, 64) * torch.tensor([1.0, 7.0, 0.2]).view(3, 1, 1).bfloat16()
    for operand in made(weights, (how, how), None):
        assert operand.tensor_scale is not None
        for e, weight in enumerate(weights):
            values, scale = fake_quantize(weight, tile=how.tile, columnwise=operand.columnwise)
            if how.seed is None:
                assert torch.equal(operand.values[e], values)
            assert operand.tensor_scale[e] == scale


def test_nan_in_a_segment_stays_there() -> None:
    x = segments()
    x[40, 3] = torch.nan
    for operand in made(x, HOW[0], ENDS):
        assert operand.tensor_scale is not None
        assert operand.tensor_scale.isnan().tolist() == [False, False, True, False]
        assert operand.values[32:64].isnan().all()
        assert not operand.values[:32].isnan().any()
        assert not operand.values[64:].isnan().any()


@pytest.mark.parametrize("how", HOW, ids=["1x16", "16x16"])
def test_no_rows_at_all(how: tuple[Rounding, Rounding]) -> None:
    for operand in made(draw(0, 64), how, torch.zeros(3, dtype=torch.int32)):
        assert operand.values.shape == (0, 64)
        assert operand.tensor_scale is not None
        assert operand.tensor_scale.tolist() == [0, 0, 0]


@pytest.mark.parametrize("ends", [[8, 64], [64, 16], [16, 112]])
def test_wrong_ends_are_refused(ends: list[int]) -> None:
    with pytest.raises(ValueError, match="ends_E: expected multiples of 16 that rise to 96"):
        operands(segments(), Rounding(), None, torch.tensor(ends, dtype=torch.int32))


def test_experts_weights_must_consist_of_whole_blocks() -> None:
    with pytest.raises(ValueError, match=r"rows divisible by 16, got \[2, 24, 32\]"):
        operands(draw(2, 24, 32), Rounding(), None)


def test_segments_and_matrices_do_not_go_together() -> None:
    with pytest.raises(ValueError, match=r"without ends_E, got \[2, 16, 16\]"):
        operands(torch.zeros(2, 16, 16), Rounding(), None, ENDS)


def decoded(operand: Operand, rows: slice, e: int) -> Tensor:
    assert operand.tensor_scale is not None
    return operand.values[rows].double() * operand.tensor_scale[e].double()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_grouped_products_are_those_of_each_expert(dtype: torch.dtype) -> None:
    x, other, weights = segments(), draw(96, 48), draw(4, 48, 64)
    (rows, x_columns), (_, y_columns) = made(x, HOW[0], ENDS), made(other, HOW[0], ENDS)
    weight = made(weights, HOW[1], None)[0]
    y = emulation.grouped_product(rows, weight, ENDS, dtype)
    dw = emulation.grouped_wgrad(y_columns, x_columns, ENDS, dtype)
    assert (y.shape, dw.shape) == ((96, 48), (4, 48, 64))
    assert y.dtype == dw.dtype == dtype
    limit = 1e-6 if dtype == torch.float32 else 3e-3
    for e, segment in enumerate(ROWS):
        wanted = decoded(rows, segment, e) @ decoded(weight, slice(e, e + 1), e)[0].T
        assert (y[segment].double() - wanted).norm() <= limit * wanted.norm()
        wanted = decoded(y_columns, segment, e).T @ decoded(x_columns, segment, e)
        assert (dw[e].double() - wanted).norm() <= limit * wanted.norm()
    assert not dw[1].any()


def test_one_rounding_after_the_tensor_scales() -> None:
    a = Operand(torch.tensor([[3.0]]).bfloat16(), torch.tensor(1.001), False)
    b = Operand(torch.tensor([[43.0]]).bfloat16(), torch.tensor(0.999), False)
    y = emulation.product(a, b, torch.bfloat16)
    assert y == torch.tensor(3 * 43 * 1.001 * 0.999).bfloat16()
    tiny = Operand(a.values, torch.tensor(1e-30), False)
    huge = Operand(a.values * 2.0**100, torch.tensor(1e-20), False)
    assert emulation.product(tiny, huge, torch.float32) > 1e-20  # 1e-50 would be 0
    plain = Operand(a.values, None, False)
    assert emulation.product(plain, plain, torch.float32) == 9
