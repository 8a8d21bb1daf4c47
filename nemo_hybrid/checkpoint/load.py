"""From a checkpoint directory to a model, and back."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from nemo_hybrid.checkpoint.adapter import (
    base_directory,
    is_adapter,
    load_adapter,
    locate,
    other_base,
)
from nemo_hybrid.checkpoint.companions import GENERATION, Companions, read_companions
from nemo_hybrid.checkpoint.names import from_hub, is_stacked
from nemo_hybrid.checkpoint.steps import reading
from nemo_hybrid.checkpoint.tensors import check_finite
from nemo_hybrid.checkpoint.weights import READABLE, Plan, Stored, account, read_headers
from nemo_hybrid.checkpoint.writing import save_weights
from nemo_hybrid.config.hf import HybridConfig, read_config
from nemo_hybrid.errors import UserError
from nemo_hybrid.model.fp32 import keeps_fp32
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.init import with_memory
from nemo_hybrid.model.lora import merge_adapters

log = logging.getLogger(__name__)

Build = Callable[[HybridConfig], HybridLM]
"""Makes a model, on the meta device, that may own a part of the experts."""


def tensors_by_name(model: HybridLM) -> dict[str, Tensor]:
    """Everything a checkpoint holds of a model: parameters and router biases."""
    return dict(chain(model.named_parameters(), model.named_buffers()))


def plan_model(
    directory: Path,
    dtype: torch.dtype | None = None,
    *,
    as_stored: bool = False,
    build: Build = HybridLM,
) -> tuple[HybridLM, Plan]:
    """The model of a directory, without storage, in the dtype that it is to have; and the plan for
    its weights. ``dtype`` None and ``build``: see `load`; ``as_stored``: see `account`.

    Raises UserError for config.json or headers that cannot be read; what does not fit stands in the
    plan.
    """
    path = directory / "config.json"
    config = read_config(path)
    stored = read_headers(directory)
    _check_size(config, stored)
    try:
        with torch.device("meta"):
            model = build(config).to(dtype or _lossless_dtype(stored))
    except RuntimeError:  # more elements than 64 bits can count
        raise UserError(f"{path} describes a model of impossible size") from None
    tensors, experts = tensors_by_name(model), config.n_routed_experts
    return model, account(stored, tensors, model.owned_experts, experts, as_stored=as_stored)


def _check_size(config: HybridConfig, stored: Stored) -> None:
    """Refuse a configuration of many more tensors than there are, before listing them all."""
    pattern = config.pattern + (config.mtp_pattern if config.mtp_num_depths else "")
    experts = config.n_routed_experts
    described = len(pattern) + pattern.count("E") * 2 * experts
    there = 0
    for name, entry in stored.entries():
        own, expert = from_hub(name)
        stacked = expert is None and is_stacked(own) and len(entry.shape) == 3
        real = entry.nbytes > 0  # else a shape may say anything
        there += min(entry.shape[0], experts) if stacked and real else 1
    if described > 2 * there + 1000:
        raise UserError(
            f"{stored.directory}: config.json describes at least {described} tensors, but the "
            f"weight files hold {there}"
        )


def _lossless_dtype(stored: Stored) -> torch.dtype:
    return torch.bfloat16 if _examples(stored).keys() == {"BF16"} else torch.float32


def _examples(stored: Stored) -> dict[str, str]:
    """Dtype -> a weight that has it, of those outside of the fp32 list."""
    return {entry.dtype: name for name, entry in stored.entries() if not keeps_fp32(name)}


def load_model(path: str | Path, dtype: torch.dtype | None = None) -> HybridLM:
    """The model alone, see `load`."""
    return load(path, dtype)[0]


def load(
    path: str | Path,
    dtype: torch.dtype | None = None,
    base: Path | None = None,
    build: Build = HybridLM,
) -> tuple[HybridLM, Companions]:
    """``build`` the model of a run, checkpoint or Hugging Face directory and fill it, on the CPU;
    also gives what travels with its weights.

    An adapter (of a run, or a directory of PEFT) is added to the weights that it names, or to those
    of ``base``.

    ``dtype`` None: bf16 where all weights outside of the fp32 list are, else fp32, so that nothing
    is rounded; a warning where the files are smaller than that. Parameters of the fp32 list are
    fp32 always. Raises UserError for a dtype other than bf16, fp16 and fp32, and, before memory is
    taken, unless every tensor of the directory is accounted for; and for one that is not finite.
    """
    if dtype is not None and dtype not in READABLE.values():
        raise UserError(f"dtype must be torch.bfloat16, float16 or float32, got {dtype!r}")
    return reading(path, lambda directory: _load(directory, dtype, base, build), locate)


def _load(
    directory: Path, dtype: torch.dtype | None, base: Path | None, build: Build
) -> tuple[HybridLM, Companions]:
    if is_adapter(directory):
        return _load_adapted(directory, dtype, base or base_directory(directory), build)
    model, plan = plan_model(directory, dtype, build=build)
    companions = read_companions(directory)
    plan.raise_errors()
    examples = _examples(plan.stored)
    if dtype is None and examples.keys() not in ({"BF16"}, {"F32"}):
        held = ", ".join(f"{name} is {kind}" for kind, name in sorted(examples.items()))
        log.warning(
            "%s: all weights are loaded as fp32, which holds each of them exactly, because not all "
            "are BF16 (%s); HybridLM.from_hf(path, dtype=torch.bfloat16) takes half the memory",
            directory, held,
        )  # fmt: skip
    model = with_memory(model)
    plan.copy_into(tensors_by_name(model))
    plan.log()
    return model, companions


def _load_adapted(
    directory: Path, dtype: torch.dtype | None, base: Path, build: Build
) -> tuple[HybridLM, Companions]:
    if warning := other_base(directory, base):
        log.warning("%s", warning)
    model, others = load(base, dtype, build=build)
    load_adapter(model, directory)
    merge_adapters(model)
    for name, tensor in tensors_by_name(model).items():
        check_finite(tensor, f"with the adapter {name}", directory)
    own, files = read_companions(directory), others.files
    if "tokenizer.json" in own.files:  # then nothing of another tokenizer
        files = {GENERATION: files[GENERATION]} if GENERATION in files else {}
    return model, Companions(
        {**files, **own.files},
        own.eos_token_ids or others.eos_token_ids,
        own.stop_ids or others.stop_ids,
    )


def save_model(model: HybridLM, path: str | Path, companions: Companions | None = None) -> None:
    """Write a model of one process as a Hugging Face directory, with the fp32 list in fp32: whole,
    or not at all. ``companions`` are written beside it.

    Raises UserError when path exists and is not empty, or cannot be written, and for weights that
    are not bf16, fp16 or fp32.
    """
    first = model.owned_experts.start
    weights = (
        (name, tensor.float() if keeps_fp32(name) else tensor, first)
        for name, tensor in tensors_by_name(model).items()
    )
    save_weights(path, model.config, weights, companions=companions)
