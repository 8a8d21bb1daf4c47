"""What a GPU would do for a computation, counted on tensors without data.

Real modules run on the device "meta". A `Meter` sees every operation below autograd, forward and
backward, as well as launches of our own kernels, and notes of each: launches, bytes moved, FLOP of
its matrix product; what is alive and kept for the backward pass; and where the host waits. Each
operation belongs to a scope, those of the backward pass to that of their forward one.

Counting rules. An operation reads its inputs and writes its outputs once; what is expanded counts
once; a gather reads as much as it gives; views and allocations cost nothing. Caches do not exist.
Its time is the longest of three: of its launches, its bytes, its FLOP.
"""

from __future__ import annotations

import weakref
from bisect import bisect_right
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from math import prod
from typing import Any, NamedTuple

import torch
from torch import Tensor, library, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from nemo_hybrid.chips import LAUNCH_S, Rates
from nemo_kernels.launch import Launch, noted
from nemo_kernels.wide import Wide

_PRODUCTS = {
    "mm": ("self", "mat2"),
    "addmm": ("mat1", "mat2"),
    "bmm": ("self", "mat2"),
    "baddbmm": ("batch1", "batch2"),
    "_grouped_mm": ("self", "mat2"),
}
"""Matrix products, and what torch calls their operands."""
_ATTENTION = {
    f"{name}{direction}"
    for name in ("_scaled_dot_product_flash_attention", "_scaled_dot_product_cudnn_attention",
                 "_scaled_dot_product_efficient_attention", "_varlen_attn")
    for direction in ("", "_backward")
}  # fmt: skip
_ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
_GATHERS = {"index_select", "gather", "index", "embedding"}
_SCATTERS = {"scatter_add", "scatter", "index_add", "index_put", "_index_put_impl", "index_copy"}
_OVERWRITES = {"copy_", "fill_", "zero_", "normal_", "uniform_"}
_LAUNCHES = {
    "nonzero": 3, "sort": 4, "topk": 2, "embedding_dense_backward": 6,
    "_fused_rms_norm_backward": 2,
}  # fmt: skip
"""Of operations that are several kernels on a GPU (read off torch's sources, about)."""
_LAUNCHES |= {name: 3 for name in _ATTENTION if name.endswith("backward")}
_BACKWARD = 2.5
"""Times an attention's forward FLOP: five products, of which one is done again, instead of two."""
_LEAF = 2**64 - 1  # the number of nodes that add to a parameter's gradient


class Work(NamedTuple):
    """One operation."""

    name: str
    launches: int
    bytes: int
    flop: int = 0
    """Of its matrix product."""
    dtype: str = ""
    """Of that product's operands."""
    unit: str = ""
    """Which kind of product it is, see ``chips.REACHED``."""

    def seconds(self, at: Rates) -> float:
        multiplying = self.flop / at.flop_per_s[self.unit] if self.flop else 0.0
        return max(self.launches * LAUNCH_S, self.bytes / at.bytes_per_s, multiplying)


class Scope(NamedTuple):
    """Where an operation belongs."""

    part: str
    """Such as the kind of layer."""
    op: str


