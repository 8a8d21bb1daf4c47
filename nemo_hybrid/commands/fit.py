"""What makes a run fit: the smallest context-parallel size, by what is recomputed; or one change
after the other."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from copy import deepcopy
from dataclasses import replace
from typing import Any

from nemo_hybrid.commands.plan import Plan, PlanOptions, gb, make_plan, ready
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.run import TrainingConfig
from nemo_hybrid.errors import UserError
from nemo_hybrid.train.checks import check_precision

TILE = 8192
"""Tokens of a tile, as it is advised."""
_SHORTEST = 128
"""Tokens of a sample, below which shorter ones are no advice."""
TILED = f" --train.tile {TILE} --train.offload true"
CHOICES: dict[str, dict[str, Any]] = {
    f"--train.recompute '{letters}'": {"recompute": letters} for letters in ("", "E", "ME", "ME*-")
} | {
    f"--train.recompute '{letters}'{TILED}": {"recompute": letters, "tile": TILE, "offload": True}
    for letters in ("ME", "ME*-")
}
"""From the least to the most that is computed once more."""


def ready_divided(
    config: TrainingConfig, options: PlanOptions
) -> tuple[TrainingConfig, HybridConfig]:
    """What `ready` makes of it, with another parallel.cp where its own cannot be had: a batch may
    have fewer rows than there are processes. Raises UserError where none can."""
    refused = []
    for cp in (config.parallel.cp, *_sizes(options)):
        tried = deepcopy(config)
        tried.parallel = replace(config.parallel, cp=cp)
        try:
            return ready(tried, options)
        except UserError as error:
            refused.append(error)
    raise refused[0]


def _sizes(options: PlanOptions) -> list[int]:
    """Of parallel.cp, those that are looked at."""
    return [1 << k for k in range(options.processes.bit_length())]


def _planned(config: TrainingConfig, shape: HybridConfig, options: PlanOptions) -> Plan:
    """Raises UserError where there is no such run."""
    config.validate(shape)
    check_precision(config, shape)
    return make_plan(config, shape, options)


def fitting(
    config: TrainingConfig, options: PlanOptions, shape: HybridConfig
) -> dict[str, tuple[int, Plan]]:
    """Names of `CHOICES` -> the smallest parallel.cp, of powers of two, with which that fits,
    and its plan; those with which none does are left out."""
    found: dict[str, tuple[int, Plan]] = {}
    for name, choice in CHOICES.items():
        for cp in _sizes(options):
            tried = deepcopy(config)
            tried.train = replace(config.train, **choice)
            tried.parallel = replace(config.parallel, cp=cp)
            try:
                plan = _planned(tried, shape, options)
            except UserError:  # heads cannot be divided so, or the batch, or a format's blocks
                continue
            if plan.fits:
                found[name] = cp, plan
                break
    return found


def fit_lines(config: TrainingConfig, options: PlanOptions, shape: HybridConfig) -> Iterator[str]:
    """What fits, and which is the smallest: of equal sizes the one that recomputes least."""
    found = fitting(config, options, shape)
    yield f"smallest parallel.cp with {options.processes} processes:"
    for name in CHOICES:
        if name in found:
            cp, plan = found[name]
            yield f"  {cp:3} {name}: {gb(plan.needed)}, {plan.step_s:.3f} s a step"
        else:
            yield f"    - {name}"
    if found:
        name, (cp, plan) = min(found.items(), key=lambda item: item[1][0])
        yield f"smallest: --parallel.cp {cp} {name}: {gb(plan.needed)} of {gb(plan.capacity)}"
    else:
        yield "none fits: take more processes, or a device with more memory"


def changes(config: TrainingConfig, options: PlanOptions, shape: HybridConfig) -> Iterator[str]:
    """What makes a run fit, one change after the other, each with the memory it leads to.

    Tried in this order: ZeRO-2, smaller micro-batches, recomputation, tiles and offloading, more
    expert parallelism, rows over more processes, more processes; and, since it changes what is
    learnt, at last shorter samples. A change that takes no memory away is left out. Ends with the
    first that fits; if none does, says so.
    """
    config, options = deepcopy(config), replace(options)
    at = make_plan(config, shape, options)
    for name, change in _candidates(config, shape, options):
        tried = deepcopy(config), replace(options)
        _apply(change, *tried)
        try:
            found = _planned(tried[0], shape, tried[1])
        except UserError:
            continue
        if found.needed > 0.98 * at.needed:
            continue
        _apply(change, config, options)  # which the next candidates go on from
        at = found
        yield f"{name}: {gb(found.needed)}" + (", fits" if found.fits else "")
        if found.fits:
            return
    while config.data.sequence_length >= 2 * _SHORTEST:
        config.data.sequence_length //= 2
        with suppress(UserError):
            found = _planned(config, shape, options)
            if found.fits:
                shorter = f"--data.sequence_length {config.data.sequence_length}"
                yield f"{shorter}, of which less is learnt: {gb(found.needed)}, fits"
                return
    yield (
        "even so it does not fit, nor with a smaller data.sequence_length: take still more "
        "processes, or a device with more memory"
    )


def _apply(change: dict[str, int | str], config: TrainingConfig, options: PlanOptions) -> None:
    for key, value in change.items():
        section, _, field = key.partition(".")
        setattr(options if section == "plan" else getattr(config, section), field, value)


def _candidates(
    config: TrainingConfig, shape: HybridConfig, options: PlanOptions
) -> Iterator[tuple[str, dict[str, int | str]]]:
    if config.parallel.stage(options.processes) == 1:
        yield "--parallel.zero 2", {"parallel.zero": 2}
    micro = config.train.micro_batch_size
    while micro > 1 and micro % 2 == 0:
        micro //= 2
        yield f"--train.micro_batch_size {micro}", {"train.micro_batch_size": micro}
    for letters in ("E", "ME", "ME*-"):
        if set(letters) > set(config.train.recompute) - {"e"}:
            yield f'--train.recompute "{letters}"', {"train.recompute": letters}
    yield f"--train.tile {TILE}", {"train.tile": TILE}
    yield "--train.offload true", {"train.offload": True}
    ep, processes = config.parallel.ep, options.processes
    while shape.n_routed_experts % (2 * ep) == 0 and processes % (2 * ep) == 0:
        ep *= 2
        yield f"--parallel.ep {ep}", {"parallel.ep": ep}
    cp, batch = config.parallel.cp, config.train.global_batch_size
    while processes % (2 * cp) == 0:
        cp *= 2
        yield f"--parallel.cp {cp}", {"parallel.cp": cp}
    cp = config.parallel.cp  # of these, what was taken
    for _ in range(6):
        processes *= 2
        change: dict[str, int | str] = {"plan.processes": processes}
        if shape.n_routed_experts % (2 * ep) == 0:
            ep *= 2
            change["parallel.ep"] = ep
        words = f"{processes} processes, --parallel.ep {ep}"
        if batch % (processes // cp * config.train.micro_batch_size):
            batch *= 2
            change["train.global_batch_size"] = batch
            words += f", --train.global_batch_size {batch}"
        yield words, change
