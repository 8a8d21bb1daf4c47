"""`rollout`: samples of what a model says to prompts, as a file of one object per line.

What is done stands in OUT.part-RANK, one line per sample in the order in which they ended, and what
was asked for in OUT.run.json. When all are there they become OUT, in the order of the prompts.
"""

from __future__ import annotations

import glob
import hashlib
import json
import os
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import replace
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, NamedTuple

from pydantic.dataclasses import dataclass

from nemo_hybrid.agreement import ALONE, Agreement
from nemo_hybrid.commands.command import Command, check_place
from nemo_hybrid.commands.generate import Drafts, SamplingOptions
from nemo_hybrid.config.base import CHECKED, NotNegativeFloat, PositiveInt, refuse
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import lock, naming, read_json, replace_file, sync
from nemo_hybrid.process import launched
from nemo_hybrid.terminal import progress_bar

if TYPE_CHECKING:
    from nemo_hybrid.commands.generate import Opened
    from nemo_hybrid.config.hf import HybridConfig
    from nemo_hybrid.data.prompts import Prompt, PromptReader
    from nemo_hybrid.generation.batched import Rollout
    from nemo_hybrid.model.hybrid import HybridLM
    from nemo_hybrid.parallel.dispatch import AllToAllDispatcher
    from nemo_hybrid.parallel.world import World

Key = tuple[int | str, int]
"""A prompt and the number of its sample."""


@dataclass(config=CHECKED)
class RolloutOptions(SamplingOptions):
    """Write samples of what a model says to prompts."""

    from_: str
    """Run directory (its latest checkpoint) or checkpoint directory."""
    data: str
    """File of prompts: rows of prompt (text, or messages to be answered) or input_ids."""
    out: str
    """File to write, JSON lines; the same command goes on where another was interrupted."""
    samples: PositiveInt = 1
    """Samples of each prompt."""
    slots: PositiveInt = 64
    """Samples that each process generates at once; they do not depend on it."""
    max_new_tokens: PositiveInt = 256
    """Most tokens of a sample; it ends earlier at the end-of-sequence token."""
    temperature: NotNegativeFloat = 1.0
    """0: always the most probable token; 1: the model's distribution; lower is more careful."""
    speculate: Drafts = 0
    """Tokens, 0 to 7, that the MTP block drafts before each pass; they change what is drawn, but
    not how probable it is."""
    ep: PositiveInt = 1
    """Processes that divide the experts between them; must divide the number of processes."""

    def validate(self) -> None:
        super().validate()
        check_place(self.out)
        refuse((Path(self.out).is_dir(), f"--out: {self.out} is a directory: name a file"))


class Line(NamedTuple):
    """Where a sample stands."""

    file: Path
    start: int
    stop: int


