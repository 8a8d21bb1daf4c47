"""Context parallelism: the tokens of a row divided over processes, in their order.

Mamba-2 layers pass their state on. Every process computes the state that its part leaves, and how
much it keeps of what came before; the processes divide the heads, follow the states of their heads
through all parts, and give back the one with which each part begins. What travels does not grow
with the row. Attention trades tokens for heads: every process attends with some heads over whole
rows, so that work is divided evenly and kernels know nothing of it. Everything else in a model goes
token by token.

All processes call the same exchanges in the same order and use what comes, so that their backward
passes meet as well. Rows that are whole (see `Shard`) go the usual way.

Shapes: B batch, S tokens of a whole row, T of a part, C conv channels, K conv kernel, J = K - 1,
H heads, P head dim, G groups or key/value heads, N state; R parts, h and g heads of one process, U
heads of queries, keys and values of one process, X numbers of a state.
"""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from nemo_hybrid.model.sequence import WholeSequences
from nemo_hybrid.parallel.exchange import AllToAll
from nemo_hybrid.parallel.world import TIMEOUT, World
from nemo_kernels.attention import attention
from nemo_kernels.conv1d import causal_conv1d
from nemo_kernels.documents import Packing, Shard, divided
from nemo_kernels.ssd import entering_states, ssd_scan, ssd_state


class SequenceShards(WholeSequences):
    """Of the processes of ``group``, in their order, each has one part of every row."""

    def __init__(self, group: dist.ProcessGroup) -> None:
        self.group = group
        self.part, self.parts = dist.get_rank(group), dist.get_world_size(group)

    @staticmethod
    def of(world: World, timeout: timedelta = TIMEOUT) -> SequenceShards:
        """With the processes that read the same rows as this one. All processes call it."""
        groups = [
            dist.new_group(list(range(first, first + world.cp)), timeout=timeout)
            for first in range(0, world.size, world.cp)
        ]
        own = groups[world.reader]
        assert isinstance(own, dist.ProcessGroup)  # those of others are numbers here
        return SequenceShards(own)

    def convolve(
        self, x_BSC: Tensor, weight_CK: Tensor, bias_C: Tensor, documents: Packing
    ) -> Tensor:
        if not isinstance(documents, Shard):
            return super().convolve(x_BSC, weight_CK, bias_C, documents)
        x_BTC, reach = x_BSC, weight_CK.shape[1] - 1
        last_JBC = x_BTC[:, x_BTC.shape[1] - reach :].transpose(0, 1)
        # The first part gets the end of the last one, which `Shard.halo` keeps away from it.
        send, receive = ([0] * self.parts for _ in range(2))
        send[(self.part + 1) % self.parts] = receive[self.part - 1] = reach
        before_JBC = self._exchange(last_JBC, send, receive)
        x_BXC = torch.cat([before_JBC.transpose(0, 1), x_BTC], 1)
        return causal_conv1d(x_BXC, weight_CK, bias_C, documents.halo)[:, reach:]

    def scan(
        self,
        x_BSHP: Tensor,
        dt_BSH: Tensor,
        A_H: Tensor,
        B_BSGN: Tensor,
        C_BSGN: Tensor,
        D_H: Tensor,
        chunk_size: int,
        documents: Packing,
    ) -> Tensor:
        inputs = (x_BSHP, dt_BSH, A_H, B_BSGN, C_BSGN, D_H)
        if not isinstance(documents, Shard):
            return super().scan(*inputs, chunk_size, documents)
        state_BHPN, decay_BH = ssd_state(*inputs[:4], documents.local)
        begins_B = ~documents.continues_B
        # Nothing of a document that ended is left, before this part or in it.
        decay_BH = decay_BH.masked_fill(begins_B[:, None], 0)
        entering_BHPN = self._carry(state_BHPN, decay_BH)
        entering_BHPN = entering_BHPN.masked_fill(begins_B[:, None, None, None], 0)
        return ssd_scan(*inputs, chunk_size, documents.local, entering_BHPN)[0]

    def _carry(self, state_BHPN: Tensor, decay_BH: Tensor) -> Tensor:
        """The state that enters this part, like that which it leaves."""
        heads_R = divided(decay_BH.shape[1], self.parts)
        own_R = [heads_R[self.part]] * self.parts
        rows_HBX = torch.cat([state_BHPN.flatten(2), decay_BH[..., None]], -1).transpose(0, 1)
        parts_RhBX = self._exchange(rows_HBX, heads_R, own_R).view(
            self.parts, own_R[0], *rows_HBX.shape[1:]
        )
        states_RhBPN = parts_RhBX[..., :-1].unflatten(-1, state_BHPN.shape[2:])
        entering_RhBPN = entering_states(states_RhBPN, parts_RhBX[..., -1])
        entering_HBPN = self._exchange(entering_RhBPN.flatten(0, 1), own_R, heads_R)
        return entering_HBPN.transpose(0, 1)

    def attend(self, q_BSHP: Tensor, k_BSGP: Tensor, v_BSGP: Tensor, documents: Packing) -> Tensor:
        if not isinstance(documents, Shard):
            return super().attend(q_BSHP, k_BSGP, v_BSGP, documents)
        batch, tokens, heads, width = q_BSHP.shape
        repeats = max(1, self.parts // k_BSGP.shape[2])
        # One buffer for all three: in which order their gradients come is then no question.
        by_process = [
            t.unflatten(2, (self.parts, -1))
            for t in (q_BSHP, *(t.repeat_interleave(repeats, 2) for t in (k_BSGP, v_BSGP)))
        ]
        qkv_BTRUP = torch.cat(by_process, 3)
        qkv_RTBUP = qkv_BTRUP.permute(2, 1, 0, 3, 4).flatten(0, 1)
        sizes, own = list(documents.sizes), [tokens] * self.parts
        qkv_BSUP = self._exchange(qkv_RTBUP, own, sizes).transpose(0, 1)
        q_BShP, k_BSgP, v_BSgP = qkv_BSUP.split([t.shape[3] for t in by_process], 2)
        o_BShP = attention(q_BShP, k_BSgP, v_BSgP, documents.whole)
        o_RTBhP = self._exchange(o_BShP.transpose(0, 1), sizes, own)
        o_BTRhP = o_RTBhP.unflatten(0, (self.parts, tokens)).permute(2, 1, 0, 3, 4)
        return o_BTRhP.reshape(batch, tokens, heads, width)

    def sum(self, tensor: Tensor) -> Tensor:
        total = tensor.clone()
        dist.all_reduce(total, group=self.group)
        return total

    def _exchange(self, x: Tensor, send: list[int], receive: list[int]) -> Tensor:
        """So many of the rows to every process, and from it."""
        received: Tensor = AllToAll.apply(x, send, receive, self._all_to_all)
        return received

    def _all_to_all(self, received: Tensor, x: Tensor, receive: list[int], send: list[int]) -> None:
        dist.all_to_all_single(received, x, receive, send, group=self.group)
