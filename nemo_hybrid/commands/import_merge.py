"""`import` and `merge`: our layout of a Hugging Face checkpoint, and weights with their adapter."""

from __future__ import annotations

from dataclasses import field
from pathlib import Path

from pydantic.dataclasses import dataclass

from nemo_hybrid.commands.command import Command, check_paths
from nemo_hybrid.config.base import CHECKED, CommandOptions
from nemo_hybrid.errors import UserError


@dataclass(config=CHECKED)
class ImportOptions(CommandOptions):
    """Copy a Hugging Face checkpoint into our layout."""

    out: str
    """Directory to write; it must be absent or empty."""
    paths: list[str] = field(default_factory=list)
    """Hugging Face directory of a nemotron_h checkpoint."""

    def validate(self) -> None:
        check_paths("import", self.paths, 1, 1)


@dataclass(config=CHECKED)
class MergeOptions(CommandOptions):
    """Add adapters to the weights that they were trained beside."""

    from_: str
    """Run, checkpoint or directory that holds an adapter (adapter_config.json)."""
    out: str
    """Hugging Face directory to write; it must be absent or empty."""
    base: str | None = None
    """Directory of the weights, where it is not the one that the adapter names."""


def import_command(options: ImportOptions) -> None:
    """Copy a Hugging Face directory into a new one, and say what to do with it."""
    from nemo_hybrid.checkpoint.convert import import_directory

    print(import_directory(Path(options.paths[0]), Path(options.out)).summary())
    print(
        f"written to {options.out}; go on with\n"
        f"  nemo-hybrid inspect {options.out}\n"
        f"  nemo-hybrid generate --from {options.out} --prompt TEXT\n"
        f"  nemo-hybrid pretrain --model.from_hf {options.out} --config FILE"
    )


def merge_command(options: MergeOptions) -> None:
    """Write weights with an adapter added to them."""
    from nemo_hybrid.checkpoint import adapter
    from nemo_hybrid.checkpoint.directory import new_directory
    from nemo_hybrid.checkpoint.load import load, save_model

    directory = adapter.locate(options.from_)
    if not adapter.is_adapter(directory):
        raise UserError(f"{directory} holds no {adapter.CONFIG}: it is a whole model already")
    out = new_directory(options.out)
    base = adapter.base_directory(directory, options.base)
    model, companions = load(directory, base=base)
    save_model(model, out, companions)
    print(f"{out}: {base} with the adapter of {directory}")


COMMANDS = {
    "import": Command(import_command, ImportOptions),
    "merge": Command(merge_command, MergeOptions),
}
