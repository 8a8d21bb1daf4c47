"""What configuration files say of an assignment, read with the rules of those who load it."""

from __future__ import annotations

import json
import random
import re
from fnmatch import fnmatch
from functools import cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from types import ModuleType
from typing import get_args

import pytest
import torch

from helpers.tiny_models import tiny_config
from nemo_hybrid import HybridLM
from nemo_hybrid.checkpoint.load import tensors_by_name
from nemo_hybrid.checkpoint.names import is_stacked, to_hub
from nemo_hybrid.export.layout import (
    ALGOS,
    ExportFacts,
    Target,
    modules_of,
    quantization_configs,
    stored_like,
)
from nemo_hybrid.precision.assign import assign, places, planned
from nemo_hybrid.precision.quantize import weight_tensors

CONFIG = tiny_config(
    "ME*M-E*MM-EE*", hidden_size=64, moe_intermediate_size=32, mamba_head_dim=16,
    moe_shared_expert_intermediate_size=48, n_routed_experts=3, mtp_num_depths=1,
)  # fmt: skip
LINEAR = 2  # dimensions; convolutions have three and are linear layers in vLLM


@cache
def modules() -> list[str]:
    """What is a linear layer, or an expert, in an engine, by name on disk."""
    with torch.device("meta"):
        model = HybridLM(CONFIG)
    names = [(n, p) for own, t in tensors_by_name(model).items() for n, p in to_hub(own, t)]
    return [
        n.removesuffix(".weight") for n, p in names
        if n.endswith(".weight") and p.dim() >= LINEAR and "embeddings" not in n
    ]  # fmt: skip


def some_assignments() -> list[dict]:
    """At random, from the same few formats; every second one quantizes in the MTP block, too."""
    drawn = []
    for seed in range(8):
        rng = random.Random(seed)
        formats = rng.choice([["bf16", "nvfp4"], ["bf16", "fp8"], ["bf16", "fp8", "nvfp4_w4a16"]])
        chosen: dict[str, str] = {}
        for place in places(CONFIG):
            owner, _, leaf = place.rpartition(".")
            fused = is_stacked(place) or leaf in ("q_proj", "k_proj", "v_proj")
            free = seed % 2 or not place.startswith("mtp.")
            key = owner if fused else place
            chosen[key] = chosen.get(key) or (rng.choice(formats) if free else "bf16")
            chosen[place] = chosen[key]
        drawn.append({place: chosen[place] for place in places(CONFIG)})
    return drawn


def wanted(assignment: dict) -> dict[str, str | None]:
    sizes = places(CONFIG)
    known = {m: f for p, f in assignment.items() for m in modules_of(p, sizes[p])}
    return {name: ALGOS.get(known.get(name, "bf16")) for name in modules()}


def vllm_algo(config: dict, name: str) -> str | None:
    """By the rules of vLLM's modelopt.py: excluded by name, by part, by glob; q, k and v are one
    module, and so are experts of a layer; in mixed precision, its fallbacks."""
    head, dot, _ = name.partition(".experts.")
    name = (head + ".experts" if dot else name).replace("backbone", "model")
    seen = re.sub(r"\.[qkv]_proj$", ".qkv_proj", name)
    ignore = []
    for entry in config["ignore"]:
        split = entry.endswith("*") and not entry.endswith(".*")
        ignore += [entry[:-1], entry[:-1] + ".*"] if split else [entry]
    ignore = [entry.replace("backbone", "model") for entry in ignore]
    if any(entry == name or entry in seen or fnmatch(seen, entry) for entry in ignore):
        return None
    if dot and any(name in entry for entry in ignore):
        return None
    if config["quant_algo"] != "MIXED_PRECISION":
        return config["quant_algo"]
    layers = {k.replace("backbone", "model"): v for k, v in config["quantized_layers"].items()}
    if name in layers:
        return layers[name]["quant_algo"]
    for start in (seen + ".", seen.removesuffix("experts") if dot else "no such"):
        for key, layer in layers.items():
            if key.startswith(start):
                return layer["quant_algo"]
    return None


def test_vllm_finds_every_format() -> None:
    for assignment in some_assignments():
        config, whole = quantization_configs(CONFIG, assignment, "mixed", kv_cache=False)
        assert {name: vllm_algo(config, name) for name in modules()} == wanted(assignment)
        assert whole["quantization"]["kv_cache_quant_algo"] is None
        formats = set(assignment.values()) - {"bf16"}
        if len(formats) == 1:
            target = "fp8" if formats == {"fp8"} else "nvfp4"
            config, _ = quantization_configs(CONFIG, assignment, target, kv_cache=False)
            assert config["quant_algo"] == ALGOS[formats.pop()]
            assert {name: vllm_algo(config, name) for name in modules()} == wanted(assignment)
    # The list of what is excluded is needed.
    bare = {**config, "ignore": []}
    assert {name: vllm_algo(bare, name) for name in modules()} != wanted(assignment)


