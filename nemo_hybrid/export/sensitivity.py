"""Which modules suffer from quantization, and which formats fit into a budget of bits.

Shapes: B rows, S sequence, T tokens, D hidden, V vocabulary.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import torch
from torch import Tensor

from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.errors import UserError
from nemo_hybrid.export.divergence import States, per_token
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.precision.assign import BLOCK, Assignment, Format, places
from nemo_hybrid.precision.groups import family
from nemo_hybrid.precision.quantize import Search
from nemo_hybrid.precision.simulate import simulated
from nemo_hybrid.terminal import print_table, progress_bar

BITS: dict[Format, float] = {"bf16": 16.0, "fp8": 8.0, "nvfp4": 4.5, "nvfp4_w4a16": 4.5}
"""Per weight, block scales included; a tensor's scales are too few to count."""
TABLE_FILE, PLOT_FILE = "sensitivity.json", "sensitivity.png"
SPENT_ON = ("experts", "shared_experts", "mamba", "attention", "mlp")
"""Families that a budget is for: the others are quantized only where somebody names them."""


@dataclass(frozen=True)
class Sensitivity:
    """Of a group of weights, which are of one family and layer and get one format."""

    layer: int
    family: str
    places: tuple[str, ...]
    weights: int
    kl: dict[Format, float]
    """KL(as it is || this group alone quantized), mean over tokens, in nats."""

    def kl_of(self, format: Format) -> float:
        return 0.0 if format == "bf16" else self.kl[format]


@torch.no_grad()
def measure(
    model: HybridLM,
    pieces: Sequence[Tensor],
    formats: Sequence[Format] = ("nvfp4", "fp8"),
    search: Search = "amax",
    input_amax: Mapping[str, Tensor] | None = None,
    *,
    show: bool = False,
) -> list[Sensitivity]:
    """Quantize every group alone, in every format that its widths allow, and compare logits of
    ``pieces``, ids [B, S], with those of the model as it is.

    With ``input_amax`` (see `Calibration`) inputs are quantized too. Logits are fp32 and made for a
    few tokens at once; of the model there is one copy and that of a group's weights; layers below
    the group are computed once. MTP block and head have no part in it. Raises UserError where the
    model gives no finite numbers.
    """
    layers, head_VD = list(model.backbone.layers), model.lm_head.weight.float()
    inputs = [model.backbone.embeddings(ids_BS.to(head_VD.device)) for ids_BS in pieces]

    def states(first: int) -> States:
        """From the inputs of layer ``first`` on."""
        parts = []
        for x_BSD in inputs:
            for layer in layers[first:]:
                x_BSD = layer(x_BSD, None)[0]
            parts.append(model.backbone.norm_f(x_BSD).flatten(0, 1).float())
        return States(torch.cat(parts), head_VD)

    base, groups = states(0), candidates(model.config, formats)
    labels_T = torch.zeros(len(base.h_TD), dtype=torch.int64)  # nobody asks for theirs
    measured: list[Sensitivity] = []
    with progress_bar("measuring sensitivity", len(groups), show) as progress:
        for i, layer in enumerate(layers):
            for group in (group for group in groups if group.layer == i):
                kl: dict[Format, float] = {}
                for format in group.kl:
                    with simulated(model, dict.fromkeys(group.places, format), search, input_amax):
                        found = per_token(base, states(i), labels_T)
                    kl[format] = float(found.kl_T.mean())
                    if not math.isfinite(kl[format]):
                        raise UserError(
                            "the model's logits are not finite: the checkpoint is broken"
                        )
                measured.append(replace(group, kl=kl))
                progress(len(measured))
            inputs = [layer(x_BSD, None)[0] for x_BSD in inputs]
    return measured


def candidates(shape: HybridConfig, formats: Sequence[Format]) -> list[Sensitivity]:
    """Every group that a budget is for, in the formats that its widths allow; 0 stands for what
    nobody has measured."""
    found: dict[tuple[int, str], dict[str, tuple[int, ...]]] = {}
    for place, size in places(shape).items():
        if (kind := family(place)) in SPENT_ON:
            found.setdefault((int(place.split(".")[2]), kind), {})[place] = size
    out = []
    for (layer, kind), sizes in found.items():
        uneven = any(size[-1] % BLOCK for size in sizes.values())
        kl = {format: 0.0 for format in formats if format == "fp8" or not uneven}
        out.append(Sensitivity(layer, kind, tuple(sizes), sum(map(math.prod, sizes.values())), kl))
    return out


