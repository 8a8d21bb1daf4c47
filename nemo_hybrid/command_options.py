"""Options of every command but `pretrain`, as in nemo_hybrid.config: defaults, help, bounds."""

from __future__ import annotations

from dataclasses import field, fields
from pathlib import Path
from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from nemo_hybrid.config.base import (
    CHECKED,
    GLOBS,
    NOT_NEGATIVE,
    POSITIVE,
    CommandOptions,
    NotNegativeFloat,
    NotNegativeInt,
    PositiveFloat,
    PositiveInt,
    Seed,
    Share,
    refuse,
)
from nemo_hybrid.config.finetune import SampleOptions
from nemo_hybrid.errors import UserError

TRAINED_VOCAB_SIZE = 4096
"""Entries of a tokenizer that `prepare` trains, unless it is told otherwise."""


@dataclass(config=CHECKED)
class PrepareOptions(SampleOptions, CommandOptions):
    """Turn text into a token store, or conversations into samples for fine-tuning."""

    paths: list[str] = field(default_factory=list)
    """Text files (.txt, .py and other text, .jsonl, .parquet), directories of those, Hugging Face
    datasets on disk, Megatron .bin/.idx pairs. None: the default corpus, which is the running
    Python's standard library."""
    out: str | None = None
    """Directory of the store. It may be left out for the default corpus, which then goes to
    the place that configs/run/pretrain_tiny_cpu.yaml names."""
    tokenizer: str | None = None
    """Directory of a Hugging Face tokenizer to use; null: train a byte-level BPE one."""
    vocab_size: int | None = None
    """Entries of the tokenizer that is trained; null: 4096. A given tokenizer has its own."""
    for_: Literal["pretrain", "finetune"] = "pretrain"
    """finetune: samples of conversations, prompts with completions, texts or packs, for the model
    whose directory --tokenizer names; the options about samples count for these alone."""
    preview: NotNegativeInt = 0
    """Show so many samples for fine-tuning, what is learnt of them in colour, and write nothing."""
    seed: int = 0
    """Seed of the choice of held-out documents, and of what happens to reasoning."""

    def validate(self) -> None:
        super().validate()
        samples = self.samples_wanted
        refuse(
            (
                self.out is None and self.paths and not self.preview,
                "--out is missing: name the directory of the store",
            ),
            (
                self.tokenizer is not None and self.vocab_size is not None,
                "give tokenizer or vocab_size, not both: a given tokenizer has its own vocabulary",
            ),
            (samples and not self.paths, "samples need data: name files or directories"),
            (
                samples and self.tokenizer is None,
                "--tokenizer is missing: name the directory of the model to train",
            ),
            *(
                (
                    not samples and name in _OF_SAMPLES,
                    f"--{name} is about samples: give --for finetune with it",
                )
                for name in self.changed()
            ),
        )

    @property
    def samples_wanted(self) -> bool:
        """Whether samples for fine-tuning are made or shown, instead of a token store."""
        return self.for_ == "finetune" or self.preview > 0


_OF_SAMPLES = {f.name for f in fields(SampleOptions)} - {"text_field", "heldout", "skip_bad"}


@dataclass(config=CHECKED)
class GenerateOptions(CommandOptions):
    """Continue a prompt with a trained model."""

    from_: str
    """Run directory (its latest checkpoint) or checkpoint directory."""
    prompt: str
    """Text to continue."""
    max_new_tokens: PositiveInt = 100
    """Most tokens to generate; generation stops earlier at the end-of-sequence token."""
    temperature: NotNegativeFloat = 0.0
    """0: always the most probable token; 1: the model's distribution; lower is more careful."""
    top_p: Share = 1.0
    """Draw only from the most probable tokens that together have this probability."""
    seed: Seed = 1234
    """Seed of the draws."""
    chat: bool = False
    """Give the prompt as a user's message, rendered with the model's chat template."""

    def validate(self) -> None:
        _check_text(self.prompt)


@dataclass(config=CHECKED)
class EvalOptions(CommandOptions):
    """Measure a trained model's losses on held-out data."""

    from_: str
    """Run directory (its latest checkpoint) or checkpoint directory."""
    data: str
    """Prepared token store, or samples for fine-tuning, whose held-out part is used."""
    sequences: PositiveInt = 256
    """Sequences to evaluate (fewer if the store holds fewer)."""
    micro_batch_size: PositiveInt = 8
    """Sequences per forward pass."""
    sequence_length: PositiveInt = 256
    """Tokens per sequence."""


