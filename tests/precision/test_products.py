"""Linear layers and experts in low precision, against float64 products of dequantized tensors and
the operand table of the NVFP4 recipe."""

import itertools
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helpers.bands import band, unit
from nemo_hybrid.precision.layers import QuantizedExperts, QuantizedLinear, most_rows
from nemo_hybrid.precision.operands import Ingredients, PassFormats, Streams
from nemo_kernels.lowp import mxfp8
from nemo_kernels.lowp.reference import dequantize, quantize
from nemo_kernels.moe import grouped_mlp, moe_mlp

ALL_NVFP4 = PassFormats("nvfp4", "nvfp4", "nvfp4")
EXACT = PassFormats("fp32", "fp32", "fp32")
T, K, N = 64, 48, 80


def draw(*shape: int, seed: int = 0) -> Tensor:
    """bf16 with rows, columns and blocks of different sizes, so that every scale counts."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator)
    x *= torch.exp(torch.randn(shape[-1], generator=generator))
    return (x * torch.exp(torch.randn(*shape[:-1], 1, generator=generator))).bfloat16()


def decoded(x: Tensor, **how: object) -> Tensor:
    return dequantize(quantize(x, **how)).double()  # type: ignore[arg-type]


def seeds(streams: Streams, layer: str, *operands: str) -> list[int]:
    use = Streams.next_use(streams, layer)
    return [Streams.seed(use, operand) for operand in operands]


def passes(layer: Callable[..., Tensor], x: Tensor, weight: Tensor, dy: Tensor) -> list[Tensor]:
    """y, dx and dW; the latter in the weight's dtype."""
    x, weight = x.clone().requires_grad_(), weight.clone().requires_grad_()
    y = layer(x, weight)
    return [y.detach(), *torch.autograd.grad(y, (x, weight), dy)]


def by_the_table(
    x: Tensor, w: Tensor, dy: Tensor, seed_dgrad: int | None, seed_wgrad: int | None
) -> list[Tensor]:
    """Fprop, Dgrad and Wgrad of the recipe in float64, from the packed format."""
    w_hat = decoded(w, tile=(16, 16))
    y = decoded(x) @ w_hat.T
    dx = decoded(dy, seed=seed_dgrad) @ w_hat
    dy_t = decoded(dy, columnwise=True, rht=True, seed=seed_wgrad)
    return [y, dx, dy_t @ decoded(x, columnwise=True, rht=True).T]


def distance(got: Tensor, wanted: Tensor) -> float:
    got, wanted = got.detach().double(), wanted.detach()
    return float((got - wanted).norm() / wanted.norm())


def test_the_three_products_are_those_of_the_operand_table() -> None:
    x, w, dy = draw(T, K, seed=1), draw(N, K, seed=2), draw(T, N, seed=3)
    streams = Streams(5, rank=1)
    streams.start(7, 2)
    layer = QuantizedLinear("layer", ALL_NVFP4, Ingredients(), streams)
    got = passes(layer, x, w.float(), dy)  # in fp32, the gradient of the weight is not rounded
    streams.start(7, 2)
    wanted = by_the_table(x, w, dy, *seeds(streams, "layer", "dy dgrad", "dy wgrad"))
    once, never = unit(torch.bfloat16), band(torch.float32, terms=T)
    for result, want, rounding in zip(got, wanted, (once, once, never), strict=True):
        assert distance(result, want) < rounding
    # Anything else than the table is far off: other bits, none, no transform, 1-D weights.
    assert distance(got[1], by_the_table(x, w, dy, 1, 2)[1]) > 0.02
    assert distance(got[2], by_the_table(x, w, dy, None, None)[2]) > 0.02
    for change in ("rht", "two_dimensional_weights", "stochastic_rounding"):
        streams.start(7, 2)
        other = QuantizedLinear("layer", ALL_NVFP4, Ingredients(**{change: False}), streams)
        distances = [distance(a, b) for a, b in zip(passes(other, x, w, dy), wanted, strict=True)]
        touched = {"rht": "001", "two_dimensional_weights": "110", "stochastic_rounding": "011"}
        assert ["1" if d > 0.02 else "0" for d in distances] == [*touched[change]]


