"""Ways to break a model that a comparison of its outputs must notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from itertools import chain
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from helpers.tiny_models import CHUNK
from nemo_hybrid.model.hybrid import HybridLM
from nemo_kernels.moe import topk_router
from nemo_kernels.ssd import ssd_scan

Sabotage = Callable[[HybridLM], AbstractContextManager[None]]

NOTICED = 1e-2
"""Least deviation of the logits, as :func:`relative` measures it, that a sabotage must cause."""


@torch.no_grad()
def relative(ours: Tensor, theirs: Tensor) -> float:
    """Size of the deviation as a fraction of the tensor's own size, in the Euclidean norm."""
    assert theirs.norm() > 0
    return float((ours - theirs).norm() / theirs.norm())


def sabotages(pattern: str, length: int = CHUNK + 1) -> dict[str, Sabotage]:
    """What a comparison of these layers over rows of this many tokens must notice.

    A single token has no neighbours to look at, over a few tokens little decays and the router bias
    may change no choice, and rows within one chunk carry no state.
    """
    return {
        name: sabotage
        for letter, least, name, sabotage in _SABOTAGES
        if letter in pattern and length >= least
    }


@torch.no_grad()
def quiet_paths(model: HybridLM, ids_BS: Tensor) -> dict[str, float]:
    """Sabotages that change this model's logits too little to be noticed, and how much they do."""
    logits_BSV = model(ids_BS).logits
    changes: dict[str, float] = {}
    for name, sabotage in sabotages(model.config.pattern, ids_BS.shape[1]).items():
        with sabotage(model):
            changes[name] = relative(model(ids_BS).logits, logits_BSV)
    assert torch.equal(model(ids_BS).logits, logits_BSV), "a sabotage was not undone"
    return {name: change for name, change in changes.items() if not change > NOTICED}


def changed(ending: str, change: Callable[[Tensor], Tensor]) -> Sabotage:
    """Sabotage by changing the parameters and buffers whose names end so."""

    @contextmanager
    def sabotage(model: HybridLM) -> Iterator[None]:
        tensors = chain(model.named_parameters(), model.named_buffers())
        chosen = [p for name, p in tensors if name.endswith(ending)]
        assert chosen, ending
        before = [p.clone() for p in chosen]
        with torch.no_grad():
            for p in chosen:
                p.copy_(change(p))
        yield
        with torch.no_grad():
            for p, value in zip(chosen, before, strict=True):
                p.copy_(value)

    return sabotage


def scan_without_carry(*args: Any) -> tuple[Tensor, Tensor]:
    """``ssd_scan`` over one document per row, but every chunk starts from a zero state."""
    x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H, chunk, *nothing = args
    assert isinstance(chunk, int)
    assert not any(nothing)
    pieces = zip(*(t.split(chunk, dim=1) for t in (x_BSHP, dt_BSH, B_BSGN, C_BSGN)), strict=True)
    scanned = [ssd_scan(x, dt, A_H, B, C, D_H, chunk) for x, dt, B, C in pieces]
    return torch.cat([y_BLHP for y_BLHP, _ in scanned], dim=1), scanned[-1][1]


def scan_without_gradient_through_the_carry(*args: Any) -> tuple[Tensor, Tensor]:
    """The values of ``ssd_scan``, the gradients of :func:`scan_without_carry`."""
    right, state = ssd_scan(*args)
    forgetful, _ = scan_without_carry(*args)
    return forgetful + (right - forgetful).detach(), state


def router_without_gradient(*args: Any) -> tuple[Tensor, Tensor, Tensor]:
    """``topk_router`` with weights that are constants to the backward pass."""
    ids_TK, weights_TK, scores_TE = topk_router(*args)
    # Not without graph: a gradient of zero is the mistake, no gradient would be easy to see.
    return ids_TK, weights_TK.detach() + 0 * weights_TK, scores_TE


@contextmanager
def state_dropped_between_chunks(_model: HybridLM) -> Iterator[None]:
    with patch("nemo_hybrid.model.sequence.ssd_scan", scan_without_carry):
        yield


_AT_ALL, _TO_OTHERS, _SEVERAL, _TO_OTHER_CHUNKS = 1, 2, CHUNK - 1, CHUNK + 1
# Letter of the layer, shortest row where it matters, what is broken, how.
_SABOTAGES: list[tuple[str, int, str, Sabotage]] = [
    ("M", _AT_ALL, "scan killed", changed("mixer.dt_bias", lambda p: torch.full_like(p, -30.0))),
    ("M", _TO_OTHER_CHUNKS, "state dropped between chunks", state_dropped_between_chunks),
    ("M", _SEVERAL, "nothing decays", changed("mixer.A_log", lambda p: torch.full_like(p, -30.0))),
    ("M", _AT_ALL, "skip connection lost", changed("mixer.D", torch.zeros_like)),
    ("M", _TO_OTHERS, "convolution reversed", changed("conv1d.weight", lambda p: p.flip(-1))),
    ("M", _AT_ALL, "bias of the convolution lost", changed("conv1d.bias", torch.zeros_like)),
    ("E", _AT_ALL, "routed experts zeroed", changed("experts.down_proj", torch.zeros_like)),
    ("E", _AT_ALL, "router rows permuted", changed("gate.weight", lambda p: p.roll(1, 0))),
    ("E", _SEVERAL, "router bias lost", changed("e_score_correction_bias", torch.zeros_like)),
    (
        "E",
        _AT_ALL,
        "shared expert zeroed",
        changed("shared_experts.down_proj.weight", torch.zeros_like),
    ),
    (
        "*",
        _TO_OTHERS,
        "query heads of other key/value heads",
        changed("mixer.q_proj.weight", lambda p: p.roll(p.shape[0] // 2, 0)),
    ),
    (
        "*",
        _TO_OTHERS,
        "attention without preference",
        changed("mixer.q_proj.weight", torch.zeros_like),
    ),
    ("*", _AT_ALL, "values lost", changed("mixer.v_proj.weight", torch.zeros_like)),
    ("-", _AT_ALL, "mlp zeroed", changed("mixer.down_proj.weight", torch.zeros_like)),
]
