"""Activations that the backward pass computes again instead of finding them kept.

Shapes: B batch, S sequence, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from nemo_hybrid.model.latent_moe import Experts
from nemo_hybrid.model.layer import Layer, Layers
from nemo_hybrid.model.router import RoutingStats
from nemo_kernels.documents import Packing, Shard, Tile, divided

TILED = "E-"
"""Letters of layers in which tokens know nothing of each other."""
Out = tuple[Tensor, RoutingStats | None]


def recompute_layers(model: nn.Module, letters: str, tile: int = 0, offload: bool = False) -> None:
    """Have layers of these pattern letters keep their inputs alone, in the backbone and in the MTP
    block; e: have experts not keep their inner activations.

    ``tile``: tokens that MoE and MLP layers take at a time, being recomputed then; 0: all.
    ``offload``: inputs of recomputed layers wait in the host's memory.
    """
    host = Host() if offload else None
    for module in model.modules():
        if isinstance(module, Layers):
            module.run = partial(_run, letters, tile, host)
        elif isinstance(module, Experts):
            module.recompute = "e" in letters


def _run(
    letters: str, tile: int, host: Host | None, layer: Layer, x_BSD: Tensor, documents: Packing
) -> Out:
    # Where others stand in for the layer's parameters, they do so in the backward pass as well.
    parameters: dict[str, Tensor] = dict(layer.named_parameters())
    grad = torch.is_grad_enabled()
    if not tile or layer.letter not in TILED:
        if layer.letter not in letters or not grad:
            return layer(x_BSD, documents)
        return _recomputed(host, layer, parameters, x_BSD, documents)
    sizes = tiles(x_BSD.shape[0], x_BSD.shape[1], documents, tile)
    real_BS = None if documents is None else documents.real_BS
    real = [None] * len(sizes) if real_BS is None else real_BS.split(sizes, 1)
    if grad:  # so that shares of gradients add up in fp32, and are rounded once
        parameters = {n: p.float() if p.requires_grad else p for n, p in parameters.items()}
    call = partial(_recomputed, host) if grad else _called
    outs = [
        call(layer, parameters, piece_BSD, Tile(piece_BS))
        for piece_BSD, piece_BS in zip(x_BSD.split(sizes, 1), real, strict=True)
    ]
    y_BSD = torch.cat([y for y, _ in outs], 1)
    stats = [stats for _, stats in outs if stats is not None]
    if not stats:
        return y_BSD, None
    return y_BSD, RoutingStats(*(torch.stack(sums).sum(0) for sums in zip(*stats, strict=True)))


def tiles(rows: int, tokens: int, documents: Packing, tile: int) -> list[int]:
    """Sizes of pieces of a row of so many tokens: equally many in all processes that have parts of
    such rows, because their experts meet in each."""
    sizes = documents.sizes if isinstance(documents, Shard) else (tokens,)
    return divided(tokens, pieces(rows, sizes, tile))


def pieces(rows: int, sizes: Sequence[int], tile: int) -> int:
    """How many there are of each of the parts of a row, which have these sizes; ``tile`` 0: one."""
    return min(math.ceil(rows * max(sizes) / tile), min(sizes)) if tile else 1


def _called(
    layer: Layer, parameters: Mapping[str, Tensor], x_BSD: Tensor, documents: Packing | Tile
) -> Out:
    out: Out = functional_call(layer, dict(parameters), (x_BSD, documents))
    return out


def _recomputed(
    host: Host | None,
    layer: Layer,
    parameters: Mapping[str, Tensor],
    x_BSD: Tensor,
    documents: Packing | Tile,
) -> Out:
    # Of what is given here, autograd is shown the tensors alone: the input.
    hooks = saved_tensors_hooks(host.keep, host.bring) if host else nullcontext()
    with hooks:
        out: Out = checkpoint(
            _called,
            layer,
            parameters,
            x_BSD,
            documents,
            use_reentrant=False,
            preserve_rng_state=False,
        )
    return out


class _Kept(NamedTuple):
    device: torch.device
    tensor: Tensor


class Host:
    """Keeps tensors in the memory of the host. Copies of a GPU's go there beside its work; on the
    way back it waits for them."""

    def __init__(self) -> None:
        self._beside: torch.cuda.Stream | None = None

    def keep(self, x: Tensor) -> _Kept:
        there = torch.empty(x.shape, dtype=x.dtype, pin_memory=x.is_cuda)
        if not x.is_cuda:
            return _Kept(x.device, there.copy_(x))
        if self._beside is None:
            self._beside = torch.cuda.Stream(x.device)
        self._beside.wait_stream(torch.cuda.current_stream(x.device))
        with torch.cuda.stream(self._beside):
            there.copy_(x, non_blocking=True)
        x.record_stream(self._beside)
        return _Kept(x.device, there)

    def bring(self, kept: _Kept) -> Tensor:
        if self._beside is not None:
            torch.cuda.current_stream(kept.device).wait_stream(self._beside)
        return kept.tensor.to(kept.device, non_blocking=True)