def test_mxfp8_has_blocks_along_what_each_product_sums_over() -> None:
    def spread(*shape: int, seed: int) -> Tensor:
        """Over so many powers of two that small numbers of a block become subnormal or zero."""
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(shape, generator=generator)
        return x * torch.exp(4 * torch.randn(shape, generator=generator))

    def blocks(t: Tensor) -> Tensor:
        """Along the last dimension."""
        return mxfp8.operand(t.contiguous(), columnwise=False).values.double()

    x, w, dy = spread(64, 96, seed=1), spread(160, 96, seed=2), spread(64, 160, seed=3)
    formats = PassFormats("mxfp8", "mxfp8", "mxfp8")
    got = passes(QuantizedLinear("layer", formats, Ingredients(), Streams(0, 0)), x, w, dy)
    wanted = [blocks(x) @ blocks(w).T, blocks(dy) @ blocks(w.T).T, blocks(dy.T) @ blocks(x.T).T]
    other = [blocks(x.T).T @ blocks(w.T), blocks(dy.T).T @ blocks(w), blocks(dy).T @ blocks(x)]
    for result, want, across in zip(got, wanted, other, strict=True):
        # A few large terms make up each sum: that leaves other blocks no fifty bands.
        assert distance(result, want) < band(torch.float32)
        assert distance(result, across) > 20 * band(torch.float32)


@pytest.mark.parametrize("which", range(3))
@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8", "bf16"])
def test_each_pass_has_its_format(which: int, kind: str) -> None:
    x, w, dy = draw(64, 64, seed=1), draw(96, 64, seed=2), draw(64, 96, seed=3)
    formats = PassFormats(*(kind if i == which else "fp32" for i in range(3)))  # type: ignore[arg-type]
    layer = QuantizedLinear("layer", formats, Ingredients(), Streams(0, 0))
    got = passes(layer, x.float(), w.float(), dy.float() * 1.001)
    exact = [
        t.double()
        for t in passes(torch.nn.functional.linear, x.float(), w.float(), dy.float() * 1.001)
    ]
    error = [distance(a, b) for a, b in zip(got, exact, strict=True)]
    limits = {"nvfp4": (0.05, 0.4), "mxfp8": (0.01, 0.06), "bf16": (1e-4, 3e-3)}
    low, high = limits[kind]
    for i in range(3):
        if i != which or (kind == "bf16" and which == 0):  # there bf16 holds x and w exactly
            assert error[i] < 1e-6
        else:
            assert low < error[i] < high


def test_bits_depend_on_all_that_names_a_use_and_on_nothing_else() -> None:
    x, w, dy = draw(T, K, seed=1), draw(N, K, seed=2), draw(T, N, seed=3)

    def gradient(seed=0, rank=0, batch=0, micro_batch=0, name="a", uses=1) -> Tensor:
        streams = Streams(seed, rank)
        streams.start(batch, micro_batch)
        layer = QuantizedLinear(name, ALL_NVFP4, Ingredients(), streams)
        return [passes(layer, x, w, dy) for _ in range(uses)][-1][1]

    first = gradient()
    assert torch.equal(first, gradient())
    for other in ({"seed": 1}, {"rank": 1}, {"batch": 1}, {"micro_batch": 1}, {"name": "b"},
                  {"uses": 2}):  # fmt: skip
        assert not torch.equal(first, gradient(**other)), other


def test_recomputation_changes_no_bit_and_does_not_advance_the_bits() -> None:
    x, w, dy = draw(T, K, seed=1), draw(N, K, seed=2), draw(T, N, seed=3)

    def run(recompute: bool) -> list[Tensor]:
        layer = QuantizedLinear("layer", ALL_NVFP4, Ingredients(), Streams(0, 0))
        inputs = [x.clone().requires_grad_(), w.clone().requires_grad_()]
        results: list[Tensor] = []
        for _ in range(2):
            if recompute:
                y = torch.utils.checkpoint.checkpoint(layer, *inputs, use_reentrant=False)
            else:
                y = layer(*inputs)
            results += [y, *torch.autograd.grad(y, inputs, dy)]
        return results

    for a, b in zip(run(True), run(False), strict=True):
        assert torch.equal(a, b)


