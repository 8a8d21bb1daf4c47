"""`generate`: continue prompts with a trained model."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from nemo_hybrid.commands.command import Command, check_text
from nemo_hybrid.config.base import (
    CHECKED,
    NOT_NEGATIVE,
    CommandOptions,
    NotNegativeFloat,
    PositiveInt,
    Seed,
    Share,
    refuse,
)
from nemo_hybrid.errors import UserError
from nemo_hybrid.process import launched
from nemo_hybrid.terminal import check_reader

if TYPE_CHECKING:
    from nemo_hybrid.checkpoint.load import Build
    from nemo_hybrid.commands.rollout import RolloutOptions
    from nemo_hybrid.data.prompts import Prompt, PromptReader
    from nemo_hybrid.data.tokenizer import TextTokenizer
    from nemo_hybrid.generation.batched import Request, Rollout
    from nemo_hybrid.generation.thinking import Markers
    from nemo_hybrid.model.cache import StateFormat
    from nemo_hybrid.model.hybrid import HybridLM


Drafts = Annotated[int, Field(ge=0, le=7)]


@dataclass(config=CHECKED, kw_only=True)
class SamplingOptions(CommandOptions):
    """Options of whoever lets models speak, and think."""

    top_p: Share = 1.0
    """Draw only from the most probable tokens that together have this probability."""
    seed: Seed = 1234
    """Seed of the draws."""
    ssm_cache: Literal["float32", "float16"] = "float32"
    """What Mamba states are kept in between tokens; they are calculated with in float32."""
    ssm_rounding: Literal["nearest", "stochastic"] | None = None
    """How float16 states are rounded; null: stochastic, which keeps what adds up slowly."""
    thinking: Literal["auto", "on", "off"] = "auto"
    """Whether chat templates are told to ask for thinking; auto: they are told nothing."""
    thinking_budget: Annotated[int | None, NOT_NEGATIVE] = None
    """Most tokens of thinking, after which its closing marker is forced and the answer follows."""
    thinking_markers: str | None = None
    """What opens and what closes thinking, with a blank between: by default <think> and </think>,
    if the chat template writes them."""

    def validate(self) -> None:
        words = None if self.thinking_markers is None else self.thinking_markers.split()
        refuse(
            (
                words is not None and (len(words) != 2 or words[0] == words[1]),
                f"--thinking_markers: give two with a blank between, such as '<think> </think>', "
                f"got {self.thinking_markers!r}",
            ),
            (
                words and "/" in words[0] and words[0].replace("/", "", 1) == words[1],
                f"--thinking_markers: {self.thinking_markers!r} names first what closes thinking: "
                "name first what opens it",
            ),
            (
                self.ssm_rounding and self.ssm_cache == "float32",
                "--ssm_rounding is for --ssm_cache float16: float32 states are not rounded",
            ),
        )

    @property
    def states(self) -> StateFormat:
        """What the generator is told of both options of Mamba states."""
        return "float32" if self.ssm_cache == "float32" else self.ssm_rounding or "stochastic"


@dataclass(config=CHECKED)
class GenerateOptions(SamplingOptions):
    """Continue prompts with a trained model."""

    from_: str
    """Run directory (its latest checkpoint) or checkpoint directory."""
    prompt: str = ""
    """Text to continue; special tokens that it spells are special tokens."""
    prompts: str | None = None
    """File of several: rows of prompt (text, or messages to be answered) or input_ids."""
    max_new_tokens: PositiveInt = 100
    """Most tokens to generate; generation stops earlier at the end-of-sequence token."""
    temperature: NotNegativeFloat = 0.0
    """0: always the most probable token; 1: the model's distribution; lower is more careful."""
    slots: PositiveInt = 16
    """Prompts that are continued at once; the texts do not depend on it."""
    speculate: Drafts = 0
    """Tokens, 0 to 7, that the MTP block drafts before each pass; at temperature 0 texts stay the
    same."""
    chat: bool = False
    """Give the prompt as a user's message, rendered with the model's chat template."""

    def validate(self) -> None:
        super().validate()
        several = self.prompts is not None
        refuse(
            (several and self.prompt, "give --prompt or --prompts, not both"),
            (several and self.chat, "--chat is for --prompt: rows of --prompts say what they are"),
            (self.chat and not self.prompt.strip(), "--chat: give what the user says as --prompt"),
            (
                self.thinking != "auto" and not (several or self.chat),
                "--thinking is for conversations: give --chat, or --prompts",
            ),
        )
        check_text(self.prompt)


