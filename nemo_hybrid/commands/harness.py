"""`harness`: scores of a model on tasks of EleutherAI's evaluation harness."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic.dataclasses import dataclass

from nemo_hybrid.commands.command import Command, check_place
from nemo_hybrid.commands.generate import Drafts
from nemo_hybrid.config.base import (
    CHECKED,
    POSITIVE,
    CommandOptions,
    NotNegativeInt,
    PositiveInt,
    Seed,
    refuse,
)
from nemo_hybrid.errors import UserError
from nemo_hybrid.terminal import print_table

if TYPE_CHECKING:
    from nemo_hybrid.generation.harness import Harness


@dataclass(config=CHECKED)
class HarnessOptions(CommandOptions):
    """Score a model on tasks of lm-eval."""

    from_: str
    """Run directory (its latest checkpoint) or checkpoint directory."""
    tasks: str
    """Names of tasks with commas between them, and YAML files of tasks of your own."""
    out: str | None = None
    """File to write the results to, as JSON, with the tasks' versions; null: the table alone."""
    num_fewshot: NotNegativeInt | None = None
    """Examples before every question; null: what each task says."""
    limit: Annotated[int | None, POSITIVE] = None
    """Questions of each task, to try it; null: all."""
    chat: bool = False
    """Ask in the model's chat template."""
    thinking: Literal["keep", "strip"] = "keep"
    """strip: of an answer what follows the thinking, up to </think>, is judged."""
    row_tokens: PositiveInt = 4096
    """Tokens of a forward pass, into which texts are packed."""
    slots: PositiveInt = 64
    """Answers that are generated at once."""
    speculate: Drafts = 0
    """Tokens that the MTP block drafts before each pass."""
    seed: Seed = 1234
    """Seed of the draws, where a task wants some."""


def harness_command(options: HarnessOptions) -> None:
    """Print the scores, and write them."""
    if find_spec("lm_eval") is None:
        raise UserError("lm-eval is not installed: pip install nemo-hybrid[harness]")
    out = options.out and Path(options.out)
    if out:
        check_place(str(out))
        refuse((out.exists(), f"{out} exists already: name another --out"))
    from nemo_hybrid.files import replace_file
    from nemo_hybrid.generation.harness import KEPT, find_tasks, scores

    tasks = find_tasks(options.tasks.split(","))
    found = scores(_open(options), tasks, options.num_fewshot, options.limit, options.chat)
    rows = list(_rows(found["results"], found["versions"], found["n-shot"]))
    print_table(("task", "version", "examples", "metric", "value", "+-"), rows)
    if out:
        content = {name: found[name] for name in KEPT if name in found}
        content["options"] = {**vars(options), "lm_eval": _version()}
        replace_file(out, json.dumps(content, indent=1, default=str) + "\n")


def _open(options: HarnessOptions) -> Harness:
    from nemo_hybrid.checkpoint.adapter import base_directory, is_adapter, locate
    from nemo_hybrid.checkpoint.companions import read_companions
    from nemo_hybrid.checkpoint.load import load
    from nemo_hybrid.checkpoint.steps import reading
    from nemo_hybrid.data.prompts import PromptReader
    from nemo_hybrid.data.tokenizer import load_tokenizer
    from nemo_hybrid.export.divergence import ready
    from nemo_hybrid.generation.harness import Harness

    def read(given: Path) -> Harness:
        base = base_directory(given) if is_adapter(given) else given
        directory = given if (given / "tokenizer.json").is_file() else base
        tokenizer = load_tokenizer(directory)
        model = ready(load(given)[0])
        shape = model.config
        reader = PromptReader(
            directory, tokenizer, shape.vocab_size, shape.max_position_embeddings, new=0
        )
        refuse(
            (
                options.speculate and not shape.mtp_num_depths,
                f"{given} has no MTP block that could draft tokens",
            )
        )
        return Harness(
            model,
            tokenizer,
            reader,
            frozenset(read_companions(directory).stops(shape.eos_token_id)),
            row_tokens=options.row_tokens,
            slots=options.slots,
            drafts=options.speculate,
            seed=options.seed,
            closing="</think>" if options.thinking == "strip" else None,
            show=True,
        )

    return reading(options.from_, read, locate)


def _rows(results: Any, versions: Any, shots: Any) -> Any:
    for task, figures in results.items():
        for key, value in figures.items():
            metric, _, name = key.partition(",")
            if isinstance(value, float | int) and name and not metric.endswith("_stderr"):
                error = figures.get(f"{metric}_stderr,{name}")
                shown = f"{error:.4f}" if isinstance(error, float) else ""
                kind = metric if name == "none" else f"{metric} ({name})"
                yield (
                    task,
                    str(versions.get(task)),
                    str(shots.get(task)),
                    kind,
                    f"{value:.4f}",
                    shown,
                )


def _version() -> str:
    from importlib.metadata import version

    return version("lm-eval")


COMMANDS = {"harness": Command(harness_command, HarnessOptions, reads="from_")}
