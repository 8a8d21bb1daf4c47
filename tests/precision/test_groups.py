"""What every part of a model is called, and globs that choose among names."""

import pytest
from torch import nn

from helpers.tiny_models import tiny_config
from nemo_hybrid.globs import last_rule, matched, nearest, of_all_layers, unmatched
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.precision.groups import PRODUCTS, component, family, figures, group_of, is_stacked

LAYER = "backbone.layers.1.mixer"
NAMES = {  # family, metrics, table of formats, table of parameters
    f"{LAYER}.in_proj": ("mamba", "in_proj", "Mamba-2 in_proj", "Mamba-2"),
    f"{LAYER}.out_proj": ("mamba", "out_proj", "Mamba-2 out_proj", "Mamba-2"),
    f"{LAYER}.A_log": ("mamba", "", "", "Mamba-2"),
    f"{LAYER}.norm.weight": ("mamba", "", "", "Mamba-2"),
    f"{LAYER}.o_proj.weight": ("attention", "attention", "attention", "attention"),
    f"{LAYER}.up_proj": ("mlp", "up_proj", "dense MLP", "dense MLP"),
    f"{LAYER}.experts": ("experts", "experts", "routed experts", "LatentMoE: routed experts"),
    f"{LAYER}.experts.up_proj": (
        "experts", "experts", "routed experts", "LatentMoE: routed experts"),
    f"{LAYER}.shared_experts.down_proj": (
        "shared_experts", "shared_experts", "shared experts", "LatentMoE: shared experts"),
    f"{LAYER}.fc2_latent_proj": (
        "latent", "latent_proj", "latent projections", "LatentMoE: latent projections"),
    f"{LAYER}.gate.weight": ("router", "gate", "router", "LatentMoE: routers"),
    "mtp.layers.0.mixer.k_proj": ("mtp", "mtp.attention", "attention", "MTP block"),
    "mtp.layers.0.eh_proj": ("mtp", "mtp.eh_proj", "MTP block", "MTP block"),
    "mtp.layers.0.enorm.weight": ("mtp", "mtp.", "", "MTP block"),
    "lm_head.weight": ("head", "lm_head", "head", "head"),
    "backbone.embeddings.weight": ("embedding", "", "", "embedding"),
    "backbone.layers.1.norm.weight": ("norm", "", "", "norms"),
    "backbone.norm_f.weight": ("norm", "", "", "norms"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names(name: str) -> None:
    found = family(name), figures(name), group_of(name).products, component(name)
    assert found == NAMES[name]


def test_every_part_of_a_model_has_a_group() -> None:
    model = HybridLM(tiny_config("ME*-", mtp_num_depths=1))
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        assert family(name)
        assert component(name)
        assert is_stacked(name) == (parameter.dim() == 3 and ".experts." in name)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) or hasattr(module, "low_precision"):
            assert group_of(name).products in PRODUCTS
            assert group_of(name).figures


def test_globs() -> None:
    names = ["a.0.in_proj", "a.1.in_proj", "b.0.out_proj", "lm_head"]
    assert matched("*.0.*", names) == ["a.0.in_proj", "b.0.out_proj"]
    assert matched("in_proj", names) == matched("*.IN_PROJ", names) == []
    rules = [("*", 1), ("a.*", 2), ("*.1.*", 0)]
    assert [last_rule(rules, name) for name in names] == [2, 0, 1, 1]
    assert last_rule(rules[1:], "lm_head") is None
    assert nearest("*.out_prj", names) == "b.0.out_proj"
    assert nearest("a.0.inproj", names) == "a.0.in_proj"
    assert nearest("*in_prj", names) == "a.0.in_proj"
    assert nearest("x", []) is None
    assert unmatched("*.out_prj", names, []).endswith("the nearest name is b.*.out_proj")
    assert unmatched("lm_*", names[:2], names).startswith("lm_* matches lm_head, whose format")
    assert of_all_layers("a.12.b.3.c") == "a.*.b.*.c"