def assign_within(
    budget_bits: float, measured: Sequence[Sensitivity], shape: HybridConfig
) -> Assignment:
    """A format for every place, of which the weights that may be quantized take ``budget_bits`` on
    average at most (see `mean_bits`).

    All groups begin in the fewest bits; then, as long as one fits, the change comes that saves most
    KL per bit. That takes the sum of what groups do alone for what they do together. Raises
    UserError for a budget that cannot be kept.
    """
    if not any(group.kl for group in measured):
        raise UserError(
            f"no weights that a budget is for have rows that blocks of {BLOCK} divide: take "
            "--format mixed or fp8"
        )
    unquantized: Format = "bf16"
    total = sum(s.weights for s in measured)
    chosen: list[Format] = []
    for group in measured:
        chosen.append(min(group.kl, key=lambda f: BITS[f], default=unquantized))
    left = budget_bits * total
    left -= sum(group.weights * BITS[now] for group, now in zip(measured, chosen, strict=True))
    if left < 0:
        least = math.ceil(1000 * (budget_bits - left / total) - 1e-6) / 1000
        raise UserError(f"--budget_bits {budget_bits:g} is too small: give at least {least:g}")
    while changes := list(_changes(measured, chosen, left)):
        _, back, format = max(changes)
        group = measured[-back]
        left -= group.weights * (BITS[format] - BITS[chosen[-back]])
        chosen[-back] = format
    assignment: Assignment = dict.fromkeys(places(shape), "bf16")
    for group, format in zip(measured, chosen, strict=True):
        assignment |= dict.fromkeys(group.places, format)
    return assignment


def _changes(
    measured: Sequence[Sensitivity], chosen: Sequence[Format], left: float
) -> Iterator[tuple[float, int, Format]]:
    """KL saved per bit, the group's number negated, and its new format, of every change that saves
    some and takes no more than the bits that are left."""
    for i, (group, now) in enumerate(zip(measured, chosen, strict=True)):
        formats: list[Format] = [*group.kl, "bf16"]
        for format in formats:
            bits = group.weights * (BITS[format] - BITS[now])
            saved = group.kl_of(now) - group.kl_of(format)
            if 0 < bits <= left and saved > 0:
                yield saved / bits, -i, format


def mean_bits(measured: Sequence[Sensitivity], assignment: Mapping[str, Format]) -> float:
    """Bits per weight over the measured groups: weights that a budget leaves alone (embeddings,
    head, router, latent projections, MTP, ...) are not counted."""
    bits = sum(s.weights * BITS[assignment[s.places[0]]] for s in measured)
    return bits / max(1, sum(s.weights for s in measured))


def sensitivity_report(
    measured: Sequence[Sensitivity], assignment: Mapping[str, Format], budget_bits: float
) -> dict[str, bytes]:
    """Print a table of the groups, worst first; returns files to write beside the export, by name:
    the same as JSON, and a plot (PNG)."""
    formats = sorted({f for s in measured for f in s.kl}, key=lambda f: BITS[f])
    worst = sorted(measured, key=lambda s: -max(s.kl.values(), default=0.0))
    bits = mean_bits(measured, assignment)
    print_table(
        ("layer", "family", "weights", *(f"KL in {f}" for f in formats), "format"),
        [
            (
                str(s.layer),
                s.family,
                f"{s.weights:,}",
                *(f"{s.kl[f]:.2e}" if f in s.kl else "" for f in formats),
                assignment[s.places[0]],
            )
            for s in worst
        ],
        title="Change of the logits (nats per token) when one group alone is quantized",
        right=("layer", "weights"),
    )
    print(
        f"{bits:.3f} bits per weight of these groups (budget {budget_bits:g}); other weights are "
        "not counted"
    )
    content = {
        "budget_bits": budget_bits,
        "bits": bits,
        "groups": [asdict(s) | {"format": assignment[s.places[0]]} for s in measured],
    }
    return {
        TABLE_FILE: json.dumps(content, indent=1).encode(),
        PLOT_FILE: _plot(measured, assignment, formats),
    }


def _plot(
    measured: Sequence[Sensitivity], assignment: Mapping[str, Format], formats: Sequence[Format]
) -> bytes:
    """KL over layers: a mark per family, a colour per format, filled where it was chosen."""
    from matplotlib.ticker import MaxNLocator

    from nemo_hybrid.train.plots import png, styled

    colors = dict(zip(formats, ("#d9822b", "#2f6fab", "#7a9a3b"), strict=False))
    marks = dict(zip(SPENT_ON, "osD^v", strict=True))
    figure, (axes,) = styled(1, 4.5)
    for s in measured:
        for format, kl in s.kl.items():
            filled = assignment[s.places[0]] == format
            axes.plot(
                s.layer, kl, marks[s.family], mec=colors[format], mew=1.2,
                mfc=colors[format] if filled else "white",
            )  # fmt: skip
    for format in formats:
        axes.plot([], [], "o", color=colors[format], label=format)
    for kind in dict.fromkeys(s.family for s in measured):
        axes.plot([], [], marks[kind], mec="#333333", mfc="white", label=kind.replace("_", " "))
    axes.set_yscale("log", nonpositive="clip")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set_title("One group quantized alone", loc="left", fontweight="bold")
    axes.set_title("filled: chosen format; none filled: bf16", loc="right", fontsize=9)
    axes.set_xlabel("layer")
    axes.set_ylabel("KL of the logits, nats per token")
    figure.legend(frameon=False, fontsize=9, loc="outside right upper")
    return png(figure)
