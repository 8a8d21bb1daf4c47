"""What quantization does to a model, without writing anything: weights have the values that an
export stores, and inputs of products are rounded as engines round them.

Shapes: K in-features; R routed slots sorted by expert, E experts, L width in which experts work, F
expert inner width.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from nemo_hybrid.checkpoint.names import is_stacked
from nemo_hybrid.export.assign import Format, groups
from nemo_hybrid.export.quantize import Search, decoded, weight_tensors
from nemo_hybrid.model.hybrid import HybridLM
from nemo_kernels.moe.reference import LoopExperts
from nemo_kernels.nvfp4.reference import fake_quantize

E4M3_MAX = 448.0
WITH_INPUTS = ("fp8", "nvfp4")
"""Formats whose products take rounded inputs as well."""


@contextmanager
def simulated(
    model: HybridLM,
    assignment: Mapping[str, Format],
    search: Search = "amax",
    input_amax: Mapping[str, Tensor] | None = None,
) -> Iterator[None]:
    """Inside, the model computes with quantized weights, and with ``input_amax`` (that of a
    `Calibration`) with quantized inputs too. Afterwards it is what it was."""
    with quantized_weights(model, assignment, search), ExitStack() as stack:
        if input_amax is not None:
            stack.enter_context(quantized_inputs(model, assignment, input_amax))
        yield


@contextmanager
def quantized_weights(
    model: HybridLM, assignment: Mapping[str, Format], search: Search = "amax"
) -> Iterator[None]:
    """Inside, weights have the values that the export would store, rounded to their dtype. The
    memory that it takes is that of the quantized places' weights. Raises as `weight_tensors`."""
    kept: dict[str, Tensor] = {}
    try:
        for group in groups(assignment):
            weights = {place: weight_of(model, place).data for place in group}
            shared = None if is_stacked(group[0]) else _amax(*weights.values())
            for place, weight in weights.items():
                kept[place] = weight
                values = stored_values(weight, assignment[place], search, shared)
                weight_of(model, place).data = values
        yield
    finally:
        for place, weight in kept.items():
            weight_of(model, place).data = weight


@contextmanager
def quantized_inputs(
    model: HybridLM, assignment: Mapping[str, Format], amax: Mapping[str, Tensor]
) -> Iterator[None]:
    """Inside, inputs of products in nvfp4 and fp8 are rounded as `rounded_input` does; ``amax`` as
    in `Calibration`. Without gradients."""
    device = model.lm_head.weight.device
    rounders = {
        # One scale for all experts, as engines have it.
        place: partial(rounded_input, format=format, amax=amax[place].max().to(device))
        for place, format in assignment.items()
        if format in WITH_INPUTS
    }
    with ExitStack() as stack:
        for place, rounder in rounders.items():
            if not is_stacked(place):
                module = model.get_submodule(place)
                handle = module.register_forward_pre_hook(partial(_round_first, rounder))
                stack.callback(handle.remove)
        for name in sorted({p.rpartition(".")[0] for p in rounders if is_stacked(p)}):
            experts: Any = model.get_submodule(name)
            stack.callback(setattr, experts, "low_precision", experts.low_precision)
            experts.low_precision = RoundedInputs(
                rounders.get(f"{name}.up_proj"), rounders.get(f"{name}.down_proj")
            )
        yield


def weight_of(model: HybridLM, place: str) -> nn.Parameter:
    """The weight of a place, [out, in] or stacked [E, out, in]."""
    return model.get_parameter(place if is_stacked(place) else f"{place}.weight")


def stored_values(
    weight: Tensor, format: Format, search: Search = "amax", amax: Tensor | None = None
) -> Tensor:
    """What an export of a weight [.., out, in] stores, decoded and rounded to the weight's dtype:
    the values that engines multiply with. ``amax``: see `weight_tensors`."""
    if weight.dim() > 2:
        return torch.stack([stored_values(matrix, format, search, amax) for matrix in weight])
    if format == "bf16":
        return weight.to(torch.bfloat16).to(weight.dtype)
    stored = weight_tensors(weight, format, amax=amax, search=search)
    return decoded(stored).to(weight.dtype)


def rounded_input(x: Tensor, format: Format, amax: Tensor) -> Tensor:
    """x [.., K] with the values that an engine multiplies, in x's dtype.

    fp8: the static scale amax/448. nvfp4: the static tensor scale amax/2688, and scales of blocks
    of 16 found anew for every row. What exceeds amax saturates. K of nvfp4 is divisible by 16.
    """
    if format == "fp8":
        scale = amax / E4M3_MAX
        codes = (x.float() / scale).clamp(-E4M3_MAX, E4M3_MAX).to(torch.float8_e4m3fn)
        return (codes.float() * scale).to(x.dtype)
    values, tensor_scale = fake_quantize(x, amax=amax)
    return (values.float() * tensor_scale).to(x.dtype)


class RoundedInputs(LoopExperts):
    """The expert MLP on inputs that are rounded; None: they are not.

    Engines multiply by the routing weight behind the down projection, so the squared ReLU is
    rounded without it.
    """

    def __init__(
        self, up: Callable[[Tensor], Tensor] | None, down: Callable[[Tensor], Tensor] | None
    ) -> None:
        self.up, self.down = up or _unchanged, down or _unchanged

    def forward(
        self,
        x_RL: Tensor,
        weights_R: Tensor,
        groups: list[int],
        w_up_EFL: Tensor,
        w_down_ELF: Tensor,
    ) -> tuple[Tensor, Tensor]:
        h_RF = self.pre_activation(x_RL, groups, w_up_EFL)
        act_RF = self.down(h_RF.float().relu().square_()) * weights_R[:, None]
        rows = zip(act_RF.split(groups), w_down_ELF, strict=True)
        return torch.cat([act @ down.to(act.dtype).t() for act, down in rows]), h_RF

    def pre_activation(self, x_RL: Tensor, groups: list[int], w_up_EFL: Tensor) -> Tensor:
        return super().pre_activation(self.up(x_RL), groups, w_up_EFL)


def _unchanged(x: Tensor) -> Tensor:
    return x


def _round_first(
    rounder: Callable[[Tensor], Tensor], module: nn.Module, args: tuple[Tensor, ...]
) -> tuple[Tensor, ...]:
    return (rounder(args[0]), *args[1:])


def _amax(*weights: Tensor) -> Tensor:
    return torch.stack([weight.abs().amax().float() for weight in weights]).amax()
