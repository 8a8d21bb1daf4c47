"""How large activations get: what input scales and the KV cache's scales are made of.

Shapes: B rows, S tokens of a piece of text, E experts.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from nemo_hybrid.checkpoint.companions import read_companions
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.run import DataOptions
from nemo_hybrid.data.loader import heldout_batches, open_blend, require_tokenizer
from nemo_hybrid.data.packing import PackedSamples, open_stores
from nemo_hybrid.data.sources import find_sources
from nemo_hybrid.data.store import TRAIN, holds_samples
from nemo_hybrid.data.tokenizer import TextTokenizer, load_tokenizer
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import naming
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.lora import adaptable
from nemo_hybrid.precision.groups import is_stacked
from nemo_hybrid.precision.magnitudes import Magnitudes, watching
from nemo_hybrid.terminal import progress_bar

_CHARACTERS = 6
"""Of a text, for a token that is wanted: so many are read at first, and as many again until there
are enough tokens."""
_UNCERTAIN = 64
"""Tokens at the end of what was read that the text behind it may change."""


@dataclass(frozen=True)
class Calibration:
    """What was seen of a model's activations; all numbers are magnitudes, not yet scales."""

    amax: dict[str, Tensor]
    """Of a place's inputs, on the CPU: fp32 scalar; of stacks one per expert, [E]. Never 0: 1 where
    there was nothing but zeros."""
    unseen: dict[str, list[int]]
    """Experts of a stack that no token was sent to: they have the largest amax of the others."""
    kv: dict[str, float]
    """Largest key and value by the places of k_proj and v_proj (keys are cached as they leave it:
    there is no position encoding)."""
    tokens: int
    """Tokens read."""


@torch.no_grad()
def calibrate(
    model: HybridLM,
    pieces: Iterable[Tensor],
    percentile: float | None = None,
    places: Collection[str] | None = None,
    *,
    show: bool = False,
) -> Calibration:
    """Run the model on pieces of text, ids [B, S], and watch the inputs of its products.

    Experts' down projections are watched in front of the routing weight, where engines quantize.
    With ``percentile``, amax is the smallest bf16 number that at least so many percent of the
    magnitudes lie below, and at most the largest of them; for a stack, the percentile is that of
    all experts together, which share a scale. ``places``: which to watch; None: all of them. MTP
    block and head run only for places of theirs.

    Raises UserError where there is nothing to read, and naming the place for activations that are
    not finite.
    """
    linears, stacks = adaptable(model)
    watched = [*linears, *stacks, "lm_head"] if places is None else places
    caches = [p for p in linears if p.endswith((".k_proj", ".v_proj"))]
    tokens, pieces = 0, list(pieces)
    total = sum(piece.numel() for piece in pieces)
    kv = {place: Magnitudes(1, None) for place in caches}
    with (
        ExitStack() as hooks,
        watching(model, watched, percentile) as seen,
        progress_bar("calibrating", total, show) as progress,
    ):
        for place, magnitudes in kv.items():
            hook = model.get_submodule(place).register_forward_hook(
                lambda module, args, output, seen=magnitudes: seen.see(output)
            )
            hooks.callback(hook.remove)
        for ids_BS in pieces:
            ids_BS = ids_BS.to(model.lm_head.weight.device)
            h_BSD, _ = model.forward_hidden(ids_BS)
            if "lm_head" in watched:
                model.lm_head(h_BSD)
            if any(place.startswith("mtp.") for place in watched):
                model.forward_mtp(h_BSD, ids_BS)
            tokens += ids_BS.numel()
            progress(tokens)
    if not tokens:
        raise UserError("there is no token to calibrate with: give more text")
    amax = {place: magnitudes.result(place) for place, magnitudes in seen.items()}
    unseen = {p: m.unseen() for p, m in seen.items() if p in stacks and m.unseen()}
    # MTP's keys and values are not watched where the block did not run.
    kv_amax = {p: float(m.result(p)[0]) for p, m in kv.items() if not m.unseen()}
    return Calibration(
        {p: a if is_stacked(p) else a[0] for p, a in amax.items()}, unseen, kv_amax, tokens
    )


