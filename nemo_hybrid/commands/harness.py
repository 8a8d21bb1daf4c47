"""`harness`: scores of a model on tasks of EleutherAI's evaluation harness."""

from __future__ import annotations

import json
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic.dataclasses import dataclass

from nemo_hybrid.commands.command import Command, check_place
from nemo_hybrid.commands.generate import Drafts, GenerateOptions, open_model
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
    from nemo_hybrid.data.prompts import Prompt, PromptReader
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
        content["options"] = {**vars(options), "lm_eval": version("lm-eval")}
        replace_file(out, json.dumps(content, indent=1, default=str) + "\n")


def _open(options: HarnessOptions) -> Harness:
    from nemo_hybrid.export.divergence import ready
    from nemo_hybrid.generation.harness import Harness

    def no_prompts(reader: PromptReader) -> list[Prompt]:
        if reader.tokenizer is None:
            raise UserError(f"{reader.directory} has no tokenizer.json, and tasks are texts")
        return []

    asked = GenerateOptions(options.from_, speculate=options.speculate)
    opened = open_model(asked, no_prompts)
    assert opened.tokenizer is not None
    return Harness(
        ready(opened.model),
        opened.tokenizer,
        opened.reader,
        opened.stops,
        row_tokens=options.row_tokens,
        slots=options.slots,
        drafts=options.speculate,
        seed=options.seed,
        closing="</think>" if options.thinking == "strip" else None,
        show=True,
    )


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


COMMANDS = {"harness": Command(harness_command, HarnessOptions, reads="from_")}
