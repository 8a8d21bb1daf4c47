"""README.md of an exported directory: facts and numbers, and what nobody has checked."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from nemo_hybrid import __version__
from nemo_hybrid.checkpoint.manifest import MANIFEST
from nemo_hybrid.checkpoint.names import RUN_STATE
from nemo_hybrid.checkpoint.publish import CARD, about, card_head, code, printable
from nemo_hybrid.config.yaml_text import read_yaml
from nemo_hybrid.errors import UserError
from nemo_hybrid.export.decode import inside
from nemo_hybrid.export.layout import ExportFacts, layout_of
from nemo_hybrid.export.sensitivity import TABLE_FILE, candidates, mean_bits
from nemo_hybrid.files import naming, read_json
from nemo_hybrid.model.fp32 import keeps_fp32
from nemo_hybrid.precision.assign import places, unquantizable, with_inputs
from nemo_hybrid.precision.groups import family

if TYPE_CHECKING:
    from nemo_hybrid.commands.export import ExportOptions
    from nemo_hybrid.export.verify import Measured

_FORMATS = {
    "bf16": "BF16",
    "fp32": "FP32",
    "fp8": "FP8 (E4M3, one scale per tensor), inputs too",
    "nvfp4": "NVFP4 (E2M1 in blocks of 16), inputs too",
    "nvfp4_w4a16": "NVFP4 (E2M1 in blocks of 16), weights alone",
}
_NVIDIA = "the module families of NVIDIA's model of this name, not NVIDIA's choice of single layers"
_PRESETS = {
    "conservative": "experts, shared experts and dense MLPs",
    "super": _NVIDIA,
    "ultra": _NVIDIA,
    "nano": _NVIDIA,
}
_SCALES = {
    "amax": "from the largest value of a block",
    "mse": "searched for the least squared error of a block",
    "four_over_six": "the better of mapping a block's largest value to 4 and to 6",
    "training": "those of 16x16 blocks, as NVFP4 training has them, but for q, k and v, which have "
    "one common tensor scale",
}
_ENGINES = """## Serving

```sh
vllm serve DIR                                # FP8 keys and values: --kv-cache-dtype fp8
python -m sglang.launch_server --model-path DIR                    # --kv-cache-dtype fp8_e4m3
trtllm-serve DIR
```

| engine | |
|---|---|
| vLLM | from 0.32, whose loaders names and configuration follow; 0.15 refuses `MIXED_PRECISION` |
| vLLM, drafting with the multi-token-prediction block | `--speculative-config \
'{"method": "mtp", "num_speculative_tokens": 1}'`; misread weights show in its acceptance alone |
| SGLang 0.5.23, TensorRT-LLM 1.2.1 | not tried |
| transformers 5.23 | loads `bf16`; of all other formats it **computes wrong values without an \
error**: of `compressed-tensors` with experts, and of ModelOpt's layout, whose scales it ignores |

## Not checked

- This directory was not loaded into any serving engine, nor run on a GPU's FP4 or FP8 units; speed
  was not measured.
- No benchmark was run: questions, code, long contexts, tools, languages. Acceptance of drafted
  tokens was not measured.
- Tensors were not compared with the source after they were written:
  `nemo-hybrid verify-export DIR --base SOURCE` does it.
