"""From a checkpoint directory to a model, and back."""

from __future__ import annotations

from itertools import chain
from pathlib import Path

import torch
from torch import Tensor

from nemo_hybrid.checkpoint.files import resolve
from nemo_hybrid.checkpoint.weights import load_weights, save_weights
from nemo_hybrid.config import HybridConfig
from nemo_hybrid.hf_config import read_json
from nemo_hybrid.model.hybrid import HybridLM


def tensors_by_name(model: HybridLM) -> dict[str, Tensor]:
    """Everything a checkpoint holds of a model: parameters and router biases."""
    return dict(chain(model.named_parameters(), model.named_buffers()))


def save_model(model: HybridLM, path: str | Path) -> None:
    """Write a model of one process as a Hugging Face directory: whole, or not at all.

    Raises UserError when path exists and is not empty, or cannot be written.
    """
    first = model.owned_experts.start
    weights = ((name, tensor, first) for name, tensor in tensors_by_name(model).items())
    save_weights(Path(path), model.config, weights)


def load_model(path: str | Path, dtype: torch.dtype | None = None) -> HybridLM:
    """Build the model of a run, checkpoint or Hugging Face directory and fill it, on the CPU.

    ``dtype`` None: as config.json says. Parameters of the fp32 list stay fp32. Raises UserError
    unless every tensor of the directory is accounted for.
    """
    directory = resolve(path)
    config = HybridConfig.from_hf(str(directory))
    if dtype is None:
        stored = read_json(directory / "config.json")
        name = stored.get("dtype", stored.get("torch_dtype"))
        dtype = torch.bfloat16 if name == "bfloat16" else torch.float32
    with torch.device("meta"):
        model = HybridLM(config)
    model = model.to(dtype).to_empty(device="cpu")
    load_weights(directory, tensors_by_name(model), n_experts=config.n_routed_experts)
    return model
