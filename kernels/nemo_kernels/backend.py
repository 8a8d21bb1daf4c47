"""Which implementation each op takes, and why.

An op is a folder of this package. Its ``reference`` module is the specification and runs on every
device. Other implementations are declared by the folder as ``PATHS = {name: module}``, best first,
for example ``PATHS = {"mamba_ssm": "nemo_kernels.ssd.external"}``. Such a module

* imports its library at its top (so importing the module is the probe),
* has the functions of ``reference`` under the same names with the same signatures,
* says in ``DEVICE_TYPES`` on which tensors it runs (``("cuda",)``), and
* has ``self_check(device_type, sizes) -> float``: the largest deviation of its outputs and
  gradients from the reference at the `Sizes` of the model, relative to the reference's largest.

A path that does not take everything has ``refusal(*what) -> str`` as well, with arguments that the
op's folder chooses: why it does not take a call, or nothing.

``auto`` takes the first path that runs on the tensor's device, imports, and passes its self-check;
otherwise, and for shapes that this path does not take, the reference. Probe and self-check happen
at the first use and once per process.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib import import_module
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

_FOLDERS = {
    **{op: op for op in ("ssd", "conv1d", "attention", "moe", "loss", "norm")},
    "nvfp4": "lowp",
}
OPS = tuple(_FOLDERS)
TOLERANCE = 2e-2
"""Largest accepted deviation in a self-check; those run in bf16, whose rounding is 4e-3."""


class Path(NamedTuple):
    """The implementation an op takes and the reason for it."""

    name: str
    reason: str


class Sizes(NamedTuple):
    """At which self-checks run, since compilers have made mistakes at some sizes and not at others;
    Nano's. Tokens are many enough for loops over them to have eight steps."""

    heads: int = 64
    head_dim: int = 64
    groups: int = 8
    state: int = 128
    chunk: int = 128
    query_heads: int = 32
    key_heads: int = 2
    attention_dim: int = 128
    expert_width: int = 2688
    expert_inner: int = 1856
    vocabulary: int = 131072
    tokens: int = 1100


_choices: dict[str, str] = {}
_sizes = Sizes()


def choose(**choices: str) -> None:
    """Set the path of ops for this process: ``choose(ssd="reference", attention="auto")``.

    Raises ValueError for an unknown op, a name the op does not have, or a library that is missing;
    then no choice has changed.
    """
    for op, name in choices.items():
        names = ("auto", "reference", *_declared(op))
        if name not in names:
            raise ValueError(f"op {op} has no path {name!r}; choose one of {', '.join(names)}")
        if name not in ("auto", "reference"):
            problem = _probe(_declared(op)[name])
            if problem:
                raise ValueError(f"path {name} of op {op} cannot be used: {problem}")
    _choices.update(choices)
    _resolve.cache_clear()


def check_at(sizes: Sizes) -> None:
    """Let self-checks of this process, from the next one on, run at these sizes."""
    global _sizes
    _sizes = sizes


@contextmanager
def choosing(**choices: str) -> Iterator[None]:
    """`choose` for as long as this lasts."""
    before = dict(_choices)
    choose(**choices)
    try:
        yield
    finally:
        _choices.clear()
        _choices.update(before)
        _resolve.cache_clear()


def path(op: str, device_type: str) -> Path:
    """The path of op on tensors of a device type ("cpu", "cuda").

    Raises ValueError for an unknown op, or when a forced path does not run on that device.
    """
    return _resolve(op, device_type)[0]


def implementation(op: str, device_type: str, *what: Any) -> ModuleType:
    """The module that implements op on tensors of a device type; see :func:`path`. ``what`` decides
    whether the path takes this call: if not, ``auto`` leaves it to the reference, and a path that
    was chosen raises ValueError."""
    (name, _), module = _resolve(op, device_type)
    why = module.refusal(*what) if what and hasattr(module, "refusal") else ""
    if why and _choices.get(op, "auto") != "auto":
        raise ValueError(f"path {name} of op {op}: {why}; choose auto or reference")
    return _reference(op) if why else module


def importable(op: str, names: Collection[str]) -> list[str]:
    """Of the paths of op that have these names those whose modules import here, best first. Raises
    ValueError: no such op."""
    declared = _declared(op).items()
    return [name for name, module in declared if name in names and not _probe(module)]


def paths(op: str) -> list[str]:
    """Names of op's paths, best first, but for the reference. Raises ValueError: no such op."""
    return list(_declared(op))


