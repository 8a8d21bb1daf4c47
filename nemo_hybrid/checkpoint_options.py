"""Options of the commands about checkpoints, as in nemo_hybrid.config: defaults, help, checks."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from nemo_hybrid.config import check_seed, check_text
from nemo_hybrid.errors import UserError


@dataclass
class ImportOptions:
    """Copy a checkpoint into the layout that this program writes: `import`."""

    out: str
    """Directory to write; it must be absent or empty."""
    paths: list[str] = field(default_factory=list)
    """Hugging Face directory of a nemotron_h checkpoint."""

    def validate(self) -> None:
        """Raise UserError for an option that cannot work."""
        _check_paths("import", self.paths, 1, 1)


@dataclass
class InspectOptions:
    """Show what a configuration or checkpoint holds, without loading weights: `inspect`."""

    paths: list[str] = field(default_factory=list)
    """Model or run YAML, config.json, or the directory of a run, a checkpoint or a Hugging Face
    model. In a directory with weights every tensor is compared with the model; exit status 2 means
    that one is missing, unexpected or does not fit."""
    json: bool = False
    """Print JSON instead of tables."""
    deep: bool = False
    """Read every file and compare its checksum with the manifest. Of a run's checkpoint, presence
    and size of all files are compared in any case."""

    def validate(self) -> None:
        """Raise UserError for an option that cannot work."""
        _check_paths("inspect", self.paths, 1, 1)


@dataclass
class CompareOptions:
    """Compare two checkpoints' probabilities of a text, token by token: `compare-logprobs`."""

    paths: list[str] = field(default_factory=list)
    """A and B: run, checkpoint or Hugging Face directories. B may be left out when backend is not
    this program: then it is A again."""
    backend: Literal["nemo_hybrid", "transformers", "transformers_unclamped"] = "nemo_hybrid"
    """What computes B. transformers keeps Mamba-2 time steps above time_step_min, which neither
    this program nor Megatron-LM does, so that small differences are to be expected;
    transformers_unclamped takes that limit away, so that only rounding should remain."""
    data: str | None = None
    """UTF-8 text file to read with the checkpoints' tokenizer. Without data and prompt, random
    token ids are taken."""
    prompt: str | None = None
    """Text to compare on, instead of a file."""
    tokens: int = 2048
    """Most tokens whose probabilities are compared."""
    sequence_length: int = 512
    """Tokens that the models see at once; the text is cut into pieces of this length."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Format of weights and computation, whatever the files hold."""
    tolerance: float | None = None
    """End with status 3 when the mean absolute difference exceeds this (in nats). Single tokens may
    differ by more."""
    seed: int = 1234
    """Seed of the random token ids."""

    def validate(self) -> None:
        """Raise UserError for an option that cannot work."""
        _check_paths("compare-logprobs", self.paths, 1 if self.backend != "nemo_hybrid" else 2, 2)
        for name in ("tokens", "sequence_length"):
            if getattr(self, name) <= 0:
                raise UserError(f"{name} must be positive, got {getattr(self, name)}")
        if self.data is not None and self.prompt is not None:
            raise UserError("give --data or --prompt, not both")
        if self.prompt == "":
            raise UserError("--prompt is empty; leave it out to compare on random token ids")
        if self.tolerance is not None and not 0 <= self.tolerance < float("inf"):
            raise UserError(f"tolerance must be 0 or more, got {self.tolerance}")
        check_text(self.prompt or "")
        check_seed("seed", self.seed)


def _check_paths(command: str, paths: list[str], fewest: int, most: int) -> None:
    if not fewest <= len(paths) <= most:
        wanted = str(most) if fewest == most else f"{fewest} or {most}"
        given = " ".join(paths) or "none"
        raise UserError(f"{command} takes {wanted} path{'s' * (most > 1)}, got {given}")
