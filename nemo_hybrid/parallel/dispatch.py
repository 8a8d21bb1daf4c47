"""Expert parallelism: every routed slot travels to the process that owns its expert, and back.

Dropless: the number of slots per process is exchanged first, so no slot is cut or padded. What
travels has the latent width; the routing weight travels along, because it multiplies inside the
expert.

Shapes: T tokens, K experts per token, R = T*K routed slots, Q received slots, L latent, E experts.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from nemo_hybrid.model.latent_moe import AdaptedExperts
from nemo_hybrid.parallel.exchange import AllToAll
from nemo_kernels.moe import combine_slots, grouped_mlp, sort_slots


class _Spread(torch.autograd.Function):
    """To every slot its token's row, in the order of the slots. Backward a gather as well: by
    itself torch would sort the slots once more, or add to rows in any order."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, order_R: Tensor, inverse_R: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(inverse_R)
        ctx.top_k = top_k
        return x.index_select(0, order_R // top_k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (inverse_R,) = ctx.saved_tensors
        return _summed(grad, inverse_R, ctx.top_k), None, None, None


class _Combine(torch.autograd.Function):
    """Each token's sum of its slots, which come in an order; the other way round than `_Spread`."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, order_R: Tensor, inverse_R: Tensor, top_k: int) -> Tensor:
        ctx.save_for_backward(order_R)
        ctx.top_k = top_k
        return _summed(y, inverse_R, top_k)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None, None]:
        (order_R,) = ctx.saved_tensors
        return grad.index_select(0, order_R // ctx.top_k), None, None, None


def _summed(y: Tensor, inverse_R: Tensor, top_k: int) -> Tensor:
    """In fp32, rounded once."""
    if top_k == 1:
        return y.index_select(0, inverse_R)
    return combine_slots(y, inverse_R.view(-1, top_k))


class AllToAllDispatcher(nn.Module):
    """Owns experts ``[ep_rank * E / ep, (ep_rank + 1) * E / ep)`` of every MoE layer.

    ``ep_size`` divides ``experts``. ``join`` comes before the first use.
    """

    def __init__(self, experts: int, ep_size: int, rank: int) -> None:
        super().__init__()
        self.num_experts = experts
        self.ep_size = ep_size
        self.num_local_experts = experts // ep_size
        first = (rank % ep_size) * self.num_local_experts
        self.owned = range(first, first + self.num_local_experts)
        self.group: dist.ProcessGroup | None = None

    def join(self, data_first: bool = False) -> None:
        """Make or find the expert-parallel group; all processes together."""
        from nemo_hybrid.parallel.deepspeed_private import expert_parallel_group

        name = expert_group_name(self.ep_size)
        self.group = expert_parallel_group(name, self.ep_size, data_first)
        if dist.get_rank(self.group) * self.num_local_experts != self.owned.start:
            raise RuntimeError("DeepSpeed ordered the expert-parallel ranks in an unexpected way")

    def most(self, number: int) -> int:
        """The largest of the numbers that the processes of this group have."""
        on_gpu = dist.get_backend(self.group) == dist.Backend.NCCL
        largest = torch.tensor(number, device="cuda" if on_gpu else "cpu")
        dist.all_reduce(largest, dist.ReduceOp.MAX, group=self.group)
        return int(largest)

    def exchange(
        self,
        received: Tensor,
        x: Tensor,
        receive: list[int] | None = None,
        send: list[int] | None = None,
    ) -> None:
        """All-to-all of so many rows from and to each process; None: as many from and to each."""
        assert self.group is not None, "the dispatcher works only inside the engine"
        dist.all_to_all_single(received, x, receive, send, group=self.group)

    def rows(self, counts_E: Tensor, received_counts_E: Tensor) -> tuple[list[int], list[int]]:
        """To and from each process, from counts per expert and process. Waits for a GPU, once."""
        counts_2SE = torch.stack([counts_E, received_counts_E]).view(2, self.ep_size, -1)
        send, receive = counts_2SE.sum(2).tolist()
        return send, receive

    def forward(
        self, x_TL: Tensor, topk_ids_TK: Tensor, topk_weights_TK: Tensor, experts: AdaptedExperts
    ) -> Tensor:
        top_k = topk_ids_TK.shape[1]
        order_R, inverse_R, counts_E = sort_slots(topk_ids_TK, self.num_experts)
        received_counts_E = torch.empty_like(counts_E)
        self.exchange(received_counts_E, counts_E)
        send, receive = self.rows(counts_E, received_counts_E)

        x_RL = _Spread.apply(x_TL, order_R, inverse_R, top_k)
        weights_R = _Spread.apply(topk_weights_TK.flatten(), order_R, inverse_R, 1)
        x_QL = AllToAll.apply(x_RL, send, receive, self.exchange)
        weights_Q = AllToAll.apply(weights_R, send, receive, self.exchange)
        # Rows arrive by source rank, then by expert; the experts want them by expert.
        arrived_SE = received_counts_E.view(self.ep_size, self.num_local_experts)
        local = torch.arange(self.num_local_experts, device=counts_E.device).repeat(self.ep_size)
        # The number of rows is known here, so that nothing waits for a GPU once more.
        owner_Q = torch.repeat_interleave(local, arrived_SE.flatten(), output_size=sum(receive))
        by_expert_Q = owner_Q.argsort(stable=True)
        orders = (by_expert_Q, _inverse(by_expert_Q))
        x_QL, weights_Q = (_Spread.apply(t, *orders, 1) for t in (x_QL, weights_Q))
        y_QL = grouped_mlp(x_QL, weights_Q, arrived_SE.sum(0), *experts)
        y_RL = AllToAll.apply(_Combine.apply(y_QL, *orders, 1), receive, send, self.exchange)
        y_TL: Tensor = _Combine.apply(y_RL, order_R, inverse_R, top_k)
        return y_TL


def expert_group_name(ep_size: int) -> str:
    """DeepSpeed's name of the expert-parallel group."""
    return f"ep_size_{ep_size}"


def _inverse(permutation: Tensor) -> Tensor:
    inverse = torch.empty_like(permutation)
    inverse[permutation] = torch.arange(len(permutation), device=permutation.device)
    return inverse
