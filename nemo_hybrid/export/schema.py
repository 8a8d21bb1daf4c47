"""What an exported directory must hold, derived from its configuration files as engines read them.

Nothing of the writer is used, so that both must be right: names and shapes come from the model that
config.json describes, formats from its ``quantization_config`` (`export.declared`).

A module here is the name of a weight on disk without ``.weight``, one per routed expert.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch

from nemo_hybrid.checkpoint.load import tensors_by_name
from nemo_hybrid.checkpoint.names import to_hub
from nemo_hybrid.config.hf import HybridConfig, config_json, read_config
from nemo_hybrid.config.model import FP32_NAMES
from nemo_hybrid.errors import UserError
from nemo_hybrid.export.declared import GROUP, Format, Layout, declared, in_engines
from nemo_hybrid.files import read_json
from nemo_hybrid.model.hybrid import HybridLM

_EMBEDDINGS = "backbone.embeddings.weight"


class Slot(NamedTuple):
    """One tensor: its safetensors dtype and its shape."""

    dtype: str
    shape: tuple[int, ...]

    def __str__(self) -> str:
        return f"{self.dtype} {list(self.shape)}"


@dataclass(frozen=True)
class Schema:
    """``formats``: of the quantized modules; ``tensors``: everything the files must hold, by name
    on disk; ``optional``: what they may hold beside that."""

    config: HybridConfig
    layout: Layout
    formats: dict[str, Format]
    tensors: dict[str, Slot]
    optional: dict[str, Slot]

    def parts(self, module: str) -> list[str]:
        """Last name parts of the tensors of a quantized module."""
        return list(_slots(self.layout, self.formats[module], (0, 0)))

    def of_modules(self) -> set[str]:
        """Names of all those tensors."""
        return {f"{module}.{part}" for module in self.formats for part in self.parts(module)}

    def shared(self) -> dict[str, list[str]]:
        """What engines hold one number of for several modules -> names of those scalars."""
        out: defaultdict[str, list[str]] = defaultdict(list)
        for module, format in self.formats.items():
            owner = in_engines(module)
            experts = owner.endswith(".experts")
            what = f"{owner}.*.{module.rpartition('.')[2]}" if experts else owner
            for part, slot in _slots(self.layout, format, (0, 0)).items():
                if slot.dtype == "F32" and (part.startswith("input") or not experts):
                    out[f"{what}.{part}"].append(f"{module}.{part}")
        return {what: names for what, names in out.items() if len(names) > 1}


def read_schema(directory: Path, entries: int) -> tuple[Schema, list[str]]:
    """The schema of a directory whose weight files hold so many tensors, and what is wrong with its
    configuration files, in words.

    Raises UserError where they cannot be read, or describe no model of the family.
    """
    path = directory / "config.json"
    raw = read_json(path)
    quantization = raw.pop("quantization_config", None)
    config = read_config(raw, str(path))
    experts = 2 * config.n_routed_experts * config.pattern.count("E")
    if experts > entries:
        raise UserError(f"{path} describes {experts} expert weights; the files hold {entries}")
    problems = _faults_of_model(raw, config)
    plain = _plain(config)
    # Engines keep routers and convolutions as linear layers, too.
    modules = {
        name.removesuffix(".weight"): slot.shape
        for name, slot in plain.items()
        if name.endswith(".weight") and len(slot.shape) > 1 and name != _EMBEDDINGS
    }
    layout, formats, kv_cache = declared(directory, quantization, list(modules), problems)
    problems += _misfits(formats, modules)
    tensors = dict(plain)
    for module, format in formats.items():
        del tensors[f"{module}.weight"]
        for part, slot in _slots(layout, format, modules[module]).items():
            tensors[f"{module}.{part}"] = slot
    optional = {
        f"{module}.{part}_scale": Slot("F32", ())
        for module in modules
        for part in "kv"
        if kv_cache and module.endswith(f".mixer.{part}_proj")
    }
    for name in [name for name in optional if not name.startswith("mtp.")]:
        tensors[name] = optional.pop(name)
    return Schema(config, layout, formats, tensors, optional), problems


def _faults_of_model(raw: Mapping[str, Any], config: HybridConfig) -> list[str]:
    """What config.json says beside, or unlike, what is written of a model of the family: engines
    read fields that we do not (``auto_map``, ``text_config``, ``compression_config``, ...)."""
    wanted = config_json(config)
    if isinstance(raw.get("eos_token_id"), list):  # of which ours is the first
        wanted["eos_token_id"] = raw["eos_token_id"]
    problems = [f"config.json: {name} is unknown" for name in raw.keys() - wanted.keys()]
    return sorted(problems) + [
        f"config.json: {name} is {raw.get(name)!r}, must be {must!r}"
        for name, must in wanted.items()
        if raw.get(name, ...) != must
    ]


def _plain(config: HybridConfig) -> dict[str, Slot]:
    with torch.device("meta"):
        model = HybridLM(config)
    return {
        name: Slot("F32" if name.rpartition(".")[2] in FP32_NAMES else "BF16", tuple(part.shape))
        for own, tensor in tensors_by_name(model).items()
        for name, part in to_hub(own, tensor)
    }


def _slots(layout: Layout, format: Format, shape: tuple[int, ...]) -> dict[str, Slot]:
    """Last name part -> tensor, for a quantized weight [out, in]."""
    given = {"modelopt": "input_scale", "compressed-tensors": "input_global_scale"}[layout]
    scalar = Slot("F32", (1,) if layout == "compressed-tensors" else ())
    if format == "fp8":
        return {"weight": Slot("F8_E4M3", shape), "weight_scale": scalar, given: scalar}
    out, width = shape[0], shape[-1]
    packed, tensor_scale = (
        ("weight", "weight_scale_2")
        if layout == "modelopt"
        else ("weight_packed", "weight_global_scale")
    )
    slots = {
        packed: Slot("U8", (out, width // 2)),
        "weight_scale": Slot("F8_E4M3", (out, width // GROUP)),
        tensor_scale: scalar,
    }
    return slots if format == "nvfp4_w4a16" else {**slots, given: scalar}


def _misfits(formats: Mapping[str, Format], modules: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Formats that a module cannot have, or that engines cannot have beside each other."""
    problems = [
        f"{module} counts as {format}, which shape {list(modules[module])} cannot be: exclude it"
        for module, format in formats.items()
        if len(modules[module]) != 2 or (format != "fp8" and modules[module][1] % GROUP)
    ]
    fused: defaultdict[str, set[str]] = defaultdict(set)
    for module in modules:
        fused[in_engines(module)].add(formats.get(module, "unquantized"))
    return problems + [
        f"{owner}, one module in engines, has several formats: {', '.join(sorted(found))}"
        for owner, found in fused.items()
        if len(found) > 1
    ]
