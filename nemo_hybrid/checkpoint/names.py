"""Names of tensors in Hugging Face checkpoints and in our models, and of the files beside them that
serve training alone.

Names of tensors are equal but for two things. Routed experts are stacked in memory and separate on
disk::

    backbone.layers.1.mixer.experts.up_proj   [E, F, L]   in memory
    backbone.layers.1.mixer.experts.7.up_proj.weight [F, L]   on disk, one per expert

And some writers say ``model.`` where the hub says ``backbone.`` (transformers'
``conversion_mapping.py``, entry "nemotron_h"); both are read, ``backbone.`` is written.

Shapes: E experts, F expert width, L latent.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import torch

from nemo_hybrid.checkpoint.manifest import MANIFEST
from nemo_hybrid.precision.groups import is_stacked

ROUTER_BIAS = "mixer.gate.e_score_correction_bias"
RUN_STATE = "run_state.json"
RESOLVED = "run.yaml"
OPTIMIZER_INDEX = "optimizer.index.json"
_TRAINING = (RUN_STATE, RESOLVED, OPTIMIZER_INDEX, MANIFEST)
_OF_RANKS = re.compile(r"(optimizer-r\d+-\w+|(rank-|data-r)\d+)\.safetensors")
DATA = "data-r{}.safetensors"
"""Of a rank: its tensors of the data to come, under names that no other rank has."""
_EXPERT = re.compile(r"(.+\.mixer\.experts)\.(0|[1-9][0-9]{0,8})\.(up_proj|down_proj)\.weight")


def to_hub(
    name: str, tensor: torch.Tensor, first_expert: int = 0
) -> Iterator[tuple[str, torch.Tensor]]:
    """Names on disk of one of our tensors, with views of it.

    A stacked tensor holds the experts from ``first_expert`` on.
    """
    if not is_stacked(name):
        yield name, tensor
        return
    for i, matrix in enumerate(tensor):
        yield expert_name(name, first_expert + i), matrix


def expert_name(name: str, expert: int) -> str:
    """Name on disk of one expert of a stacked tensor."""
    head, _, projection = name.rpartition(".")
    return f"{head}.{expert}.{projection}.weight"


def from_hub(name: str) -> tuple[str, int | None]:
    """Our name for a name on disk, and which expert it is (None: not a routed expert)."""
    if name.startswith("model."):
        name = "backbone." + name.removeprefix("model.")
    match = _EXPERT.fullmatch(name)
    if match is None:
        return name, None
    return f"{match[1]}.{match[3]}", int(match[2])


def is_training_state(file: str) -> bool:
    """Whether a file of a checkpoint serves resuming alone (see `checkpoint.state`)."""
    return file in _TRAINING or _OF_RANKS.fullmatch(file) is not None