class Opened(NamedTuple):
    """What is needed to generate. ``tokenizer``: None where the model has none."""

    directory: Path
    model: HybridLM
    reader: PromptReader
    tokenizer: TextTokenizer | None
    prompts: list[Prompt]
    stops: frozenset[int]
    markers: Markers | None
    """Of thinking, where a prompt has a budget."""

    def requests(self, most: int) -> list[Request]:
        """A sample of ``most`` tokens of every prompt."""
        from nemo_hybrid.generation.batched import Request

        return [
            Request(p.number, p.ids, most, (0,), self.stops, p.budget, p.thinks)
            for p in self.prompts
        ]


def open_model(
    options: GenerateOptions | RolloutOptions,
    ask: Callable[[PromptReader], list[Prompt]],
    build: Build | None = None,
) -> Opened:
    """The model that is named, and what ``ask`` wants of it; prompts are read before weights are.
    ``build``: see `load`. Raises UserError."""
    from nemo_hybrid.checkpoint.adapter import base_directory, is_adapter, locate
    from nemo_hybrid.checkpoint.companions import read_companions
    from nemo_hybrid.checkpoint.load import load
    from nemo_hybrid.checkpoint.steps import reading
    from nemo_hybrid.config.hf import read_config
    from nemo_hybrid.data.prompts import PromptReader, unread_fields
    from nemo_hybrid.data.tokenizer import load_tokenizer
    from nemo_hybrid.export.decode import is_quantized, read_export
    from nemo_hybrid.generation.thinking import Markers
    from nemo_hybrid.model.hybrid import HybridLM

    def read(given: Path) -> Opened:
        base = base_directory(given) if is_adapter(given) else given
        directory = given if (given / "tokenizer.json").is_file() else base
        has_tokenizer = (directory / "tokenizer.json").is_file()
        tokenizer = load_tokenizer(directory) if has_tokenizer else None
        exported = given == base and is_quantized(base)
        shape = read_export(base).config if exported else read_config(base)
        longest = shape.max_position_embeddings
        refuse(
            (
                options.speculate and not shape.mtp_num_depths,
                f"{given} has no MTP block that could draft tokens",
            ),
            (exported and build, f"--ep: {given} is quantized, and every process reads all of it"),
        )
        switch = None if options.thinking == "auto" else options.thinking == "on"
        words = options.thinking_markers and options.thinking_markers.split()
        reader = PromptReader(
            directory, tokenizer, shape.vocab_size, longest, options.max_new_tokens,
            switch, options.thinking_budget, (words[0], words[1]) if words else None,
        )  # fmt: skip
        prompts = ask(reader)
        unread = unread_fields(prompts)
        if unread and not launched()[0]:
            counts = ", ".join(f"{name} ({count:,})" for name, count in unread.items())
            print(
                f"fields of prompts that are not read, and rows with them: {counts}",
                file=sys.stderr,
            )
        budgets = any(prompt.budget is not None for prompt in prompts)
        refuse((words and not budgets, "--thinking_markers are for budgets, and there is none"))
        markers = Markers(*map(tuple, reader.marker_ids)) if budgets else None
        stops = frozenset(read_companions(directory).stops(shape.eos_token_id))
        ends = stops & {*markers.opening, *markers.closing} if markers else ()
        refuse((ends, f"markers of thinking hold token {ends and min(ends)}, which ends texts"))
        model = _dequantized(given) if exported else load(given, build=build or HybridLM)[0]
        return Opened(given, model.eval(), reader, tokenizer, prompts, stops, markers)

    return reading(options.from_, read, locate)


