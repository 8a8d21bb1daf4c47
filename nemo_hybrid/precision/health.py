"""How healthy low precision is: what NVFP4 loses of its operands, and gradients that are zero.

Looked at are sampled steps (``precision.health_every``). Counts are kept on the device and read
once per sample. Layers form groups by what they are, such as in_proj, experts, mtp.attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from nemo_kernels.nvfp4 import hadamard
from nemo_kernels.nvfp4.operand import Rounding
from nemo_kernels.nvfp4.packing import decode_packed
from nemo_kernels.nvfp4.reference import quantize
from nemo_kernels.nvfp4.rounding import E2M1_MAX
from nemo_kernels.nvfp4.scales import BLOCK

Shares = dict[str, dict[str, float]]
"""Group, figure: a share between 0 and 1."""

ROLES = ("x", "w", "dy")
"""Operands: activations, weights, gradients of outputs."""
_PART = 1 << 22
"""Elements looked at together, whose copies take memory beside the training."""
_ROUNDED = 1 + 2.0**-20
"""What the limit's own rounding may make of it."""


class Probe:
    """Counts for the products ``names`` (modules) of a run on a device; see :meth:`read`.

    ``every``: steps between samples; 0: there are none.
    """

    def __init__(self, names: Iterable[str], every: int, device: torch.device | str) -> None:
        self.active = False
        self._every = every
        groups = {name: group_of(name) for name in names}
        self._groups = list(dict.fromkeys(groups.values()))
        self._place = {name: self._groups.index(group) for name, group in groups.items()}
        # Per group: first the gradients' (elements, zeros), then each role's (non-zero elements,
        # flushed, saturated).
        self._counts = torch.zeros(
            len(self._groups), 1 + len(ROLES), 3, dtype=torch.int64, device=device
        )

    def start_step(self, step: int) -> None:
        """Before step ``step`` (from 1): every ``every``-th is looked at."""
        self.active = self._every > 0 and step % self._every == 0
        self._counts.zero_()

    def operand(
        self,
        name: str,
        role: str,
        x: Tensor,
        rounding: Rounding,
        columnwise: bool,
        ends_E: Tensor | None = None,
    ) -> None:
        """Count what quantizing x to NVFP4 as :func:`nemo_kernels.nvfp4.operands` does it loses.

        x: [M, N], with ``ends_E`` rows of experts; or [E, M, N]. Where x is transformed, the
        transformed values count. Stochastic rounding draws other bits than the product has.
        """
        if not x.numel():
            return
        counts_3 = self._counts[self._place[name], 1 + ROLES.index(role)]
        step = max(1, _PART // x.shape[1:].numel())
        parts = x.detach().split(-(-step // BLOCK) * BLOCK if x.dim() == 2 else step)
        turned = [_transformed(part, rounding, columnwise) for part in parts]
        amax_R = _amax(turned, ends_E)
        for part, z, amax in zip(parts, turned, amax_R.split([len(p) for p in parts]), strict=True):
            if x.dim() == 3:
                amax = amax[:, None, None]
            elif rounding.tile[0] > 1:
                amax = amax[0]
            else:
                amax = amax[::BLOCK][None] if columnwise else amax[:, None]
            q = quantize(part, columnwise=columnwise, amax=amax, **rounding._asdict())
            size = (z.mT if columnwise else z).abs().float().unflatten(-1, (-1, BLOCK))
            scale = q.block_scale.float()
            code = decode_packed(q.data).unflatten(-1, (-1, BLOCK))
            limit = scale * q.tensor_scale * (E2M1_MAX * _ROUNDED)
            there = size > 0
            counts_3 += torch.stack([
                there.sum(),
                (there & (code * scale.unsqueeze(-1) == 0)).sum(),
                (size > limit.unsqueeze(-1)).sum(),
            ])  # fmt: skip

    def read(
        self, gradients: Iterable[tuple[str, Tensor]], sum_ranks: Callable[[Tensor], Tensor]
    ) -> Shares:
        """End the sample, on every rank together, and return the figures over all ranks.

        ``zero_gradients``: exact zeros among the elements of the weights' gradients, whatever the
        format; and for each role of operands in NVFP4 ``ROLE_flushed`` and ``ROLE_saturated``:
        elements that became zero, and elements beyond the largest value of their block, among
        those that were not zero.

        Args:
            gradients: parameter names and elements of this rank's part of the global gradient.
            sum_ranks: sums a tensor over all ranks.
        """
        self.active = False
        for name, part in gradients:
            place = self._place.get(name.rpartition(".")[0])
            if place is not None:
                self._counts[place, 0, 0] += part.numel()
                self._counts[place, 0, 1] += (part == 0).sum()
        result: Shares = {}
        for group, (gradient, *roles) in zip(
            self._groups, sum_ranks(self._counts).tolist(), strict=True
        ):
            found = result[group] = {}
            if gradient[0]:
                found["zero_gradients"] = gradient[1] / gradient[0]
            for role, (elements, flushed, saturated) in zip(ROLES, roles, strict=True):
                if elements:
                    found[f"{role}_flushed"] = flushed / elements
                    found[f"{role}_saturated"] = saturated / elements
        return result


def group_of(name: str) -> str:
    """The group of a product, from its module's name."""
    *above, last = name.split(".")
    if "shared_experts" in above:
        last = "shared_experts"
    elif last in ("q_proj", "k_proj", "v_proj", "o_proj"):
        last = "attention"
    elif last in ("fc1_latent_proj", "fc2_latent_proj"):
        last = "latent_proj"
    return f"mtp.{last}" if name.startswith("mtp.") else last


def _transformed(x: Tensor, rounding: Rounding, columnwise: bool) -> Tensor:
    return hadamard.transform(x, -2 if columnwise else -1) if rounding.rht else x


def _amax(parts: list[Tensor], ends_E: Tensor | None) -> Tensor:
    """The amax that rules each row (or expert's matrix) of the parts, fp32."""
    inner = tuple(range(1, parts[0].dim()))
    own_R = torch.cat([torch.linalg.vector_norm(z, torch.inf, inner) for z in parts]).float()
    if len(inner) == 2:
        return own_R
    if ends_E is None:
        return own_R.amax().expand_as(own_R)
    row_R = torch.arange(len(own_R), dtype=torch.int32, device=own_R.device)
    segment_R = torch.searchsorted(ends_E, row_R, right=True).clamp_max_(len(ends_E) - 1)
    largest_E = own_R.new_zeros(len(ends_E)).scatter_reduce_(0, segment_R, own_R, "amax")
    return largest_E[segment_R]
