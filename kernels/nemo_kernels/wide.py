"""Weights that are used several times in a pass, whose gradients are summed in fp32.

Each use of a bf16 weight rounds its share of the gradient to bf16, and small shares are lost in the
sum. What stands in for the weight here is fp32, so operations leave its gradient in fp32 and
autograd adds the shares there; its own backward pass rounds their sum once.
"""

from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

_aten = torch.ops.aten


def widened(weight: Tensor) -> Tensor:
    """What stands in for a weight, see above: the weight itself if it is fp32."""
    if weight.dtype.itemsize > 2:
        return weight
    # Vectors take little memory, and kernels read them from it.
    return weight.float() if weight.dim() < 2 else _Widened.apply(weight)


class _Widened(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, weight: Tensor) -> Tensor:
        ctx.dtype = weight.dtype
        return Wide(weight.detach())

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad.to(ctx.dtype)


class Wide(Tensor):
    """The numbers of ``rounded`` in fp32, without memory of its own: cast to their dtype it gives
    them as they are, other operations get a copy in fp32."""

    rounded: Tensor
    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    @staticmethod
    def __new__(cls, rounded: Tensor) -> "Wide":
        wide = Tensor._make_wrapper_subclass(
            cls,
            rounded.shape,
            rounded.stride(),
            dtype=torch.float32,
            device=rounded.device,
            storage_size=0,
        )
        wide.rounded = rounded
        return wide

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs, first = kwargs or {}, args[0]
        if isinstance(first, cls):
            in_place = func._schema.name.endswith("_")
            assert not in_place, f"what {func} would write into a weight's stand-in would be lost"
            if func is _aten.detach.default:
                return cls(first.rounded)
            if func is _aten.empty_like.default:
                return func(first.rounded, **{"dtype": torch.float32, **kwargs})
            if func is _aten._to_copy.default and kwargs.get("dtype") == first.rounded.dtype:
                return first.rounded.detach()
        args, kwargs = tree_map_only(cls, _copy, (args, kwargs))
        return func(*args, **kwargs)


def _copy(wide: Wide) -> Tensor:
    return _aten._to_copy(wide.rounded, dtype=torch.float32)
