"""`prepare --preview`: samples as a model will see them, with what is learnt of them."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence, Set
from itertools import groupby, islice
from typing import Any

from nemo_hybrid.config.finetune import SampleOptions
from nemo_hybrid.data.samples import Sample, SampleMaker
from nemo_hybrid.data.sources import Unusable, find_samples
from nemo_hybrid.data.tokenizer import TextTokenizer
from nemo_hybrid.terminal import check_reader

LEARNT, MASKED = "bold green", "dim"
OPEN, CLOSE = "[[", "]]"


def preview(
    options: SampleOptions, paths: Sequence[str], tokenizer: str, count: int, *, seed: int
) -> None:
    """Print the first ``count`` samples and unusable records of the input. Raises UserError."""
    options.validate()
    maker = SampleMaker(options, tokenizer, seed)
    coloured = sys.stdout.isatty() and not os.environ.get("NO_COLOR")
    for where, item, unread in islice(_items(maker, paths), count):
        check_reader()
        if isinstance(item, Unusable):
            print(f"{where}: unusable: {_visible(item.why)}\n")
            continue
        fields = f"; unread: {', '.join(map(_visible, sorted(unread)))}" if unread else ""
        print(f"{where}: {len(item.ids):,} tokens, {item.learnt:,} learnt{fields}")
        pieces = _pieces(item, maker.tokenizer)
        if coloured:
            _print_coloured(pieces)
        else:
            print("".join(f"{OPEN}{t}{CLOSE}" if learnt else t for t, learnt in pieces) + "\n")


def _items(
    maker: SampleMaker, paths: Sequence[str]
) -> Iterator[tuple[str, Sample | Unusable, Set[str]]]:
    """Where something stands, what it became, and the fields of its record that no rule knows."""
    for made in maker.read(find_samples(paths).sources):
        yield from ((made.where, sample, made.unread) for sample in made.samples)
        yield from ((item.where, item, made.unread) for item in made.unusable)


def _pieces(sample: Sample, tokenizer: TextTokenizer) -> list[tuple[str, bool]]:
    """Text of the longest runs of tokens that are all learnt, or all not."""
    tokens = zip(sample.ids.tolist(), sample.targets.tolist(), strict=True)
    runs = [(learnt, [i for i, _ in run]) for learnt, run in groupby(tokens, lambda t: t[1])]
    return [(_visible(tokenizer.decode(ids)), learnt) for learnt, ids in runs]


def _print_coloured(pieces: Sequence[tuple[str, bool]]) -> None:
    from rich.console import Console
    from rich.text import Text

    styled: list[Any] = [(text, LEARNT if learnt else MASKED) for text, learnt in pieces]
    Console(highlight=False).print(Text.assemble(*styled), end="\n\n")


def _visible(text: str) -> str:
    """Without characters that would steer a terminal."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)
