"""The model as users import it: ``from nemo_hybrid import HybridLM``."""

from __future__ import annotations

import torch

from nemo_hybrid.checkpoint.companions import Companions
from nemo_hybrid.checkpoint.load import load, save_model
from nemo_hybrid.model import hybrid


class HybridLM(hybrid.HybridLM):
    """Hybrid Mamba-2 / attention language model that can be loaded and saved.

    ``companions`` travel with its weights: tokenizer, generation settings.
    """

    companions: Companions | None = None

    @classmethod
    def from_hf(cls, path: str, dtype: torch.dtype | None = None) -> HybridLM:
        """Load a local directory (run, checkpoint or Hugging Face), every tensor accounted for.

        ``dtype`` None: bf16 or fp32, whichever rounds nothing. The model is in training mode, which
        changes none of its results. Raises UserError.
        """
        model, companions = load(path, dtype, build=cls)
        assert isinstance(model, cls)
        model.companions = companions
        return model

    def save_hf(self, path: str) -> None:
        """Write a Hugging Face directory: config.json and safetensors, one key per expert, those of
        the fp32 list in fp32. Raises UserError when path exists and is not empty."""
        save_model(self, path, self.companions)
