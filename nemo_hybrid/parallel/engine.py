"""The DeepSpeed engine: ZeRO-1 or ZeRO-2 with fp32 accumulation, on CPU and on GPUs alike.

Mixed dtypes. DeepSpeed's own bf16 mode would cast every parameter, also the few that must stay
fp32. So that mode is off, the model arrives in its final dtypes, and parameters are grouped by
dtype. The *first* group's dtype matters: ZeRO-1 accumulates in fp32 beside the parameters only when
that dtype is not already fp32, so bf16 comes first there (a test sees the difference); ZeRO-2 sizes
buffers by it, so fp32 comes first, on the safe side (no test sees a difference).
"""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from deepspeed.moe.layer import MoE
from torch import Tensor, nn

from nemo_hybrid.checkpoint.state import Fragment
from nemo_hybrid.config.parallel import REDUCE_BUCKET
from nemo_hybrid.config.run import TrainingConfig
from nemo_hybrid.parallel import deepspeed_private
from nemo_hybrid.parallel.dispatch import AllToAllDispatcher, expert_group_name
from nemo_hybrid.parallel.world import World

MOMENTS = ("exp_avg", "exp_avg_sq")


def prepare_deepspeed(world: World) -> None:
    """Settings that must stand before DeepSpeed starts. Raises RuntimeError if it is not one that
    we know how to drive."""
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel(logging.ERROR)
    # DeepSpeed calls collectives by names that newer torch versions call deprecated.
    warnings.filterwarnings("ignore", r"`torch\.distributed\.\w+` is deprecated", FutureWarning)
    deepspeed_private.check_library()
    if hasattr(torch.compiler, "set_default_backend"):
        # DeepSpeed's Muon, which nobody asks for, would import the whole compiler for its own.
        torch.compiler.set_default_backend("eager")
    if world.device.type == "cpu":
        deepspeed_private.without_shm_comm()
    deepspeed.init_distributed(verbose=False)


class Engine:
    """Backward, reduction, clipping and AdamW's step of ``module``, with ``groups`` of parameters
    (see ``train.optim``), which have the names that they have in ``model``."""

    def __init__(
        self,
        module: nn.Module,
        model: nn.Module,
        groups: list[dict[str, Any]],
        config: TrainingConfig,
        world: World,
        accumulation: int,
        dispatcher: AllToAllDispatcher | None,
    ) -> None:
        import deepspeed

        self.world = world
        self.clip_grad_norm = config.train.clip_grad_norm
        self.norm = torch.tensor(torch.nan)
        self.names = {parameter: name for name, parameter in model.named_parameters()}
        self.dispatcher = dispatcher
        for name, parameter in model.named_parameters():
            if ".experts." in name and not parameter.requires_grad:
                deepspeed_private.keep_own(parameter)
        if dispatcher is not None and any(group["experts"] for group in groups):
            _mark_experts(groups, dispatcher.ep_size)
            module.add_module("trained_experts", TrainedExperts(dispatcher))
        largest = max(p.numel() for group in groups for p in group["params"])
        zero = config.parallel.stage(world.size)
        fp32_first = zero == 2
        groups.sort(key=lambda g: (g["params"][0].dtype == torch.float32) != fp32_first)
        self.engine, *_ = deepspeed.initialize(
            model=module,
            optimizer=torch.optim.AdamW(groups),
            config=_deepspeed_config(config, zero, accumulation, largest),
            dist_init_required=False,
        )
        if dispatcher is not None and dispatcher.group is None:
            dispatcher.join()
        self.zero = deepspeed_private.ZeroOptimizer(self.engine.optimizer)
        # From the start, so that there is something to save before the first update.
        for master in self.zero.masters:
            self.zero.state[master] = first_state(master)

    def start(self, micro_batches: int) -> None:
        """Before the forward passes of a global batch, which may have fewer micro-batches than
        there are at most."""
        most = self.engine.gradient_accumulation_steps()
        assert 0 < micro_batches <= most, "more micro-batches than a global batch has"
        self.engine.micro_steps += most - micro_batches

    def __call__(self, *args: Any) -> Any:
        return self.engine(*args)

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradient of ``loss``, this micro-batch's share of the *global* mean.

        DeepSpeed averages over ranks and micro-batches, so the share is scaled up to undo that.
        """
        scale = self.world.size * self.engine.gradient_accumulation_steps()
        self.engine.backward(loss * scale)

    def end_micro_batch(self) -> None:
        """Go on to the next micro-batch of the same global batch."""
        assert not self.engine.is_gradient_accumulation_boundary(), "update or discard comes next"
        self.engine.step()

    def grad_norm(self) -> Tensor:
        """Norm of the global batch's gradient, before clipping; the same number on every rank.

        To be asked once, after the last backward pass of a global batch: the library passes over
        all gradients for it. NaN where it is not finite.
        """
        norm = self.zero.grad_norm()
        self.norm = norm.masked_fill((norm < 0) | norm.isinf(), torch.nan)
        return self.norm

    def gradients(self) -> Iterator[tuple[str, Tensor]]:
        """Name of every parameter of which this rank owns a part, and that part of the global
        batch's gradient, flat. Every element is on one rank. To be asked when :meth:`grad_norm` is.
        """
        for part, gradient in self.zero.gradients():
            yield self.names[part.parameter], gradient

    def update(self, lr: float) -> None:
        """Update the weights with the gradient of the global batch, whose norm is known."""
        if self.clip_grad_norm:
            factor = 1.0 / ((self.norm + 1e-6) / self.clip_grad_norm).clamp(min=1.0)
            if factor < 1:
                self.zero.scale_gradients(factor)
        self.zero.set_lr(lr)
        self.engine.step()

    def discard(self) -> None:
        """Forget the gradient of the global batch: weights, moments and counts stay."""
        self.zero.discard_gradients()
        self.engine.micro_steps += 1

    @torch.no_grad()
    def seed_masters(self, exact: Mapping[str, Tensor]) -> None:
        """Give the masters the values from which the model's weights were rounded; by name, this
        rank's parameters. Names that are missing keep the rounded ones."""
        for part in self.zero.parts():
            values = exact.get(self.names[part.parameter])
            if values is not None:
                source = values.reshape(-1)[part.start : part.start + part.numel]
                part.master.narrow(0, part.master_start, part.numel).copy_(source)

    @property
    def optimizer_steps(self) -> int:
        """Updates made so far, as the optimizer counts them for its bias correction."""
        return int(self.zero.state[self.zero.masters[0]]["step"])

    @optimizer_steps.setter
    def optimizer_steps(self, steps: int) -> None:
        for master in self.zero.masters:
            self.zero.state[master]["step"].fill_(steps)

    def fragments(self) -> Iterator[Fragment]:
        """The parts of masters and moments that this rank owns: views, not copies."""
        for part in self.zero.parts():
            state = self.zero.state[part.master]
            flat = {"master": part.master.detach(), **{k: state[k] for k in MOMENTS}}
            start, shape = self._global(part.parameter)
            yield Fragment(
                name=self.names[part.parameter],
                start=start + part.start,
                numel=part.numel,
                shape=shape,
                tensors={k: v.narrow(0, part.master_start, part.numel) for k, v in flat.items()},
            )

    def _global(self, parameter: nn.Parameter) -> tuple[int, tuple[int, ...]]:
        """Offset of this rank's parameter in the flattened global one, and the global shape."""
        shape = tuple(parameter.shape)
        if self.dispatcher is None or getattr(parameter, "allreduce", True):
            return 0, shape
        return self.dispatcher.owned.start * parameter[0].numel(), (
            self.dispatcher.num_experts,
            *shape[1:],
        )

    def publish_masters(self) -> None:
        """Round the (restored) masters into the model's weights, on every rank."""
        self.zero.publish_masters()