def test_excluded_experts_are_not_taken_for_shared_ones() -> None:
    assignment = assign(CONFIG, None, {"*shared_experts*": "fp8"})
    config, _ = quantization_configs(CONFIG, assignment, "mixed", kv_cache=False)
    name = "backbone.layers.1.mixer.experts.3.up_proj"
    assert vllm_algo(config, name) is None
    assert vllm_algo({**config, "ignore": ["lm_head"]}, name) == "FP8"


def converter() -> ModuleType:
    """modelopt's file alone: importing the package around it takes half a minute."""
    package = find_spec("modelopt")
    if package is None:
        pytest.skip("nvidia-modelopt is not installed; the dev extra has it")
    path = Path(package.submodule_search_locations[0], "torch", "export", "convert_hf_config.py")
    spec = spec_from_file_location("convert_hf_config", path)
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("kv_cache", [False, True])
def test_both_files_agree_as_modelopts_do(kv_cache) -> None:
    convert = converter()
    for target, preset in (("nvfp4", "nano"), ("fp8", "super"), ("mixed", "super")):
        for calibrated in (True, target == "nvfp4"):
            assignment = planned(CONFIG, target, preset, {}, calibrated or target != "nvfp4")
            config, whole = quantization_configs(CONFIG, assignment, target, kv_cache)
            theirs = convert.convert_hf_quant_config_format(json.loads(json.dumps(whole)))
            # vLLM reads it there; modelopt has it in the groups alone.
            assert config.pop("group_size", None) == (None if target == "fp8" else 16)
            assert config.pop("config_groups").keys() == theirs["config_groups"].keys()
            theirs_groups = theirs.pop("config_groups")
            again, _ = quantization_configs(CONFIG, assignment, target, kv_cache)
            assert list(again["config_groups"].values()) == list(theirs_groups.values())
            assert config == theirs
            needed = {"quant_algo", "kv_cache_quant_algo", "exclude_modules"}
            assert needed <= whole["quantization"].keys()
            assert ("group_size" in whole["quantization"]) == (target != "fp8")


def test_compressed_tensors_finds_every_format() -> None:
    quantization = pytest.importorskip("compressed_tensors.quantization")
    match = pytest.importorskip("compressed_tensors.utils.match")
    checked = 0
    for assignment in some_assignments():
        if set(assignment.values()) != {"bf16", "nvfp4"}:
            continue
        assignment["lm_head"] = "bf16"
        config, whole = quantization_configs(CONFIG, assignment, "compressed-tensors", False)
        assert whole is None
        parsed = quantization.QuantizationConfig.model_validate(config)
        group = parsed.config_groups["group_0"]
        assert (group.weights.group_size, group.input_activations.dynamic) == (16, "local")
        module = torch.nn.Linear(1, 1)
        for prefix in ("backbone.", "model."):
            for name, algo in wanted(assignment).items():
                loaded = name.replace("backbone.", prefix)
                targets, ignore = group.targets, parsed.ignore
                assert match.is_match(loaded, module, targets, ignore) == (algo is not None), loaded
        checked += 1
    assert checked > 1
    weights_alone = planned(CONFIG, "compressed-tensors", "conservative", {}, calibrated=False)
    config, _ = quantization_configs(CONFIG, weights_alone, "compressed-tensors", False)
    assert config["config_groups"]["group_0"]["input_activations"] is None
    assert r"re:.*\.mixer\.gate$" in config["ignore"]
    assert not any("backbone" in entry or "layers" in entry for entry in config["ignore"])


@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
@pytest.mark.parametrize("format", ["fp8", "nvfp4", "nvfp4_w4a16"])
def test_announced_shapes_are_those_of_the_quantizer(layout, format) -> None:
    like = stored_like((48, 32), format, layout)
    made = weight_tensors(torch.randn(48, 32), format, layout)
    inputs = {p: like.pop(p) for p in list(like) if p.startswith("input_")}
    if layout == "modelopt" or format != "fp8":  # fp8 is written in modelopt's layout alone
        found = {p: (t.shape, t.dtype) for p, t in made.items()}
        assert found == {p: (t.shape, t.dtype) for p, t in like.items()}
    assert bool(inputs) == (format != "nvfp4_w4a16")


def test_plain_exports_say_nothing() -> None:
    assignment = planned(CONFIG, "bf16", "conservative", {}, calibrated=False)
    assert quantization_configs(CONFIG, assignment, "bf16", False) == (None, None)
    assert set(get_args(Target)) == {"bf16", "nvfp4", "mixed", "fp8", "compressed-tensors"}
    assert "errors" in ExportFacts.__dataclass_fields__