@dataclass(config=CHECKED)
class PlanOptions(CommandOptions):
    """Say whether a run fits, and how long a step takes."""

    section: ClassVar[str] = "plan."

    processes: PositiveInt = 1
    """Processes of the run, one per device."""
    device: Literal["h100", "h200", "b200", "gb200", "gb300", "cpu"] = "h100"
    """Device of every process; `cpu`: one core. Its data sheet gives the figures below that are
    null."""
    memory_gb: Annotated[float | None, POSITIVE] = None
    """Memory of one device in 1e9 bytes."""
    reserve_gb: NotNegativeFloat = 4.0
    """Part of it that the driver, the communication library and fragmentation take: assumed."""
    matmul_tflops: Annotated[float | None, POSITIVE] = None
    """Dense matmul rate of one device in bf16, in 1e12 operations per second."""
    efficiency: Share = 0.4
    """Share of that rate that a whole forward and backward pass reaches: assumed."""
    memory_gb_s: Annotated[float | None, POSITIVE] = None
    """Bandwidth of the device's memory in 1e9 bytes per second."""
    devices_per_node: Annotated[int | None, POSITIVE] = None
    """Devices that a fast link connects."""
    link_gb_s: Annotated[float | None, POSITIVE] = None
    """That link's bandwidth per device and direction, in 1e9 bytes per second."""
    network_gb_s: PositiveFloat = 50.0
    """Bandwidth per device and direction between nodes: 50 is 400 Gbit/s."""


@dataclass(config=CHECKED)
class ImportOptions(CommandOptions):
    """Copy a Hugging Face checkpoint into our layout."""

    out: str
    """Directory to write; it must be absent or empty."""
    paths: list[str] = field(default_factory=list)
    """Hugging Face directory of a nemotron_h checkpoint."""

    def validate(self) -> None:
        _check_paths("import", self.paths, 1, 1)


@dataclass(config=CHECKED)
class MergeOptions(CommandOptions):
    """Add adapters to the weights that they were trained beside."""

    from_: str
    """Run, checkpoint or directory that holds an adapter (adapter_config.json)."""
    out: str
    """Hugging Face directory to write; it must be absent or empty."""
    base: str | None = None
    """Directory of the weights, where it is not the one that the adapter names."""


@dataclass(config=CHECKED)
class ExportOptions(CommandOptions):
    """Write a checkpoint in the number formats that serving engines load."""

    from_: str
    """Run, checkpoint or Hugging Face directory."""
    out: str
    """Directory to write; it must be absent or empty."""
    format: Literal["bf16", "nvfp4", "mixed", "fp8", "compressed-tensors"]
    """bf16: plain; nvfp4, mixed, fp8: ModelOpt's layout, mixed with a format per module;
    compressed-tensors: NVFP4 in that library's layout."""
    preset: Literal["conservative", "super", "nano", "ultra"] = "conservative"
    """Which modules are quantized: conservative: experts, shared experts and dense MLPs; the others
    by module family as NVIDIA published those models."""
    formats: GLOBS = field(default_factory=dict)
    """Formats of further modules, on top of the preset: glob over module names -> bf16, fp8, nvfp4
    or nvfp4_w4a16; or a YAML file of that."""
    scales: Literal["amax", "mse", "four_over_six", "training"] = "amax"
    """NVFP4 scales of weights: from the largest value; from a search for the least error; from the
    choice between 4 and 6; or those of the 16x16 blocks of NVFP4 training."""
    calibration: str | None = None
    """Token store, samples for fine-tuning or text file whose activations give the input scales;
    without it weights alone are quantized (W4A16)."""
    calibration_tokens: PositiveInt = 65536
    """Tokens of it to read."""
    percentile: Annotated[float | None, Field(ge=90, le=100)] = None
    """Share of the activations, in percent, that input scales cover; null: all of them."""
    kv_cache: Literal["none", "fp8"] = "none"
    """fp8: write scales for keys and values, which needs calibration."""
    budget_bits: Annotated[float | None, Field(gt=0, lt=16)] = None
    """Mean bits per weight: instead of a preset, measure each module group's sensitivity and assign
    formats that fit."""
    heldout: str | None = None
    """Token store or samples (their held-out part), or another text file: measure KL divergence and
    perplexity of the export on it, for the model card."""
    heldout_tokens: PositiveInt = 8192
    """Tokens of it to read."""

    def validate(self) -> None:
        calibration, budget = self.calibration, self.budget_bits
        idle = {
            "preset": self.format == "bf16" or budget is not None,
            "scales": self.format in ("bf16", "fp8"),
            "calibration_tokens": calibration is None,
            "heldout_tokens": self.heldout is None,
        }
        refuse(
            *(
                (
                    calibration is None and getattr(self, name) is not None,
                    f"{name} needs calibration: name a text file or a token store",
                )
                for name in ("percentile", "budget_bits")
            ),
            (
                calibration and self.format == "bf16",
                "calibration is for quantized formats: leave it out with bf16",
            ),
            (
                calibration and self.heldout and _same_file(calibration, self.heldout),
                "heldout is the text of the calibration: name another one",
            ),
            (
                budget is not None and self.formats,
                "budget_bits assigns formats itself: leave formats out",
            ),
            *(
                (idle.get(name), f"{name} has no effect with these options: leave it out")
                for name in self.changed()
            ),
        )


