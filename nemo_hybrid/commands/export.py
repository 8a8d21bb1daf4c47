"""`export`: which formats, with which scales, and what they cost."""

from __future__ import annotations

import math
from dataclasses import field, replace
from itertools import accumulate
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from nemo_hybrid.commands.command import Command
from nemo_hybrid.config.base import CHECKED, GLOBS, CommandOptions, PositiveInt, refuse
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.errors import UserError
from nemo_hybrid.terminal import print_table

if TYPE_CHECKING:
    from torch import Tensor

    from nemo_hybrid.export.calibrate import Calibration
    from nemo_hybrid.export.layout import ExportFacts
    from nemo_hybrid.precision.assign import Assignment, Format

_MEASURED_TOKENS = 8192  # of the calibration text, for sensitivity
_FEW_TOKENS = 1024
_SHOWN = 8  # experts


@dataclass(config=CHECKED)
class ExportOptions(CommandOptions):
    """Write a checkpoint in the number formats that serving engines load."""

    from_: str
    """Run, checkpoint or Hugging Face directory."""
    out: str
    """Directory to write; it must be absent or empty."""
    format: Literal["bf16", "nvfp4", "mixed", "fp8", "compressed-tensors"]
    """bf16: plain; nvfp4, mixed, fp8: ModelOpt's layout, mixed with a format per module;
    compressed-tensors: NVFP4 in that library's layout."""
    preset: Literal["conservative", "super", "nano", "ultra"] = "conservative"
    """Which modules are quantized: conservative: experts, shared experts and dense MLPs; the others
    by module family as NVIDIA published those models."""
    formats: GLOBS = field(default_factory=dict)
    """Formats of further modules, on top of the preset: glob over module names -> bf16, fp8, nvfp4
    or nvfp4_w4a16; or a YAML file of that."""
    scales: Literal["amax", "mse", "four_over_six", "training"] = "amax"
    """NVFP4 scales of weights: from the largest value; from a search for the least error; from the
    choice between 4 and 6; or those of the 16x16 blocks of NVFP4 training."""
    calibration: str | None = None
    """Token store, samples for fine-tuning or text file whose activations give the input scales;
    without it weights alone are quantized (W4A16)."""
    calibration_tokens: PositiveInt = 65536
    """Tokens of it to read."""
    percentile: Annotated[float | None, Field(ge=90, le=100)] = None
    """Share of the activations, in percent, that input scales cover; null: all of them."""
    kv_cache: Literal["none", "fp8"] = "none"
    """fp8: write scales for keys and values, which needs calibration."""
    budget_bits: Annotated[float | None, Field(gt=0, lt=16)] = None
    """Mean bits per weight: instead of a preset, measure each module group's sensitivity and assign
    formats that fit."""
    heldout: str | None = None
    """Token store or samples (their held-out part), or another text file: measure KL divergence and
    perplexity of the export on it, for the model card."""
    heldout_tokens: PositiveInt = 8192
    """Tokens of it to read."""

    def validate(self) -> None:
        calibration, budget = self.calibration, self.budget_bits
        idle = {
            "preset": self.format == "bf16" or budget is not None,
            "scales": self.format in ("bf16", "fp8"),
            "calibration_tokens": calibration is None,
            "heldout_tokens": self.heldout is None,
        }
        refuse(
            *(
                (
                    calibration is None and getattr(self, name) is not None,
                    f"{name} needs calibration: name a text file or a token store",
                )
                for name in ("percentile", "budget_bits")
            ),
            (
                calibration and self.format == "bf16",
                "calibration is for quantized formats: leave it out with bf16",
            ),
            (
                calibration and self.heldout and _same_file(calibration, self.heldout),
                "heldout is the text of the calibration: name another one",
            ),
            (
                budget is not None and self.formats,
                "budget_bits assigns formats itself: leave formats out",
            ),
            *(
                (idle.get(name), f"{name} has no effect with these options: leave it out")
                for name in self.changed()
            ),
        )


def _same_file(one: str, other: str) -> bool:
    try:
        return Path(one).is_file() and Path(one).samefile(other)
    except OSError:
        return False


def export_command(options: ExportOptions) -> None:
    """What can be refused without a model is refused before one is loaded. Raises UserError."""
    from nemo_hybrid.checkpoint.directory import new_directory
    from nemo_hybrid.checkpoint.steps import reading
    from nemo_hybrid.export.write import unquantized

    out = new_directory(options.out)
    reading(options.from_, lambda source: _export(options, source, out), unquantized)


