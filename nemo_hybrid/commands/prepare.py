"""`prepare`: text into a token store, or conversations into samples for fine-tuning."""

from __future__ import annotations

import os
from dataclasses import field, fields
from pathlib import Path
from typing import Literal

from pydantic.dataclasses import dataclass

from nemo_hybrid.commands.command import Command
from nemo_hybrid.config.base import CHECKED, CommandOptions, NotNegativeInt, PositiveInt, refuse
from nemo_hybrid.config.finetune import SampleOptions
from nemo_hybrid.config.read import read_keys
from nemo_hybrid.errors import UserError

DEFAULT_CORPUS_RUN = Path(__file__).parents[2] / "configs" / "run" / "pretrain_tiny_cpu.yaml"


@dataclass(config=CHECKED)
class PrepareOptions(SampleOptions, CommandOptions):
    """Turn text into a token store, or conversations into samples for fine-tuning."""

    paths: list[str] = field(default_factory=list)
    """Text files (.txt, .py and other text), .jsonl, .json, .csv, .tsv and .parquet, compressed or
    not; directories of those; Hugging Face datasets on disk; Megatron .bin/.idx pairs. None: the
    default corpus, which is the running Python's standard library."""
    out: str | None = None
    """Directory of the store. It may be left out for the default corpus, which then goes to
    the place that configs/run/pretrain_tiny_cpu.yaml names."""
    tokenizer: str | None = None
    """Directory of a Hugging Face tokenizer to use; null: train a byte-level BPE one."""
    vocab_size: int | None = None
    """Entries of the tokenizer that is trained; null: 4096. A given tokenizer has its own."""
    tokenizer_sample_mb: PositiveInt | None = None
    """Train the tokenizer on so many million bytes, of every file on its share from its beginning
    on; null: on everything."""
    workers: PositiveInt | None = None
    """Threads that encode; null: one for each core. The store is the same for any number."""
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
            (
                self.tokenizer is not None and self.tokenizer_sample_mb is not None,
                "give tokenizer or tokenizer_sample_mb, not both: a given tokenizer is not trained",
            ),
            (
                samples and self.workers is not None,
                "--workers is about token stores, not about samples: leave it out",
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


def prepare_command(options: PrepareOptions) -> None:
    """Make a store, or show samples."""
    tokenizer = options.tokenizer and _checkpoint_of_a_run(options.tokenizer)
    if options.samples_wanted:
        assert tokenizer is not None
        if options.preview:
            from nemo_hybrid.data.preview import preview

            preview(options, options.paths, tokenizer, options.preview, seed=options.seed)
            return
        from nemo_hybrid.data.samples import prepare_samples

        assert options.out is not None
        out = Path(options.out)
        print(prepare_samples(options, options.paths, tokenizer, out, seed=options.seed))
        return
    out = Path(options.out or default_corpus_place())
    from nemo_hybrid.data.documents import prepare

    if options.workers:  # the tokenizer's library reads it when it starts its threads
        os.environ["RAYON_NUM_THREADS"] = str(options.workers)
    summary = prepare(
        out,
        options.paths,
        tokenizer=tokenizer,
        vocab_size=options.vocab_size,
        tokenizer_sample_mb=options.tokenizer_sample_mb,
        text_field=options.text_field,
        heldout=options.heldout,
        skip_bad=options.skip_bad,
        seed=options.seed,
        # The default corpus is made once: a second `prepare` finds it.
        reuse=not options.paths,
    )
    print(summary)


def _checkpoint_of_a_run(tokenizer: str) -> str:
    """The newest checkpoint, where a tokenizer's directory is that of a run."""
    if (Path(tokenizer) / "tokenizer.json").is_file():
        return tokenizer
    from nemo_hybrid.checkpoint.steps import list_steps, resolve

    return str(resolve(tokenizer)) if list_steps(Path(tokenizer) / "checkpoints") else tokenizer


def default_corpus_place() -> str:
    """Where the default corpus belongs, as the run configuration that uses it says."""
    if not DEFAULT_CORPUS_RUN.is_file():
        raise UserError("--out is missing: name the directory of the token store")
    return str(read_keys(DEFAULT_CORPUS_RUN)["data.default_corpus"])


COMMANDS = {"prepare": Command(prepare_command, PrepareOptions)}