@dataclass(config=CHECKED)
class VerifyOptions(CommandOptions):
    """Check an exported directory: names, shapes, dtypes, checksums, values."""

    paths: list[str] = field(default_factory=list)
    """Exported directory."""
    base: str | None = None
    """The checkpoint it was made of, to compare probabilities with."""
    data: str | None = None
    """UTF-8 text file or token store (its held-out part) to compare on; null: random token ids."""
    tokens: PositiveInt = 8192
    """Tokens to compare on."""
    max_kl: Annotated[float | None, NOT_NEGATIVE] = None
    """End with status 3 when the mean KL divergence, with or without rounded inputs, exceeds this,
    in nats."""

    def validate(self) -> None:
        _check_paths("verify-export", self.paths, 1, 1)


@dataclass(config=CHECKED)
class InspectOptions(CommandOptions):
    """Show shape, size and tensors of a model, without loading weights."""

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
        _check_paths("inspect", self.paths, 1, 1)


@dataclass(config=CHECKED)
class DoctorOptions(CommandOptions):
    """Show what is installed and which path each operation takes."""


@dataclass(config=CHECKED)
class CompareOptions(CommandOptions):
    """Compare two checkpoints' probabilities of a text, token by token."""

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
    tokens: PositiveInt = 2048
    """Most tokens whose probabilities are compared."""
    sequence_length: PositiveInt = 512
    """Tokens that the models see at once; the text is cut into pieces of this length."""
    dtype: Literal["fp32", "bf16"] = "fp32"
    """Format of weights and computation, whatever the files hold."""
    tolerance: Annotated[float | None, NOT_NEGATIVE] = None
    """End with status 3 when the mean absolute difference exceeds this (in nats). Single tokens may
    differ by more."""
    seed: Seed = 1234
    """Seed of the random token ids."""

    def validate(self) -> None:
        _check_paths("compare-logprobs", self.paths, 1 if self.backend != "nemo_hybrid" else 2, 2)
        refuse(
            (
                self.data is not None and self.prompt is not None,
                "give --data or --prompt, not both",
            ),
            (
                self.prompt == "",
                "--prompt is empty; leave it out to compare on random token ids",
            ),
        )
        _check_text(self.prompt or "")


def _check_text(prompt: str) -> None:
    """Raise UserError for a command-line word that held bytes which are not UTF-8."""
    if any("\ud800" <= letter <= "\udfff" for letter in prompt):
        raise UserError("the prompt is not text: it holds bytes that are not UTF-8")


def _same_file(one: str, other: str) -> bool:
    try:
        return Path(one).is_file() and Path(one).samefile(other)
    except OSError:
        return False


def _check_paths(command: str, paths: list[str], fewest: int, most: int) -> None:
    if not fewest <= len(paths) <= most:
        wanted = str(most) if fewest == most else f"{fewest} or {most}"
        given = " ".join(paths) or "none"
        raise UserError(f"{command} takes {wanted} path{'s' * (most > 1)}, got {given}")