class TrainedExperts(MoE):
    """Tells DeepSpeed's engine, by its class alone, that parameters flagged ``allreduce = False``
    are reduced over the expert-data-parallel group. It refuses this where there are none."""

    def __init__(self, dispatcher: AllToAllDispatcher) -> None:
        nn.Module.__init__(self)
        self.num_experts = dispatcher.num_experts
        self._join = dispatcher.join

    def set_deepspeed_parallelism(
        self, use_data_before_expert_parallel_: bool = False, **_: Any
    ) -> None:
        """Called by ``deepspeed.initialize``."""
        self._join(use_data_before_expert_parallel_)


def first_state(master: Tensor) -> dict[str, Tensor]:
    """What AdamW keeps of a parameter, before its first update. A fused optimizer wants the count
    beside the parameter."""
    moments = {name: torch.zeros_like(master) for name in MOMENTS}
    return {"step": torch.zeros((), device=master.device), **moments}


def _mark_experts(groups: list[dict[str, Any]], ep_size: int) -> None:
    """Flag routed experts, so that they are reduced over ranks that hold the same experts."""
    name = expert_group_name(ep_size)
    for group in groups:
        if group["experts"]:
            group.update(moe=True, name=name)
            for parameter in group["params"]:
                parameter.allreduce = False
                parameter.group_name = name


def _deepspeed_config(
    config: TrainingConfig, zero: int, accumulation: int, largest: int
) -> dict[str, Any]:
    """``largest``: elements of the largest parameter. One that does not fit into the reduction
    buffer would have its gradient rounded to its own dtype before it is summed."""
    return {
        "train_micro_batch_size_per_gpu": config.train.micro_batch_size,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,  # by `update`: the library would ask for the norm once more
        "data_types": {"grad_accum_dtype": "fp32"},
        "communication_data_type": "fp32",
        "zero_optimization": {
            "stage": zero,
            "compute_grad_norm": False,
            "contiguous_gradients": True,
            "reduce_scatter": True,
            # An all-reduce of each bucket: shares reduced to their owners send half as much, but by
            # as many collectives as processes, each of which passes all of these in turn.
            "use_multi_rank_bucket_allreduce": True,
            # Beside the backward pass it would take two buckets (each 2.5 GB for Nano's stacks),
            # and hide what ZeRO-1 does in one micro-batch of each global batch.
            "overlap_comm": False,
            "parameter_alignment": True,  # what a GPU multiplies begins at multiples of 16 bytes
            "reduce_bucket_size": max(REDUCE_BUCKET, largest),
        },
        "steps_per_print": 10**12,
        "timers": {"throughput": {"enabled": False}},  # it waits for the device, twice per batch
    }
