"""README.md of an exported directory: what it was made of and how, and what nobody has checked."""

from __future__ import annotations

import math
import re
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING

from nemo_hybrid import __version__
from nemo_hybrid.export.assign import family, places

if TYPE_CHECKING:
    from nemo_hybrid.export.layout import ExportFacts
    from nemo_hybrid.export.verify import Measured

_WORDS = {
    "bf16": "BF16",
    "fp8": "FP8 (E4M3, one scale per tensor)",
    "nvfp4": "NVFP4 (E2M1 in blocks of 16), inputs too",
    "nvfp4_w4a16": "NVFP4 (E2M1 in blocks of 16), weights alone",
}
_SCALES = {
    "amax": "from the largest value of a block",
    "mse": "searched for the least squared error of a block",
    "four_over_six": "the better of mapping a block's largest value to 4 and to 6",
    "training": "those of the 16x16 blocks of NVFP4 training, repeated for 16 rows",
}
_LAYER = re.compile(r"(backbone|mtp)\.layers\.(\d+)\.(.+)")
_LONGEST = 200


def card(facts: ExportFacts, measured: Measured | None = None) -> str:
    """The model card, in the form that the Hugging Face hub reads.

    Without ``measured`` it says that nothing was. Texts that come from users and files stand in it
    as code, on one line, so that they cannot become Markdown or HTML.
    """
    sections = [
        _head(facts),
        _recipe(facts),
        _precision(facts),
        _measured(facts, measured),
        _engines(facts),
        _unchecked(facts, measured),
    ]
    return "\n\n".join(sections) + "\n"


def code(text: str) -> str:
    """A text of unknown origin as inline code that no character of it can end."""
    shown = "".join(c if c.isprintable() else "?" for c in text)[:_LONGEST]
    shown = shown.replace("`", "'").replace("|", "\\|").strip() or "?"
    return f"`{shown}`"


def _name(path: str) -> str:
    """What a path ends with, as code: of a run's checkpoint the run and the step."""
    parts = [part for part in Path(path).parts if part != "checkpoints"]
    return code(
        "/".join(parts[-2:] if parts[-1:] and parts[-1].startswith("step_") else parts[-1:])
    )


def _table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    header = list(header)
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _head(facts: ExportFacts) -> str:
    formats = sorted(set(facts.assignment.values()) - {"bf16"})
    tags = ["nemotron_h", *dict.fromkeys(name.partition("_")[0] for name in formats)]
    what = ", ".join(tag.upper() for tag in tags[1:]) or "BF16"
    bits = 8 * facts.bytes_after / facts.parameters
    return "\n".join(
        [
            "---",
            f"tags: [{', '.join(tags)}]",
            "---",
            f"# {_name(facts.source)} in {what}",
            "",
            f"Weights of {_name(facts.source)}, exported by nemo_hybrid {__version__} with "
            f"`--format {facts.target}`. What the source was trained on is said there; its licence "
            "and limits apply.",
            "",
            f"{facts.parameters:,} parameters in {facts.bytes_after:,} bytes ({bits:.2f} bits "
            f"each, scales included), {facts.bytes_after / facts.bytes_before:.1%} of the "
            f"{facts.bytes_before:,} before.",
        ]
    )


def _recipe(facts: ExportFacts) -> str:
    if facts.target == "bf16":
        return (
            "## Recipe\n\nNothing is quantized: weights are BF16, those that decide by small "
            "differences (`A_log`, `D`, `dt_bias`, router biases) FP32."
        )
    rows = [
        ("layout", "compressed-tensors" if facts.target == "compressed-tensors" else "ModelOpt")
    ]
    if facts.budget_bits is not None:
        chosen = f"measured sensitivity, at most {facts.budget_bits:g} bits per weight on average"
    else:
        chosen = "single names" if facts.preset is None else f"preset `{facts.preset}`"
    rows.append(("formats by", chosen))
    if any(format.startswith("nvfp4") for format in facts.assignment.values()):
        rows.append(("NVFP4 block scales", f"`{facts.search}`: {_SCALES[facts.search]}"))
    seen = facts.calibration
    if seen is None:
        rows.append(("input scales", "none: nothing was calibrated, inputs stay BF16"))
    else:
        share = "all" if facts.percentile is None else f"{facts.percentile:g} %"
        data = "" if facts.calibration_data is None else f" of {_name(facts.calibration_data)}"
        rows.append(("input scales", f"{share} of the values on {seen.tokens:,} tokens{data}"))
    cache = "FP8, with scales of the calibration" if facts.kv_cache == "fp8" else "no scales"
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
    if facts.preset is not None:
        lines += [
            "",
            "Presets follow the formats that NVIDIA published for its models by module family. "
            "They are not NVIDIA's assignment of single layers.",
        ]
    return "\n".join(lines)


