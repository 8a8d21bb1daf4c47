"""`inspect`: what a configuration describes, and whether a directory's tensors are it.

Nothing is loaded: the model is built without storage, and files are opened for their headers.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, field
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic.dataclasses import dataclass as options

from nemo_hybrid.commands.command import Command, check_paths
from nemo_hybrid.config.base import CHECKED, CommandOptions, field_types
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.model import LAYER_LETTERS
from nemo_hybrid.config.read import load_config
from nemo_hybrid.config.run import RunConfig
from nemo_hybrid.config.yaml_text import read_yaml
from nemo_hybrid.errors import UserError
from nemo_hybrid.terminal import print_table

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_hybrid.checkpoint.weights import Plan
    from nemo_hybrid.model.hybrid import HybridLM


@options(config=CHECKED)
class InspectOptions(CommandOptions):
    """Show shape, size and tensors of a model, without loading weights."""

    paths: list[str] = field(default_factory=list)
    """Model or run YAML, config.json, or the directory of a run, a checkpoint or a Hugging Face
    model. In a directory with weights every tensor is compared with the model; exit status 2 means
    that one is missing, unexpected or does not fit."""
    json: bool = False
    """Print JSON instead of tables."""
    deep: bool = False
    """Read every file: are the weights finite, and the checksums those of the manifest, if there is
    one? Of a run's checkpoint, presence and size of all files are compared in any case."""

    def validate(self) -> None:
        check_paths("inspect", self.paths, 1, 1)


def inspect_command(options: InspectOptions) -> int:
    """Print the tables; 2 where a tensor is missing or does not fit."""
    from nemo_hybrid.checkpoint.adapter import is_adapter, locate
    from nemo_hybrid.checkpoint.steps import reading

    path = Path(options.paths[0])
    if not path.is_file() and is_adapter(locate(path)):
        reading(path, lambda directory: _inspect_adapter(directory, options), locate)
        return 0
    found, plan = inspect(path, options.deep)
    if options.json:
        print(json.dumps(found, indent=1))
    else:
        _print(found, plan)
    return 2 if plan is not None and plan.having("error") else 0


def _inspect_adapter(directory: Path, options: InspectOptions) -> None:
    """Print what an adapter adapts; its files are compared with the manifest as a model's are."""
    from nemo_hybrid.checkpoint.adapter import adapted_in, read_adapter
    from nemo_hybrid.model import lora

    stored = read_adapter(directory)
    adapted = adapted_in(stored)
    found: dict[str, Any] = {
        "path": str(directory),
        "base": stored.base,
        "rank": stored.options.rank,
        "alpha": stored.options.alpha,
        "adapters": [one._asdict() for one in adapted],
        "verified": _verified(directory, stored.tensors, options.deep),
    }
    if options.json:
        print(json.dumps(found, indent=1))
        return
    print("{path}\nadapter of rank {rank}, alpha {alpha:g}, for {base}".format(**found))
    print_table(lora.HEADER, lora.table(adapted), "Adapters", right=lora.HEADER[1:])
    _print_verified(found["verified"])


def inspect(path: Path, deep: bool) -> tuple[dict[str, Any], Plan | None]:
    """What a model YAML, a run YAML, a config.json, or a Hugging Face, checkpoint or run directory
    holds, as JSON values; and what became of every tensor, where there are weights.

    ``active`` are the parameters that one token meets; embedding and head in, MTP block out.
    ``router_biases`` are stored but are no parameters; ``bf16_bytes`` is the memory of all weights
    in bf16, those of the fp32 list in fp32.

    A run's checkpoint is verified; with ``deep`` every file's checksum is compared as well, and
    every weight read. Raises
    UserError for what is none of these, for files whose headers are broken, and for a checkpoint
    that is not whole.
    """
    from nemo_hybrid.checkpoint.steps import LATEST, reading

    path = path.expanduser()
    if not path.exists() or path.is_dir() or path.name == LATEST:
        return reading(path, lambda directory: _inspect(directory, deep))
    return _inspect(path, deep)


def _inspect(path: Path, deep: bool) -> tuple[dict[str, Any], Plan | None]:
    """Of a file, or of a directory with config.json."""
    from nemo_hybrid.checkpoint.companions import read_companions
    from nemo_hybrid.checkpoint.load import plan_model, tensors_by_name
    from nemo_hybrid.checkpoint.weights import pickles
    from nemo_hybrid.model.fp32 import keeps_fp32
    from nemo_hybrid.train.flops import parameter_counts

    plan = None
    if path.is_dir():
        if any(path.glob("*.safetensors*")) or pickles(path):
            model, plan = plan_model(path)
            read_companions(path)
        else:
            model = _without_storage(HybridConfig.from_hf(str(path)), path)
    elif path.suffix == ".json":
        model = _without_storage(HybridConfig.from_hf(str(path)), path)
    elif path.suffix in (".yaml", ".yml"):
        model = _without_storage(_shape_in_yaml(path), path)
    else:
        raise UserError(f"{path} is neither a .yaml file, nor a config.json, nor a directory")
    parameters = dict(model.named_parameters())
    verified, counts = _verified(path, parameters, deep), _by_component(parameters)
    if deep and plan is None and verified is None:
        raise UserError(f"{path} has neither weights nor a manifest: leave out --deep")
    if deep and plan is not None:
        plan.findings += plan.not_finite()
    total = sum(counts.values())
    found: dict[str, Any] = {
        "path": str(path),
        "config": asdict(model.config),
        "layers": _layers(model.config.pattern),
        "parameters": {
            **counts,
            "total": total,
            "total without MTP": total - counts.get("MTP block", 0),
            "active": parameter_counts(model.config).active,
        },
        "router_biases": sum(buffer.numel() for buffer in model.buffers()),
        "bf16_bytes": sum(
            tensor.numel() * (4 if keeps_fp32(name) else 2)
            for name, tensor in tensors_by_name(model).items()
        ),
        "files": plan and {file: (path / file).stat().st_size for file in plan.stored.files},
        "tensors": plan and [asdict(finding) for finding in plan.findings],
        "verified": verified,
    }
    return found, plan


