"""LoRA adapters as directories of PEFT: adapter_config.json and adapter_model.safetensors.

PEFT's names are those of transformers' model, which says ``model.`` where the hub says
``backbone.``, and its experts' matrices lie side by side::

    backbone.layers.0.mixer.in_proj.lora.A                  [r, D_in]   in memory
    base_model.model.model.layers.0.mixer.in_proj.lora_A.weight         on disk
    backbone.layers.1.mixer.experts.up_proj_lora.A          [E, r, D_in]
    backbone.layers.1.mixer.experts.up_proj_lora.B          [E, D_out, r]
    base_model.model.model.layers.1.mixer.experts.lora_A.weight         [E r, D_in]
    base_model.model.model.layers.1.mixer.experts.lora_B.weight         [D_out, r E]

Where both stacks of a layer have adapters, those without ``base_layer`` before ``lora_`` are
down_proj's and those with it up_proj's: PEFT wraps one around the other.

transformers has no MTP block: PEFT passes over adapters of ``mtp.``, which change nothing that it
computes. It refuses adapters of ``out_proj`` in every form (its fused kernels take the weight
itself), and says so; merge them, or leave out_proj out.

Shapes: E experts, r rank.
"""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor, nn

from nemo_hybrid.checkpoint.directory import STEP, Writer
from nemo_hybrid.checkpoint.manifest import MANIFEST, to_json
from nemo_hybrid.checkpoint.names import from_hub
from nemo_hybrid.checkpoint.steps import resolve
from nemo_hybrid.checkpoint.tensors import TensorFile, check_finite, safetensors_parts
from nemo_hybrid.checkpoint.weights import READABLE
from nemo_hybrid.config.finetune import LoraOptions
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import naming, read_json
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.lora import Adapted, adaptable, adapted_of, adapters, add_adapters

log = logging.getLogger(__name__)

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"
BASE = "base.json"
"""Digest of the weights that an adapter of ours was trained beside."""
_END_BYTES = 1 << 20
_KEY = re.compile(r"base_model\.model\.(.+)\.lora_([AB])\.weight")
_STACKS = ("up_proj", "down_proj")
# What may be set without changing what an adapter computes, beside what is read.
_HARMLESS = {
    "alora_invocation_tokens", "auto_mapping", "base_model_name_or_path", "exclude_modules",
    "inference_mode", "init_lora_weights", "layers_pattern", "layers_to_transform", "lora_alpha",
    "lora_dropout", "megatron_core", "peft_type", "peft_version", "qalora_group_size", "r",
    "revision", "target_modules", "target_parameters", "task_type",
}  # fmt: skip
# Of them other beginnings than these change the weights that the adapter is for.
_BEGINNINGS = (True, False, None, "gaussian", "orthogonal", "eva")


class StoredAdapter(NamedTuple):
    """What an adapter's directory holds: tensors by our names, those of stacks [E, ..], and all
    that adapter_config.json says. ``options`` names the adapted weights one by one."""

    options: LoraOptions
    base: str | None
    tensors: dict[str, Tensor]
    settings: dict[str, Any]


def adapter_files(
    options: LoraOptions, base: str, tensors: Mapping[str, Tensor]
) -> tuple[str, dict[str, Tensor]]:
    """adapter_config.json and the tensors of adapter_model.safetensors.

    ``base``: directory of the weights that were adapted. ``tensors``: the parameters of all
    adapters by our names, those of stacks with all experts.
    """
    linears = dict.fromkeys(_weight(name) for name in tensors if ".lora." in name)
    stacks = dict.fromkeys(_weight(name) for name in tensors if "_lora." in name)
    found: dict[str, Tensor] = {}
    for name, key in _keys(linears, stacks).items():
        tensor = tensors[name]
        if _weight(name) in stacks:
            A = name.endswith(".A")
            tensor = tensor.flatten(0, 1) if A else tensor.permute(1, 2, 0).flatten(1, 2)
        found[key] = tensor.contiguous()
    alpha = options.scale * options.rank
    config = {
        "base_model_name_or_path": base,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "lora_alpha": int(alpha) if alpha.is_integer() else alpha,
        "lora_dropout": 0.0,
        "modules_to_save": None,
        "peft_type": "LORA",
        "r": options.rank,
        "target_modules": [_theirs(name) for name in linears],
        "target_parameters": [_theirs(name) for name in stacks] or None,
        "task_type": "CAUSAL_LM",
        "use_dora": False,
        "use_rslora": False,
    }
    return to_json(config), found