def _precision(facts: ExportFacts) -> str:
    layers: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
    sizes, weights = places(facts.shape), defaultdict[tuple[str, str], int](int)
    for place, format in facts.assignment.items():
        match = _LAYER.fullmatch(place)
        key = (f"{match[1]} … {match[3]}" if match else place, format)
        layers[key] += [int(match[2])] if match else []
        weights[key] += math.prod(sizes[place])
    rows = [
        (f"`{name}`", _ranges(layers[name, format]), _WORDS[format], f"{weights[name, format]:,}")
        for name, format in sorted(layers, key=lambda key: (family(key[0]), key))
    ]
    left = (
        "Routers, embeddings, convolutions and norms are never quantized; head, latent projections "
        "and the multi-token-prediction block only where the table says so. `A_log`, `D`, "
        "`dt_bias` and router biases are FP32."
    )
    return "\n".join(
        ["## Precision", "", _table(("modules", "layers", "format", "weights"), rows), "", left]
    )


def _measured(facts: ExportFacts, measured: Measured | None) -> str:
    lines = ["## Measured", ""]
    for kind, scales in sorted(facts.errors.items()):
        shown = ", ".join(f"{value:.4f} with `{name}`" for name, value in scales.items())
        lines.append(f"- relative error of the weights, {kind.replace('_', ' ')}: {shown}")
    if measured is None or measured.kl is None or measured.source_loss is None:
        lines.append(
            "- KL divergence and perplexity: not measured. `nemo-hybrid verify-export DIR --base "
            "SOURCE --data TEXT` does it."
        )
        return "\n".join(lines)
    before, after = math.exp(measured.source_loss), math.exp(measured.loss)
    lines += [
        f"- on {measured.tokens:,} tokens of {_name(measured.text)}, with dequantized weights and "
        "inputs as they are, in FP32:",
        f"  KL(source, export) {measured.kl:.3e} nats per token; perplexity {before:.3f} before, "
        f"{after:.3f} after",
    ]
    return "\n".join(lines)


def _engines(facts: ExportFacts) -> str:
    fp8 = facts.kv_cache == "fp8"
    further = {
        "mixed": " vLLM 0.15 refuses `MIXED_PRECISION`.",
        "bf16": " transformers loads this directory, too.",
    }
    lines = [
        "## Serving",
        "",
        "`DIR` is this directory. Least versions: vLLM 0.32, whose loaders names and configuration "
        "follow; SGLang 0.5.23 and TensorRT-LLM 1.2.1, which were not tried."
        + further.get(facts.target, ""),
        "",
        "```sh",
        f"vllm serve DIR{' --kv-cache-dtype fp8' * fp8}",
        f"python -m sglang.launch_server --model-path DIR{' --kv-cache-dtype fp8_e4m3' * fp8}",
        "trtllm-serve DIR",
        "```",
    ]
    if facts.target == "compressed-tensors":
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


def _unchecked(facts: ExportFacts, measured: Measured | None) -> str:
    lines = [
        "## Not checked",
        "",
        "- This directory was not loaded into any serving engine, nor was it run on a GPU's FP4 or "
        "FP8 units; speed was not measured.",
        "- No benchmark was run: questions, code, long contexts, tools, languages.",
        "- Acceptance of drafted tokens was not measured.",
    ]
    if any(format in ("nvfp4", "fp8") for format in facts.assignment.values()):
        lines.append("- What the rounding of inputs costs is not part of any number above.")
    if facts.kv_cache == "fp8":
        lines.append("- What FP8 keys and values cost was not measured.")
    if measured is None:
        lines.append("- Weights were not compared with the source after they were written.")
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
