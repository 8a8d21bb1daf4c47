"""Runs and layouts of a tiny model to plan."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from helpers.corpus import TINY_MODEL
from nemo_hybrid.commands.memory import Layout
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.read import load_config
from nemo_hybrid.config.run import ModelOptions, RunConfig

MODELS = Path(__file__).parents[2] / "configs" / "model"
CONFIG = HybridConfig(**TINY_MODEL)


def layout(**changed: Any) -> Layout:
    given = {
        "cfg": CONFIG, "processes": 4, "ep": 1, "zero": 2, "width": 2, "rows": 3, "length": 40,
        "recompute": "", "accumulation": 1, "cpu": True, "host_copy": False,
        "reference": ("ssd", "conv1d", "moe", "attention"),
    }  # fmt: skip
    return Layout(**given | changed)


def run(
    ep: int = 1, zero: Any = 2, recipe: Any = "bf16", length: int = 32, **train: Any
) -> RunConfig:
    config = RunConfig(model=ModelOptions(**TINY_MODEL))
    config.data.path, config.data.sequence_length = "none", length
    config.parallel.ep, config.parallel.zero = ep, zero
    config.train = replace(config.train, **{"global_batch_size": 64} | train)
    return config


def family(name: str) -> HybridConfig:
    return load_config([], ["--model", str(MODELS / f"{name}.yaml")]).model.hybrid()
