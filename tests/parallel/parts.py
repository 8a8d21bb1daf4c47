"""Deliberate mistakes of context parallelism, which the comparison must notice."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from nemo_hybrid.data.batch import Batch
from nemo_hybrid.model.sequence import WholeSequences
from nemo_hybrid.objectives.next_token import NextToken
from nemo_hybrid.parallel import context
from nemo_hybrid.parallel.context import SequenceShards
from nemo_hybrid.parallel.engine import Engine
from nemo_kernels.documents import Shard


def no_state(self: SequenceShards, state: Tensor, decay: Tensor) -> Tensor:
    return torch.zeros_like(state)


def no_chain(states: Tensor, decays: Tensor) -> Tensor:
    """What a part is entered with is what the one before it wrote, and nothing older."""
    return _ENTERING(states, torch.zeros_like(decays))


def no_halo(self: SequenceShards, x: Tensor, w: Tensor, b: Tensor, shard: Shard) -> Tensor:
    return WholeSequences().convolve(x, w, b, shard.local)


def halo_of_all_documents(x: Tensor, w: Tensor, b: Tensor, documents: object) -> Tensor:
    return _CONVOLVE(x, w, b, None)


def keys_in_another_order(
    self: SequenceShards, q: Tensor, k: Tensor, v: Tensor, shard: Shard
) -> Tensor:
    return _ATTEND(self, q, k.flip(2), v.flip(2), shard)


def own_counts(self: SequenceShards, tensor: Tensor) -> Tensor:
    return tensor


def shifted_after_the_cut(self: NextToken, batch: Batch, part: int, parts: int, step: int) -> Batch:
    """What lies behind the part is not found."""
    own = _CUT(self, batch, part, parts, step)
    assert own.ahead is not None
    weights_NBS = own.ahead.weights_NBS.clone()
    for depth in range(1, len(weights_NBS)):
        weights_NBS[depth, :, -depth:] = 0
    return replace(own, ahead=own.ahead._replace(weights_NBS=weights_NBS))


def divided_by_the_parts(self: Engine, loss: Tensor) -> None:
    _BACKWARD(self, loss / self.world.cp)


def states_of_other_documents(documents: Any, *args: Any) -> Shard:
    """A document that begins with a part begins with the state before it."""
    shard = _SHARD(documents, *args)
    return replace(shard, continues_B=torch.ones_like(shard.continues_B))


def scan_alone(self: SequenceShards, *args: Any) -> Tensor:
    return WholeSequences().scan(*args[:-1], args[-1].local)


def attend_alone(self: SequenceShards, *args: Any) -> Tensor:
    return WholeSequences().attend(*args[:-1], args[-1].local)


_ENTERING, _CONVOLVE, _ATTEND = (
    context.entering_states,
    context.causal_conv1d,
    SequenceShards.attend,
)
_CUT, _BACKWARD, _SHARD = NextToken.cut, Engine.backward, Shard.cut
FAULTS: dict[str, tuple[Any, str, Callable[..., Any]]] = {
    "no state": (SequenceShards, "_carry", no_state),
    "no chain": (context, "entering_states", no_chain),
    "no halo": (SequenceShards, "convolve", no_halo),
    "halo of another document": (context, "causal_conv1d", halo_of_all_documents),
    "state of another document": (Shard, "cut", staticmethod(states_of_other_documents)),
    "keys in another order": (SequenceShards, "attend", keys_in_another_order),
    "local balance counts": (SequenceShards, "sum", own_counts),
    "labels shifted after the cut": (NextToken, "cut", shifted_after_the_cut),
    "share divided by cp": (Engine, "backward", divided_by_the_parts),
    "M ignores its sequence": (SequenceShards, "scan", scan_alone),
    "* ignores its sequence": (SequenceShards, "attend", attend_alone),
}


@contextmanager
def broken(fault: str) -> Iterator[None]:
    """Inside, the mistake is made, if it is one of these."""
    if fault not in FAULTS:
        yield
        return
    owner, name, wrong = FAULTS[fault]
    with patch.object(owner, name, wrong):
        yield
