"""Activations that the backward pass computes again instead of finding them kept.

Shapes: B batch, S sequence, D hidden.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.autograd.graph import saved_tensors_hooks
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

from nemo_hybrid.model.latent_moe import Experts
from nemo_hybrid.model.layer import Layer, Layers
from nemo_hybrid.model.router import RoutingStats
from nemo_kernels.documents import Packing, Shard, Tile, divided
from nemo_kernels.wide import widened

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
    letters: str,
    tile: int,
    host: Host | None,
    layer: Layer,
    x_BSD: Tensor,
    documents: Packing | Tile,
) -> Out:
    # Where others stand in for the layer's parameters, they do so in the backward pass as well.
    parameters: dict[str, Tensor] = dict(layer.named_parameters())
    # Of what is given here, autograd is shown the tensors alone: the input.
    hooks = saved_tensors_hooks(host.keep, host.bring) if host else nullcontext()
    grad = torch.is_grad_enabled()
    if tile and layer.letter in TILED:
        pieces = _pieces_of(layer, list(parameters), x_BSD, documents, tile)
        if not grad:
            return _out(pieces.outputs(x_BSD, parameters.values()))
        with hooks:
            return _out(_InPieces.apply(pieces, x_BSD, *parameters.values()))
    if layer.letter not in letters or not grad:
        return layer(x_BSD, documents)
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


def _called(
    layer: Layer, parameters: Mapping[str, Tensor], x_BSD: Tensor, documents: Packing | Tile
) -> Out:
    out: Out = functional_call(layer, dict(parameters), (x_BSD, documents))
    return out


def _out(outputs: Sequence[Tensor]) -> Out:
    y_BSD, *sums = outputs
    return y_BSD, RoutingStats(*sums) if sums else None


class _Pieces(NamedTuple):
    """How a layer takes some tokens of every row at a time."""

    layer: Layer
    names: list[str]
    """Of its parameters."""
    sizes: list[int]
    tiles: list[Tile]

    def outputs(self, x_BSD: Tensor, parameters: Iterable[Tensor]) -> tuple[Tensor, ...]:
        """The layer's, and the sums of its `RoutingStats` if it has any."""
        by_name = dict(zip(self.names, parameters, strict=True))
        pieces = zip(x_BSD.split(self.sizes, 1), self.tiles, strict=True)
        outs = [_called(self.layer, by_name, *piece) for piece in pieces]
        stats = [stats for _, stats in outs if stats is not None]
        sums = (torch.stack(parts).sum(0) for parts in zip(*stats, strict=True))
        return torch.cat([y for y, _ in outs], 1), *sums


def _pieces_of(
    layer: Layer, names: list[str], x_BSD: Tensor, documents: Packing | Tile, tile: int
) -> _Pieces:
    sizes = tiles(x_BSD.shape[0], x_BSD.shape[1], documents, tile)
    real_BS = None if documents is None else documents.real_BS
    real = [None] * len(sizes) if real_BS is None else real_BS.split(sizes, 1)
    return _Pieces(layer, names, sizes, [*map(Tile, real)])


class _InPieces(torch.autograd.Function):
    """Keeps the layer's input. Its backward pass runs the pieces once more with weights that are
    `widened`: so shares of gradients add up in fp32, and are rounded once."""

    @staticmethod
    def forward(
        ctx: Any, pieces: _Pieces, x_BSD: Tensor, *parameters: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.pieces, ctx.parameters = pieces, parameters
        ctx.save_for_backward(x_BSD)
        ctx.set_materialize_grads(False)
        y_BSD, *sums = pieces.outputs(x_BSD, parameters)
        ctx.mark_non_differentiable(*sums[:1])  # counts
        return y_BSD, *sums

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy_BSD: Tensor, *dsums: Tensor | None) -> tuple[Tensor | None, ...]:
        layer, names, sizes, tiles = ctx.pieces
        _, of_x, *of_parameters = ctx.needs_input_grad
        wide = [
            widened(p).detach().requires_grad_() if wanted else p
            for p, wanted in zip(ctx.parameters, of_parameters, strict=True)
        ]
        (x_BSD,) = ctx.saved_tensors
        x_BTD = [x.detach().requires_grad_(of_x) for x in x_BSD.split(sizes, 1)]
        pieces = zip(x_BTD, tiles, dy_BSD.split(sizes, 1), strict=True)
        # The last one first, as autograd would.
        for x, tile, dy in reversed([*pieces]):
            with torch.enable_grad():
                y, stats = _called(layer, dict(zip(names, wide, strict=True)), x, tile)
            outputs, gradients = [y], [dy]
            if stats is not None and dsums[1] is not None and stats.shares_BE.requires_grad:
                outputs, gradients = [y, stats.shares_BE], [dy, dsums[1]]
            torch.autograd.backward(outputs, gradients)
        dx_BSD = torch.cat([x.grad for x in x_BTD], 1) if of_x else None
        dparameters = (
            w.grad.to(p.dtype) if wanted and w.grad is not None else None
            for p, w, wanted in zip(ctx.parameters, wide, of_parameters, strict=True)
        )
        return None, dx_BSD, *dparameters


def tiles(rows: int, tokens: int, documents: Packing | Tile, tile: int) -> list[int]:
    """Sizes of pieces of a row of so many tokens: equally many in all processes that have parts of
    such rows, because their experts meet in each."""
    sizes = documents.sizes if isinstance(documents, Shard) else (tokens,)
    return divided(tokens, pieces(rows, sizes, tile))


def pieces(rows: int, sizes: Sequence[int], tile: int) -> int:
    """How many there are of each of the parts of a row, which have these sizes; ``tile`` 0: one."""
    return min(math.ceil(rows * max(sizes) / tile), min(sizes)) if tile else 1


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
