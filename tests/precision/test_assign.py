"""Presets, the user's globs, and what engines fuse."""

from __future__ import annotations

import re

import pytest
from torch import nn

from helpers.tiny_models import tiny_config
from nemo_hybrid import HybridLM, UserError
from nemo_hybrid.precision.assign import (
    FORMATS,
    PRESETS,
    assign,
    groups,
    places,
    planned,
)
from nemo_hybrid.precision.groups import family

WIDE: dict[str, object] = {  # widths that 16 divides
    "hidden_size": 64, "moe_intermediate_size": 32, "moe_shared_expert_intermediate_size": 48,
    "mamba_head_dim": 16,
}  # fmt: skip
CONFIG = tiny_config("ME*M-E", mtp_num_depths=2, **WIDE)
Q = "backbone.layers.2.mixer.q_proj"
UP = "backbone.layers.1.mixer.experts.up_proj"
DOWN = "backbone.layers.1.mixer.experts.down_proj"


def quantized(assignment: dict) -> dict:
    return {place: format for place, format in assignment.items() if format != "bf16"}


def test_places_are_all_linear_layers_and_experts() -> None:
    model = HybridLM(CONFIG)
    modules = {n: m for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    linear = {n: tuple(m.weight.shape) for n, m in modules.items()}
    stacks = {n: tuple(p.shape) for n, p in model.named_parameters() if ".experts." in n}
    assert places(CONFIG) == linear | stacks
    assert places(CONFIG)[UP] == (8, 32, 16)
    kinds = {family(place) for place in places(CONFIG)}
    assert kinds == {
        "experts",
        "shared_experts",
        "mamba",
        "attention",
        "latent",
        "mlp",
        "mtp",
        "head",
    }


@pytest.mark.parametrize(
    ("preset", "wanted"),
    [
        ("conservative", {"experts": "nvfp4", "shared_experts": "nvfp4", "mlp": "nvfp4"}),
        ("super", {"experts": "nvfp4", "shared_experts": "fp8", "mlp": "fp8", "mamba": "fp8"}),
        ("ultra", {"experts": "nvfp4", "shared_experts": "fp8", "mlp": "fp8", "mamba": "fp8"}),
    ],
)
def test_presets_go_by_family(preset, wanted) -> None:
    shape = CONFIG
    for place, format in assign(shape, preset, {}).items():
        assert format == wanted.get(family(place), "bf16"), place


def test_nano_spares_the_mamba_layer_before_attention() -> None:
    shape = tiny_config("M*MM*-", **WIDE)
    got = quantized(assign(shape, "nano", {}))
    assert {p.split(".")[2] for p in got if family(p) == "mamba"} == {"2"}
    assert {family(p) for p in got} == {"mamba", "mlp"}
    assert all(format == "nvfp4" for format in got.values())
    fp8 = quantized(planned(shape, "fp8", "nano", {}, calibrated=True))
    assert fp8.keys() == got.keys()
    assert set(fp8.values()) == {"fp8"}


def test_the_last_glob_that_matches_counts() -> None:
    rules = {"*.mixer.*": "nvfp4_w4a16", "*.[qkvo]_proj": "bf16", "*.o_proj": "fp8"}
    got = assign(CONFIG, None, rules)
    assert got[UP] == got["backbone.layers.0.mixer.in_proj"] == "nvfp4_w4a16"
    assert got[Q] == "bf16"
    assert got["backbone.layers.2.mixer.o_proj"] == "fp8"


def test_head_latent_and_mtp_must_be_named() -> None:
    got = quantized(assign(CONFIG, None, {"*": "fp8"}))
    assert {family(p) for p in got} == {"experts", "shared_experts", "mamba", "attention", "mlp"}
    got = quantized(assign(CONFIG, None, {"*latent_proj": "fp8", "lm_head": "nvfp4"}))
    assert {family(p) for p in got} == {"latent", "head"}  # not the MTP block's latent projections
    got = quantized(assign(CONFIG, None, {"mtp.*": "fp8"}))
    assert {family(p) for p in got} == {"mtp"}
    assert not any("latent" in p for p in got)
    assert (
        quantized(assign(CONFIG, None, {"mtp.*": "fp8", "mtp.*latent*": "fp8"})).keys() > got.keys()
    )
    assert quantized(assign(CONFIG, None, {"mtp.*": "bf16", "lm_h*": "bf16"})) == {}


@pytest.mark.parametrize(
    ("rules", "message"),
    [
        ({"*": "int8"}, "'int8' is no format; use bf16, fp8, nvfp4, nvfp4_w4a16"),
        ({UP + ".weight": "fp8"}, f"nothing in the model, whose layers are counted from 0; the near"
         f"est name is {UP}".replace(".1.", ".*.")),
        ({"backbone.layers.1.mixer.experts.3.up_proj": "fp8"}, "is backbone.layers.*.mixer.experts."
         "up_proj"),
        *(
            ({glob: "fp8"}, "whose format cannot be chosen: linear layers and all experts of a lay")
            for glob in ("*.gate", "*conv1d", "*conv1d.bias", "*embeddings", "*A_log", "*.D",
                         "*dt_bias", "*norm_f", "*e_score*")
        ),
        ({"lm_h*": "fp8"}, 'write "lm_head" in it'),
        ({"*fc1_*": "fp8"}, 'write "latent" in it'),
        ({Q: "fp8"}, "k_proj is bf16, but backbone.layers.2.mixer.q_proj|engines fuse them"),
        ({UP: "nvfp4"}, "experts.down_proj is bf16|engines fuse them, so give both one format"),
        ({"*out_proj": "nvfp4"}, "out_proj has rows of 24, which blocks of 16 do not divide"),
    ],
)  # fmt: skip
def test_unfit_rules(rules, message) -> None:
    shape = tiny_config("ME*", hidden_size=32, mamba_num_heads=2, moe_intermediate_size=32,
                        mtp_num_depths=1)  # fmt: skip
    with pytest.raises(UserError, match="|".join(map(re.escape, message.split("|")))):
        assign(shape, None, rules)


@pytest.mark.parametrize(
    ("target", "preset", "rules", "calibrated", "message"),
    [
        ("bf16", "conservative", {"*": "fp8"}, True, "format is bf16"),
        ("nvfp4", "super", {}, True, "cannot hold, or not beside other formats, but mixed can"),
        ("mixed", "super", {}, False, "is to be fp8, whose products take fp8 inputs, too: name"),
        ("fp8", "super", {"*in_proj": "nvfp4"}, True, "in_proj is to be nvfp4, which --format fp8"),
        ("nvfp4", "conservative", {"*in_proj": "nvfp4_w4a16"}, True, "is to be nvfp4_w4a16"),
        ("compressed-tensors", "super", {}, True, "is to be fp8, which --format compressed"),
        ("compressed-tensors", "conservative", {"lm_head": "nvfp4"}, True, "lm_head: engines"),
        ("nvfp4", "conservative", {"*": "bf16"}, True, "nothing would be quantized"),
    ],
)  # fmt: skip
def test_what_a_target_cannot_hold(target, preset, rules, calibrated, message) -> None:
    shape = tiny_config("ME*", **WIDE)
    with pytest.raises(UserError, match=re.escape(message)):
        planned(shape, target, preset, rules, calibrated)


def test_without_calibration_weights_alone_are_quantized() -> None:
    shape = tiny_config("E", **WIDE)
    for target in ("nvfp4", "mixed", "compressed-tensors"):
        got = quantized(planned(shape, target, "conservative", {}, calibrated=False))
        assert set(got.values()) == {"nvfp4_w4a16"}
        got = quantized(planned(shape, target, "conservative", {}, calibrated=True))
        assert set(got.values()) == {"nvfp4"}
    assert quantized(planned(shape, "bf16", "conservative", {}, calibrated=True)) == {}


def test_groups_share_scales() -> None:
    shape = tiny_config("M**E", **WIDE)
    rules = {"*.mixer.*_proj": "fp8"}
    got = groups(assign(shape, None, rules))
    several = [group for group in got if len(group) > 1]
    wanted = [[f"backbone.layers.{n}.mixer.{p}_proj" for p in "qkv"] for n in (1, 2)]
    assert several == wanted
    assert {p for group in got for p in group} == quantized(assign(shape, None, rules)).keys()


def test_names_of_formats_and_presets() -> None:
    assert FORMATS == ("bf16", "fp8", "nvfp4", "nvfp4_w4a16")
    assert set(PRESETS) == {"conservative", "super", "nano", "ultra"}