- What has no number above was not measured, nor was what FP8 keys and values cost.
"""
_LAYER = re.compile(r"(backbone|mtp)\.layers\.(\d+)\.(.+)")
_QUOTED = 4000  # characters of the source's own card


class Origin(NamedTuple):
    """What the files of a checkpoint tell of it, and the beginning of its own card."""

    facts: Mapping[str, str]
    own: str


def card(
    options: ExportOptions, facts: ExportFacts, origin: Origin, measured: Measured | None = None
) -> str:
    """The model card, in the form that the Hugging Face hub reads.

    Texts that come from users and files stand in it as code, so that they cannot become Markdown or
    HTML.
    """
    formats = sorted(set(facts.assignment.values()) - {"bf16"})
    tags = list(dict.fromkeys(name.partition("_")[0] for name in formats))
    what = ", ".join(tag.upper() for tag in tags) or "BF16"
    rows = {**_facts(options, facts), **origin.facts}
    sections = [
        f"{card_head(tags, Path(facts.source), 'vllm')}\n# {_name(str(facts.source))} in {what}",
        "Licence and limits of the source apply.",
        _table(("", ""), [row for row in rows.items() if row[1]]),
        "## Formats",
        _table(("modules", "layers", "format", "weights"), _weights(facts)),
    ]
    if measured is not None:
        title, header, numbers = measured_table(measured)
        sections += ["## Measured", f"{title}:", _table(header, numbers)]
    sections += [_ENGINES, about(facts.shape)]
    if origin.own:
        # Four spaces make it code, whatever it says.
        lines = ["    " + printable(line.expandtabs(4)) for line in origin.own.splitlines()]
        sections += [f"## The beginning of the source's {CARD}", "\n".join(lines) + "\n"]
    return "\n\n".join(sections)


def _facts(options: ExportOptions, facts: ExportFacts) -> dict[str, str]:
    """Rows of the table; those without a value are left out."""
    seen, budget, share = facts.calibration, options.budget_bits, options.percentile
    rows = {
        "exported by": f"nemo_hybrid {__version__}, `--format {options.format}`",
        "parameters": f"{facts.parameters:,}",
        "bytes of weights": f"{facts.bytes_after:,}",
        "bits per parameter, scales included": f"{8 * facts.bytes_after / facts.parameters:.2f}",
        "share of what BF16 takes": f"{facts.share:.1%}",
        "layout": "plain" if options.format == "bf16" else layout_of(options.format),
    }
    if budget is not None:
        groups = candidates(facts.shape, ())
        rows |= {
            "formats by": f"measured sensitivity (`{TABLE_FILE}`)",
            "bits per weight that a budget is for": f"{mean_bits(groups, facts.assignment):.3f}",
            "budget": f"{budget:g} for {sum(g.weights for g in groups):,} weights",
        }
    elif options.format != "bf16":
        rows["preset"] = f"`{options.preset}`: {_PRESETS[options.preset]}"
    rows["changed by globs, the last counts"] = "; ".join(
        f"{code(glob)}: {code(given)}" for glob, given in options.formats.items()
    )
    if any(format.startswith("nvfp4") for format in facts.assignment.values()):
        rows["NVFP4 block scales"] = f"`{options.scales}`: {_SCALES[options.scales]}"
    if seen is not None:
        data = _text(options.calibration or "", "training part")
        rows["calibration"] = f"{seen.tokens:,} tokens of {data}"
    if with_inputs(facts.assignment):
        rows["input scales cover"] = (
            "all values" if share is None else f"{share:g} % of the values that are not zero"
        )
    if seen is not None and options.kv_cache == "fp8":
        where = ", ".join(dict.fromkeys(place.partition(".")[0] for place in seen.kv))
        rows["FP8 scales of keys and values"] = f"{len(seen.kv)}, in: {where}"
    for place, experts in (seen.unseen if seen else {}).items():
        rows[f"experts of {code(place)} that calibration did not reach, with their layer's largest "
             "input"] = _ranges(experts)  # fmt: skip
    for kind, errors in sorted(facts.errors.items()):
        shown = ", ".join(f"{error:.4f} with `{name}`" for name, error in errors.items())
        rows[f"relative error of the weights, {kind.replace('_', ' ')}"] = shown
    return rows


def _weights(facts: ExportFacts) -> list[tuple[str, str, str, str]]:
    """All weights of the model, of each kind in one row."""
    never = unquantizable(facts.shape)
    sizes = places(facts.shape) | never
    kept = {name: "fp32" if keeps_fp32(name) else "bf16" for name in never}
    found: defaultdict[tuple[str, str, str], list[str]] = defaultdict(list)
    for name, format in (facts.assignment | kept).items():
        match = _LAYER.fullmatch(name)
        shown = f"{match[1]} … {match[3]}" if match else name
        found["" if name in never else family(name), shown, format].append(name)
    rows = []
    for kind, shown, format in sorted(found, key=lambda key: (not key[0], key)):
        names = found[kind, shown, format]
        layers = [int(match[2]) for name in names if (match := _LAYER.fullmatch(name))]
        weights = sum(math.prod(sizes[name]) for name in names)
        rows.append((f"`{shown}`", _ranges(layers), _FORMATS[format], f"{weights:,}"))
    return rows


def lineage(source: Path) -> Origin:
    """Where the weights of a checkpoint come from: what its own files say of that, and which of
    them cannot be read."""
    unread: list[str] = []

    def content(name: str, read: Callable[[Path], Any]) -> Any:
        try:
            return read(source / name) if (source / name).is_file() else {}
        except UserError:
            unread.append(name)
            return {}

    run, state = content("run.yaml", read_yaml), content(RUN_STATE, read_json)
    manifest, own = content(MANIFEST, read_json), content(CARD, _beginning)

    blend, digests = inside(run, "data", "blend"), state.get("data")
    phases = inside(run, "data", "phases")
    blends = [blend, *(phases.values() if isinstance(phases, dict) else ())]
    named = chain.from_iterable(stores for stores in blends if isinstance(stores, dict))
    data = [*named, inside(run, "data", "path")]
    base, preset = inside(run, "model", "from_hf"), inside(run, "distill", "preset")
    facts = {
        "checkpoint": _name(str(source)),
        "SHA-256 in its manifest, not checked": _codes([manifest.get("sha256")]),
        "began as": _name(base) if isinstance(base, str) else "",
        "optimizer steps": _count(state.get("step")),
        "sequences per step": _count(inside(run, "train", "global_batch_size")),
        "tokens per sequence": _count(inside(run, "data", "sequence_length")),
        "number formats of training": _codes([inside(run, "precision", "recipe")]) or "not known",
        "distilled for": "" if preset == "none" else _codes([preset]),
        "training data": ", ".join(
            dict.fromkeys(_name(p) for p in data if p and isinstance(p, str))
        ),
        "digests of the data": _codes(digests if isinstance(digests, list) else []),
        "could not be read": _codes(unread),
    }
    return Origin({name: value for name, value in facts.items() if value}, own or "")


def _beginning(path: Path) -> str:
    with naming("read", path), open(path, encoding="utf-8", errors="replace") as file:
        return file.read(_QUOTED)


def _count(value: object) -> str:
    """A whole number; empty: it is none, or absurdly large."""
    return f"{value:,}" if isinstance(value, int) and 0 <= value < 1 << 63 else ""


def _codes(values: Iterable[object]) -> str:
    return ", ".join(code(value) for value in values if isinstance(value, str))


def _name(path: str) -> str:
    """What a path ends with, as code: of a run's checkpoint the run and the step."""
    parts = [part for part in Path(path).parts if part != "checkpoints"]
    return code(
        "/".join(parts[-2:] if parts[-1:] and parts[-1].startswith("step_") else parts[-1:])
    )


def _text(path: str, part: str) -> str:
    """What was read of a text file, or of a token store: its part."""
    return f"the {part} of {_name(path)}" if Path(path).is_dir() else _name(path)


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def measured_table(found: Measured) -> tuple[str, list[str], list[list[str]]]:
    """Title, header and rows: what was rounded, and what that costs."""
    rows = [
        [run.rounded, "" if run.kl is None else f"{run.kl:.3e}", f"{run.perplexity:.3f}"]
        for run in found.runs
    ]
    header = ["rounded", "KL(source, export), nats per token", "perplexity"]
    text = _text(found.text, "held-out part")
    return f"{found.tokens:,} tokens of {text}, in FP32", header, rows


def _ranges(numbers: list[int]) -> str:
    """Such as 0, 2-4."""
    out: list[list[int]] = []
    for number in sorted(numbers):
        if out and number == out[-1][-1] + 1:
            out[-1][1:] = [number]
        else:
            out.append([number])
    return ", ".join("-".join(map(str, run)) for run in out)