def write_adapter(
    writer: Writer, options: LoraOptions, base: str, tensors: Mapping[str, Tensor]
) -> Collection[str]:
    """Write the files of `adapter_files`; returns the names of what they hold."""
    config, stored = adapter_files(options, base, tensors)
    writer.write(WEIGHTS, safetensors_parts(stored, {"format": "pt"}))
    writer.write_text(CONFIG, config)
    return tensors.keys()


def read_adapter(directory: Path) -> StoredAdapter:
    """Read an adapter that this program or PEFT wrote.

    Raises UserError, naming it, for a feature other than plain LoRA, and for a tensor that has no
    place, lacks its counterpart, does not have the rank or is not finite.
    """
    settings = read_json(directory / CONFIG)
    rank, alpha = _check_settings(directory, settings)
    if not (directory / WEIGHTS).is_file():
        old = " (adapter_model.bin cannot be read: save it as safetensors)"
        hint = old if (directory / "adapter_model.bin").exists() else ""
        raise UserError(f"{directory} holds no {WEIGHTS}{hint}")
    found: dict[str, Tensor] = {}
    with TensorFile(directory / WEIGHTS) as file:
        for key, entry in file.entries.items():
            match = _KEY.fullmatch(key)
            if match is None:
                raise UserError(f"{file.path}: unexpected {key}, which is no part of plain LoRA")
            if entry.dtype not in READABLE or len(entry.shape) != 2:
                raise UserError(f"{directory}: {key} is {entry.dtype} {list(entry.shape)}")
            tensor = file.read(key)
            check_finite(tensor, key, file.path)
            found[_key(match[1], match[2])] = tensor
    linears, stacks = _places(directory, found, settings)
    tensors: dict[str, Tensor] = {}
    for name, key in _keys(linears, stacks).items():
        if key not in found:
            letter = name[-1]
            twin = key.replace(f".lora_{letter}.", f".lora_{'B' if letter == 'A' else 'A'}.")
            raise UserError(f"{directory}: {twin} has no counterpart lora_{letter}")
        tensor, stacked, A = found[key], _weight(name) in stacks, name.endswith(".A")
        ranks = tensor.shape[0 if A else 1]
        if ranks % rank or not ranks or (not stacked and ranks != rank):
            raise UserError(
                f"{directory}: {key} has shape {list(tensor.shape)}, which is not of rank {rank}"
            )
        if stacked and A:
            tensor = tensor.unflatten(0, (-1, rank))
        elif stacked:
            tensor = tensor.unflatten(1, (rank, -1)).permute(2, 0, 1).contiguous()
        tensors[name] = tensor
    options = LoraOptions(rank, alpha, linears, stacks)
    return StoredAdapter(options, settings.get("base_model_name_or_path"), tensors, settings)


def adapted_in(stored: StoredAdapter) -> list[Adapted]:
    """What an adapter adapts, for `lora.table`."""
    options, tensors = stored.options, stored.tensors
    places = [(name, f"{name}.lora.") for name in options.target_modules or ()]
    places += [(name, f"{name}_lora.") for name in options.target_parameters]
    found = ((name, tensors[f"{at}A"], tensors[f"{at}B"]) for name, at in places)
    return [adapted_of(name, A, B, len(A)) for name, A, B in found]