class Work:
    """What is written of the samples that were asked for: the files around OUT."""

    def __init__(self, out: Path) -> None:
        self.out, self.about = out, out.with_name(f"{out.name}.run.json")

    def part(self, rank: int) -> Path:
        """Where a process writes."""
        return self.out.with_name(f"{self.out.name}.part-{rank}")

    def check(self) -> None:
        """Raise UserError for files that nothing tells of."""
        for found in () if self.about.is_file() else (self.out, *self._parts()):
            if found.exists():
                raise UserError(f"{found} exists already, of another run: name another --out")

    def begin(self, options: RolloutOptions, opened: Opened) -> set[Key] | None:
        """The samples that are there already; None where OUT is complete. One process calls this,
        and holds the files until they are finished. Raises UserError for files of another run."""
        from nemo_hybrid.data.prompts import asked_digest

        wanted = _identity(options, opened)
        if not self.about.is_file():
            asked = asked_digest((prompt.number, prompt.row) for prompt in opened.prompts)
            replace_file(self.about, json.dumps({**wanted, "asked": asked}, indent=1) + "\n")
        there = read_json(self.about)
        for name, value in wanted.items():
            if there.get(name) != value:
                raise UserError(
                    f"{self.out} is of another run: {name} is {there.get(name)} there, {value} "
                    f"here; name another --out, or remove {self.about} and what it is about"
                )
        self._held = lock(self.about, self.out)
        if self.out.exists():
            self._close()
            return None
        return set(self._lines())

    def finish(self, keys: Sequence[Key]) -> None:
        """Make OUT of the lines of these samples, in this order. One process calls this. Raises
        UserError where some are not to be seen from here."""
        lines = self._lines()
        if missing := [key for key in keys if key not in lines]:
            raise UserError(
                f"{len(missing)} samples are missing, such as {missing[0]}: all processes have to "
                f"write to one file system; collect what they wrote, {self.out}.part-*, in one "
                "place and run the command again there"
            )
        replace_file(self.out, _contents(lines[key] for key in keys))
        self._close()

    def _close(self) -> None:
        """Leave OUT alone, which is complete."""
        for part in self._parts():
            part.unlink()
        os.close(self._held)

    def _parts(self) -> list[Path]:
        return sorted(self.out.parent.glob(f"{glob.escape(self.out.name)}.part-*"))

    def _lines(self) -> dict[Key, Line]:
        """Of all parts. What stands behind the last whole line, where writing was interrupted, is
        cut off."""
        found: dict[Key, Line] = {}
        for path in self._parts():
            with naming("continue", path), path.open("rb") as file:
                stop = 0
                for line in file:
                    if not line.endswith(b"\n"):
                        os.truncate(path, stop)
                        break
                    start, stop = stop, stop + len(line)
                    try:
                        content = json.loads(line)
                        found[content["prompt"], content["sample"]] = Line(path, start, stop)
                    except (ValueError, LookupError, TypeError) as e:
                        raise UserError(f"{path} is damaged at byte {start}: remove it") from e
        return found


def rollout_command(options: RolloutOptions) -> None:
    """Generate all samples that are not there yet, and put them in order."""
    rank, size = launched()
    if size % options.ep:
        raise UserError(f"--ep {options.ep} does not divide the number of processes, {size}")
    work = Work(Path(options.out))
    work.check()
    from nemo_hybrid.generation import batched
    from nemo_hybrid.parallel.world import World

    world = World.start()
    with world.agreed():
        opened, dispatcher = _open(options, world)
    if len(set(world.gather(opened.directory))) > 1:
        raise UserError(f"processes read different checkpoints of {options.from_}: name one")
    done = world.from_rank_0(work.begin, options, opened)
    keys = [(prompt.number, n) for prompt in opened.prompts for n in range(options.samples)]
    if done is None:
        if not rank:
            print(f"{work.out} is complete: {len(keys):,} samples")
        return World.stop()
    requests = [
        replace(request, samples=left)
        for request in opened.requests(options.max_new_tokens)
        if (left := [n for n in range(options.samples) if (request.prompt, n) not in done])
    ][rank::size]
    together: Agreement = ALONE
    if dispatcher:
        dispatcher.join()
        together = replace(world, size=options.ep, group=dispatcher.group, host=None)
    generator = batched.Generator(
        opened.model.to(world.device), options.slots, temperature=options.temperature,
        top_p=options.top_p, seed=options.seed, drafts=options.speculate,
        states=options.states, markers=opened.markers,
        most=dispatcher.most if dispatcher else batched.alone,
    )  # fmt: skip
    began, total = time.monotonic(), sum(len(request.samples) for request in requests)
    part = work.part(rank)
    with world.agreed(), naming("write", part):
        file = part.open("ab")
    with together.agreed(), closing(generator.run(requests)) as rollouts, naming("write", part):
        tokens = _write(file, rollouts, opened, total, show=not rank)
    counts = world.gather((total, tokens))
    world.from_rank_0(work.finish, keys)
    if not rank:
        seconds, made = time.monotonic() - began, [sum(n) for n in zip(*counts, strict=True)]
        print(
            f"{work.out}: {len(keys):,} samples of {len(opened.prompts):,} prompts; {made[0]:,} "
            f"generated now, {made[1]:,} tokens in {seconds:.1f} s"
        )
    World.stop()


