"""HybridLM against transformers' NemotronH: logits and the gradient of every parameter, fp32, CPU.

The weights are loud (see ``helpers.tiny_models``), and every case shows with its own model and its
own tokens that it would notice: each sabotage of the pattern's layers must change the logits by
more than 1e-2 of their norm (most change them by 0.2 and more), a thousand times the tolerance, and
a gradient lost on its way shows a hundred times its own.

Tolerances are relative to the Euclidean norm of the tensor that transformers computes: of all
logits together, and of the gradient of each parameter alone. Rounding eight times as badly
(``helpers.bands.jittered``) moves the logits by up to 6e-6, and by up to 5e-5 the gradients of a
few numbers such as A_log and D, whose terms cancel; matrices' by a tenth of that. They hold with
the routing weight before the down projection here and after it there: both are the same sum.

No token comes closer than 1e-4 to another choice of experts.

Their clamp of the time step is neutralised, and nothing else of theirs (``nemotron_h_oracle``).
"""

from __future__ import annotations

from collections.abc import Callable
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from helpers.bands import SABOTAGE, jittered
from helpers.nemotron_h_oracle import their_name, transformers_twin
from helpers.sabotage import (
    NOTICED,
    quiet_paths,
    relative,
    router_without_gradient,
    scan_without_gradient_through_the_carry,
)
from helpers.tiny_models import (
    CHUNK,
    CONV,
    decided_model,
    loud_model,
    random_ids,
    smallest_routing_margin,
    tiny_config,
)
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.model.hybrid import HybridLM

TOLERANCE, GRADIENTS = 1e-5, 1e-4
MARGIN = 1e-4
VANISHED = 1e-6  # of the largest gradient: nothing but rounding

FIRST_SEED = 3  # no parameter's gradient happens to cancel away

