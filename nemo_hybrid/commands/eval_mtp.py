"""`eval-mtp`: how many drafts of the MTP block stay, and what they gain."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from pydantic import Field
from pydantic.dataclasses import dataclass

from nemo_hybrid.commands.command import Command, check_place
from nemo_hybrid.commands.generate import GenerateOptions, open_model
from nemo_hybrid.config.base import CHECKED, CommandOptions, PositiveInt, Seed, refuse
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import whole_directory, write_file
from nemo_hybrid.terminal import print_table, progress_bar

if TYPE_CHECKING:
    from nemo_hybrid.generation.batched import Generator, Request

TABLE_FILE, PLOT_FILE = "eval_mtp.json", "eval_mtp.png"
TEMPERATURES = (0.0, 1.0)
MOST = 7
"""Drafts."""


@dataclass(config=CHECKED)
class EvalMtpOptions(CommandOptions):
    """Measure how many drafts of the MTP block stay, and what they gain."""

    from_: str
    """Run directory (its latest checkpoint) or checkpoint directory."""
    data: str
    """File of prompts: rows of prompt (text, or messages to be answered) or input_ids."""
    depths: str = "1..7"
    """Drafts per pass to try, such as 3, 1..7 or 1,3,7."""
    max_new_tokens: Annotated[int, Field(ge=2)] = 128
    """Most tokens after a prompt; a text ends earlier at the end-of-sequence token."""
    slots: PositiveInt = 8
    """Prompts that are continued at once: the fewer, the more drafts gain."""
    seed: Seed = 1234
    """Seed of the draws."""
    out: str | None = None
    """Directory to write, with the figures as JSON and a plot; null: the table is printed alone."""

    def validate(self) -> None:
        depths_of(self.depths)
        if self.out is not None:
            check_place(self.out)
            refuse((Path(self.out).exists(), f"{self.out} exists already: name another --out"))


class Depth(NamedTuple):
    """Of one draft in a row: how often it was looked at, those before it having stayed, and how
    often it stayed."""

    tried: int
    stayed: int

    @property
    def share(self) -> float:
        return self.stayed / max(1, self.tried)


class Measured(NamedTuple):
    """Texts of one temperature and number of drafts."""

    temperature: float
    drafts: int
    tokens: int
    seconds: float
    cpu_seconds: float
    """Of the process, in all its threads."""
    by_depth: list[Depth]

    @property
    def rate(self) -> float:
        """Tokens per second."""
        return self.tokens / self.seconds

    @property
    def acceptance_length(self) -> float:
        """Tokens that a pass gives in the mean, the one that follows the drafts included."""
        length, reached = 1.0, 1.0
        for depth in self.by_depth:
            reached *= depth.share
            length += reached
        return length


def depths_of(text: str) -> list[int]:
    """The numbers that a text names, in order. Raises UserError."""
    found: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*([1-9])(?:\.\.([1-9]))?\s*", part)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last <= MOST:
            raise UserError(
                f"--depths: give numbers from 1 to {MOST}, such as 3, 1..7 or 1,3,7, got {text!r}"
            )
        found |= {*range(first, last + 1)}
    return sorted(found)


def count(texts: Sequence[Sequence[int]], drafts: int) -> list[Depth]:
    """What becomes of drafts, by their places, where passes over ``texts`` gave so many tokens.

    The last pass of a text is cut where that ends: of the draft there nothing is known.
    """
    whole = [tokens for passes in texts for tokens in passes[:-1]]
    cut = [passes[-1] for passes in texts if passes]
    depths = []
    for depth in range(1, drafts + 1):
        stayed = sum(tokens > depth for tokens in whole + cut)
        depths.append(Depth(stayed + whole.count(depth), stayed))
    return depths


def eval_mtp_command(options: EvalMtpOptions) -> None:
    """Measure, print a table, and write the figures and a plot."""
    import torch

    from nemo_hybrid.export.divergence import ready
    from nemo_hybrid.generation.batched import Generator

    depths = depths_of(options.depths)
    out = options.out
    asked = GenerateOptions(
        options.from_, prompts=options.data, max_new_tokens=options.max_new_tokens,
        speculate=depths[-1],
    )  # fmt: skip
    opened = open_model(asked, lambda reader: reader.read_file(options.data))
    model = ready(opened.model)
    requests = opened.requests(options.max_new_tokens)
    runs = [(t, k) for t in TEMPERATURES for k in (0, *depths)]
    # What cannot be written is found before it is measured.
    with whole_directory(Path(out)) if out else nullcontext() as place:
        measured = []
        with progress_bar(f"measuring {len(runs)} times", len(runs), show=True) as progress:
            for temperature, drafts in runs:
                generator = Generator(
                    model, options.slots, temperature=temperature, seed=options.seed, drafts=drafts,
                    markers=opened.markers,
                )  # fmt: skip
                measured.append(_measure(generator, requests, temperature, drafts))
                progress(len(measured))
        _show(measured)
        if place:
            content = {
                "from": str(opened.directory), "prompts": len(requests), "slots": options.slots,
                "max_new_tokens": options.max_new_tokens, "seed": options.seed,
                "device": model.lm_head.weight.device.type, "threads": torch.get_num_threads(),
                "runs": list(map(_as_json, measured)),
            }  # fmt: skip
            write_file(place / TABLE_FILE, [json.dumps(content, indent=1).encode()])
            write_file(place / PLOT_FILE, [_plot(measured)])
    if out:
        print(f"written to {out}")


def _as_json(measured: Measured) -> dict[str, Any]:
    return {
        **measured._asdict(),
        "by_depth": [depth._asdict() for depth in measured.by_depth],
        "tokens_per_second": measured.rate,
        "acceptance_length": measured.acceptance_length,
    }


def _measure(
    generator: Generator, requests: Sequence[Request], temperature: float, drafts: int
) -> Measured:
    list(generator.run([replace(requests[0], most=2)]))  # what the first call alone costs
    began, cpu = time.monotonic(), time.process_time()
    found = list(generator.run(requests))
    seconds, cpu = time.monotonic() - began, time.process_time() - cpu
    tokens = sum(len(rollout.ids) for rollout in found)
    passes = [rollout.passes for rollout in found]
    return Measured(temperature, drafts, tokens, seconds, cpu, count(passes, drafts))


def _plain(measured: Sequence[Measured], like: Measured) -> Measured:
    """The run without drafts at the same temperature."""
    return next(m for m in measured if m.temperature == like.temperature and not m.drafts)


def _show(measured: Sequence[Measured]) -> None:
    print_table(
        ("temperature", "drafts", "tokens/s", "over plain", "length", "share that stays, by depth"),
        [
            (
                f"{m.temperature:g}",
                str(m.drafts),
                f"{m.rate:.1f}",
                f"{m.rate / _plain(measured, m).rate:.2f}",
                f"{m.acceptance_length:.2f}" if m.drafts else "",
                " ".join(f"{depth.share:.2f}" if depth.tried else "-" for depth in m.by_depth),
            )
            for m in measured
        ],
        title="Drafts: tokens per pass (length), and how many of them stay where those before do",
        right=("temperature", "drafts", "tokens/s", "over plain", "length"),
    )


def _plot(measured: Sequence[Measured]) -> bytes:
    """Shares by depth, of the run with the most drafts; and what drafts gain, by their number."""
    from matplotlib.ticker import MaxNLocator

    from nemo_hybrid.train.plots import png, styled

    figure, (left, right) = styled(1, 4.0, columns=2)
    for temperature, color in zip(TEMPERATURES, ("#2f6fab", "#d9822b"), strict=True):
        label = "greedy" if temperature == 0 else f"temperature {temperature:g}"
        own = [m for m in measured if m.temperature == temperature]
        shares = [depth.share for depth in own[-1].by_depth]
        left.plot(range(1, len(shares) + 1), shares, "o-", color=color, label=label)
        drafts = [m.drafts for m in own]
        gains = [m.rate / own[0].rate for m in own]
        right.plot(drafts, gains, "o-", color=color, label=f"speed, {label}")
        lengths = [m.acceptance_length for m in own]
        right.plot(drafts, lengths, "s--", color=color, mfc="white", label=f"length, {label}")
    left.set(xlabel="depth", ylabel="share of drafts that stay", ylim=(0, 1.02))
    right.set(xlabel="drafts per pass", ylabel="tokens per pass; speed over plain", ylim=(0, None))
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.legend(frameon=False, fontsize=8)
    return png(figure)


COMMANDS = {"eval-mtp": Command(eval_mtp_command, EvalMtpOptions, reads="from_")}