def _open(options: RolloutOptions, world: World) -> tuple[Opened, AllToAllDispatcher | None]:
    """The model and the prompts; and what brings tokens to the experts of other processes, if this
    one has a part of them. Raises UserError."""
    from nemo_hybrid.commands.generate import open_model

    def read(reader: PromptReader) -> list[Prompt]:
        return reader.read_file(options.data)

    if options.ep == 1:
        return open_model(options, read), None
    from nemo_hybrid.model.hybrid import HybridLM
    from nemo_hybrid.parallel.dispatch import AllToAllDispatcher
    from nemo_hybrid.parallel.engine import prepare_deepspeed

    prepare_deepspeed(world)
    dispatchers = []

    def with_part(config: HybridConfig) -> HybridLM:
        if config.n_routed_experts % options.ep:
            raise UserError(f"--ep {options.ep} does not divide {config.n_routed_experts} experts")
        dispatchers.append(AllToAllDispatcher(config.n_routed_experts, options.ep, world.rank))
        return HybridLM(config, dispatcher=dispatchers[-1])

    opened = open_model(options, read, with_part)
    return opened, dispatchers[-1]


def _identity(options: RolloutOptions, opened: Opened) -> dict[str, Any]:
    """What decides the samples."""
    from nemo_hybrid.checkpoint.adapter import base_digest, base_directory, is_adapter

    weights = [opened.directory]
    if is_adapter(opened.directory):
        weights.append(base_directory(opened.directory))
    prompts = json.dumps(
        [(p.number, p.ids, p.budget)[: 2 + (p.budget is not None)] for p in opened.prompts]
    )
    return {
        "weights": " ".join(map(base_digest, weights)),
        "stops": sorted(opened.stops),
        "ssm_cache": options.states,
        "markers": opened.markers and [[*ids] for ids in vars(opened.markers).values()],
        **{n: getattr(options, n) for n in ("samples", "max_new_tokens", "temperature", "top_p",
                                            "seed", "speculate", "thinking_budget")},
        "prompts": hashlib.sha256(prompts.encode()).hexdigest(),
    }  # fmt: skip


def _write(
    file: IO[bytes], rollouts: Iterable[Rollout], opened: Opened, total: int, show: bool
) -> int:
    """Append every rollout when it ends; gives the number of their tokens."""
    tokens = 0
    with file, progress_bar(f"generating {total:,} samples", total, show) as progress:
        for count, rollout in enumerate(rollouts, 1):
            tokens += len(rollout.ids)
            file.write(_line(rollout, opened).encode())
            file.flush()
            progress(count)
        sync(file)
    return tokens


def _line(rollout: Rollout, opened: Opened) -> str:
    tokenizer = opened.tokenizer
    content = {
        "prompt": rollout.request.prompt,
        "sample": rollout.sample,
        "prompt_ids": rollout.request.ids,
        "ids": rollout.ids,
        "chosen": rollout.chosen,
        "logprobs": [float(f"{x:.9g}") for x in rollout.logprobs],  # all that fp32 holds
        "text": tokenizer.decode(rollout.said) if tokenizer else None,
        "ended": rollout.ended,
    }
    return json.dumps(content) + "\n"


def _contents(lines: Iterable[Line]) -> Iterator[bytes]:
    with ExitStack() as stack:
        files: dict[Path, IO[bytes]] = {}
        for path, start, stop in lines:
            if path not in files:
                files[path] = stack.enter_context(path.open("rb"))
            files[path].seek(start)
            yield files[path].read(stop - start)


COMMANDS = {"rollout": Command(rollout_command, RolloutOptions, reads="from_")}
