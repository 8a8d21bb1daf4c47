"""The smallest context-parallel size with which a run fits, by what it recomputes."""

from __future__ import annotations

from collections.abc import Iterator
from copy import deepcopy
from dataclasses import replace

from nemo_hybrid.commands.plan import Plan, PlanOptions, gb, make_plan
from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.config.run import TrainingConfig
from nemo_hybrid.errors import UserError

RECOMPUTED = ("", "E", "ME", "ME*-")
"""From the least to the most that is computed once more."""


def fitting(
    config: TrainingConfig, options: PlanOptions, shape: ModelConfig
) -> dict[str, tuple[int, Plan]]:
    """Letters of `RECOMPUTED` -> the smallest parallel.cp, of powers of two, with which that fits,
    and its plan; those with which none does are left out."""
    found: dict[str, tuple[int, Plan]] = {}
    for letters in RECOMPUTED:
        cp = 1
        while cp <= options.processes and letters not in found:
            tried = deepcopy(config)
            tried.train = replace(config.train, recompute=letters)
            tried.parallel = replace(config.parallel, cp=cp)
            try:
                tried.validate(shape)
                plan = make_plan(tried, shape, options)
            except UserError:  # heads cannot be divided so, or the batch
                pass
            else:
                found |= {letters: (cp, plan)} if plan.fits else {}
            cp *= 2
    return found


def fit_lines(config: TrainingConfig, options: PlanOptions, shape: ModelConfig) -> Iterator[str]:
    """What fits, and which is the smallest: of equal sizes the one that recomputes least."""
    found = fitting(config, options, shape)
    yield f"smallest parallel.cp with {options.processes} processes, by train.recompute:"
    for letters in RECOMPUTED:
        name = letters or "nothing"
        if letters in found:
            cp, plan = found[letters]
            yield f"  {name:8} {cp:3}: {gb(plan.needed)}, {plan.step_s:.3f} s a step"
        else:
            yield f"  {name:8}   -"
    if found:
        letters, (cp, plan) = min(found.items(), key=lambda item: item[1][0])
        yield (
            f"take --parallel.cp {cp} --train.recompute '{letters}': {gb(plan.needed)} of "
            f"{gb(plan.capacity)}"
        )
    else:
        yield "none fits: take more processes, or a device with more memory"
