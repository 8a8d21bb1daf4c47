"""Which weight is stored in which format.

A place is a weight that may be quantized, by our name without ``.weight``:
``backbone.layers.0.mixer.in_proj``, and for all routed experts of a layer together
``backbone.layers.1.mixer.experts.up_proj``.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, cast, get_args

import torch

from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.errors import UserError
from nemo_hybrid.globs import matched, unmatched
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.precision.groups import family, is_stacked

Format = Literal["bf16", "fp8", "nvfp4", "nvfp4_w4a16"]
"""nvfp4_w4a16: weights alone; the other two quantize the inputs of the product as well."""
FORMATS = get_args(Format)
WITH_INPUTS = ("fp8", "nvfp4")
"""Formats whose products take rounded inputs as well."""
BLOCK = 16
Assignment = dict[str, Format]


_MLPS = ("experts", "shared_experts", "mlp")
# Dense MLPs, which Super and Ultra do not have, are treated as their shared experts are.
_SUPER: dict[str, Format] = {
    "experts": "nvfp4", "shared_experts": "fp8", "mlp": "fp8", "mamba": "fp8",
}  # fmt: skip
PRESETS: dict[str, dict[str, Format]] = {
    "conservative": dict.fromkeys(_MLPS, "nvfp4"),
    "super": _SUPER,
    "ultra": _SUPER,
    "nano": dict.fromkeys((*_MLPS, "mamba"), "nvfp4"),
}
"""By module family, as NVIDIA published these models; their own choice for single layers differs,
but for nano's Mamba layers directly before an attention layer, which stay bf16. Super and Ultra
agree in families: what sets Ultra apart are four-over-six scales."""

# Families that a glob must name: these words have to stand in it.
_NAMED_ONLY = {"head": "lm_head", "latent": "latent", "mtp": "mtp"}


def places(shape: HybridConfig) -> dict[str, tuple[int, ...]]:
    """Everything that may be quantized, with the weight's shape: [out, in], of stacks
    [E, out, in]."""
    return _shapes(shape, places=True)


def weights(shape: HybridConfig) -> dict[str, torch.Tensor]:
    """Everything that files hold of a model, by our names, without storage."""
    with torch.device("meta"):
        model = HybridLM(shape)
    return dict(model.named_parameters()) | dict(model.named_buffers())


def _shapes(shape: HybridConfig, *, places: bool) -> dict[str, tuple[int, ...]]:
    return {
        name.removesuffix(".weight"): tuple(weight.shape)
        for name, weight in weights(shape).items()
        if (is_stacked(name) or name.endswith(("_proj.weight", "lm_head.weight"))) == places
    }


def unquantizable(shape: HybridConfig) -> dict[str, tuple[int, ...]]:
    """All other weights, as in `places`."""
    return _shapes(shape, places=False)


def groups(assignment: Mapping[str, Format]) -> list[list[str]]:
    """The quantized places, those together that engines fuse, so that they have one tensor scale
    and one input scale: q, k and v of a layer. (Of stacked experts the input scale is one for all,
    the tensor scales are not.)"""
    found: dict[str, list[str]] = {}
    for place, format in assignment.items():
        if format != "bf16":
            fused = place.endswith((".q_proj", ".k_proj", ".v_proj"))
            found.setdefault(place.rpartition(".")[0] if fused else place, []).append(place)
    return list(found.values())


def with_inputs(assignment: Mapping[str, Format]) -> list[str]:
    """The places whose products take rounded inputs."""
    return [place for place, format in assignment.items() if format in WITH_INPUTS]


def assign(shape: HybridConfig, preset: str | None, rules: Mapping[str, str]) -> Assignment:
    """The format of every place: the preset's, then those of rules (glob over places -> format),
    of which the last that matches counts.

    Head, latent projections and MTP are quantized only by a glob that holds "lm_head", "latent" or
    "mtp". Raises UserError for a rule that matches nothing, or nothing that it may change, and for
    what engines cannot load (see `check`).
    """
    sizes = places(shape)
    assignment: Assignment = {place: _of_preset(shape, preset, place) for place in sizes}
    for glob, given in rules.items():
        if given not in FORMATS:
            raise UserError(f"formats: {glob}: {given!r} is no format; use {', '.join(FORMATS)}")
        found = matched(glob, sizes)
        if not found:
            named = [place for place in sizes if not _unnamed(place, glob)]
            raise UserError(f"formats: {unmatched(glob, named, unquantizable(shape))}")
        allowed = [place for place in found if given == "bf16" or not _unnamed(place, glob)]
        if not allowed:
            raise UserError(
                f"formats: {glob} matches only {found[0]} and the like, which are quantized only "
                f'by a glob that names them: write "{_unnamed(found[0], glob)}" in it'
            )
        assignment |= dict.fromkeys(allowed, cast(Format, given))
    check(assignment, sizes)
    return assignment


def _of_preset(shape: HybridConfig, preset: str | None, place: str) -> Format:
    if preset is None:
        return "bf16"
    kind = family(place)
    if preset == "nano" and kind == "mamba":
        layer = int(place.split(".")[2])
        if shape.pattern[layer + 1 : layer + 2] == "*":
            return "bf16"
    return PRESETS[preset].get(kind, "bf16")


def _unnamed(place: str, glob: str) -> str | None:
    """The word that a glob lacks to quantize a place; None: it lacks none."""
    return next(
        (
            word
            for kind, word in _NAMED_ONLY.items()
            if word not in glob and (kind == family(place) or word in place)
        ),
        None,
    )


def check(assignment: Mapping[str, Format], sizes: Mapping[str, tuple[int, ...]]) -> None:
    """Raise UserError for a width that NVFP4's blocks do not divide, and for several formats where
    engines fuse: q, k and v, and all expert weights of a layer."""
    fused: dict[str, dict[Format, str]] = {}
    for place, format in assignment.items():
        width = sizes[place][-1]
        if format.startswith("nvfp4") and width % BLOCK:
            raise UserError(
                f"{place} has rows of {width}, which blocks of {BLOCK} do not divide: leave it in "
                "bf16 or fp8 (formats)"
            )
        owner, _, leaf = place.rpartition(".")
        if leaf in ("q_proj", "k_proj", "v_proj") or is_stacked(place):
            fused.setdefault(owner, {})[format] = place
    for found in fused.values():
        if len(found) > 1:
            (one, a), (other, b) = list(found.items())[:2]
            raise UserError(
                f"{a} is {one}, but {b} is {other}: engines fuse them, so give both one format"
            )


def planned(
    shape: HybridConfig, target: str, preset: str, rules: Mapping[str, str], calibrated: bool
) -> Assignment:
    """The assignment of a `nemo-hybrid export --format`: ``target`` bf16, nvfp4, mixed, fp8 or
    compressed-tensors. fp8 takes from the preset only which places are quantized. Without
    calibration nvfp4 becomes nvfp4_w4a16.

    Raises UserError as `assign`, and for an assignment that the target cannot hold.
    """
    if target == "bf16":
        if rules:
            raise UserError("formats says what is quantized, but format is bf16: choose another")
        return assign(shape, None, {})
    if target == "fp8":
        base = {p: "fp8" for p in places(shape) if _of_preset(shape, preset, p) != "bf16"}
        assignment = assign(shape, None, {**base, **rules})
    else:
        assignment = assign(shape, preset, rules)
    return fitted(assignment, target, calibrated)


def fitted(assignment: Mapping[str, Format], target: str, calibrated: bool) -> Assignment:
    """The same, as far as a target format can hold it; see `planned`."""
    out: Assignment = dict(assignment)
    if not calibrated:
        out = {p: "nvfp4_w4a16" if f == "nvfp4" else f for p, f in out.items()}
    first: dict[Format, str] = {f: p for p, f in reversed(out.items()) if f != "bf16"}
    if not first:
        raise UserError("nothing would be quantized: name another preset, or formats, or use bf16")
    if "fp8" in first and not calibrated:
        raise UserError(
            f"{first['fp8']} is to be fp8, whose products take fp8 inputs, too: name a text or "
            "token store as calibration"
        )
    if target == "mixed":
        return out
    held = "fp8" if target == "fp8" else "nvfp4" if "nvfp4" in first else "nvfp4_w4a16"
    wrong = next((format for format in first if format != held), None)
    if wrong is not None:
        raise UserError(
            f"{first[wrong]} is to be {wrong}, which --format {target} cannot hold, or not beside "
            "other formats, but mixed can"
        )
    if target == "compressed-tensors" and out["lm_head"] != "bf16":
        raise UserError(
            "lm_head: engines do not load a quantized head in compressed-tensors' layout; leave it "
            "in bf16"
        )
    return out
