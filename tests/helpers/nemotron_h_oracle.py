"""transformers' NemotronH with our weights: the independent oracle of the backbone.

It has no MTP block and cannot be built without a shared expert.

It clamps the time step from below at ``time_step_min``, in the forward pass, not only at
initialisation; Megatron-LM and this project do not. All models here have that clamp opened to
(0, infinity), which changes nothing else.
"""

from __future__ import annotations

import math
from dataclasses import fields
from itertools import chain
from pathlib import Path

import torch
from torch import nn

from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.model.hybrid import HybridLM

_OURS_ONLY = ("pattern", "mtp_pattern", "mtp_num_depths")


def their_name(name: str) -> str:
    """transformers says ``model.`` in memory; experts are stacked on both sides."""
    return name.replace("backbone.", "model.", 1) if name.startswith("backbone.") else name


def transformers_twin(model: HybridLM) -> nn.Module:
    """A ``NemotronHForCausalLM`` with copies of all weights and router biases of ``model``."""
    from transformers import NemotronHForCausalLM

    twin = open_clamp(NemotronHForCausalLM(_their_config(model.config)).eval())
    ours = dict(chain(model.named_parameters(), model.named_buffers()))
    theirs = dict(chain(twin.named_parameters(), twin.named_buffers()))
    assert {their_name(name) for name in ours} == theirs.keys()
    with torch.no_grad():
        for name, tensor in ours.items():
            assert theirs[their_name(name)].shape == tensor.shape, name
            theirs[their_name(name)].copy_(tensor)
    return twin


def load_theirs(directory: Path, dtype: torch.dtype) -> tuple[nn.Module, dict[str, set[str]]]:
    """A directory as transformers loads it, and which keys were missing, unexpected, mismatched."""
    from transformers import NemotronHForCausalLM

    model, info = NemotronHForCausalLM.from_pretrained(
        directory,
        local_files_only=True,
        output_loading_info=True,
        dtype=dtype,
        attn_implementation="eager",
        experts_implementation="eager",
    )
    return open_clamp(model.eval()), info


def open_clamp(theirs: nn.Module) -> nn.Module:
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHMamba2Mixer

    for module in theirs.modules():
        if isinstance(module, NemotronHMamba2Mixer):
            assert module.time_step_limit == (theirs.config.time_step_min, math.inf)
            module.time_step_limit = (0.0, math.inf)
    return theirs


def _their_config(config: HybridConfig) -> object:
    from transformers import NemotronHConfig

    shape = {f.name: getattr(config, f.name) for f in fields(ModelConfig)}
    for name in _OURS_ONLY:
        del shape[name]
    # The plainest of their implementations: an oracle should be easy to believe.
    return NemotronHConfig(
        **shape,
        hybrid_override_pattern=config.pattern,
        attn_implementation="eager",
        experts_implementation="eager",
    )