class Meter(TorchDispatchMode):
    """Counts what happens within ``with Meter() as meter``, see above. ``op``: the scope of what
    happens outside of all others, and of adding to parameters' gradients."""

    def __init__(self, op: str = "") -> None:
        super().__init__()
        self.works: Counter[tuple[Work, Scope]] = Counter()
        self.kept: Counter[Scope] = Counter()
        """Bytes that are kept for the backward pass."""
        self.waits: Counter[str] = Counter()
        """Times that the host waits for the device, by what for."""
        self.live = self.peak = 0
        """Bytes that are alive, and the most that ever were."""
        self._scopes = [Scope("", op)]
        self._marks = [(-1, self._scopes[0])]  # number of the next autograd node, its scope
        self._alive: dict[int, weakref.ref[Any]] = {}
        self._known: set[int] = set()  # storages that are kept, or not by a backward pass
        self._parts: dict[int, str] = {}  # of parameters, by their identity
        self._stack = ExitStack()

    def __enter__(self) -> Meter:
        super().__enter__()
        self._stack.enter_context(_TensorsOfNumbers(self))
        # Not by the mode for functions, under which a recomputing backward pass does not run.
        aten = self._stack.enter_context(library._scoped_library("aten", "IMPL"))
        aten.impl("scaled_dot_product_attention", _attention, "AutogradMeta")
        aten.impl("rms_norm", _norm, "AutogradMeta")
        self._stack.enter_context(noted(self._launched))
        hooks = torch.autograd.graph.saved_tensors_hooks(self._keep, lambda tensor: tensor)
        self._stack.enter_context(hooks)
        return self

    def __exit__(self, *error: Any) -> None:
        self._stack.close()
        super().__exit__(*error)

    # Scopes ---------------------------------------------------------------------------------

    @contextmanager
    def scope(self, part: str | None = None, op: str | None = None) -> Iterator[None]:
        """What is done inside belongs there; None: as around it."""
        self._open(part, op)
        try:
            yield
        finally:
            self._close()

    @contextmanager
    def following(
        self, module: nn.Module, name: Callable[[nn.Module], tuple[str | None, str | None] | None]
    ) -> Iterator[None]:
        """What the modules of a module do belongs to the scopes (part, op) that ``name`` gives
        them; None: to that of the module around it."""
        with ExitStack() as stack:
            for inner in module.modules():
                found = name(inner)
                if found is not None:
                    before = inner.register_forward_pre_hook(partial(self._enter, found))
                    after = inner.register_forward_hook(lambda *_: self._close(), always_call=True)
                    stack.callback(before.remove)
                    stack.callback(after.remove)
            yield

    def _enter(self, at: tuple[str | None, str | None], *_: Any) -> None:
        self._open(*at)

    def _open(self, part: str | None, op: str | None) -> None:
        around = self._here()
        here = Scope(around.part if part is None else part, around.op if op is None else op)
        self._scopes.append(here)
        self._mark()

    def _close(self) -> None:
        self._scopes.pop()
        self._mark()

    def _mark(self) -> None:
        self._marks.append((torch._C._autograd._get_sequence_nr(), self._scopes[-1]))

    def _here(self) -> Scope:
        """Within a module's forward pass its own; else that under which the node was made that
        runs. Nodes are numbered as they are made, but for those that add to gradients."""
        node: Any = torch._C._current_autograd_node()
        if node is None or len(self._scopes) > 1:
            return self._scopes[-1]
        if node._sequence_nr() == _LEAF:
            return Scope(self._parts.get(id(node.variable), ""), self._scopes[0].op)
        after = bisect_right(self._marks, node._sequence_nr(), key=lambda mark: mark[0])
        return self._marks[after - 1][1]

    # Counting -------------------------------------------------------------------------------

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if Wide in types:  # what it does is seen when it does that
            return NotImplemented
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        waited = self._waits_for(name, given, kwargs)
        if waited is not None:
            return waited
        # Without data torch takes no other dtype than bf16.
        result = _grouped(*args) if name == "_grouped_mm" else func(*args, **kwargs)
        held = {t.untyped_storage()._cdata for t in given}
        made = [t for t in tree_leaves(result) if isinstance(t, Tensor)]
        made = [t for t in made if t.untyped_storage()._cdata not in held]
        if all(t.is_cpu for t in (*given, *made)):
            return result
        self.hold(made)
        if not (made or func._schema.is_mutable) or name in _ALLOCATIONS:
            return result
        named = dict(zip((a.name for a in func._schema.arguments), args, strict=False)) | kwargs
        launches = _LAUNCHES.get(name, 1)
        work = Work(name, launches, _traffic(func, name, named, made), *_product(name, named))
        self.works[work, self._here()] += 1
        return result

    def _waits_for(self, name: str, given: list[Tensor], kwargs: Any) -> Any:
        """What an operation gives that waits for the device: zeros, which tell nothing; all places
        of what is not zero; None for other operations."""
        x, to = given[0] if given else None, kwargs.get("device")
        if x is None:
            return None
        if name == "copy_" and x.is_cpu != given[1].is_cpu:
            self.waits["values read" if x.is_cpu else "copy to the device"] += 1
            return x
        if x.is_cpu and to is None:
            return None
        if name == "_local_scalar_dense":
            self.waits["value read"] += 1
            return 0.0 if x.dtype.is_floating_point else 0
        if name == "nonzero":
            self.waits["nonzero"] += 1
            return torch.empty(x.numel(), x.dim(), dtype=torch.int64, device=x.device)
        if name == "_to_copy" and to is not None and to != x.device:
            if to.type == "cpu":
                self.waits["values read"] += 1
                return torch.zeros_like(x, device="cpu")
            # Also where it is asked not to wait: only from pinned memory it does not have to.
            self.waits["copy to the device"] += not x.is_pinned()
        return None

    def _launched(self, launch: Launch) -> None:
        product = (0, "", "")
        if launch.flop:
            wide = launch.dtype == torch.float32
            product = launch.flop, _name(launch.dtype), "fp32" if wide else "grouped"
        work = Work(str(launch.kernel.__name__), 1, launch.moved, *product)
        self.works[work, self._here()] += 1

    # Memory ---------------------------------------------------------------------------------

    def hold(self, tensors: Iterable[Tensor]) -> None:
        """Count tensors as alive, for as long as they are."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            key, size = storage._cdata, storage.nbytes()
            if key not in self._alive and tensor.device.type != "cpu":
                self._alive[key] = weakref.ref(storage, partial(self._free, key, size))
                self.live += size
        self.peak = max(self.peak, self.live)

    def owned(self, part: str, tensors: Iterable[Tensor]) -> None:
        """Count tensors as alive, and as not kept by the backward pass: a part's own, to which
        belongs what adds to their gradients."""
        tensors = list(tensors)
        self.hold(tensors)
        self._known |= {t.untyped_storage()._cdata for t in tensors}
        self._parts |= {id(t): part for t in tensors}

    def _free(self, key: int, size: int, _: Any) -> None:
        self.live -= size
        del self._alive[key]
        self._known.discard(key)

    def _keep(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        again = torch._C._current_autograd_node() is not None  # in a backward pass
        if storage._cdata not in self._known and not again:
            self._known.add(storage._cdata)
            self.kept[self._scopes[-1]] += storage.nbytes()
        return tensor


class _TensorsOfNumbers(TorchFunctionMode):
    """Notices tensors that are made of numbers on the host, which no operation tells."""

    def __init__(self, meter: Meter) -> None:
        super().__init__()
        self.meter = meter

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is torch.tensor and torch.device(kwargs.get("device") or "cpu").type != "cpu":
            self.meter.waits["copy to the device"] += 1
        return func(*args, **kwargs)


def _attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None, dropout: float = 0.0,
    causal: bool = False, *, scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """Of tensors without data what torch chooses on a Hopper GPU: flash without a mask, with one
    cuDNN, to which it is added; in fp32 without mask and groups of heads a kernel that keeps no
    probabilities either; plain products where none of them takes it."""
    aten = torch.ops.aten
    if q.dtype.itemsize == 2 and mask is None:
        flash = aten._scaled_dot_product_flash_attention
        return flash(q, k, v, dropout, causal, scale=scale)[0]
    if q.dtype.itemsize == 2 and not torch.are_deterministic_algorithms_enabled():
        assert mask is not None
        bias = torch.zeros_like(mask, dtype=q.dtype).masked_fill_(mask.logical_not(), -torch.inf)
        cudnn = aten._scaled_dot_product_cudnn_attention
        return cudnn(q, k, v, bias, True, dropout, causal, scale=scale)[0]
    if mask is None and q.shape[-3] == k.shape[-3]:
        efficient = aten._scaled_dot_product_efficient_attention
        return efficient(q, k, v, None, True, dropout, causal, scale=scale)[0]
    plain = aten._scaled_dot_product_attention_math
    given = (mask, dropout, causal, None)
    return plain(q, k, v, *given, scale=scale, enable_gqa=enable_gqa)[0]


class _Norm(torch.autograd.Function):
    """A GPU's own kernels for rms_norm. Layer norm's, which makes a number more per row, stands for
    the forward one, of which there is no form without data."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        y, _, r = torch.ops.aten.native_layer_norm(x, weight.shape, weight, None, eps)
        ctx.save_for_backward(x, weight, r)
        return y

    @staticmethod
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, Tensor, None]:
        x, weight, r = ctx.saved_tensors
        wanted = (dy, x, weight.shape, r, weight, [True, True])
        dx, dweight = torch.ops.aten._fused_rms_norm_backward(*wanted)
        return dx, dweight, None