def _dequantized(directory: Path) -> HybridLM:
    """Of an export; says what is rounded in it."""
    from nemo_hybrid.export.decode import read_export
    from nemo_hybrid.export.verify import load_exported

    model = load_exported(directory)
    if not launched()[0]:
        scaled = read_export(directory).kv_cache
        print(
            f"{directory} is an export: its weights are dequantized to float32, inputs of products "
            "are not rounded; keys and values are "
            + ("cached in FP8, by its scales" if scaled else "not rounded"),
            file=sys.stderr,
        )
    return model


def generate_command(options: GenerateOptions) -> None:
    """Print a prompt and its continuation as it appears, or the answer to it alone; of several, one
    after the other."""
    from nemo_hybrid.data.chat import Conversation
    from nemo_hybrid.data.sources import BadRecord
    from nemo_hybrid.export.divergence import ready
    from nemo_hybrid.generation.batched import Generator

    def ask(reader: PromptReader) -> list[Prompt]:
        if options.prompts is not None:
            return reader.read_file(options.prompts)
        text = options.prompt
        try:
            if options.chat:
                return [reader.chat(Conversation([{"role": "user", "content": text}]))]
            return [reader.text(text)]
        except BadRecord as e:
            raise UserError(f"--prompt: {e}") from e

    opened = open_model(options, ask)
    generator = Generator(
        ready(opened.model), options.slots, temperature=options.temperature, top_p=options.top_p,
        seed=options.seed, drafts=options.speculate, states=options.states,
        markers=opened.markers,
    )  # fmt: skip
    began = time.monotonic()
    heading = "" if options.chat else options.prompt
    page = _Page(opened, None if options.prompts else heading)
    passes = []
    for rollout in generator.run(opened.requests(options.max_new_tokens), page.show):
        page.end(rollout)
        passes += rollout.passes
    seconds = time.monotonic() - began
    each = f", {sum(passes) / len(passes):.2f} per pass" if passes else ""
    print(f"[{page.tokens} tokens in {seconds:.1f} s{each}]", file=sys.stderr)


class _Page:
    """Standard output: one text after the other, the first that has not ended as it grows."""

    def __init__(self, opened: Opened, heading: str | None) -> None:
        """``heading``: what stands before the text of the only prompt."""
        self._tokenizer, self._heading = opened.tokenizer, heading
        self._left = [prompt.number for prompt in opened.prompts]
        self._ended: dict[int | str, Rollout] = {}
        self.tokens = 0
        self._begin()

    def _begin(self) -> None:
        """The next text, if there is one."""
        from nemo_hybrid.data.tokenizer import TextStream

        self._shown = 0
        self._stream = TextStream(self._tokenizer) if self._tokenizer else None
        if self._left:
            numbered = self._heading is None
            sys.stdout.write(f"--- {self._left[0]}\n" if numbered else self._heading or "")

    def show(self, rollout: Rollout) -> None:
        """What is new of a text, if its turn has come."""
        check_reader()
        if rollout.request.prompt == self._left[0]:
            for token in rollout.said[self._shown :]:
                sys.stdout.write(self._stream.add(token) if self._stream else f"{token} ")
            self._shown = len(rollout.said)
            sys.stdout.flush()

    def end(self, rollout: Rollout) -> None:
        """The text is as long as it will be."""
        self._ended[rollout.request.prompt] = rollout
        self.tokens += len(rollout.said)
        while self._left and self._left[0] in self._ended:
            self.show(self._ended.pop(self._left[0]))
            sys.stdout.write((self._stream.finish() if self._stream else "") + "\n")
            self._left.pop(0)
            self._begin()


COMMANDS = {"generate": Command(generate_command, GenerateOptions, reads="from_")}
