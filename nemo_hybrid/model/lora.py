"""Low-rank adapters (LoRA, arXiv 2106.09685) in our models: where they go, how they begin, and how
they end in the weights.

A linear layer ``mixer.in_proj`` gets the parameters ``mixer.in_proj.lora.A`` and ``.B``, a stacked
weight ``mixer.experts.up_proj`` a matrix of each per expert: ``mixer.experts.up_proj_lora.A``.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Iterator
from fnmatch import fnmatchcase
from typing import NamedTuple

import torch
from torch import Tensor, nn

from nemo_hybrid.config.finetune import LoraOptions
from nemo_hybrid.errors import UserError
from nemo_hybrid.model.init import generator_of
from nemo_hybrid.model.latent_moe import Experts
from nemo_hybrid.model.linear import Adapter, Linear

_STACKS = ("up_proj", "down_proj")


class Adapted(NamedTuple):
    """A weight with an adapter: the linear module's name or the stacked parameter's, the shape of
    the whole weight (of all experts, on whatever rank), and the adapter's parameters."""

    name: str
    shape: tuple[int, ...]
    parameters: int


HEADER = ("adapters", "modules", "weight", "trainable parameters")


def add_adapters(model: nn.Module, options: LoraOptions, seed: int) -> list[Adapted]:
    """Freeze the model and add adapters that compute zero, in the dtype and on the device of their
    weights: A drawn as PEFT does, uniform in +-1/sqrt(D_in), from (seed, name, expert) alone; B 0.

    Returns the adapted weights, in the model's order. Raises UserError, before the model is
    changed, for a pattern that matches nothing or what can have no adapter.
    """
    if options.rank < 1:
        raise UserError("lora.rank must be at least 1")
    if any(True for _ in adapters(model)):
        raise UserError("the model has adapters already; merge them first")
    modules = dict(model.named_modules())
    linears, stacks = adaptable(model)
    if options.target_modules is None:
        # PEFT refuses out_proj: where fused kernels take the weight itself, its adapter is lost.
        chosen = {n for n in linears if not _in_mtp(n) and not n.endswith(".out_proj")}
    else:
        chosen = _matched(options.target_modules, list(linears), "target_modules", model)
    chosen |= _matched(options.target_parameters, list(stacks), "target_parameters", model)
    if not chosen:
        raise UserError("lora.target_modules and lora.target_parameters are empty: name a weight")

    model.requires_grad_(False)
    adapted = []
    # In the order in which the parameters stand in the model.
    for name in (n for n in map(_owner, dict(model.named_parameters())) if n in chosen):
        if name in linears:
            adapter = modules[name].lora = Adapter(linears[name], options.rank, options.scale)
            at, owned, total = f"{name}.lora", range(1), 1
        else:
            adapter = Adapter(stacks[name], options.rank, options.scale)
            parent, _, leaf = name.rpartition(".")
            setattr(modules[parent], f"{leaf}_lora", adapter)
            at, owned, total = f"{name}_lora", modules[parent].owned, modules[parent].total
        _draw(adapter.A, f"{at}.A", owned, seed)
        adapted.append(adapted_of(name, adapter.A, adapter.B, total))
    return adapted


def adaptable(model: nn.Module) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Weights that can have an adapter: of linear layers, by the layers' names, and stacks."""
    linears: dict[str, Tensor] = {}
    stacks: dict[str, Tensor] = {}
    for name, module in model.named_modules():
        if isinstance(module, Linear):
            linears[name] = module.weight
        elif isinstance(module, Experts):
            stacks |= {f"{name}.{leaf}": getattr(module, leaf) for leaf in _STACKS}
    return linears, stacks


def adapters(model: nn.Module) -> Iterator[tuple[str, Adapter]]:
    """All adapters with their names, such as ``backbone.layers.0.mixer.in_proj.lora``."""
    return ((n, module) for n, module in model.named_modules() if isinstance(module, Adapter))


def adapted_of(name: str, A: Tensor, B: Tensor, n_experts: int) -> Adapted:
    """What stands in the table for an adapter, of which a rank may hold some experts only."""
    stack = (n_experts,) if A.dim() == 3 else ()
    matrices = n_experts if stack else 1
    parameters = matrices * A.shape[-2] * (A.shape[-1] + B.shape[-2])
    return Adapted(name, (*stack, B.shape[-2], A.shape[-1]), parameters)


@torch.no_grad()
def merge_adapters(model: nn.Module) -> None:
    """Add every adapter to its weight, summed in fp32 and rounded once, and take it away; all
    parameters can be trained again."""
    for module in model.modules():
        if isinstance(module, Linear) and module.lora is not None:
            module.weight.copy_(module.lora.added_to(module.weight))
            module.lora = None
        elif isinstance(module, Experts):
            for leaf in _STACKS:
                weight, adapter = getattr(module, leaf), getattr(module, f"{leaf}_lora")
                if adapter is not None:
                    weight.copy_(adapter.added_to(weight))
                    setattr(module, f"{leaf}_lora", None)
    model.requires_grad_(True)


