"""What we need of DeepSpeed that it does not promise to keep: checked at start, used only here."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from itertools import accumulate, chain
from typing import Any, NamedTuple

import deepspeed
import deepspeed.ops
import torch.distributed as dist
from deepspeed.runtime.zero.config import DeepSpeedZeroConfig
from deepspeed.utils import groups
from torch import Tensor, nn

TESTED = "0.19.8"
_GROUP_FUNCTIONS = (
    "_create_expert_and_data_parallel",
    "_get_expert_parallel_group",
    "_get_expert_parallel_group_dict",
)
_OPTIONS = ("compute_grad_norm", "parameter_alignment")
_ZERO_FIELDS = (
    "_release_preflattened_grad_buffers",
    "all_grad_tensors",
    "averaged_gradients",
    "bit16_groups",
    "micro_step_id",
    "optimizer",
    "param_groups",
    "scaled_global_norm",
    "single_partition_of_fp32_groups",
    "update_lp_params",
    "zero_grad",
)
_MAPPING = "_hp_mapping"
_ADDRESSES = ("lp_fragment_address", "hp_fragment_address")


def check_library() -> None:
    """Raise RuntimeError, naming the tested version, unless the library has what we call."""
    _require("its groups", groups, _GROUP_FUNCTIONS)
    _require("its operations", deepspeed.ops, ("__compatible_ops__",))
    _require("its options of ZeRO", DeepSpeedZeroConfig(), _OPTIONS)


def without_shm_comm() -> None:
    """Leave CPU collectives to gloo: DeepSpeed's own are compiled on first use."""
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False


def expert_parallel_group(name: str, ep_size: int, data_first: bool) -> dist.ProcessGroup:
    """Make or find this rank's expert-parallel group."""
    if name not in groups._get_expert_parallel_group_dict():
        groups._create_expert_and_data_parallel(
            ep_size, use_data_before_expert_parallel_=data_first
        )
    return groups._get_expert_parallel_group(name)


def keep_own(parameter: nn.Parameter) -> None:
    """Let the engine not overwrite a frozen parameter, of which every rank has another part, with
    rank 0's when it starts: it takes whatever the optimizer does not know for replicated."""
    parameter.ds_optim_param = True  # type: ignore[attr-defined]


class Part(NamedTuple):
    """The part of a parameter that this rank owns: ``numel`` elements from ``start`` of the
    flattened parameter on, and from ``master_start`` of ``master`` on."""

    parameter: nn.Parameter
    start: int
    numel: int
    master: Tensor
    master_start: int


class ZeroOptimizer:
    """DeepSpeed's ZeRO-1 or ZeRO-2 optimizer. Raises RuntimeError if it is not as we know it."""

    def __init__(self, zero: Any) -> None:
        _require("its ZeRO optimizer", zero, _ZERO_FIELDS)
        self._zero = zero
        for parameter in chain.from_iterable(zero.bit16_groups):
            _require("a parameter of its ZeRO optimizer", parameter, (_MAPPING,))
            mapping = getattr(parameter, _MAPPING)
            if mapping is not None:
                _require(_MAPPING, mapping, _ADDRESSES)

    def set_lr(self, lr: float) -> None:
        for group in self._zero.param_groups:
            group["lr"] = lr

    @property
    def masters(self) -> list[Tensor]:
        """This rank's flat fp32 partition of every parameter group."""
        return list(self._zero.single_partition_of_fp32_groups)

    @property
    def state(self) -> dict[Tensor, dict[str, Any]]:
        """State of the inner optimizer, by master."""
        state: dict[Tensor, dict[str, Any]] = self._zero.optimizer.state
        return state

    def parts(self) -> Iterator[Part]:
        """Everything that this rank owns a part of."""
        for parameters, master in zip(self._zero.bit16_groups, self.masters, strict=True):
            for parameter in parameters:
                mapping = getattr(parameter, _MAPPING)
                if mapping is None:
                    continue  # this rank owns no part of it
                here, there = (getattr(mapping, name) for name in _ADDRESSES)
                yield Part(parameter, here.start, here.numel, master, there.start)

    def gradients(self) -> Iterator[tuple[Part, Tensor]]:
        """Every part with its elements of the accumulated and reduced gradient, flat: a view."""
        pieces = {
            master: dict(zip(accumulate((p.numel() for p in held), initial=0), held, strict=False))
            for i, master in enumerate(self.masters)
            for held in [self._zero.averaged_gradients[i]]
        }
        for part in self.parts():
            yield part, pieces[part.master][part.master_start].reshape(-1)

    def grad_norm(self) -> Tensor:
        """Global norm of the accumulated and reduced gradient, which the library sums in fp64."""
        norm: Tensor = self._zero.scaled_global_norm()
        return norm

    def scale_gradients(self, factor: Tensor) -> None:
        for pieces in self._zero.averaged_gradients.values():
            for piece in pieces:
                piece.mul_(factor)

    def discard_gradients(self) -> None:
        """Drop what was accumulated, as the library does when it skips a step by itself."""
        self._zero.micro_step_id = -1
        self._zero.zero_grad(set_to_none=True)
        self._zero._release_preflattened_grad_buffers()
        for held in (self._zero.averaged_gradients, self._zero.all_grad_tensors):
            for group in held:
                held[group] = None

    def publish_masters(self) -> None:
        """Round the masters into the model's weights, on every rank."""
        self._zero.update_lp_params()


def _require(what: str, owner: object, names: Iterable[str]) -> None:
    missing = [name for name in names if not hasattr(owner, name)]
    if missing:
        raise RuntimeError(
            f"DeepSpeed {deepspeed.__version__} lacks {', '.join(missing)} in {what}; this version "
            f"of nemo_hybrid was tested with DeepSpeed {TESTED}"
        )