def load_adapter(model: HybridLM, directory: Path) -> None:
    """Add a directory's adapters to a model without any; of stacks, those of its own experts. They
    keep the dtype that they have in the file.

    Raises UserError, before the model is changed, where a tensor does not fit the model, or one
    that adapter_config.json asks for is missing.
    """
    stored = read_adapter(directory)
    linears, stacks = adaptable(model)
    places = linears | stacks
    experts = model.config.n_routed_experts
    for name, tensor in stored.tensors.items():
        weight, side = _weight(name), -1 if name.endswith(".A") else -2
        if weight not in places:
            raise UserError(
                f"{directory}: the model has no {weight}, for which there is an adapter"
            )
        size, stack = places[weight].shape[side], (experts,) if weight in stacks else ()
        if tensor.shape[side] != size or tensor.shape[:-2] != stack:
            raise UserError(
                f"{directory}: {name} has shape {list(tensor.shape)}; the model's weight has width "
                f"{size}{f' and {experts} experts' if stack else ''} there"
            )
    _check_complete(model, stored, directory)
    add_adapters(model, stored.options, seed=0)
    owned = model.owned_experts
    for at, adapter in adapters(model):
        for leaf, parameter in adapter.named_parameters():
            tensor = stored.tensors[f"{at}.{leaf}"]
            part = tensor if tensor.dim() == 2 else tensor[owned.start : owned.stop]
            parameter.data = part.to(parameter.device)


def locate(path: str | Path) -> Path:
    """The directory of an adapter or of a whole model that a user's path means; see `resolve`."""
    given = Path(path).expanduser()
    return given if is_adapter(given) else resolve(path)


def is_adapter(directory: Path) -> bool:
    return (directory / CONFIG).is_file()


def base_named(directory: Path) -> Path | None:
    """What an adapter says it is for; None for a whole model."""
    named = is_adapter(directory) and read_json(directory / CONFIG).get("base_model_name_or_path")
    return Path(named) if isinstance(named, str) else None


def base_directory(directory: Path, given: str | None = None) -> Path:
    """Where the weights are that an adapter is for: ``given``, or what it names itself, which may
    be relative to it or to the working directory. Raises UserError where they are not there."""
    named = given or read_json(directory / CONFIG).get("base_model_name_or_path")
    if not isinstance(named, str):
        raise UserError(f"{directory / CONFIG} names no weights; say where they are: merge --base")
    beside = [] if given else [directory / named]
    for place in (*beside, Path(named).expanduser()):
        if place.exists():
            base = locate(place)
            if is_adapter(base):
                raise UserError(f"{base}, for which the adapter is, is an adapter too: merge it")
            return base
    told = "--base" if given else str(directory / CONFIG)
    of_a_run = STEP.fullmatch(Path(named).name) is not None
    gone = " any more: runs remove their older checkpoints" if of_a_run else ""
    raise UserError(
        f"{named}, which {told} names, is not there{gone}; say where the weights are that the "
        f"adapter is for: merge --from {directory} --base DIR --out DIR"
    )


def base_digest(base: Path) -> str:
    """Identity of the weights that adapters are for: names, sizes and ends of the files (all of
    them would take too long for a large model), and the checksums that may stand beside them."""
    digest = hashlib.sha256()
    with naming("read", base):
        for path in sorted([*base.glob("*.safetensors"), *base.glob(MANIFEST)]):
            size = path.stat().st_size
            digest.update(f"{path.name} {size} ".encode())
            with open(path, "rb") as file:
                digest.update(file.read(_END_BYTES))
                file.seek(max(0, size - _END_BYTES))
                digest.update(file.read())
    return digest.hexdigest()


def other_base(directory: Path, base: Path) -> str:
    """What is wrong with ``base`` where an adapter of ours was trained beside other weights; empty:
    nothing, or it is not known."""
    path = directory / BASE
    if not path.is_file() or read_json(path).get("digest") == base_digest(base):
        return ""
    named = read_json(directory / CONFIG).get("base_model_name_or_path")
    return (
        f"{directory}: this adapter was trained beside other weights than those in {base} (or "
        f"these were written anew since); it names {named}"
    )


def _theirs(name: str) -> str:
    return re.sub(r"^backbone\.", "model.", name)


def _weight(name: str) -> str:
    """What an adapter's parameter is for."""
    return name[: -len(".lora.A")]


def _key(place: str, letter: str) -> str:
    """PEFT's name of one side of the adapter at ``place``."""
    return f"base_model.model.{_theirs(place)}.lora_{letter}.weight"


