"""DeepSpeed's private parts: used in one file, and a version without them is named at start."""

import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import nemo_hybrid.parallel
from nemo_hybrid.config.run import RunConfig
from nemo_hybrid.parallel import deepspeed_private as private
from nemo_hybrid.parallel.engine import _deepspeed_config, first_state

ROOM = Path(nemo_hybrid.parallel.__file__).parent
PRIVATE = re.compile(
    r"groups\._|_hp_mapping|bit16_groups|_fp32_groups|update_lp_params|__compatible_ops__"
)


def zero_like_deepspeed() -> SimpleNamespace:
    master = torch.zeros(6)
    owned, other = torch.nn.Parameter(torch.zeros(4)), torch.nn.Parameter(torch.zeros(2))
    owned._hp_mapping = SimpleNamespace(  # type: ignore[attr-defined]
        lp_fragment_address=SimpleNamespace(start=1, numel=3),
        hp_fragment_address=SimpleNamespace(start=2, numel=3),
    )
    other._hp_mapping = None  # type: ignore[attr-defined]
    return SimpleNamespace(
        _release_preflattened_grad_buffers=lambda: None,
        all_grad_tensors={},
        averaged_gradients={},
        bit16_groups=[[owned, other]],
        micro_step_id=-1,
        optimizer=SimpleNamespace(state={}),
        param_groups=[{"lr": 0.0}],
        scaled_global_norm=lambda: torch.tensor(1.0),
        single_partition_of_fp32_groups=[master],
        update_lp_params=lambda: None,
        zero_grad=lambda set_to_none: None,
    )


def test_one_file_uses_them() -> None:
    users = [p.name for p in sorted(ROOM.glob("*.py")) if PRIVATE.search(p.read_text())]
    assert users == ["deepspeed_private.py"]


def test_parts_that_this_rank_owns() -> None:
    raw = zero_like_deepspeed()
    (part,) = private.ZeroOptimizer(raw).parts()
    assert part.parameter is raw.bit16_groups[0][0]
    assert (part.start, part.numel, part.master_start) == (1, 3, 2)


@pytest.mark.parametrize(
    "name", [*vars(zero_like_deepspeed()), "_hp_mapping", "lp_fragment_address"]
)
def test_a_changed_optimizer_is_named(name: str) -> None:
    raw = zero_like_deepspeed()
    owner = raw
    if name not in vars(raw):
        parameter = raw.bit16_groups[0][0]
        owner = parameter if name == "_hp_mapping" else parameter._hp_mapping
    delattr(owner, name)
    with pytest.raises(RuntimeError, match=f"lacks {name} .* tested with DeepSpeed 0.19"):
        private.ZeroOptimizer(raw)


def test_a_version_without_our_options_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    private.check_library()
    older = SimpleNamespace(parameter_alignment=False)
    monkeypatch.setattr(private, "DeepSpeedZeroConfig", lambda: older)
    with pytest.raises(RuntimeError, match="lacks compute_grad_norm in its options of ZeRO"):
        private.check_library()


def test_state_is_that_of_the_optimizer_and_lies_beside_the_parameter() -> None:
    parameter = torch.zeros(3, requires_grad=True)
    optimizer = torch.optim.AdamW([parameter], fused=True)
    parameter.grad = torch.zeros(3)
    optimizer.step()
    theirs, ours = optimizer.state[parameter], first_state(parameter)
    assert {n: (t.shape, t.dtype) for n, t in ours.items()} == {
        n: (t.shape, t.dtype) for n, t in theirs.items()
    }
    elsewhere = first_state(torch.empty(3, device="meta"))
    assert {t.device.type for t in elsewhere.values()} == {"meta"}


def test_changed_group_functions_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    private.check_library()
    monkeypatch.delattr(private.groups, "_get_expert_parallel_group")
    with pytest.raises(RuntimeError, match="lacks _get_expert_parallel_group in its groups"):
        private.check_library()


def test_its_timer_does_not_wait_for_the_device() -> None:
    """As it reads the configuration that the engine is given; by itself it would."""
    from deepspeed.utils.config import get_timers_config

    assert get_timers_config({}).enabled
    assert not get_timers_config(_deepspeed_config(RunConfig(), 1, 1, 1)).enabled
