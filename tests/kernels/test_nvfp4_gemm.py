"""Native NVFP4 products against those of the dequantized operands in float64.

Where there is no GPU that has the instruction, the interpreter computes it (helpers.triton_env).
Shapes: M, N, K of a product; E experts, P rows of their segments.
"""

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from helpers.swizzled import swizzle, unswizzle
from helpers.triton_env import DEVICE, MULTIPLIES_FP4, guarded_memory
from nemo_kernels.lowp import layout, reference
from nemo_kernels.lowp.gemm_kernel import gemm, grouped_rows, grouped_wgrad
from nemo_kernels.lowp.layout import Packed

pytestmark = pytest.mark.skipif(not MULTIPLIES_FP4, reason="needs the interpreter or an sm_100 GPU")
ENDS = [128, 128, 384]
"""Of three experts, the second without rows; 16 more rows belong to no expert."""
P = 400


class Operand(NamedTuple):
    """What a product takes, and its float64 value."""

    packed: Packed
    value: Tensor


def operand(*shape: int, seed: int, scales: Tensor | None = None) -> Operand:
    """Random codes and block scales, also zeros, and tensor scales (default: one scalar) that are
    those of the experts, as the shape's first dimension if it has three."""
    generator = torch.Generator().manual_seed(seed)
    *outer, rows, k = shape
    data = torch.randint(0, 256, (*outer, rows, k // 2), generator=generator, dtype=torch.uint8)
    bits = torch.randint(0, 0x7F, (*outer, rows, k // 16), generator=generator, dtype=torch.uint8)
    block_scale = bits.view(torch.float8_e4m3fn)
    if scales is None:
        scales = torch.rand((), generator=generator) + 0.5
    exact = reference.Quantized(data, block_scale, torch.ones(()))
    value = reference.dequantize(exact, torch.float64)
    if len(shape) == 3:
        value = value * scales.double()[:, None, None]
    elif not scales.dim():
        value = value * scales.double()
    packed = Packed(*(t.to(DEVICE) for t in (data, swizzle(block_scale), scales)))
    return Operand(packed, value)


def segments(ends: list[int]) -> list[slice]:
    return [slice(start, end) for start, end in zip([0, *ends[:-1]], ends, strict=True)]


def agrees(result: Tensor, a: Tensor, b: Tensor, scale: float = 1.0) -> bool:
    """Whether a result is a b^T within the error of any order of fp32 sums."""
    k, result = a.shape[-1], result.cpu().double()
    bound = (a.abs() @ b.abs().mT) * abs(scale) * (k + 4) * 2.0**-24
    return bool(((result - a @ b.mT * scale).abs() <= bound).all())


def scales(seed: int) -> Tensor:
    """One tensor scale per expert, each far from the others."""
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(len(ENDS), generator=generator).add(0.5) * torch.tensor([1e-3, 1.0, 50.0])


def ends_E(ends: list[int] = ENDS) -> Tensor:
    return torch.tensor(ends, dtype=torch.int32, device=DEVICE)


# (M, N, K): single elements, tails of everything, whole tiles of both widths, odd atoms.
SIZES = [(1, 1, 16), (130, 40, 80), (128, 256, 256), (37, 512, 272), (257, 130, 528)]


@pytest.mark.parametrize("shape", SIZES)
def test_product(shape: tuple[int, int, int]) -> None:
    m, n, k = shape
    a, b = operand(m, k, seed=0), operand(n, k, seed=1)
    with guarded_memory():
        result = gemm(a.packed, b.packed, torch.float32)
    assert agrees(result, a.value, b.value)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_are_rounded_once(dtype: torch.dtype) -> None:
    small = torch.tensor(1e-3)
    a, b = operand(40, 48, seed=0, scales=small), operand(24, 48, seed=1, scales=small)
    exact = gemm(a.packed, b.packed, torch.float32)
    result = gemm(a.packed, b.packed, dtype)
    assert result.dtype == dtype
    assert torch.equal(result, exact.to(dtype))


def rows_operands(n: int = 136, k: int = 48) -> tuple[Operand, Operand]:
    return (
        operand(P, k, seed=2, scales=scales(0)),
        operand(len(ENDS), n, k, seed=3, scales=scales(1)),
    )


def rows_agree(result: Tensor, a: Operand, b: Operand, a_scales: Tensor) -> list[bool]:
    """For each expert. a's value is without tensor scales."""
    return [
        agrees(result[rows], a.value[rows], b.value[e], float(a_scales[e]))
        for e, rows in enumerate(segments(ENDS))
    ]


@pytest.mark.parametrize(("n", "k"), [(136, 48), (512, 320), (1, 16)])
def test_rows_of_experts(n: int, k: int) -> None:
    a, b = rows_operands(n, k)
    with guarded_memory():
        result = grouped_rows(a.packed, b.packed, ends_E(), torch.float32)
        assert result.shape == (P, n)
        # Tensors of the guard are NaN where nothing was written.
        assert not result[ENDS[-1] :].any()
    assert all(rows_agree(result, a, b, scales(0)))


def wgrad_operands(m: int = 40, n: int = 136) -> tuple[Operand, Operand]:
    return operand(m, P, seed=4, scales=scales(2)), operand(n, P, seed=5, scales=scales(3))


def wgrad_agrees(result: Tensor, a: Operand, b: Operand) -> list[bool]:
    both = scales(2).double() * scales(3).double()
    return [
        agrees(result[e], a.value[:, part], b.value[:, part], float(both[e]))
        for e, part in enumerate(segments(ENDS))
    ]


@pytest.mark.parametrize(("m", "n"), [(40, 136), (129, 512), (1, 1)])
def test_weight_gradients_of_experts(m: int, n: int) -> None:
    a, b = wgrad_operands(m, n)
    with guarded_memory():
        result = grouped_wgrad(a.packed, b.packed, ends_E(), torch.float32)
    assert result.shape == (len(ENDS), m, n)
    assert not result[1].any()
    assert all(wgrad_agrees(result, a, b))


def test_many_experts_are_found() -> None:
    """More than a kernel compares at a time, most of them empty."""
    ends = [0] * 100 + [128] * 60 + [256] * 5
    a = operand(256, 16, seed=0, scales=torch.ones(len(ends)))
    b = operand(len(ends), 8, 16, seed=1, scales=torch.arange(1.0, len(ends) + 1))
    result = grouped_rows(a.packed, b.packed, ends_E(ends), torch.float32)
    assert agrees(result[:128], a.value[:128], b.value[100])
    assert agrees(result[128:], a.value[128:], b.value[160])


def test_empty_operands_give_zeros() -> None:
    a, b, none = operand(24, 16, seed=0).packed, operand(40, 16, seed=1).packed, ends_E([0, 0])
    assert gemm(operand(0, 16, seed=0).packed, b, torch.float32).shape == (0, 40)
    empty = operand(24, 0, seed=0).packed, operand(40, 0, seed=0).packed
    with guarded_memory():
        assert not gemm(*empty, torch.bfloat16).any()
        two = torch.ones(2, device=DEVICE)
        for operands in (empty, (a, b)):
            gradient = grouped_wgrad(
                *(x._replace(tensor_scale=two) for x in operands), none, torch.float32
            )
            assert gradient.shape == (2, 24, 40)
            assert not gradient.any()


def test_a_nan_scale_reaches_its_row_alone() -> None:
    a, b = operand(130, 80, seed=0), operand(40, 80, seed=1)
    plain = unswizzle(a.packed.scale, 130, 5)
    plain.view(torch.uint8)[129, 4] = 0x7F
    result = gemm(a.packed._replace(scale=swizzle(plain)), b.packed, torch.float32).cpu()
    assert result.isnan().all(1).nonzero().tolist() == [[129]]
    assert agrees(result[:129], a.value[:129], b.value)


def test_padding_rows_do_not_matter() -> None:
    a, b = operand(130, 64, seed=0), operand(40, 64, seed=1)
    scale = a.packed.scale.clone()
    plain = unswizzle(scale, 256, 4)
    plain.view(torch.uint8)[130:] = 0x7F
    result = gemm(a.packed._replace(scale=swizzle(plain)), b.packed, torch.float32)
    assert agrees(result, a.value, b.value)


def test_quantized_tensors() -> None:
    """From numbers to the product, with the reference's quantizer."""
    generator = torch.Generator().manual_seed(0)
    x, w = (torch.randn(n, 96, generator=generator) for n in (20, 30))
    quantized = [reference.quantize(t) for t in (x, w)]
    packed = [
        Packed(*(t.to(DEVICE) for t in (q.data, swizzle(q.block_scale), q.tensor_scale)))
        for q in quantized
    ]
    assert packed[0].shape == x.shape
    result = gemm(*packed, torch.float32)
    a, b = (reference.dequantize(q).double() for q in quantized)
    # Dequantized numbers are rounded once to fp32, each.
    torch.testing.assert_close(result.cpu().double(), a @ b.T, rtol=1e-5, atol=1e-5)
    assert (result.cpu() - x @ w.T).norm() < 0.2 * (x @ w.T).norm()


def swap_nibbles(x: Packed) -> Packed:
    return x._replace(data=x.data >> 4 | x.data << 4)


def unswizzled(x: Packed) -> Packed:
    """Scales in plain order, padded, in the place of atoms."""
    *outer, a, c, _ = x.scale.shape
    plain = unswizzle(x.scale, a * 128, c * 4)
    return x._replace(scale=plain.reshape(*outer, a, c, 512))


def transposed_atoms(x: Packed) -> Packed:
    """Atoms with r div 32 before r mod 32."""
    bits = x.scale.view(torch.uint8).unflatten(-1, (32, 4, 4)).transpose(-3, -2).flatten(-3)
    return x._replace(scale=bits.contiguous().view(torch.float8_e4m3fn))


def unscaled(x: Packed) -> Packed:
    return x._replace(tensor_scale=torch.ones_like(x.tensor_scale))


def others_scales(x: Packed) -> Packed:
    return x._replace(tensor_scale=x.tensor_scale.roll(1))


FAULTS = [swap_nibbles, unswizzled, transposed_atoms, unscaled]


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_of_a_product_are_seen(fault) -> None:
    a, b = operand(130, 80, seed=0), operand(40, 80, seed=1)
    assert not agrees(gemm(fault(a.packed), b.packed, torch.float32), a.value, b.value)
    assert not agrees(gemm(a.packed, fault(b.packed), torch.float32), a.value, b.value)


@pytest.mark.parametrize("fault", [*FAULTS, others_scales])
def test_faults_of_grouped_products_are_seen(fault) -> None:
    a, b = rows_operands()
    result = grouped_rows(a.packed, fault(b.packed), ends_E(), torch.float32)
    assert not all(rows_agree(result, a, b, scales(0)))
    a, b = wgrad_operands()
    result = grouped_wgrad(fault(a.packed), b.packed, ends_E(), torch.float32)
    assert not all(wgrad_agrees(result, a, b))


def test_wrong_ends_are_seen() -> None:
    wrong = ends_E([128, 256, 384])
    a, b = rows_operands()
    result = grouped_rows(a.packed, b.packed, wrong, torch.float32)
    assert rows_agree(result, a, b, scales(0)) == [True, True, False]
    a, b = wgrad_operands()
    result = grouped_wgrad(a.packed, b.packed, wrong, torch.float32)
    assert wgrad_agrees(result, a, b) == [True, False, False]


@pytest.mark.parametrize("ends", [[128, 0, 256], [64, 128, 256], [128, 256, 512]])
@pytest.mark.skipif(DEVICE != "cpu", reason="ends are not looked at on a GPU")
def test_wrong_ends_are_refused(ends: list[int]) -> None:
    for product, operands in ((grouped_rows, rows_operands()), (grouped_wgrad, wgrad_operands())):
        with pytest.raises(ValueError, match="ends_E: expected multiples of 128"):
            product(*(x.packed for x in operands), ends_E(ends), torch.float32)


# (R, K/16)
GRIDS = [(1, 1), (128, 4), (129, 5), (300, 13), (256, 8)]


def random_scales(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(sum(shape))
    return torch.randint(1, 0x7F, shape, generator=generator, dtype=torch.uint8)


@pytest.mark.parametrize("grid", GRIDS)
def test_swizzled_scales_are_those_of_torchao(grid: tuple[int, int]) -> None:
    utils = pytest.importorskip("torchao.prototype.mx_formats.utils")
    plain = random_scales(*grid)
    assert torch.equal(swizzle(plain).flatten(), utils.to_blocked(plain).flatten())


@pytest.mark.parametrize("grid", GRIDS)
def test_swizzled_scales_have_the_place_that_is_told(grid: tuple[int, int]) -> None:
    rows, blocks = grid
    plain = random_scales(*grid)
    r, k = torch.arange(rows)[:, None], torch.arange(blocks)
    atom = r // 128 * -(-blocks // 4) + k // 4
    place = atom * 512 + r % 32 * 16 + r % 128 // 32 * 4 + k % 4
    swizzled = swizzle(plain)
    assert torch.equal(swizzled.flatten()[place], plain)
    assert int((swizzled == 0).sum()) == swizzled.numel() - plain.numel()


def test_swizzling_is_undone_for_each_expert() -> None:
    plain = random_scales(3, 200, 9).view(torch.float8_e4m3fn)
    swizzled = swizzle(plain)
    assert (swizzled.dtype, swizzled.shape) == (plain.dtype, (3, *layout.atoms(200, 144), 512))
    assert torch.equal(swizzled[1].view(torch.uint8), swizzle(plain[1]).view(torch.uint8))
    assert torch.equal(unswizzle(swizzled, 200, 9).view(torch.uint8), plain.view(torch.uint8))