OFF_GRID = 4 * CHUNK + 5
# Shorter than the convolution, around its width and the chunk's, and several chunks on and off the
# grid.
LENGTHS = [1, CONV - 2, CONV - 1, CONV, CONV + 1, CHUNK - 1, CHUNK, CHUNK + 1, 3 * CHUNK, OFF_GRID]
MIXED = "ME*-ME"
# The norm takes the size of a whole head away there, and most of the gradient of D and dt with it:
# wide heads and long rows leave more than rounding.
GROUP_PER_HEAD = {"n_groups": 8, "mamba_head_dim": 24}
CASES: dict[str, tuple[str, dict[str, object], int]] = {
    "mamba-one-group": ("M", {"n_groups": 1}, OFF_GRID),
    "mamba-group-per-head": ("M", GROUP_PER_HEAD, 3 * CHUNK - 1),
    "mamba-narrow-convolution": ("M", {"conv_kernel": 2}, OFF_GRID),
    "attention-one-kv-head": ("*", {"num_key_value_heads": 1}, OFF_GRID),
    "attention-kv-head-per-head": ("*", {"num_key_value_heads": 4}, OFF_GRID),
    "moe-full-width": ("E", {"moe_latent_size": None}, OFF_GRID),
    "mixed-one-group-full-width": (MIXED, {"n_groups": 1, "moe_latent_size": None}, 2 * CHUNK + 1),
    "mixed-group-per-head": ("ME*-M", GROUP_PER_HEAD, OFF_GRID),
    "mixed-attention-first": ("*E-MEM", {}, OFF_GRID),
    "mixed-same-kind-in-a-row": ("MM**EE--", {}, CHUNK + 3),
}
CASES |= {
    f"{name}-length-{length}": (pattern, {}, length)
    for name, pattern in {"mamba": "M", "attention": "*", "mixed": MIXED}.items()
    for length in LENGTHS
}
CASES |= {f"moe-length-{length}": ("E", {}, length) for length in (1, OFF_GRID)}
CASES |= {f"mlp-length-{length}": ("-", {}, length) for length in (1, OFF_GRID)}
CASES |= {
    f"moe-top-{k}-{'normalised' if normalised else 'plain'}-times-{scaling}": (
        "E",
        {
            "num_experts_per_tok": k,
            "norm_topk_prob": normalised,
            "routed_scaling_factor": scaling,
        },
        OFF_GRID,
    )
    for k in (1, 2, 7)
    for normalised in (True, False)
    for scaling in (1.0, 0.7, 5.0)
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_those_of_transformers(case: str) -> None:
    pattern, changes, length = CASES[case]
    config = parity_config(pattern, **changes)
    ids_BS = random_ids(config, 2, length)
    model = decided_model(config, ids_BS, MARGIN, FIRST_SEED)
    assert smallest_routing_margin(model, ids_BS) > MARGIN
    logits, gradients = deviations(model, ids_BS)
    assert logits < TOLERANCE
    assert {name: d for name, d in gradients.items() if not d < GRADIENTS} == {}
    assert quiet_paths(model, ids_BS) == {}


def test_rounding_eight_times_as_badly_stays_within_the_tolerances() -> None:
    config = parity_config(MIXED, n_groups=1, moe_latent_size=None)  # the worst of the cases
    ids_BS = random_ids(config, 2, 2 * CHUNK + 1)
    model = decided_model(config, ids_BS, MARGIN, FIRST_SEED)
    logits, gradients = jittered(lambda: deviations(model, ids_BS))
    assert TOLERANCE / SABOTAGE < logits < TOLERANCE
    assert GRADIENTS / SABOTAGE < max(gradients.values()) < GRADIENTS


@pytest.mark.parametrize(
    ("pattern", "lost"),
    [
        ("*", "attention without preference"),
        ("E", "routed experts zeroed"),
        (MIXED, "routed experts zeroed"),
    ],
)
def test_a_model_as_initialised_would_not_do(pattern: str, lost: str) -> None:
    """It computes nearly the same logits with layers broken, so the cases above refuse it."""
    config = tiny_config(pattern)
    quiet = quiet_paths(HybridLM(config), random_ids(config, 2, OFF_GRID))
    assert lost in quiet


@pytest.mark.parametrize(
    ("place", "broken", "wrong"),
    [
        ("router.topk_router", router_without_gradient, "gate.weight"),
        ("sequence.ssd_scan", scan_without_gradient_through_the_carry, "in_proj.weight"),
    ],
)
def test_a_gradient_lost_on_its_way_is_noticed(
    place: str, broken: Callable[..., tuple[Tensor, ...]], wrong: str
) -> None:
    """The values are right, so the logits agree; only the gradients tell."""
    config = parity_config(MIXED)
    ids_BS = random_ids(config, 2, OFF_GRID)
    model = decided_model(config, ids_BS, MARGIN, FIRST_SEED)
    with patch(f"nemo_hybrid.model.{place}", broken):
        logits, gradients = deviations(model, ids_BS)
    assert logits < TOLERANCE
    found = {name: d for name, d in gradients.items() if name.endswith(wrong)}
    assert len(found) == 2
    assert min(found.values()) > NOTICED


def test_the_clamp_of_transformers_is_the_only_thing_that_was_neutralised() -> None:
    """With time steps far below ``time_step_min`` their clamp matters, and only ours is right."""
    model = loud_model(tiny_config("M"), seed=1)
    with torch.no_grad():
        model.backbone.layers[0].mixer.dt_bias.fill_(-9.0)
    ids_BS = random_ids(model.config, 2, OFF_GRID)
    twin = transformers_twin(model)
    with torch.no_grad():
        ours = model(ids_BS).logits
        assert relative(ours, twin(ids_BS, use_cache=False).logits) < TOLERANCE
        twin.model.layers[0].mixer.time_step_limit = (model.config.time_step_min, float("inf"))
        assert relative(ours, twin(ids_BS, use_cache=False).logits) > SABOTAGE * TOLERANCE


def parity_config(pattern: str, **changes: object) -> HybridConfig:
    """More heads than usual: the gradients of A_log, D and dt_bias are vectors of that length, and
    one whose few numbers all happen to be small is mostly rounding."""
    return tiny_config(pattern, **({"mamba_num_heads": 8} | changes))


def deviations(model: HybridLM, ids_BS: Tensor) -> tuple[float, dict[str, float]]:
    """Of the logits, and of the gradient of every parameter by name, from transformers'.

    A gradient that must vanish is judged by its size beside the model's largest one, scaled so
    that it deviates by the tolerance when it is as large as rounding may leave it.
    """
    twin = transformers_twin(model)
    ours, theirs = model(ids_BS).logits, twin(ids_BS, use_cache=False).logits
    probe = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    model.zero_grad()
    (ours * probe).sum().backward()
    (theirs * probe).sum().backward()
    their_parameters = dict(twin.named_parameters())
    parameters = dict(model.named_parameters())
    assert len(parameters) == len(their_parameters)
    largest = max(float(p.grad.norm()) for p in their_parameters.values())
    found: dict[str, float] = {}
    for name, parameter in parameters.items():
        mine, their = parameter.grad, their_parameters[their_name(name)].grad
        if their.norm() > VANISHED * largest:
            found[name] = relative(mine, their)
        else:
            assert has_no_gradient(name, model.config, ids_BS.shape[1]), name
            found[name] = GRADIENTS * float(mine.norm()) / (VANISHED * largest)
    return relative(ours, theirs), found


def has_no_gradient(name: str, config: HybridConfig, length: int) -> bool:
    """Whether exact arithmetic gives zero: for the router when its only weight is always 1, and for
    what compares or connects tokens when there is only one."""
    if name.endswith("gate.weight"):
        return config.norm_topk_prob and config.num_experts_per_tok == 1
    return length == 1 and name.endswith(("A_log", "q_proj.weight", "k_proj.weight"))
