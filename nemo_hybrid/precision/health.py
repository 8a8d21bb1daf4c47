"""How healthy low precision is: what NVFP4 loses of its operands, and gradients that are zero.

Looked at are sampled steps (``precision.health_every``). Counts are kept on the device and read
once per sample. Layers form groups by what they are, such as in_proj, experts, mtp.attention.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from nemo_kernels.lowp.operand import Rounding
from nemo_kernels.lowp.reference import scale_operand
from nemo_kernels.lowp.rounding import E2M1_MAX

Shares = dict[str, dict[str, float]]
"""Group, figure: a share between 0 and 1."""

ROLES = ("x", "w", "dy")
"""Operands: activations, weights, gradients of outputs."""
_LIMIT = E2M1_MAX * (1 + 2.0**-20)
"""Of scaled values, with what the factor's own rounding may make of it."""


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
        """Count what quantizing x to NVFP4 as :func:`nemo_kernels.lowp.operands` does it loses.

        x: [M, N], with ``ends_E`` rows of experts; or [E, M, N]. Where x is transformed, the
        transformed values count. Stochastic rounding draws the reference's bits.
        """
        if not x.numel():
            return
        counts_3 = self._counts[self._place[name], 1 + ROLES.index(role)]
        scaled = scale_operand(x, rounding, columnwise, ends_E)
        for part, codes in scaled.rounded(rounding.seed):
            size = scaled.x[part].abs().float()
            there = size > 0
            counts_3 += torch.stack([
                there.sum(),
                (there & (codes * scaled.scale[part] == 0)).sum(),
                (size * scaled.factor[part] > _LIMIT).sum(),
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