def test_gradients_are_unbiased_on_average_over_batches() -> None:
    x, w, dy = draw(T, K, seed=1), draw(N, K, seed=2), draw(T, N, seed=3)
    streams = Streams(0, 0)
    rows = PassFormats("fp32", "nvfp4", "fp32")
    layer = QuantizedLinear("layer", rows, Ingredients(), streams)
    exact = dy.double() @ decoded(w, tile=(16, 16))
    draws = []
    for batch in range(64):
        streams.start(batch, 0)
        draws.append(passes(layer, x.float(), w.float(), dy.float())[1].double())
    one = distance(draws[0], exact)
    mean = distance(torch.stack(draws).mean(0), exact)
    assert 0.03 < one < 0.5
    assert mean < one / 6  # a bias would stay; chance falls with the root of 64


# The experts.

E, L, F = 4, 32, 48
COUNTS = torch.tensor([21, 0, 3, 40])


def expert_inputs() -> tuple[Tensor, ...]:
    rows = int(COUNTS.sum())
    weights = torch.rand(rows, generator=torch.Generator().manual_seed(9)) + 0.5
    return draw(rows, L, seed=1), weights, draw(E, F, L, seed=2), draw(E, L, F, seed=3)


def expert_passes(experts: QuantizedExperts | None, dtype: torch.dtype) -> list[Tensor]:
    x, weights, up, down = expert_inputs()
    leaves = [t.to(dtype).requires_grad_() for t in (x, up, down)]
    weights = weights.requires_grad_()
    y = grouped_mlp(leaves[0], weights, COUNTS, *leaves[1:], experts=experts)
    dy = draw(*y.shape, seed=4).to(dtype)
    return [y.detach(), *torch.autograd.grad(y, (leaves[0], weights, *leaves[1:]), dy)]


def test_experts_equal_linear_layers_one_by_one() -> None:
    """Each expert alone, by linear layers: the same codes, since each has its tensor scales."""
    streams = Streams(3, 0)
    no_bits = Ingredients(stochastic_rounding=False)  # whose numbers are those of the padded place
    got = expert_passes(QuantizedExperts("experts", ALL_NVFP4, no_bits, streams), torch.bfloat16)
    layer = QuantizedLinear("expert", ALL_NVFP4, no_bits, streams)
    x, weights, up, down = expert_inputs()
    per_row = (x, weights, draw(x.shape[0], L, seed=4))
    rows = zip(*(t.split(COUNTS.tolist()) for t in per_row), strict=True)
    by_row, by_expert = [], []
    for (x_e, weight_e, dy_e), *matrices in zip(rows, up, down, strict=True):
        n = len(x_e)
        if not n:
            by_expert.append([torch.zeros_like(w) for w in matrices])
            continue
        x_e, dy_e = (torch.cat((t, t.new_zeros(-n % 16, L))) for t in (x_e, dy_e))
        weight_e = torch.cat((weight_e, torch.zeros(-n % 16)))
        leaves = [t.clone().requires_grad_() for t in (x_e, weight_e, *matrices)]
        h = layer(leaves[0], leaves[2])
        y = layer((h.float().relu().square() * leaves[1][:, None]).bfloat16(), leaves[3])
        dx, dweight, *dmatrices = torch.autograd.grad(y, leaves, dy_e)
        by_row.append([t[:n] for t in (y, dx, dweight)])
        by_expert.append(dmatrices)
    wanted = [torch.cat(t) for t in zip(*by_row, strict=True)]
    wanted += [torch.stack(t) for t in zip(*by_expert, strict=True)]
    for result, want in zip(got, wanted, strict=True):
        assert distance(result, want.double()) < 5e-3


def test_experts_in_fp32_are_the_plain_ones() -> None:
    exact = QuantizedExperts("experts", EXACT, Ingredients(), Streams(0, 0))
    plain = expert_passes(None, torch.float32)
    for a, b in zip(expert_passes(exact, torch.float32), plain, strict=True):
        assert distance(a, b.double()) < 1e-5
    low = QuantizedExperts("experts", ALL_NVFP4, Ingredients(), Streams(0, 0))
    for a, b in zip(expert_passes(low, torch.float32), plain, strict=True):
        assert 0.03 < distance(a, b.double()) < 1


