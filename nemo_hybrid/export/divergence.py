"""Two models' distributions of the same tokens, without both in memory.

Of each model the final hidden states of all tokens and the head stay; logits are made for a few
tokens at once.

Shapes: T compared tokens, S tokens of one piece, C tokens of one chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.terminal import progress_bar
from nemo_kernels.products import sum_in_fp32

CHUNK_BYTES = 64 << 20  # of one model's log-probabilities
Module = TypeVar("Module", bound=nn.Module)


class States(NamedTuple):
    """What one model's log-probabilities of T tokens are made of."""

    h_TD: Tensor
    head_VD: Tensor


class PerToken(NamedTuple):
    """The comparison, token by token: float64, in nats, on the CPU."""

    a_T: Tensor  # log-probability of the token in A
    b_T: Tensor
    kl_T: Tensor  # KL(A || B) of the distributions that the token was drawn from
    same_top_T: Tensor  # bool: the most probable token is the same one


@torch.no_grad()
def per_token(a: States, b: States, labels_T: Tensor, *, show: bool = False) -> PerToken:
    """Compare in chunks of tokens, where A's head is: logits in the states' dtype, softmax and sums
    in float64."""
    chunk, device = max(1, CHUNK_BYTES // (8 * len(a.head_VD))), a.head_VD.device
    parts = []
    with progress_bar("comparing", len(labels_T), show) as progress:
        for start in range(0, len(labels_T), chunk):
            rows = slice(start, start + chunk)
            label_C1 = labels_T[rows, None].to(device)
            p_CV, q_CV = (_logits(of, rows).to(device).double().log_softmax(-1) for of in (a, b))
            found = (
                p_CV.gather(1, label_C1)[:, 0],
                q_CV.gather(1, label_C1)[:, 0],
                (p_CV.exp() * (p_CV - q_CV)).sum(1),
                p_CV.argmax(1) == q_CV.argmax(1),
            )
            parts.append(PerToken(*(of_C.cpu() for of_C in found)))
            progress(min(start + chunk, len(labels_T)))
    return PerToken(*map(torch.cat, zip(*parts, strict=True)))


def _logits(states: States, rows: slice) -> Tensor:
    return F.linear(states.h_TD[rows].to(states.head_VD.device), states.head_VD)


def states(model: HybridLM, pieces: Sequence[Tensor], title: str, show: bool) -> States:
    """Run a model, where it runs best, on pieces of ids [1, S]."""
    return states_of(model, lambda ids_1S: model.forward_hidden(ids_1S)[0], pieces, title, show)


@torch.no_grad()
def states_of(
    model: Any,
    hidden: Callable[[Tensor], Tensor],
    pieces: Sequence[Tensor],
    title: str,
    show: bool,
) -> States:
    """The same of any model with an ``lm_head``; ``hidden`` gives its [1, S, D]."""
    head_VD, parts = ready(model).lm_head.weight, list[Tensor]()
    with progress_bar(title, sum(piece.numel() for piece in pieces), show) as progress:
        for ids_1S in pieces:
            parts.append(hidden(ids_1S.to(head_VD.device))[0].cpu())
            progress(sum(map(len, parts)))
    return States(torch.cat(parts), head_VD.detach())


def ready(model: Module) -> Module:
    """The model where it runs best: on a CUDA device with room for it, otherwise on the CPU; its
    products sum as in training."""
    sum_in_fp32()
    tensors = [*model.parameters(), *model.buffers()]
    if torch.cuda.is_available() and not tensors[0].is_cuda:
        model = model.to(
            chosen_device(sum(t.nbytes for t in tensors), torch.cuda.mem_get_info()[0])
        )
    return model.eval()


def chosen_device(size: int, free: int) -> str:
    """cuda where ``free`` bytes hold a model of ``size`` bytes and what it computes; otherwise cpu,
    which is said on stderr."""
    needed = size + size // 8 + (1 << 30)
    if free >= needed:
        return "cuda"
    print(
        f"the model needs {needed / 1e9:.1f} GB, but the CUDA device has {free / 1e9:.1f} GB free: "
        "running on the CPU",
        file=sys.stderr,
        flush=True,
    )
    return "cpu"