def _export(options: ExportOptions, source: Path, out: Path) -> None:
    import torch

    from nemo_hybrid.checkpoint.load import load_model
    from nemo_hybrid.checkpoint.publish import CARD
    from nemo_hybrid.data.store import TOKENIZER
    from nemo_hybrid.export import calibrate, card, decode, sensitivity, verify, write
    from nemo_hybrid.precision import assign

    shape = HybridConfig.from_hf(str(source))
    calibrated, budget = options.calibration is not None, options.budget_bits
    if budget is None:
        assignment = assign.planned(
            shape, options.format, options.preset, options.formats, calibrated
        )
        if calibrated and options.kv_cache == "none" and not assign.with_inputs(assignment):
            raise UserError("calibration has no effect without rounded inputs: leave it out")
    else:  # in the fewest bits that may come of it
        assignment = sensitivity.assign_within(
            budget, sensitivity.candidates(shape, _tried(options)), shape
        )
    write.check_cache(options.kv_cache, options.format, shape, calibrated)
    if options.percentile is not None and not assign.with_inputs(assignment):
        raise UserError("percentile has no effect where no inputs are rounded: leave it out")
    if options.scales != "amax" and not any(f.startswith("nvfp4") for f in assignment.values()):
        raise UserError("scales has no effect where nothing becomes NVFP4: leave it out")
    write.prepared(source, out, assignment, options.format, options.scales)
    origin = card.lineage(source)
    pieces, heldout = [], []
    if options.calibration is not None:
        pieces = calibrate.read_pieces(
            options.calibration, source, shape, options.calibration_tokens
        )
    if options.heldout is not None:
        heldout = calibrate.read_pieces(
            options.heldout, source, shape, options.heldout_tokens, "heldout"
        )
    before = (
        verify.states(load_model(source, torch.float32), heldout, "source", True)
        if heldout
        else None
    )
    calibration, reports = None, dict[str, bytes]()
    if pieces:
        calibration, assignment, reports = _calibrated(source, pieces, assignment, options)

    def describe(directory: Path, facts: ExportFacts) -> dict[str, bytes]:
        measured = None
        if before is not None:
            amax = calibration.amax if calibration else {}
            scales, model = decode.Scales(facts.assignment, amax), verify.load_exported(directory)
            measured = verify.measure(before, model, scales, heldout, str(options.heldout), True)
            if not all(math.isfinite(run.loss + (run.kl or 0.0)) for run in measured.runs):
                raise UserError("logits are not finite: the checkpoint is broken")
            title, header, rows = card.measured_table(measured)
            print_table(header, rows, title=title)
        return {**reports, CARD: card.card(options, facts, origin, measured).encode()}

    facts = write.export_directory(
        source,
        out,
        assignment,
        target=options.format,
        search=options.scales,
        calibration=calibration,
        kv_cache=options.kv_cache,
        describe=describe,
    )
    for kind, errors in facts.errors.items():
        listed = ", ".join(f"{error:.4f} with {scales}" for scales, error in errors.items())
        print(f"relative error of {kind}: {listed}")
    for place, experts in (calibration.unseen if calibration else {}).items():
        shown = ", ".join(map(str, experts[:_SHOWN])) + (", ..." if len(experts) > _SHOWN else "")
        print(
            f"{place}: no token reached {len(experts)} experts ({shown}); input scales are those "
            "of the others"
        )
    if calibration is not None and calibration.tokens < _FEW_TOKENS:
        print(f"warning: calibrated on {calibration.tokens} tokens alone: give more text")
    if not (source / TOKENIZER).is_file():
        print(f"warning: {source} has no {TOKENIZER}, which engines need: add it and export again")
    print(
        f"{facts.bytes_after / 1e9:.3g} GB of weights, {facts.share:.1%} of what BF16 takes, "
        f"written to {options.out}; check them with\n"
        f"  nemo-hybrid verify-export {quote(options.out)} --base {quote(options.from_)}"
    )


def _tried(options: ExportOptions) -> tuple[Format, ...]:
    """The formats that a budget is spent on."""
    tried: dict[str, tuple[Format, ...]] = {"mixed": ("nvfp4", "fp8"), "fp8": ("fp8",)}
    return tried.get(options.format, ("nvfp4",))


def _calibrated(
    source: Path, pieces: list[Tensor], assignment: Assignment, options: ExportOptions
) -> tuple[Calibration, Assignment, dict[str, bytes]]:
    """The calibration; with a budget, an assignment that keeps it, and the files that say why."""
    from nemo_hybrid.checkpoint.load import load_model
    from nemo_hybrid.export import calibrate, divergence, sensitivity
    from nemo_hybrid.precision import assign, groups

    budget, reports = options.budget_bits, dict[str, bytes]()
    inputs = assign.with_inputs(assignment)
    if budget is not None:
        inputs = [place for place in assignment if groups.family(place) in sensitivity.SPENT_ON]
    if options.kv_cache == "fp8":  # engines take one dtype for all caches, the MTP block's too
        inputs = [
            *inputs,
            *(p for p in assignment if p.startswith("mtp.") and p.endswith("k_proj")),
        ]
    model = divergence.ready(load_model(source))
    calibration = calibrate.calibrate(model, pieces, options.percentile, inputs, show=True)
    if budget is not None:
        before = accumulate((piece.numel() for piece in pieces), initial=0)
        few = [p for p, so_far in zip(pieces, before, strict=False) if so_far < _MEASURED_TOKENS]
        amax, formats = calibration.amax, _tried(options)
        measured = sensitivity.measure(model, few, formats, options.scales, amax, show=True)
        chosen = sensitivity.assign_within(budget, measured, model.config)
        assignment = assign.fitted(chosen, options.format, calibrated=True)
        reports = sensitivity.sensitivity_report(measured, assignment, budget)
    rounded = assign.with_inputs(assignment)
    unseen = {place: e for place, e in calibration.unseen.items() if place in rounded}
    return replace(calibration, unseen=unseen), assignment, reports


COMMANDS = {"export": Command(export_command, ExportOptions, reads="from_")}
