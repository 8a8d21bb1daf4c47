"""Exports of one tiny model in every format, and ways to damage them."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from helpers.nvfp4_formula import E2M1
from helpers.tiny_models import loud_model, random_ids, tiny_config
from nemo_hybrid.checkpoint.manifest import manifest_text
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.export.calibrate import calibrate
from nemo_hybrid.export.layout import Target
from nemo_hybrid.export.verify import verify_directory
from nemo_hybrid.export.write import export_directory
from nemo_hybrid.files import FileRecord
from nemo_hybrid.hub import HybridLM
from nemo_hybrid.precision.assign import assign

WEIGHTS = "model-00001-of-00001.safetensors"
INDEX = "model.safetensors.index.json"
TWIN = "hf_quant_config.json"
EXPERT = "backbone.layers.1.mixer.experts.0.up_proj"
ANY = "backbone.layers.1.mixer.shared_experts.up_proj"
Made = Callable[..., Path]


class Kind(NamedTuple):
    target: Target
    rules: dict[str, str]
    kv_cache: bool = False


MIXED = {
    "backbone*.experts.*": "nvfp4",
    "*.shared_experts.*": "fp8",
    "*.mixer.in_proj": "fp8",
    "backbone.layers.2.mixer.[qkv]_proj": "nvfp4_w4a16",
}
EXPERTS = "backbone*.mixer.experts.*"
KINDS = {
    "bf16": Kind("bf16", {}),
    "mixed": Kind("mixed", MIXED, kv_cache=True),
    "everything": Kind(
        "mixed",
        {"*": "fp8", "*lm_head": "fp8", "*latent*": "nvfp4", "mtp.*": "nvfp4"},
        kv_cache=True,
    ),
    "nvfp4": Kind("nvfp4", {EXPERTS: "nvfp4"}),
    "w4a16": Kind("nvfp4", {EXPERTS: "nvfp4_w4a16"}),
    "fp8": Kind("fp8", {"*.mixer.in_proj": "fp8", "*.shared_experts.*": "fp8"}),
    "compressed": Kind("compressed-tensors", {EXPERTS: "nvfp4", "*.mixer.[qkv]_proj": "nvfp4"}),
    "compressed_w4a16": Kind("compressed-tensors", {EXPERTS: "nvfp4_w4a16"}),
}


def export_config(pattern: str = "ME*-", **changes: object) -> HybridConfig:
    """A tiny model whose widths are all divisible by 16."""
    sizes: dict[str, object] = dict(
        mamba_head_dim=16, moe_intermediate_size=32, moe_shared_expert_intermediate_size=48,
        mtp_num_depths=1, n_routed_experts=4, num_experts_per_tok=2,
    )  # fmt: skip
    return tiny_config(pattern, **(sizes | changes))


def write_export(place: Path, kind: Kind) -> HybridLM:
    """``base`` and ``export`` in a directory; the source, in bf16."""
    model = loud_model(export_config()).bfloat16()
    model.save_hf(str(place / "base"))
    assignment = assign(model.config, None, kind.rules)
    inputs = {"fp8", "nvfp4"} & set(assignment.values())
    seen = calibrate(model, [random_ids(model.config, 2, 40)]) if inputs else None
    export_directory(
        place / "base", place / "export", assignment, target=kind.target, calibration=seen,
        kv_cache="fp8" if kind.kv_cache else "none", show_progress=False,
        describe=lambda *_: {"README.md": b"# Card"},
    )  # fmt: skip
    return model


def naive_decode(parts: Mapping[str, Tensor]) -> Tensor:
    """fp32 values, element by element as the formats say."""
    packed = parts["weight_packed" if "weight_packed" in parts else "weight"]
    if packed.dtype != torch.uint8:
        return packed.float() * parts["weight_scale"]
    grid = torch.from_numpy(E2M1).float()
    codes = torch.stack((packed & 15, packed >> 4), -1).flatten(-2).long()
    values = grid[codes & 7] * (1 - 2 * (codes >> 3))
    factor = (
        parts["weight_scale_2"] if "weight_scale_2" in parts else 1 / parts["weight_global_scale"]
    )
    scale = parts["weight_scale"].float().repeat_interleave(16, 1)
    return values * scale * factor


def edit_json(directory: Path, name: str, change: Callable[[dict[str, Any]], object]) -> None:
    """Change a JSON file, and the manifest with it."""
    value = json.loads((directory / name).read_text())
    change(value)
    (directory / name).write_text(json.dumps(value))
    seal(directory)


def edit_tensors(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    """Change the tensors of the only file, and index and manifest with it."""
    tensors = load_file(directory / WEIGHTS)
    change(tensors)
    save_file(tensors, directory / WEIGHTS, {"format": "pt"})
    edit_json(directory, INDEX, lambda i: i.update(weight_map=dict.fromkeys(tensors, WEIGHTS)))


def seal(directory: Path) -> None:
    """Write the manifest of what is there."""
    records = {}
    for path in sorted(directory.iterdir()):
        if path.name != "manifest.json":
            content = path.read_bytes()
            records[path.name] = FileRecord(len(content), hashlib.sha256(content).hexdigest())
    (directory / "manifest.json").write_text(manifest_text(records))


def failed(directory: Path, base: bool = True) -> dict[str, str]:
    """Name of a check that failed -> what it says."""
    result = verify_directory(
        directory, base=str(directory.parent / "base") if base else None, tokens=40
    )
    return {check.name: check.note for check in result.checks if check.passed is False}
