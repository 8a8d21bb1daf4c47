"""README.md of an exported directory: what it was made of and how, and what nobody has checked."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from nemo_hybrid import __version__
from nemo_hybrid.checkpoint.files import MANIFEST
from nemo_hybrid.checkpoint.publish import CARD
from nemo_hybrid.checkpoint.state import RUN_STATE
from nemo_hybrid.config.model import FP32_NAMES
from nemo_hybrid.config.yaml_text import read_yaml
from nemo_hybrid.errors import UserError
from nemo_hybrid.export.layout import ExportFacts
from nemo_hybrid.export.sensitivity import TABLE_FILE, candidates, mean_bits
from nemo_hybrid.files import naming, read_json
from nemo_hybrid.precision.assign import places, unquantizable, with_inputs
from nemo_hybrid.precision.groups import family

if TYPE_CHECKING:
    from nemo_hybrid.commands.export import ExportOptions
    from nemo_hybrid.export.verify import Measured

_WORDS = {
    "bf16": "BF16",
    "fp32": "FP32",
    "fp8": "FP8 (E4M3, one scale per tensor)",
    "nvfp4": "NVFP4 (E2M1 in blocks of 16), inputs too",
    "nvfp4_w4a16": "NVFP4 (E2M1 in blocks of 16), weights alone",
}
_SCALES = {
    "amax": "from the largest value of a block",
    "mse": "searched for the least squared error of a block",
    "four_over_six": "the better of mapping a block's largest value to 4 and to 6",
    "training": "those of 16x16 blocks, repeated for 16 rows, as NVFP4 training (see Lineage) has "
    "them; q, k and v have one common tensor scale, which they had not there",
}
_LAYER = re.compile(r"(backbone|mtp)\.layers\.(\d+)\.(.+)")
_LONGEST = 200
_QUOTED = 4000  # characters of the source's own card


def card(
    options: ExportOptions, facts: ExportFacts, origin: str, measured: Measured | None = None
) -> str:
    """The model card, in the form that the Hugging Face hub reads.

    ``origin``: see `lineage`. Without ``measured`` it says that nobody did. Texts that come from
    users and files stand in it as code, so that they cannot become Markdown or HTML.
    """
    sections = [
        _head(options, facts),
        origin,
        _recipe(options, facts),
        _precision(facts),
        _measured(facts, measured),
        _engines(options, facts),
        _unchecked(options, facts, measured),
    ]
    return "\n\n".join(sections) + "\n"


def lineage(source: Path) -> str:
    """The section on where the weights of a checkpoint come from: what its own files say of that,
    and which of them cannot be read."""
    unread: list[str] = []

    def content(name: str, read: Callable[[Path], Any]) -> Any:
        try:
            return read(source / name) if (source / name).is_file() else {}
        except UserError:
            unread.append(name)
            return {}

    run, state = content("run.yaml", read_yaml), content(RUN_STATE, read_json)
    manifest, own = content(MANIFEST, read_json), content(CARD, _beginning)

    def told(section: str, key: str) -> Any:
        inside = run.get(section)
        return inside.get(key) if isinstance(inside, dict) else None

    batch, length = told("train", "global_batch_size"), told("data", "sequence_length")
    digest = _codes([manifest.get("sha256")])
    blend, digests = told("data", "blend"), state.get("data")
    data = [p for p in (*(blend if isinstance(blend, dict) else ()), told("data", "path")) if p]
    found = {
        "checkpoint": _name(str(source)),
        "SHA-256 in its manifest": f"{digest}, not checked against the files" if digest else "",
        "began as": _name(base) if isinstance(base := told("model", "from_hf"), str) else "",
        "optimizer steps": _count(state.get("step")),
        "each of": f"{_count(batch)} sequences of {_count(length)} tokens"
        if _count(batch) and _count(length)
        else "",
        "number formats of training": _codes([told("precision", "recipe")]) or "not known",
        "distilled for": _codes([p for p in [told("distill", "preset")] if p != "none"]),
        "training data": ", ".join(_name(path) for path in data if isinstance(path, str)),
        "digests of the data": _codes(digests if isinstance(digests, list) else []),
        "could not be read": _codes(unread),
    }
    lines = ["## Lineage", "", _table(("", ""), [row for row in found.items() if row[1]])]
    if own:
        # Four spaces make it code, whatever it says.
        quoted = ["    " + _printable(line.expandtabs(4)) for line in own[:_QUOTED].splitlines()]
        begins = f", in its first {_QUOTED:,} characters" if len(own) > _QUOTED else ""
        lines += ["", f"Its own `{CARD}` says{begins}:", "", *quoted]
    return "\n".join(lines)


def _beginning(path: Path) -> str:
    """Of a text: a character more than is quoted."""
    with naming("read", path), open(path, encoding="utf-8", errors="replace") as file:
        return file.read(_QUOTED + 1)


def _count(value: object) -> str:
    """A whole number; empty: it is none, or absurdly large."""
    return f"{value:,}" if isinstance(value, int) and 0 <= value < 1 << 63 else ""


def code(text: str) -> str:
    """A text of unknown origin as inline code that no character of it can end."""
    shown = _printable(text)[:_LONGEST]
    shown = shown.replace("`", "'").replace("|", "\\|").strip() or "?"
    return f"`{shown}`"


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)


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


def _head(options: ExportOptions, facts: ExportFacts) -> str:
    formats = sorted(set(facts.assignment.values()) - {"bf16"})
    tags = ["nemotron_h", *dict.fromkeys(name.partition("_")[0] for name in formats)]
    what = ", ".join(tag.upper() for tag in tags[1:]) or "BF16"
    bits = 8 * facts.bytes_after / facts.parameters
    name = _name(str(facts.source))
    return "\n".join(
        [
            "---",
            f"tags: [{', '.join(tags)}]",
            "---",
            f"# {name} in {what}",
            "",
            f"Weights of {name}, exported by nemo_hybrid {__version__} with "
            f"`--format {options.format}`. Licence and limits of the source apply.",
            "",
            f"{facts.parameters:,} parameters in {facts.bytes_after:,} bytes ({bits:.2f} bits "
            f"each, scales included), {facts.share:.1%} of what they take in BF16.",
        ]
    )


def _recipe(options: ExportOptions, facts: ExportFacts) -> str:
    if options.format == "bf16":
        return (
            "## Recipe\n\nNothing is quantized: weights are BF16, those that decide by small "
            "differences (`A_log`, `D`, `dt_bias`, router biases) FP32."
        )
    layout = "compressed-tensors" if options.format == "compressed-tensors" else "ModelOpt"
    rows = [("layout", layout), ("formats by", _choice(options, facts))]
    if options.formats:
        changes = (f"{code(glob)}: {code(given)}" for glob, given in options.formats.items())
        rows.append(("changed by globs, the last counts", "; ".join(changes)))
    if any(format.startswith("nvfp4") for format in facts.assignment.values()):
        rows.append(("NVFP4 block scales", f"`{options.scales}`: {_SCALES[options.scales]}"))
    seen, data = facts.calibration, ""
    if seen is not None:
        data = f"{seen.tokens:,} tokens of {_text(options.calibration or '', 'training part')}"
    if not with_inputs(facts.assignment):
        why = "nothing was calibrated" if seen is None else "weights alone are quantized"
        rows.append(("input scales", f"none: {why}, inputs stay BF16"))
    else:
        share = "all of the values"
        if options.percentile is not None:
            share = f"{options.percentile:g} % of the values that are not zero"
        rows.append(("input scales", f"{share} on {data}"))
    cache = "no scales"
    if seen is not None and options.kv_cache == "fp8":
        cache = f"FP8, with scales for the largest ones on {data}"
        without = not any(place.startswith("mtp.") for place in seen.kv)
        if without and facts.shape.mtp_num_depths and "*" in facts.shape.mtp_pattern:
            cache += "; none for the multi-token-prediction block"
    rows.append(("keys and values", cache))
    lines = ["## Recipe", "", _table(("", ""), rows)]
    if seen is not None and seen.unseen:
        count = sum(len(experts) for experts in seen.unseen.values())
        lines += [
            "",
            f"In {len(seen.unseen)} stacks of experts, {count} experts saw no token of the "
            "calibration; they have the largest input of their layer's others: "
            + "; ".join(f"{code(place)}: {_ranges(who)}" for place, who in seen.unseen.items())
            + ".",
        ]
    if options.budget_bits is None and options.preset != "conservative" and options.format != "fp8":
        lines += [
            "",
            "The preset follows the formats that NVIDIA published for its model of this name, by "
            "module family. It is not NVIDIA's assignment of single layers.",
        ]
    return "\n".join(lines)


def _choice(options: ExportOptions, facts: ExportFacts) -> str:
    if options.budget_bits is None:
        preset = f"preset `{options.preset}`"
        return f"{preset}, all that it quantizes in FP8" if options.format == "fp8" else preset
    groups = candidates(facts.shape, ())
    return (
        f"measured sensitivity (`{TABLE_FILE}`): {mean_bits(groups, facts.assignment):.3f} bits "
        f"on average, at most {options.budget_bits:g}, of the {sum(g.weights for g in groups):,} "
        "weights that a budget may quantize"
    )


def _precision(facts: ExportFacts) -> str:
    never = unquantizable(facts.shape)
    sizes = places(facts.shape) | never
    kept = {n: "fp32" if n.rpartition(".")[2] in FP32_NAMES else "bf16" for n in never}
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
        rows.append((f"`{shown}`", _ranges(layers), _WORDS[format], f"{weights:,}"))
    left = (
        "What is BF16 or FP32 here is excluded from quantization: routers, embeddings, "
        "convolutions and norms always; head, latent projections and the multi-token-prediction "
        "block unless a glob names them."
    )
    return "\n".join(
        ["## Precision", "", _table(("modules", "layers", "format", "weights"), rows), "", left]
    )


def measured_table(found: Measured) -> tuple[str, list[str], list[list[str]]]:
    """Title, header and rows: what was rounded, and what that costs."""
    losses = [
        ("nothing: the source", None, found.source_loss),
        ("weights", found.kl, found.loss),
        ("weights, and inputs of products", found.rounded_kl, found.rounded_loss),
    ]
    rows = [
        [what, "" if kl is None else f"{kl:.3e}", f"{math.exp(min(loss, 700)):.3f}"]
        for what, kl, loss in losses
        if loss is not None
    ]
    header = ["rounded", "KL(source, export), nats per token", "perplexity"]
    text = _text(found.text, "held-out part")
    return f"{found.tokens:,} tokens of {text}, in FP32", header, rows


def _measured(facts: ExportFacts, measured: Measured | None) -> str:
    lines = ["## Measured", ""]
    for kind, scales in sorted(facts.errors.items()):
        shown = ", ".join(f"{value:.4f} with `{name}`" for name, value in scales.items())
        lines.append(f"- relative error of the weights, {kind.replace('_', ' ')}: {shown}")
    if measured is not None:
        title, header, rows = measured_table(measured)
        lines += [f"- KL divergence and perplexity on {title}:", "", _table(header, rows)]
    else:
        lines.append(
            "- KL divergence and perplexity: not measured. `nemo-hybrid verify-export DIR --base "
            "SOURCE --data TEXT` does it."
        )
    return "\n".join(lines)


def _engines(options: ExportOptions, facts: ExportFacts) -> str:
    fp8 = options.kv_cache == "fp8"
    further = {
        "mixed": " vLLM 0.15 refuses `MIXED_PRECISION`.",
        "bf16": " transformers loads this directory, too.",
    }
    lines = [
        "## Serving",
        "",
        "`DIR` is this directory. Least versions: vLLM 0.32, whose loaders names and configuration "
        "follow; SGLang 0.5.23 and TensorRT-LLM 1.2.1, which were not tried."
        + further.get(options.format, ""),
        "",
        "```sh",
        f"vllm serve DIR{' --kv-cache-dtype fp8' * fp8}",
        f"python -m sglang.launch_server --model-path DIR{' --kv-cache-dtype fp8_e4m3' * fp8}",
        "trtllm-serve DIR",
        "```",
    ]
    if options.format == "compressed-tensors" and "E" in facts.shape.pattern:
        lines += [
            "",
            "transformers 5.23 loads the layers of experts of this layout without a warning and "
            "computes with wrong values: do not use it here.",
        ]
    if facts.shape.mtp_num_depths:
        lines += [
            "",
            "The multi-token-prediction block is among the weights. vLLM drafts with it on "
            '`--speculative-config \'{"method": "mtp", "num_speculative_tokens": 1}\'`; look at '
            "the acceptance that it logs, as misread weights show there alone.",
        ]
    return "\n".join(lines)


def _unchecked(options: ExportOptions, facts: ExportFacts, measured: Measured | None) -> str:
    lines = [
        "## Not checked",
        "",
        "- This directory was not loaded into any serving engine, nor was it run on a GPU's FP4 or "
        "FP8 units; speed was not measured.",
        "- No benchmark was run: questions, code, long contexts, tools, languages.",
        "- Acceptance of drafted tokens was not measured.",
        "- After they were written, tensors were neither compared with the source one by one nor "
        "decoded by another library: `nemo-hybrid verify-export DIR --base SOURCE` does it.",
    ]
    if with_inputs(facts.assignment) and (measured is None or measured.rounded_kl is None):
        lines.append("- What the rounding of inputs costs is not part of any number above.")
    if options.kv_cache == "fp8":
        lines.append("- What FP8 keys and values cost was not measured.")
    return "\n".join(lines)


def _ranges(numbers: list[int]) -> str:
    """Such as 0, 2-4."""
    out: list[list[int]] = []
    for number in sorted(numbers):
        if out and number == out[-1][-1] + 1:
            out[-1][1:] = [number]
        else:
            out.append([number])
    return ", ".join("-".join(map(str, run)) for run in out)