def _keys(linears: Iterable[str], stacks: Collection[str]) -> dict[str, str]:
    """PEFT's name of every parameter of these weights' adapters, by ours."""
    places = {f"{name}.lora": name for name in linears}
    for name in stacks:
        layer, _, leaf = name.rpartition(".")
        inner = leaf == "up_proj" and f"{layer}.down_proj" in stacks
        places[f"{name}_lora"] = f"{layer}.base_layer" if inner else layer
    return {f"{ours}.{x}": _key(place, x) for ours, place in places.items() for x in "AB"}


def _places(
    directory: Path, keys: Iterable[str], settings: Mapping[str, Any]
) -> tuple[list[str], list[str]]:
    """The linear layers and the stacks that tensors are for. Raises UserError where the settings do
    not tell which stack it is."""
    places = dict.fromkeys(key[len("base_model.model.") :].rpartition(".lora_")[0] for key in keys)
    targets, linears, stacks = settings.get("target_parameters") or (), list[str](), list[str]()
    for place in places:
        layer = place.removesuffix(".base_layer")
        if not layer.endswith(".mixer.experts"):
            linears.append(from_hub(place)[0])
            continue
        leaves = [x for x in _STACKS if any(_targets(f"{layer}.{x}", t) for t in targets)]
        if f"{layer}.base_layer" in places:
            leaves = list(_STACKS)
        elif len(leaves) != 1:
            key = _key(place, "A")
            raise UserError(f"{directory / CONFIG}: target_parameters does not say what {key} is")
        stacks += [f"{from_hub(layer)[0]}.{leaf}" for leaf in leaves]
    return linears, list(dict.fromkeys(stacks))


def _check_settings(directory: Path, settings: dict[str, Any]) -> tuple[int, float]:
    """Rank and alpha. Raises UserError for what is more than plain LoRA."""
    where = directory / CONFIG
    if settings.get("peft_type") != "LORA":
        raise UserError(f"{where}: peft_type is {settings.get('peft_type')!r}, expected LORA")
    for name, value in settings.items():
        if name == "bias" and value == "none":
            continue
        if name == "init_lora_weights" and value not in _BEGINNINGS:
            raise UserError(
                f"{where}: {name} {value!r} changes the weights that the adapter is for"
            )
        if value and name not in _HARMLESS:
            raise UserError(
                f"{where}: {name} is {value!r}, which PEFT alone can compute: merge it there"
            )
    rank, alpha = settings.get("r"), settings.get("lora_alpha")
    if type(rank) is not int or rank < 1:
        raise UserError(f"{where}: r is {rank!r}, expected a whole number above 0")
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not 0 < alpha < 1e9:
        raise UserError(f"{where}: lora_alpha is {alpha!r}, expected a number above 0")
    return rank, float(alpha)


def _targets(name: str, target: str) -> bool:
    """Whether PEFT takes a name for a target of a list."""
    return name == target or name.endswith(f".{target}")


def _check_complete(model: nn.Module, stored: StoredAdapter, directory: Path) -> None:
    """Raise UserError for a weight that the configuration targets and that has no adapter."""
    settings, there = stored.settings, {*stored.options.target_parameters}
    there.update(stored.options.target_modules or ())
    modules, parameters = settings.get("target_modules") or [], settings.get("target_parameters")
    if settings.get("exclude_modules") or settings.get("layers_to_transform") is not None:
        modules = []  # PEFT alone knows which it left out
    linears, stacks = adaptable(model)
    for names, targets in ((linears, modules), (stacks, parameters or [])):
        for name in set(names) - there:
            # PEFT knows no MTP block: what is in ours is meant by its whole name alone.
            known = {name} if name.startswith("mtp.") else {name, _theirs(name)}
            if isinstance(targets, str):
                missing = any(re.fullmatch(targets, n) for n in known if n.startswith("model."))
            elif name.startswith("mtp."):
                missing = name in targets
            else:
                missing = any(_targets(n, target) for n in known for target in targets)
            if missing:
                raise UserError(
                    f"{directory}: {CONFIG} targets {name}, of which no adapter is there"
                )
