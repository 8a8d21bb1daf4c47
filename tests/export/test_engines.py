"""What is written in every format, read by others: engines' rules restated, and their libraries."""

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from helpers.decoders import decoder
from helpers.engines import read_as_engines
from helpers.exported import (
    ANY,
    EXPERT,
    KINDS,
    TWIN,
    WEIGHTS,
    Made,
    edit_json,
    naive_decode,
)
from helpers.tiny_models import random_ids
from nemo_hybrid.checkpoint.load import tensors_by_name
from nemo_hybrid.checkpoint.names import to_hub
from nemo_hybrid.export.verify import load_exported
from nemo_hybrid.hub import HybridLM


@pytest.mark.parametrize("kind", KINDS)
def test_engines_read_what_is_written(exported: Made, kind: str) -> None:
    directory = exported(kind) / "export"
    seen = read_as_engines(directory)
    raw = (directory / WEIGHTS).read_bytes()
    header = json.loads(raw[8 : 8 + int.from_bytes(raw[:8], "little")])
    del header["__metadata__"]
    found = {name: f"{entry['dtype']} {entry['shape']}" for name, entry in header.items()}
    for name in seen.optional & found.keys():
        assert found.pop(name) == "F32 []"
    assert found == seen.tensors
    assert set(seen.formats.values()) == set(KINDS[kind].rules.values())


@pytest.mark.slow
@pytest.mark.parametrize("library", ["by hand", "compressed_tensors", "modelopt"])
def test_others_decode_the_same_weights(exported: Made, library: str) -> None:
    decode = naive_decode if library == "by hand" else decoder(library)
    for kind in KINDS:
        directory = exported(kind) / "export"
        model = load_exported(directory)
        weights = {n: t for own, x in tensors_by_name(model).items() for n, t in to_hub(own, x)}
        stored = load_file(directory / WEIGHTS)
        for module in read_as_engines(directory).formats:
            names = [name for name in stored if name.startswith(f"{module}.")]
            parts = {name.rpartition(".")[2]: stored[name] for name in names}
            ours = weights[f"{module}.weight"]
            torch.testing.assert_close(ours, decode(parts), rtol=1e-6, atol=0, msg=module)
    damaged = next(n for n, t in parts.items() if t.dim() == 2 and n.startswith("weight"))
    parts[damaged] = parts[damaged].view(torch.uint8).roll(1, 1).view(parts[damaged].dtype)
    assert not torch.allclose(ours, decode(parts), rtol=1e-2, atol=0)


def test_the_model_is_the_dequantized_one(exported: Made) -> None:
    """Weights and the fp32 list from the files alone; it is no longer the source."""
    directory = exported("everything") / "export"
    model = load_exported(directory)
    weights = {n: t for own, x in tensors_by_name(model).items() for n, t in to_hub(own, x)}
    stored = load_file(directory / WEIGHTS)
    quantized = read_as_engines(directory).formats
    plain = [name for name in weights if name.removesuffix(".weight") not in quantized]
    assert all(torch.equal(weights[name], stored[name].float()) for name in plain)
    ids_BS = random_ids(model.config, 2, 24)
    source = HybridLM.from_hf(str(exported("everything") / "base"), dtype=torch.float32)
    with torch.no_grad():
        assert (model(ids_BS).logits - source(ids_BS).logits).abs().max() > 1e-2


Json = dict[str, Any]


def quantization(change: Callable[[Json], object]) -> tuple[str, Callable[[Json], object]]:
    return "config.json", lambda value: change(value["quantization_config"])


@pytest.mark.parametrize(
    ("kind", "edit"),
    [
        ("nvfp4", quantization(lambda q: q["ignore"].append("backbone.layers.1*"))),
        ("nvfp4", quantization(lambda q: q["ignore"].remove("lm_head"))),
        ("nvfp4", quantization(lambda q: q.update(transform_config={}))),
        ("w4a16", quantization(lambda q: q.update(quant_algo="NVFP4"))),
        ("mixed", quantization(lambda q: q["quantized_layers"].pop(EXPERT))),
        ("mixed", quantization(lambda q: q["ignore"].append(ANY))),
        ("mixed", (TWIN, lambda t: t["quantization"].update(kv_cache_quant_algo=None))),
        ("fp8", quantization(lambda q: q["config_groups"]["group_0"]["weights"].pop("type"))),
        ("compressed", quantization(lambda q: q["ignore"].append(r"re:.*\.qkv_proj$"))),
        ("compressed", quantization(lambda q: q["ignore"].append("re:(a*)*b"))),
        ("compressed", quantization(lambda q: q["config_groups"]["group_0"].update(
            input_activations=None))),
        ("bf16", ("config.json", lambda c: c.update(quantization_config={"quant_method": "awq"}))),
    ],
)  # fmt: skip
def test_the_restated_rules_notice(made: Made, kind: str, edit: Any) -> None:
    """Each edit, by an error or by tensors that are then others."""
    directory = made(kind)
    before = read_as_engines(directory)
    edit_json(directory, *edit)
    try:
        after = read_as_engines(directory)
    except (AssertionError, KeyError):
        return
    assert after.tensors != before.tensors