def table(adapted: Iterable[Adapted], total: int | None = None) -> list[tuple[str, ...]]:
    """Rows below HEADER, one for the same weight of all layers, and the sum; its share of the
    ``total`` parameters of the whole model (see `parameter_count`), if given."""
    groups: dict[tuple[str, tuple[int, ...]], list[int]] = {}
    for one in adapted:
        glob = re.sub(r"\.\d+\.", ".*.", one.name)
        groups.setdefault((glob, one.shape), []).append(one.parameters)
    rows = [
        (glob, str(len(counts)), "x".join(map(str, shape)), f"{sum(counts):,}")
        for (glob, shape), counts in groups.items()
    ]
    trained = sum(map(sum, groups.values()))
    share = f" ({trained / total:.2%} of {total:,})" if total else ""
    return [*rows, ("all", str(sum(map(len, groups.values()))), "", f"{trained:,}{share}")]


def parameter_count(model: nn.Module, trained: bool = False) -> int:
    """Parameters of the whole model, adapters included, whichever experts this rank owns; of those
    that are ``trained`` alone."""
    ranks = {
        parameter: module.total // len(module.owned)
        for module in model.modules()
        if isinstance(module, Experts)
        for parameter in module.parameters()
    }
    counted = (p for p in model.parameters() if p.requires_grad or not trained)
    return sum(p.numel() * ranks.get(p, 1) for p in counted)


def _owner(parameter: str) -> str:
    return parameter.removesuffix(".weight")


def _draw(A: Tensor, name: str, owned_experts: range, seed: int) -> None:
    """On the CPU in fp32, so that dtype and device do not change the stream."""
    bound = A.shape[-1] ** -0.5
    for expert, matrix in zip(owned_experts, A if A.dim() == 3 else (A,), strict=True):
        draw = torch.empty(matrix.shape, dtype=torch.float32)
        draw.uniform_(-bound, bound, generator=generator_of(seed, name, expert))
        matrix.data.copy_(draw)


def _in_mtp(name: str) -> bool:
    return name.startswith("mtp.")


def _matches(name: str, pattern: str) -> bool:
    return name == pattern or name.endswith(f".{pattern}") or fnmatchcase(name, pattern)


def _matched(patterns: list[str], names: list[str], option: str, model: nn.Module) -> set[str]:
    """The names that a pattern matches. Raises UserError for a pattern that matches none."""
    chosen: set[str] = set()
    for pattern in patterns:
        found = {name for name in names if _matches(name, pattern)}
        allowed = {name for name in found if "mtp" in pattern or not _in_mtp(name)}
        if not allowed:
            why = _why(pattern, found, names, model)
            raise UserError(f"lora.{option}: {pattern!r} {why}")
        chosen |= allowed
    return chosen


def _why(pattern: str, in_mtp: set[str], names: list[str], model: nn.Module) -> str:
    """Why a pattern gives no adapter, and what to write instead."""
    if in_mtp:
        return f"is in the MTP block alone; to adapt that, name it: {sorted(in_mtp)[0]}"
    everything = [name for name, _ in model.named_modules()]
    everything += [name for name, _ in model.named_parameters()]
    other = next((name for name in everything if name and _matches(name, pattern)), None)
    if other is not None:
        return _no_place(other, model)
    leaves = {name.rpartition(".")[2] for name in names}
    hint = difflib.get_close_matches(pattern.rpartition(".")[2], sorted(leaves), 1)
    if pattern.endswith(("gate_proj", "gate_up_proj")):
        hint = ["up_proj"]  # what it is called where feed-forward layers are gated
    known = ", ".join(sorted(leaves)) or "none"
    return f"matches nothing; {f'perhaps {hint[0]}? ' if hint else ''}There are: {known}"


def _no_place(name: str, model: nn.Module) -> str:
    """Why what a pattern does match gets no adapter through this option."""
    if isinstance(dict(model.named_modules()).get(_owner(name)), Linear):
        return f"is a linear layer: it belongs into lora.target_modules, as {_owner(name)}"
    if ".experts" in name:
        return "is a stack of experts: it belongs into lora.target_parameters, as experts.up_proj"
    if ".gate" in name:
        return "is the router, which is not adapted: small changes to it send tokens elsewhere"
    if name.startswith(("lm_head", "backbone.embeddings")):
        return "is embedding or head, which MTP shares and which is not adapted"
    return f"matches {name}, which is no matrix product: convolutions and norms are not adapted"
