"""How far apart rounding may put two computations of the same thing: CONTRIBUTING.md, Bands."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

T = TypeVar("T")

SAFETY = 8
"""Between what rounding does on one processor and a band, in both of the functions below."""
SABOTAGE = 50
"""Between a band and the least that a deliberate mistake changes."""


def unit(dtype: torch.dtype) -> float:
    """The unit roundoff: rounding to the nearest number of the type changes by no more than this,
    relatively."""
    return torch.finfo(dtype).eps / 2


def band(dtype: torch.dtype, terms: int = 1) -> float:
    """Relative bound, in the norm, of a sum of so many rounded products of random sign: its
    roundings add up like a random walk (Higham and Mary, 2019)."""
    return SAFETY * math.sqrt(terms) * unit(dtype)


def jittered(compute: Callable[[], T], seed: int = 0) -> T:
    """What ``compute`` gives when each of its operations, forward and backward, rounds SAFETY times
    as badly: every element of every result changes by up to that many units, at random.

    How far it lies from the undisturbed result shows how ill-conditioned each number in it is,
    nearly alike on every processor, and is a band of its comparisons.
    """
    with _Jitter(seed):
        return compute()


class _Jitter(TorchDispatchMode):
    """Below autograd, so that it meets what a backward pass does as well."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.generator = torch.Generator().manual_seed(seed)
        self.rounds: dict[OpOverload, bool] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        if func not in self.rounds:
            self.rounds[func] = _rounds(func)
        if self.rounds[func]:
            for x in tree_leaves(out):
                if isinstance(x, Tensor) and x.is_floating_point():
                    self.disturb(x)
        return out

    def disturb(self, x: Tensor) -> None:
        wide = torch.promote_types(x.dtype, torch.float32)
        factor = torch.rand(x.shape, generator=self.generator, dtype=wide)
        reach = SAFETY * unit(x.dtype)
        x.mul_(factor.mul_(2 * reach).add_(1 - reach))


def _rounds(func: OpOverload) -> bool:
    """Whether its results are new numbers, neither a view nor moved ones."""
    schema = func._schema
    viewed = any(r.alias_info and not r.alias_info.is_write for r in schema.returns)
    return not viewed and schema.name.removeprefix("aten::").rstrip("_") not in _EXACT


# Others that only move numbers may be disturbed too: that overstates their error a little.
_EXACT = {"_to_copy", "arange", "cat", "clone", "copy", "embedding", "fill", "full", "gather",
          "index", "index_put", "index_select", "scatter", "stack", "where", "zero"}  # fmt: skip
