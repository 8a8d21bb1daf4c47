"""`generate`: continue a prompt with a trained model."""

from __future__ import annotations

import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic.dataclasses import dataclass

from nemo_hybrid.commands.command import Command, check_text
from nemo_hybrid.config.base import (
    CHECKED,
    CommandOptions,
    NotNegativeFloat,
    PositiveInt,
    Seed,
    Share,
)
from nemo_hybrid.errors import UserError
from nemo_hybrid.terminal import check_reader

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from nemo_hybrid.data.tokenizer import TextTokenizer
    from nemo_hybrid.model.hybrid import HybridLM


@dataclass(config=CHECKED)
class GenerateOptions(CommandOptions):
    """Continue a prompt with a trained model."""

    from_: str
    """Run directory (its latest checkpoint) or checkpoint directory."""
    prompt: str
    """Text to continue; special tokens that it spells are special tokens."""
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
        check_text(self.prompt)


def _chat_prompt(tokenizer: TextTokenizer, directory: Path, prompt: str) -> NDArray[np.int64]:
    """Token ids that ask for an answer to a user's message."""
    from nemo_hybrid.data.sources import BadRecord
    from nemo_hybrid.data.template import load_template, need_template

    template = need_template(load_template(tokenizer, directory), directory)
    messages = [{"role": "user", "content": prompt}]
    try:
        template.check(messages)
        text = template.render(messages, add_generation_prompt=True)
    except BadRecord as e:
        raise UserError(f"the prompt cannot be rendered: {e}") from e
    return tokenizer.encode_chat(text)[0]


def stop_ids(directory: Path, default: int) -> list[int]:
    """Ids that end a text: of generation_config.json, else of config.json, else ``default``.

    Raises UserError for ids that are none.
    """
    from nemo_hybrid.checkpoint.companions import read_companions

    companions = read_companions(directory)
    return companions.stop_ids or companions.eos_token_ids or [default]


def generate_command(options: GenerateOptions) -> None:
    """Print the prompt and its continuation as it appears, or the answer to it alone."""
    import torch

    from nemo_hybrid.checkpoint.adapter import base_directory, is_adapter, locate
    from nemo_hybrid.checkpoint.load import load_model
    from nemo_hybrid.checkpoint.steps import reading
    from nemo_hybrid.data.tokenizer import TextStream, load_tokenizer
    from nemo_hybrid.generation.batched import Generator, Request, Rollout

    def read(given: Path) -> tuple[HybridLM, TextTokenizer, NDArray[np.int64], list[int]]:
        directory = given
        if is_adapter(given) and not (given / "tokenizer.json").is_file():
            directory = base_directory(given)
        if not (directory / "tokenizer.json").is_file():
            raise UserError(f"{directory} has no tokenizer.json, so the prompt cannot be read")
        tokenizer = load_tokenizer(directory)
        model = load_model(given).eval()
        if options.chat:
            ids = _chat_prompt(tokenizer, directory, options.prompt)
        else:
            ids = tokenizer.encode_prompt(options.prompt)
        return model, tokenizer, ids, stop_ids(directory, model.config.eos_token_id)

    model, tokenizer, ids, ends = reading(options.from_, read, locate)
    if torch.cuda.is_available():
        model = model.to("cuda")
    if not len(ids):
        raise UserError("--prompt is empty: give at least one token to continue")
    if ids.max() >= model.config.vocab_size:
        raise UserError(
            f"the prompt holds {tokenizer.decode([int(ids.max())])!r}, token {ids.max()} of the "
            f"tokenizer, beyond the model's vocab_size {model.config.vocab_size}"
        )

    began = time.monotonic()
    text, shown = TextStream(tokenizer), 0

    def show(rollout: Rollout) -> None:
        nonlocal shown
        check_reader()
        for token in rollout.said[shown:]:
            sys.stdout.write(text.add(token))
        sys.stdout.flush()
        shown = len(rollout.said)

    if not options.chat:
        sys.stdout.write(options.prompt)
    request = Request(0, ids.tolist(), options.max_new_tokens, stops=frozenset(ends))
    generator = Generator(
        model, 1, temperature=options.temperature, top_p=options.top_p, seed=options.seed
    )
    for _ in generator.run([request], show):
        sys.stdout.write(text.finish() + "\n")
    seconds = time.monotonic() - began
    print(f"[{shown} tokens in {seconds:.1f} s]", file=sys.stderr)


COMMANDS = {"generate": Command(generate_command, GenerateOptions, reads="from_")}