def report(device_type: str, ops: Sequence[str] = OPS) -> list[tuple[str, str, str]]:
    """(op, path name, reason) of these ops on tensors of a device type."""
    return [(op, *path(op, device_type)) for op in ops]


def draw(device_type: str, *shapes: tuple[int, ...]) -> list[Tensor]:
    """Normal numbers in bf16 for self-checks, the same on every call."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(s, generator=generator).to(device_type, torch.bfloat16) for s in shapes]


def relative_deviation(
    run: Callable[..., Tensor], implementations: tuple[Any, Any], inputs: Sequence[Tensor]
) -> float:
    """For self-checks: how far ``run(implementation, *inputs)`` and its gradients with respect to
    the inputs differ between two implementations. The largest ratio, over output and gradients, of
    the largest difference to the largest value of the second implementation.
    """
    results = []
    for implementation in implementations:
        leaves = [t.detach().clone().requires_grad_() for t in inputs]
        with torch.enable_grad():
            output = run(implementation, *leaves)
            # Its gradient differs from token to token, unlike that of a plain sum.
            loss = (
                output.float()
                * torch.linspace(-1, 1, output.numel()).to(output.device).view(output.shape)
            ).sum()
            results.append([output, *torch.autograd.grad(loss, leaves)])
    ratios = [(a - b).abs().max() / b.abs().max() for a, b in zip(*results, strict=True)]
    return float(torch.stack([r.detach().float() for r in ratios]).max())


@cache
def _resolve(op: str, device_type: str) -> tuple[Path, ModuleType]:
    declared = _declared(op)
    choice = _choices.get(op, "auto")
    if choice == "reference":
        return Path(choice, "chosen"), _reference(op)
    if choice != "auto":
        module = import_module(declared[choice])
        # Tensors without data can ask any path what it would do.
        if device_type not in (*module.DEVICE_TYPES, "meta"):
            names = ["auto", "reference", *(name for name in declared if name != choice)]
            raise ValueError(
                f"path {choice} of op {op} does not run on {device_type} tensors, only on "
                f"{', '.join(module.DEVICE_TYPES)}; choose {', '.join(names[:-1])} or {names[-1]}"
            )
        return Path(choice, "chosen"), module
    # Without a GPU nothing is probed: a library's import can take seconds.
    if device_type == "cpu":
        return Path("reference", "CPU tensors"), _reference(op)
    reasons = []
    for name, module_name in declared.items():
        problem = _probe(module_name) or _check(module_name, device_type)
        if not problem:
            return Path(name, "imports and agrees with the reference"), import_module(module_name)
        reasons.append(f"{name}: {problem}")
    reason = "; ".join(reasons) or "the only path"
    return Path("reference", reason), _reference(op)


def _declared(op: str) -> dict[str, str]:
    if op not in OPS:
        raise ValueError(f"there is no op {op!r}; ops are {', '.join(OPS)}")
    return dict(import_module(f"nemo_kernels.{_FOLDERS[op]}").PATHS)


def _reference(op: str) -> ModuleType:
    return import_module(f"nemo_kernels.{_FOLDERS[op]}.reference")


@cache
def _probe(module_name: str) -> str:
    """Why a path's module does not import; empty if it does."""
    try:
        import_module(module_name)
    except Exception as error:  # a library with other dependencies than ours raises what it likes
        return f"{type(error).__name__}: {error}"
    return ""


@cache
def _check(module_name: str, device_type: str) -> str:
    """Why a path is not used on a device type; empty if it passes its self-check."""
    module = import_module(module_name)
    if device_type not in module.DEVICE_TYPES:
        return f"does not run on {device_type} tensors"
    try:
        deviation = _in_fresh_thread(lambda: float(module.self_check(device_type, _sizes)))
    except Exception as error:  # also a compiler's, which have no type in common
        return f"failed its self-check: {type(error).__name__}: {error}"
    if not deviation <= TOLERANCE:  # also true for NaN
        return f"deviates from the reference by {deviation:.2g} (limit {TOLERANCE})"
    return ""


def _in_fresh_thread(action: Callable[[], float]) -> float:
    """The result of action in a thread, where whatever the caller has set does not hold: inference
    mode, autocast, hooks of a checkpoint."""
    device = torch.cuda.current_device() if torch.cuda.is_available() else None

    def run() -> float:
        with nullcontext() if device is None else torch.cuda.device(device):
            return action()

    with ThreadPoolExecutor(1) as pool:
        return pool.submit(run).result()
