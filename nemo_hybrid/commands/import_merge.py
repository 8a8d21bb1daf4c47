"""`import` and `merge`: our layout of a Hugging Face checkpoint, and weights with their adapter."""

from __future__ import annotations

from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic.dataclasses import dataclass

from nemo_hybrid import __version__
from nemo_hybrid.commands.command import Command, check_paths
from nemo_hybrid.config.base import CHECKED, CommandOptions
from nemo_hybrid.errors import UserError

if TYPE_CHECKING:
    from nemo_hybrid.checkpoint.companions import Companions
    from nemo_hybrid.model.hybrid import HybridLM


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
    force: bool = False
    """Merge also with other weights than those that the adapter was trained beside."""


def import_command(options: ImportOptions) -> None:
    """Copy a Hugging Face directory into a new one, and say what to do with it."""
    from nemo_hybrid.checkpoint.convert import import_directory
    from nemo_hybrid.checkpoint.steps import reading

    plan = reading(options.paths[0], lambda source: import_directory(source, Path(options.out)))
    print(plan.summary())
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
    from nemo_hybrid.checkpoint.publish import CARD, code, origin_name, short_card
    from nemo_hybrid.checkpoint.steps import reading

    out = new_directory(options.out)

    def read(directory: Path) -> tuple[HybridLM, Companions, Path, Path]:
        if not adapter.is_adapter(directory):
            raise UserError(f"{directory} holds no {adapter.CONFIG}: it is a whole model already")
        base = adapter.base_directory(directory, options.base)
        if not options.force and (other := adapter.other_base(directory, base)):
            raise UserError(f"{other}. With --force true they are merged all the same")
        return *load(directory, base=base), base, directory

    model, companions, base, directory = reading(options.from_, read, adapter.locate)
    name, added = code(origin_name(base)), code(origin_name(directory))
    told = (
        f"The weights of {name} with the LoRA adapter {added} added to them by nemo_hybrid "
        f"{__version__}. The base model's licence and limits apply."
    )
    card = short_card(["merge"], base, f"{name} with an adapter", told, model.config, directory)
    files = {**companions.files, CARD: card.encode()}
    save_model(model, out, replace(companions, files=files))
    print(f"{out}: {base} with the adapter of {directory}")


COMMANDS = {
    "import": Command(import_command, ImportOptions, reads="paths"),
    "merge": Command(merge_command, MergeOptions, reads="from_"),
}
