"""Low-rank parts beside the experts' matrices, by every path, against matrices that they were added
to, in float64. See ``helpers.triton_env`` for where the kernels run.

Shapes: T tokens, E experts, K experts per token, L width, F expert width, r rank.
"""

import pytest
import torch
from torch import Tensor

from helpers.bands import SABOTAGE, band
from helpers.moe_inputs import draw_ids, draw_inputs, naive_moe, with_gradients
from helpers.triton_env import DEVICE
from nemo_kernels import backend
from nemo_kernels.moe import LowRank, grouped_mlp, moe_mlp, sort_slots

EXPERTS, CHOICES, WIDTH, INNER, RANK, SCALE = 5, 2, 16, 24, 8, 0.75
PATHS = {"reference": torch.float64, "grouped_mm": torch.float32, "triton": torch.float32}
SIDES = {"both": (True, True), "up": (True, False), "down": (False, True)}


def drawn() -> tuple[Tensor, list[Tensor], Tensor]:
    """Ids, of which expert 4 has none; x, weights, up, down, A and B of up, A and B of down; dy."""
    generator = torch.Generator().manual_seed(0)
    ids_TK = draw_ids(generator, 12, EXPERTS - 1, CHOICES, 0.5)
    inputs = draw_inputs(generator, 12, CHOICES, EXPERTS, WIDTH, INNER)
    shapes = ((RANK, WIDTH), (INNER, RANK), (RANK, INNER), (WIDTH, RANK))
    low = [torch.randn(EXPERTS, *shape, generator=generator) / shape[1] ** 0.5 for shape in shapes]
    dy_TL = torch.randn(12, WIDTH, generator=generator)
    return ids_TK, [t.detach() for t in (*inputs, *low)], dy_TL


def summed(ids_TK: Tensor, sides: tuple[bool, bool], scale: float = SCALE):  # type: ignore[no-untyped-def]
    def run(x: Tensor, w: Tensor, up: Tensor, down: Tensor, *low: Tensor) -> Tensor:
        A_up, B_up, A_down, B_down = low
        up = up + scale * B_up @ A_up if sides[0] else up
        down = down + scale * B_down @ A_down if sides[1] else down
        return naive_moe(x, ids_TK, w, up, down)

    return run


def apart(path: str, sides: tuple[bool, bool], recompute: bool = False) -> list[list[float]]:
    """Of output and all gradients, in the norm: from the right one, and from another scale's."""
    ids_TK, inputs, dy_TL = drawn()
    exact = tuple(t.double().requires_grad_() for t in inputs)
    leaves = tuple(t.to(DEVICE, PATHS[path]).requires_grad_() for t in inputs)

    def run(x: Tensor, w: Tensor, up: Tensor, down: Tensor, *low: Tensor) -> Tensor:
        parts = (LowRank(*low[:2], SCALE), LowRank(*low[2:], SCALE))
        given = tuple(part if side else None for part, side in zip(parts, sides, strict=True))
        with backend.choosing(moe=path):
            return moe_mlp(x, ids_TK.to(DEVICE), w, up, down, recompute, low_rank=given)  # type: ignore[arg-type]

    found = with_gradients(run, leaves, dy_TL.to(DEVICE))
    rows = []
    for scale in (SCALE, 1.1 * SCALE):
        expected = with_gradients(summed(ids_TK, sides, scale), exact, dy_TL.double())
        pairs = zip(found, expected, strict=True)
        rows.append([float((a.cpu() - b).norm() / b.norm().clamp(min=1e-9)) for a, b in pairs])
    return rows


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("path", PATHS)
def test_every_path_equals_matrices_that_were_summed(path: str, recompute: bool) -> None:
    right, wrong = apart(path, SIDES["both"], recompute)
    limit = band(PATHS[path], INNER)
    assert max(right) < limit
    assert min(wrong) > SABOTAGE * limit


@pytest.mark.parametrize("side", ["up", "down"])
def test_one_side_alone(side: str) -> None:
    right, wrong = apart("reference", SIDES[side])
    limit = band(torch.float64, INNER)
    assert max(right) < limit
    assert wrong[0] > SABOTAGE * limit


def test_sorted_rows_and_what_is_kept() -> None:
    """As processes that share experts take them. Beside its inputs the backward pass keeps the
    pre-activation and what is known of rows, no matrices."""
    ids_TK, (x, _, up, down, *low), _ = drawn()
    order_R, _, counts_E = sort_slots(ids_TK[:, :1].contiguous(), EXPERTS)
    x, weights_R = x[order_R].requires_grad_(), torch.ones(12)
    matrices = [t.requires_grad_() for t in low]
    given = (LowRank(*matrices[:2], SCALE), LowRank(*matrices[2:], SCALE))
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y_RL = grouped_mlp(x, weights_R, counts_E, up, down, low_rank=given)
    own = {t.data_ptr() for t in (x, weights_R, up, down, *matrices)}
    assert [t.shape for t in kept if t.data_ptr() not in own] == [(12, INNER)]
    exact = summed(ids_TK[order_R, :1], (True, True))(x, weights_R[:, None], up, down, *low)
    torch.testing.assert_close(y_RL, exact)
    y_RL.sum().backward()
    assert up.grad is None
    assert all(t.grad is not None and not t.grad[4].any() for t in matrices)


def test_bad_input_is_named() -> None:
    ids_TK, (x, w, up, down, *low), _ = drawn()
    with pytest.raises(ValueError, match=r"A_ErI: expected shape \[5, any, 16\], got \[5, 8, 24\]"):
        moe_mlp(x, ids_TK, w, up, down, low_rank=(LowRank(low[2], low[1], 1.0), None))
    with pytest.raises(ValueError, match=r"B_EOr: expected shape \[5, 24, 8\], got \[5, 16, 8\]"):
        moe_mlp(x, ids_TK, w, up, down, low_rank=(LowRank(low[0], low[3], 1.0), None))
