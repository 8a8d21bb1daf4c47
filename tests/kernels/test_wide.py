"""What stands in for weights in fp32, against copies in fp32."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helpers.moe_inputs import by_path, draw_ids, draw_inputs
from helpers.triton_env import DEVICE
from nemo_kernels.moe import grouped_mm, kernel, reference
from nemo_kernels.wide import Wide, widened

BF16, FP32 = torch.bfloat16, torch.float32


def gradient(stand_in: Callable[[Tensor], Tensor], use: Callable[[Tensor], Tensor]) -> Tensor:
    weight = torch.linspace(-3, 3, 24).view(4, 6).to(DEVICE, BF16).requires_grad_()
    wide = stand_in(weight)
    (use(wide) + 2.0**-9 * use(wide)).backward()
    return weight.grad


@pytest.mark.parametrize(
    "use",
    [
        lambda w: (w.to(BF16) * 1.5).float().sum(),
        lambda w: (w * w).sum(),
        lambda w: w.mT[1:3].exp().sum(),
        lambda w: w.split(2)[1].unsqueeze(1).square().sum(),
        lambda w: torch.mm(w, w.t()).trace(),
        lambda w: w.float().sum() + w.clone().sum(),
    ],
)
def test_gradients_are_those_of_copies(use: Callable[[Tensor], Tensor]) -> None:
    ours = gradient(widened, use)
    assert torch.equal(ours, gradient(Tensor.float, use))
    assert ours.dtype == BF16


def test_it_has_no_memory_but_the_weights() -> None:
    weight = torch.randn(3, 4, device=DEVICE, dtype=BF16).requires_grad_()
    wide = widened(weight)
    assert isinstance(wide, Wide)
    assert (wide.dtype, wide.shape, wide.stride()) == (FP32, weight.shape, weight.stride())
    assert not wide.untyped_storage().nbytes()
    assert wide.to(BF16).data_ptr() == weight.data_ptr()
    like = torch.empty_like(wide)
    assert (type(like), like.dtype, like.shape) == (Tensor, FP32, weight.shape)
    assert torch.equal(wide + 0, weight.float())
    assert widened(wide) is wide
    with pytest.raises(AssertionError, match="would be lost"):
        wide.detach().mul_(2)
    fp32, vector = torch.ones(2, 2), torch.ones(2, dtype=BF16)
    assert widened(fp32) is fp32
    assert type(widened(vector)) is Tensor


@pytest.mark.parametrize("path", [kernel, grouped_mm, reference])
def test_experts_by_every_path(path) -> None:
    """Two uses, of which one counts little: lost if it were rounded before it is added."""
    generator = torch.Generator().manual_seed(0)
    ids_TK = draw_ids(generator, 9, 3, 2, 1.0).to(DEVICE)
    inputs = draw_inputs(generator, 9, 2, 3, 16, 16, BF16)
    x_TL, w_TK, *stacks = (t.detach().to(DEVICE) for t in inputs)

    def gradients(stand_in: Callable[[Tensor], Tensor]) -> list[Tensor]:
        leaves = [stack.clone().requires_grad_() for stack in stacks]
        wide = [stand_in(leaf) for leaf in leaves]
        y, again = (by_path(path, x, ids_TK, w_TK, *wide) for x in (x_TL, x_TL.roll(1, 0)))
        (y.float().sum() + 2.0**-9 * again.float().sum()).backward()
        return [leaf.grad for leaf in leaves]

    ours, copies, narrow = (gradients(s) for s in (widened, Tensor.float, lambda stack: stack))
    assert all(torch.equal(a, b) for a, b in zip(ours, copies, strict=True))
    rounds = path is grouped_mm  # each share, before it is added
    assert rounds or not any(torch.equal(a, b) for a, b in zip(ours, narrow, strict=True))
