"""HybridLM against transformers' NemotronH: logits and the gradient of every parameter, fp32, CPU.

The weights are loud (see ``helpers.tiny_models``), and every case shows that it would notice:
each sabotage of the pattern's layers must change the logits by more than 1e-2 (they change them by
0.1 and more).

Tolerance: 1e-5 of each tensor's norm. The routing weight stands before the down projection here
and after it there; in fp32 that difference stays inside the tolerance. What deviations there are
(1e-6 in the logits, 3e-6 in the gradients of deep patterns) come from rounding: computing our scan
with another chunk size moves the gradients as much.
"""

import pytest
import torch
from torch import Tensor

from helpers.nemotron_h_oracle import their_name, transformers_twin
from helpers.sabotage import sabotages
from helpers.tiny_models import (
    CHUNK,
    loud_model,
    random_ids,
    smallest_routing_margin,
    tiny_config,
)

TOLERANCE = 1e-5
NOTICED = 1e-2

OFF_GRID = 4 * CHUNK + 5
CASES = {
    "mamba": ("M", {}, OFF_GRID),
    "mamba-one-group": ("M", {"n_groups": 1}, OFF_GRID),
    "mamba-four-groups": ("M", {"n_groups": 4}, 3 * CHUNK - 1),
    "mamba-on-the-grid": ("M", {}, 3 * CHUNK),
    "attention": ("*", {}, OFF_GRID),
    "attention-one-kv-head": ("*", {"num_key_value_heads": 1}, OFF_GRID),
    "moe-latent": ("E", {}, OFF_GRID),
    "moe-full-width": ("E", {"moe_latent_size": None}, OFF_GRID),
    "moe-unnormalised": ("E", {"norm_topk_prob": False, "routed_scaling_factor": 0.7}, OFF_GRID),
    # Without normalisation: a single normalised weight is constant, its gradient only rounding.
    "moe-one-of-eight": ("E", {"num_experts_per_tok": 1, "norm_topk_prob": False}, OFF_GRID),
    "mlp": ("-", {}, OFF_GRID),
    "mixed": ("ME*-ME", {}, OFF_GRID),
    "mixed-one-group": ("ME*-ME", {"n_groups": 1, "moe_latent_size": None}, 2 * CHUNK + 1),
}


@pytest.mark.parametrize("case", CASES)
def test_logits_and_gradients_equal_those_of_transformers(case: str) -> None:
    pattern, changes, length = CASES[case]
    model = loud_model(tiny_config(pattern, **changes), seed=5)
    ids_BS = random_ids(model.config, 2, length)
    twin = transformers_twin(model)
    if "E" in pattern:
        # Rounding must not decide between experts.
        assert smallest_routing_margin(model, ids_BS) > 20 * TOLERANCE

    ours = model(ids_BS).logits
    theirs = twin(ids_BS, use_cache=False).logits
    assert relative(ours, theirs) < TOLERANCE
    probe = torch.randn(ours.shape, generator=torch.Generator().manual_seed(2))
    (ours * probe).sum().backward()
    (theirs * probe).sum().backward()
    their_parameters = dict(twin.named_parameters())
    deviations = {
        name: relative(parameter.grad, their_parameters[their_name(name)].grad)
        for name, parameter in model.named_parameters()
    }
    assert len(deviations) == len(their_parameters)
    wrong = {name: d for name, d in deviations.items() if not d < TOLERANCE}
    assert not wrong

    for name, sabotage in sabotages(pattern).items():
        with torch.no_grad(), sabotage(model):
            change = (model(ids_BS).logits - theirs).abs().max()
        assert change > NOTICED, f"the comparison would not notice: {name}"


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
        assert relative(ours, twin(ids_BS, use_cache=False).logits) > 10 * TOLERANCE


@torch.no_grad()
def relative(ours: Tensor, theirs: Tensor) -> float:
    """Size of the deviation as a fraction of the tensor's own size, in the Euclidean norm."""
    assert theirs.norm() > 0
    return float((ours - theirs).norm() / theirs.norm())