@pytest.mark.parametrize(
    "formats",
    [ALL_NVFP4, PassFormats("bf16", "mxfp8", "nvfp4"), PassFormats("nvfp4", "nvfp4", "mxfp8")],
)
def test_recomputed_experts_and_unsorted_tokens_give_the_same_bits(formats: PassFormats) -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.stack([torch.randperm(E, generator=generator)[:2] for _ in range(33)])
    _, _, up, down = expert_inputs()
    up, down = (
        torch.nn.functional.pad(t, (0, (-t.shape[2]) % 32, 0, (-t.shape[1]) % 32))
        for t in (up, down)
    )
    x, weights = draw(33, up.shape[2], seed=1), torch.rand(33, 2, generator=generator)

    def run(recompute: bool) -> list[Tensor]:
        experts = QuantizedExperts("experts", formats, Ingredients(), Streams(0, 0))
        leaves = [t.clone().requires_grad_() for t in (x, weights, up, down)]
        y = moe_mlp(leaves[0], ids, *leaves[1:], recompute=recompute, experts=experts)
        return [y, *torch.autograd.grad(y.float().square().sum(), leaves)]

    for a, b in zip(run(False), run(True), strict=True):
        assert torch.equal(a, b)
        assert a.isfinite().all()
        assert a.abs().max() > 0


@pytest.mark.parametrize("align", [1, 16, 128])
def test_no_padding_needs_more_rows_than_are_made(align: int) -> None:
    tight = False
    for counts in itertools.product((0, 1, 15, 16, 17, 130), repeat=3):
        padded = sum(-(-n // align) * align for n in counts)
        rows = most_rows(sum(counts), 3, align)
        assert padded <= rows
        assert rows % align == 0
        tight |= padded == rows
    assert tight  # some need them all


@pytest.mark.parametrize("kind", ["nvfp4", "mxfp8", "bf16"])
def test_experts_of_which_none_has_a_row(kind: str) -> None:
    formats = PassFormats(kind, kind, kind)  # type: ignore[arg-type]
    experts = QuantizedExperts("experts", formats, Ingredients(), Streams(0, 0))
    shapes = (0, 32), (0,), (E, 64, 32), (E, 32, 64)
    leaves = [torch.ones(shape).bfloat16().requires_grad_() for shape in shapes]
    counts = torch.zeros(E, dtype=torch.int64)
    y = grouped_mlp(leaves[0], leaves[1], counts, *leaves[2:], experts=experts)
    assert y.shape == (0, 32)
    for leaf, grad in zip(leaves, torch.autograd.grad(y.sum(), leaves), strict=True):
        assert grad.shape == leaf.shape
        assert not grad.any()


def test_a_layer_without_tokens() -> None:
    layer = QuantizedLinear("layer", ALL_NVFP4, Ingredients(), Streams(0, 0))
    y, dx, dw = passes(layer, draw(2, K)[:0], draw(N, K), draw(2, N)[:0])
    assert (y.shape, dx.shape) == ((0, N), (0, K))
    assert not dw.any()


@pytest.mark.parametrize("where", ["x", "weight", "dy"])
def test_nan_goes_through_and_is_never_a_zero(where: str) -> None:
    inputs = {"x": draw(T, K, seed=1), "weight": draw(N, K, seed=2), "dy": draw(T, N, seed=3)}
    inputs[where][5, 7] = torch.nan
    layer = QuantizedLinear("layer", ALL_NVFP4, Ingredients(), Streams(0, 0))
    y, dx, dw = passes(layer, inputs["x"], inputs["weight"], inputs["dy"])
    touched = {"x": (y, dw), "weight": (y, dx), "dy": (dx, dw)}
    for result in touched[where]:
        assert result.isnan().any()


def test_a_width_that_blocks_do_not_divide_is_refused() -> None:
    layer = QuantizedLinear("layer", ALL_NVFP4, Ingredients(), Streams(0, 0))
    with pytest.raises(ValueError, match="divisible by 16, got 40"):
        layer(draw(T, 40), draw(N, 40))