def _norm(x: Tensor, shape: list[int], weight: Tensor, eps: float) -> Tensor:
    y: Tensor = _Norm.apply(x, weight, eps)
    return y


def _grouped(a: Tensor, b: Tensor, ends_E: Tensor, *_: Any) -> Tensor:
    """An empty result of ``grouped_mm``: of rows and experts' matrices, or of columns by expert."""
    outer = a.shape[:1] if b.dim() == 3 else (len(ends_E), a.shape[0])
    return a.new_empty(*outer, b.shape[-1])


def _size(tensor: Tensor) -> int:
    """Bytes of its distinct elements."""
    sizes = zip(tensor.shape, tensor.stride(), strict=True)
    return prod(n if stride or not n else 1 for n, stride in sizes) * tensor.itemsize


def _traffic(func: Any, name: str, named: dict[str, Any], made: list[Tensor]) -> int:
    """Bytes that an operation reads and writes; ``named``: its arguments, ``made``: results in
    memory of their own."""
    total = results = sum(map(_size, made))
    kind = name.rstrip("_")
    for i, argument in enumerate(func._schema.arguments):
        tensors = [t for t in tree_leaves(named.get(argument.name)) if isinstance(t, Tensor)]
        size = sum(map(_size, tensors))
        written = argument.alias_info is not None and argument.alias_info.is_write
        read = not (argument.is_out or name in _OVERWRITES)
        if i == 0 and kind in _GATHERS:
            size = min(size, results)
        elif i == 0 and kind in _SCATTERS and written:
            coming = next(named[n] for n in ("src", "source", "values", "index") if n in named)
            size = min(size, coming.numel() * tensors[0].itemsize)
            read = "add" in name or bool(named.get("accumulate"))
        total += size * (1 + read) if written else size
    return total


def _product(name: str, named: dict[str, Any]) -> tuple[int, str, str]:
    """FLOP, operands' dtype and kind of an operation's matrix product."""
    if name in _ATTENTION:
        q, k = named["query"], named["key"]
        seen = named["max_k"] if "_varlen" in name else k.shape[-2]
        causal = named.get("is_causal") or tuple(named.get("window_size") or ()) == (-1, 0)
        forward = 4 * q.numel() * seen // (2 if causal else 1)
        flop = int(_BACKWARD * forward) if "backward" in name else forward
        return flop, _name(q.dtype), "attention" if q.dtype.itemsize == 2 else "fp32 batched"
    if name.rstrip("_") not in _PRODUCTS:
        return 0, "", ""
    a, b = (named[operand] for operand in _PRODUCTS[name.rstrip("_")])
    if 1 in (a.shape[-2], b.shape[-1]):  # with a vector: a pass over the matrix
        return 0, "", ""
    if a.dtype.itemsize == 2:
        unit = "grouped" if name == "_grouped_mm" else "library"
    else:
        unit = "fp32" if a.dim() == 2 else "fp32 batched"
    return 2 * a.numel() * b.shape[-1], _name(a.dtype), unit


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
