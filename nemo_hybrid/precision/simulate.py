"""What quantization does to a model, without writing anything: weights have the values that an
export stores, and inputs of products are rounded as engines round them.

Shapes: K in-features; R routed slots sorted by expert, E experts, L width in which experts work, F
expert inner width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nemo_hybrid.errors import UserError
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.precision.assign import WITH_INPUTS, Format, groups
from nemo_hybrid.precision.groups import is_stacked
from nemo_hybrid.precision.magnitudes import called_with_inputs
from nemo_hybrid.precision.quantize import Search, amax_of, decoded, weight_tensors
from nemo_kernels.lowp.reference import fake_quantize
from nemo_kernels.lowp.scales import E4M3_MAX
from nemo_kernels.moe.function import Gradients, Routed, Wanted
from nemo_kernels.moe.reference import LoopExperts

Change = Callable[[Tensor], Tensor]


@contextmanager
def simulated(
    model: HybridLM,
    assignment: Mapping[str, Format],
    search: Search = "amax",
    input_amax: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """Inside, weights have the values that the export would store, rounded to their dtype, and with
    ``input_amax`` (that of a `Calibration`) inputs are quantized too. Afterwards the model is what
    it was. The memory that it takes is that of the quantized places' weights. Raises as
    `weight_tensors`, but UserError names the place."""
    with ExitStack() as stack:
        for group in groups(assignment):
            weights = {place: weight_of(model, place) for place in group}
            shared = None if is_stacked(group[0]) else amax_of(*weights.values())
            for place, weight in weights.items():
                try:
                    values = stored_values(weight.data, assignment[place], search, shared)
                except UserError as error:
                    raise UserError(f"{place}: {error}") from None
                stack.callback(setattr, weight, "data", weight.data)
                weight.data = values
        if input_amax is not None:
            stack.enter_context(quantized_inputs(model, assignment, input_amax))
        yield


def quantized_inputs(
    model: HybridLM, assignment: Mapping[str, Format], amax: Mapping[str, Tensor]
) -> AbstractContextManager[None]:
    """Inside, inputs of products in nvfp4 and fp8 are rounded as `rounded_input` does; ``amax`` as
    in `Calibration`."""
    return called_with_inputs(model, _rounders(model, assignment, amax), QuantizedMLP)


def quantization_aware(
    model: HybridLM, assignment: Mapping[str, Format], amax: Mapping[str, Tensor]
) -> None:
    """From now on the model computes with the values of an export, and is trained as if nothing
    were rounded. Weights are quantized in every pass; inputs have the scales of ``amax``, as in
    `Calibration`.

    Raises UserError for places whose products cannot be changed: the head, whose product is one
    operation with the loss.
    """
    if assignment.get("lm_head", "bf16") != "bf16":
        raise UserError("lm_head cannot be trained quantized: leave it out of distill.formats")
    rounders = _rounders(model, assignment, amax)
    changes: dict[str, Change] = {}
    for group in groups(assignment):
        fused = [weight_of(model, place) for place in group] if len(group) > 1 else ()
        for place in group:
            changes[place] = partial(_quantized, format=assignment[place], fused=fused)
    for place, change in changes.items():
        if not is_stacked(place):
            linear: Any = model.get_submodule(place)
            linear.low_precision = partial(_product, rounders.get(place, _unchanged), change)
    for name in sorted({p.rpartition(".")[0] for p in changes if is_stacked(p)}):
        experts: Any = model.get_submodule(name)
        up, down = f"{name}.up_proj", f"{name}.down_proj"
        experts.low_precision = QuantizedMLP(
            rounders.get(up), rounders.get(down), changes.get(up), changes.get(down)
        )


def _rounders(
    model: HybridLM, assignment: Mapping[str, Format], amax: Mapping[str, Tensor]
) -> dict[str, Change]:
    """Of places whose inputs are rounded, with one scale for all experts, as engines have it."""
    device = model.lm_head.weight.device
    return {
        place: partial(rounded_input, format=format, amax=amax[place].max().to(device))
        for place, format in assignment.items()
        if format in WITH_INPUTS
    }


def _quantized(weight: Tensor, format: Format, fused: Sequence[Tensor]) -> Tensor:
    """Stored values of a weight; ``fused``: all weights that share its tensor scale."""
    amax = amax_of(*fused) if fused else None
    return _passed(weight, stored_values(weight.detach(), format, amax=amax))


def _product(rounder: Change, change: Change, x: Tensor, weight: Tensor) -> Tensor:
    return F.linear(rounder(x), change(weight).to(x.dtype))


def weight_of(model: HybridLM, place: str) -> nn.Parameter:
    """The weight of a place, [out, in] or stacked [E, out, in]."""
    return model.get_parameter(place if is_stacked(place) else f"{place}.weight")


def stored_values(
    weight: Tensor, format: Format, search: Search = "amax", amax: Tensor | None = None
) -> Tensor:
    """What an export of a weight [.., out, in] stores, decoded and rounded to the weight's dtype:
    the values that engines multiply with. ``amax``: see `weight_tensors`."""
    if format == "bf16":
        return weight.to(torch.bfloat16).to(weight.dtype)
    if weight.dim() > 2:
        if search != "amax":
            return torch.stack([stored_values(matrix, format, search) for matrix in weight])
        # All matrices at once, each with its own tensor scale.
        amax = weight.abs().amax((-2, -1), keepdim=True).float()
    stored = weight_tensors(weight, format, amax=amax, search=search)
    return decoded(stored).to(weight.dtype)


def rounded_input(x: Tensor, format: Format, amax: Tensor) -> Tensor:
    """x [.., K] with the values that an engine multiplies, in x's dtype.

    fp8: the static scale amax/448. nvfp4: the static tensor scale amax/2688, and scales of blocks
    of 16 found anew for every row. What exceeds amax saturates. K of nvfp4 is divisible by 16.
    Gradients pass as if nothing were rounded.
    """
    exact = x.detach().float()
    amax = torch.where(amax == 0, 1.0, amax)
    if format == "fp8":
        scale = amax / E4M3_MAX
        codes = (exact / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        values = codes.float() * scale
    else:
        codes, tensor_scale = fake_quantize(x, amax=amax)
        values = codes.float() * tensor_scale
    return _passed(x, values.to(x.dtype))


class QuantizedMLP(LoopExperts):
    """The expert MLP on changed inputs and weights, whose gradients are those of these operations.

    Engines multiply by the routing weight behind the down projection, so the squared ReLU is
    rounded without it.
    """

    def __init__(
        self,
        up: Change | None,
        down: Change | None,
        up_weight: Change | None = None,
        down_weight: Change | None = None,
    ) -> None:
        self.up, self.down = up or _unchanged, down or _unchanged
        self.up_weight, self.down_weight = up_weight or _unchanged, down_weight or _unchanged

    def forward(self, routed: Routed, keep: bool) -> tuple[Tensor, Tensor]:
        h_RF = self.pre_activation(routed)
        act_RF = self.down(h_RF.float().relu().square()) * routed.weight_R[:, None]
        return _products(act_RF, routed.groups, self.down_weight(routed.down_ELF)), h_RF

    def pre_activation(self, routed: Routed) -> Tensor:
        x_RL = self.up(routed.rows(routed.x_TL)).float()
        h_RF = _products(x_RL, routed.groups, self.up_weight(routed.up_EFL))
        return h_RF.to(routed.x_TL.dtype)

    def backward(self, routed: Routed, h_RF: Tensor, dy_TL: Tensor, wanted: Wanted) -> Gradients:
        """By computing everything once more; that of weights is in their dtype."""
        given = (routed.rows(routed.x_TL), routed.weight_R, routed.up_EFL, routed.down_ELF)
        with torch.enable_grad():
            x_RL, weight_R, *weights = (
                t.detach().requires_grad_(want)
                for t, want in zip(given, (True, True, *wanted), strict=True)
            )
            again = Routed(x_RL, None, weight_R, routed.groups, *weights)
            y_RL, _ = self.forward(again, keep=False)
        leaves = [t for t in (x_RL, weight_R, *weights) if t.requires_grad]
        found = iter(torch.autograd.grad(y_RL, leaves, routed.rows(dy_TL).to(y_RL.dtype)))
        dx_RL, dweight_R = next(found), next(found)
        dup_EFL, ddown_ELF = (next(found) if want else None for want in wanted)
        return dx_RL, dweight_R, dup_EFL, ddown_ELF


def _products(x_R: Tensor, groups: list[int], weight_E: Tensor) -> Tensor:
    """Each expert's rows of fp32 x_R [R, K] times its weight [N, K]: [R, N]."""
    rows = zip(x_R.split(groups), weight_E, strict=True)
    return torch.cat([x @ weight.float().t() for x, weight in rows])


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor) -> Tensor:
        return values.view_as(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


def _passed(x: Tensor, values: Tensor) -> Tensor:
    """The values, with gradients as if they were x."""
    return cast(Tensor, _StraightThrough.apply(x, values))


def _unchanged(x: Tensor) -> Tensor:
    return x