def _verified(directory: Path, parameters: Iterable[str], deep: bool) -> dict[str, Any] | None:
    """Compare a directory with its manifest, with ``deep`` the files' contents too; and give step
    and layout of the run that wrote it. One without training state may have been edited since it
    was written, so that it is compared only where ``deep`` asks for it. Raises UserError."""
    from nemo_hybrid.checkpoint.directory import verify
    from nemo_hybrid.checkpoint.manifest import MANIFEST
    from nemo_hybrid.checkpoint.names import OPTIMIZER_INDEX, RUN_STATE
    from nemo_hybrid.checkpoint.state import check_state

    state: dict[str, Any] = {}
    of_a_run = any((directory / name).exists() for name in (RUN_STATE, OPTIMIZER_INDEX))
    if not of_a_run and not (deep and (directory / MANIFEST).exists()):
        return None
    records = verify(directory, deep)
    if of_a_run:
        state = check_state(directory, parameters)
    return {
        "files": len(records),
        "bytes": sum(record.size for record in records.values()),
        "checksums": deep,
        "step": state.get("step"),
        "layout": state.get("layout"),
    }


def _shape_in_yaml(path: Path) -> HybridConfig:
    """The shape in a run's configuration, or in a file of the section ``model`` alone."""
    from nemo_hybrid.checkpoint.steps import model_shape

    if field_types(RunConfig).keys() & read_yaml(path).keys():
        return model_shape(load_config([path]).model)
    return model_shape(load_config([], ["--model", str(path)]).model)


def _without_storage(config: HybridConfig, path: Path) -> HybridLM:
    from nemo_hybrid.train.flops import without_storage

    try:
        return without_storage(config)
    except (RuntimeError, TypeError):  # a product, or a number, beyond 64 bits
        raise UserError(f"{path} describes a model of impossible size") from None


def _by_component(parameters: Mapping[str, Tensor]) -> dict[str, int]:
    from nemo_hybrid.precision.groups import component

    counts: Counter[str] = Counter()
    for name, tensor in parameters.items():
        counts[component(name)] += tensor.numel()
    order = ["embedding", *LAYER_LETTERS.values(), "norms", "head", "MTP block"]
    # Parts of LatentMoE stay together: its name is their first word.
    return dict(sorted(counts.items(), key=lambda item: order.index(item[0].split(":")[0])))


def _layers(pattern: str) -> dict[str, int]:
    counts = {about: pattern.count(letter) for letter, about in LAYER_LETTERS.items()}
    return {about: count for about, count in counts.items() if count}


def _print(found: dict[str, Any], plan: Plan | None) -> None:
    config, counts = found["config"], found["parameters"]
    layers = ", ".join(f"{count} {about}" for about, count in found["layers"].items())
    depth = len(config["pattern"])
    print(f"{found['path']}\npattern {config['pattern']}\n{depth} layers: {layers}")
    shape = [(name, str(value)) for name, value in config.items() if name != "pattern"]
    half = -(-len(shape) // 2)
    pairs = zip_longest(shape[:half], shape[half:], fillvalue=("", ""))
    print_table(("field", "value") * 2, [(*left, *right) for left, right in pairs], "Shape")
    print_table(
        ("component", "parameters", "share"),
        [(name, f"{n:,}", f"{n / counts['total']:.1%}") for name, n in counts.items()],
        "Parameters",
        right=("parameters", "share"),
        ruled=[list(counts).index("total") - 1],
    )
    print(
        f"Active: k of E routed experts, embedding and head, no MTP. Beside the parameters, "
        f"{found['router_biases']:,} router bias entries.\nWeights in bf16 (the fp32 list in "
        f"fp32): {_size(found['bf16_bytes'])}."
    )
    if plan is not None:
        _print_audit(plan, found["files"])
    elif Path(found["path"]).is_dir():
        print("no weights here (no .safetensors file)")
    _print_verified(found["verified"])


def _print_audit(plan: Plan, files: Mapping[str, int]) -> None:
    outcomes = Counter((f.status, f.dtype or "-", f.note) for f in plan.findings)
    rows = [
        (str(count), *outcome)
        for outcome, count in sorted(outcomes.items())
        if outcome[0] != "error"
    ]
    rows.append((str(len(plan.having("error"))), "error", "", ""))
    title = f"Tensors of {len(files)} files, {_size(sum(files.values()))}"
    print_table(("tensors", "outcome", "dtype", "note"), rows, title)
    for line in plan.problems():
        print(line)


def _print_verified(verified: dict[str, Any] | None) -> None:
    if verified is None:
        return
    if verified["step"] is not None:
        layout = ", ".join(f"{name} {value}" for name, value in (verified["layout"] or {}).items())
        step = verified["step"]
        print(f"Checkpoint of step {step} ({layout}): optimizer state of all parameters.")
    how = "size and checksum" if verified["checksums"] else "size (contents: --deep)"
    print(f"{verified['files']} files, {_size(verified['bytes'])}: present and of the right {how}.")


def _size(count: int) -> str:
    for unit in ("bytes", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024  # type: ignore[assignment]
    return f"{count:.2f} {unit}" if unit != "bytes" else f"{count} bytes"


COMMANDS = {"inspect": Command(inspect_command, InspectOptions, reads="paths")}
