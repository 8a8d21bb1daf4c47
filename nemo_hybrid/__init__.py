"""nemo_hybrid: pre-train and fine-tune hybrid Mamba-2 / attention models with LatentMoE and MTP."""

from typing import TYPE_CHECKING

from nemo_hybrid.errors import UserError

if TYPE_CHECKING:
    from nemo_hybrid.config.hf import HybridConfig
    from nemo_hybrid.hub import HybridLM

__all__ = ["HybridConfig", "HybridLM", "UserError"]
__version__ = "0.1.0"


def __getattr__(name: str) -> object:
    """Import what takes long, torch above all, only when it is asked for."""
    if name == "HybridConfig":
        from nemo_hybrid.config.hf import HybridConfig

        return HybridConfig
    if name == "HybridLM":
        from nemo_hybrid.hub import HybridLM

        return HybridLM
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
