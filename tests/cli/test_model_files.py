"""The shapes of the released models, built on the meta device, have their numbers of parameters."""

from pathlib import Path

import pytest
import torch

from nemo_hybrid import HybridLM
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.read import load_config
from nemo_hybrid.train.flops import parameter_counts

MODELS = Path(__file__).parents[2] / "configs" / "model"

# Without MTP, the MTP block, active: computed by hand from the published dimensions. Super's are
# also the sums of the shapes in its released files.
REFERENCE = {
    "nano": (31_577_937_344, 0, 3_580_073_408),
    "lightning": (31_577_937_344, 1_335_325_824, 3_580_073_408),
    "super": (120_668_687_360, 2_942_324_736, 12_770_216_960),
    "ultra": (549_308_968_960, 11_215_609_856, 56_058_818_560),
}


def shape_in(name: str) -> HybridConfig:
    return load_config([], ["--model", str(MODELS / f"{name}.yaml")]).model.hybrid()


@pytest.mark.parametrize("name", sorted(REFERENCE))
def test_parameters_of_the_released_models(name: str) -> None:
    config = shape_in(name)
    with torch.device("meta"):
        model = HybridLM(config)
    sizes = {parameter: tensor.numel() for parameter, tensor in model.named_parameters()}
    mtp = sum(size for parameter, size in sizes.items() if parameter.startswith("mtp."))
    backbone = sum(sizes.values()) - mtp
    # A token meets k of E experts in every layer, and no MTP block.
    experts = sum(
        size
        for parameter, size in sizes.items()
        if ".experts." in parameter and not parameter.startswith("mtp.")
    )
    k, e = config.num_experts_per_tok, config.n_routed_experts
    active = backbone - experts + experts * k // e

    assert (backbone, mtp, active) == REFERENCE[name]
    counts = parameter_counts(config)
    assert (counts.backbone, counts.mtp, counts.active) == REFERENCE[name]
    assert counts.total == backbone + mtp


@pytest.mark.parametrize(
    ("name", "layers"), [("nano", "23 23 6"), ("super", "40 40 8"), ("ultra", "48 48 12")]
)
def test_layers_of_the_released_models(name: str, layers: str) -> None:
    pattern = shape_in(name).pattern
    assert [pattern.count(letter) for letter in "ME*"] == [int(n) for n in layers.split()]
    assert set(pattern) == set("ME*")


def test_routing_of_the_released_models() -> None:
    """What the number of parameters does not show."""
    rows = [shape_in(name) for name in ("nano", "lightning", "super", "ultra")]
    assert [c.num_experts_per_tok for c in rows] == [6, 6, 22, 22]
    assert [c.routed_scaling_factor for c in rows] == [2.5, 2.5, 5.0, 5.0]
    assert [c.mtp_num_depths for c in rows] == [0, 2, 2, 2]
    assert [c.initializer_range for c in rows] == [0.0173, 0.0173, 0.014, 0.0099]
    assert {(c.n_groups, c.ssm_state_size, c.chunk_size, c.norm_topk_prob) for c in rows} == {
        (8, 128, 128, True)
    }