def read_pieces(
    data: str,
    directory: Path,
    config: HybridConfig,
    tokens: int,
    split: Literal["train", "heldout"] = "train",
    length: int = 512,
) -> list[Tensor]:
    """About ``tokens`` token ids of a text file, read with the tokenizer of ``directory``, or of a
    part of a token store, or of samples for fine-tuning: pieces [1, S] of one document each, of at
    most ``length``.

    Of a token store's training part they are drawn at random (always the same), of the held-out
    part evenly spaced; of a text file and of samples they are the first. Held-out pieces have two
    tokens at least: of one there is nothing to predict. Raises UserError.
    """
    path = Path(data).expanduser()
    if holds_samples(path / TRAIN):
        pieces = _of_samples(path, directory, config, tokens, split, length)
    elif path.is_dir():
        pieces = _of_store(path, directory, config, tokens, split, length)
    else:
        (source,) = find_sources([str(path)]).sources
        if source.kind != "text" or source.packing:
            advice = (
                "make a token store of it (`nemo-hybrid prepare`) or samples (`--for finetune`)"
            )
            raise UserError(f"{data} is {source.why or f'no plain text: {advice} and name that'}")
        ids = first_ids(path, load_tokenizer(directory), tokens)
        pieces = list(ids[None].split(length, 1))
    pieces = [piece for piece in pieces if piece.shape[1] > (split == "heldout")]
    if not pieces:
        raise UserError(f"{data}: fewer than two tokens; there is nothing to predict")
    largest = max(int(piece.max()) for piece in pieces)
    if largest >= config.vocab_size:
        raise UserError(
            f"{data} holds token id {largest}, beyond the model's vocab_size {config.vocab_size}"
        )
    return pieces


def _of_store(
    path: Path, directory: Path, config: HybridConfig, tokens: int, split: str, length: int
) -> list[Tensor]:
    options = DataOptions(path=str(path), sequence_length=length)
    ends = read_companions(directory).ends
    blend, rows = open_blend(options, config, ends, directory / "config.json"), -(-tokens // length)
    if split == "train":
        rows = min(rows, sum(store.windows(length) for store in blend.train))
        batches = iter([blend.rows(range(rows), length, seed=0)])
    else:
        batches = heldout_batches(
            blend, sequence_length=length, micro_batch_size=1, rank=0, world_size=1, limit=rows
        )
    return [
        piece_S[None]
        for batch in batches
        for piece_S in batch.ids_BS.flatten().split(batch.documents.cu_seqlens.diff().tolist())
    ]


def _of_samples(
    path: Path, directory: Path, config: HybridConfig, tokens: int, split: str, length: int
) -> list[Tensor]:
    train, heldout = open_stores(path)
    store = train if split == "train" else heldout
    if store is None:
        raise UserError(f"{path} has no held-out samples: prepare it with --heldout above 0")
    require_tokenizer(PackedSamples(train, heldout, length, config.pad_token_id), directory)
    so_far = np.minimum(store.lengths, length).cumsum()
    first = range(min(len(so_far), int(np.searchsorted(so_far, tokens)) + 1))
    return [torch.from_numpy(store.sample(number)[0][None, :length]) for number in first]


def first_ids(path: Path, tokenizer: TextTokenizer, tokens: int) -> Tensor:
    """At most so many ids of a text file, which is read no further than they take; as `prepare`
    takes it: line breaks stay as they are, a byte order mark is no text. Raises UserError.

    They are those of the whole text, unless what follows changes more than 64 tokens before it:
    tokenizers merge within words.
    """
    ids, text, size = np.empty(0, np.int64), "", _CHARACTERS * (tokens + _UNCERTAIN)
    try:
        with naming("read", path), open(path, encoding="utf-8-sig", newline="") as file:
            while len(ids) < tokens + _UNCERTAIN and (more := file.read(size)):
                text += more
                size, ids = len(text), tokenizer.encode([text])[0]
    except UnicodeDecodeError:
        raise UserError(f"{path} is not a UTF-8 text file") from None
    return torch.from_numpy(ids[:tokens])
