"""Texts token by token, many at once: every slot goes on with one, and takes the next when it ends.

A prompt is read once, in pieces, beside the slots; then each of its samples gets a copy of what was
remembered. A sample depends on the weights, the seed and its two numbers alone (see `sampling`), up
to rounding: not on the number of slots, nor on what else is generated.

Shapes: B slots, P prompts that are read together, S tokens of them, N samples that are placed, D
hidden, V vocabulary, K steps between two looks at what was drawn.
"""

from __future__ import annotations

import math
from collections import abc, deque
from collections.abc import Callable, Iterable, Iterator, Sequence, Set
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import chain
from typing import Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemo_hybrid.errors import UserError
from nemo_hybrid.generation.sampling import (
    log_probabilities,
    pick,
    probabilities,
    stream,
    uniforms,
)
from nemo_hybrid.generation.speculative import Speculation
from nemo_hybrid.generation.thinking import Markers, Thinking
from nemo_hybrid.model.cache import (
    StateFormat,
    commit,
    copy_rows,
    draw_from,
    experts_of,
    keep_states,
)
from nemo_hybrid.model.hybrid import HybridLM

_PIECE = 2048
"""Tokens of prompts that are read at once: so much bounds the memory that it takes."""
_STEPS = {"cpu": 1}
_STEPS_ELSEWHERE = 8
"""Tokens per slot between two looks at what was drawn, for which a GPU has to be waited for."""
_FREE_SHARE = 8
"""One slot of so many is free before prompts are read: reading a few takes little longer than
reading one."""


@dataclass(frozen=True)
class Request:
    """What is to follow the tokens ``ids``, at least one: ``samples`` are the numbers of those that
    are wanted, each of ``most`` tokens or fewer, where one of ``stops`` comes. ``budget``: the most
    tokens of thinking, see `thinking`; ``thinks``: whether the prompt ends in it."""

    prompt: int | str
    ids: Sequence[int]
    most: int
    samples: Sequence[int] = (0,)
    stops: Set[int] = frozenset()
    budget: int | None = None
    thinks: bool = False


@dataclass(frozen=True)
class Rollout:
    """One sample: its tokens, that which stopped it included, and the model's own log-probability
    of each (at temperature 1, of all tokens). ``chosen``: False for tokens that a budget forced."""

    request: Request
    sample: int
    ids: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    chosen: list[bool] = field(default_factory=list)
    passes: list[int] = field(default_factory=list)
    """How many tokens each pass gave that verified drafts."""
    experts: NDArray[np.int16] | None = None
    """When it has ended, and if asked for: what all tokens but the last went to, those of the
    prompt included [tokens, MoE layers, experts per token]."""

    @property
    def ended(self) -> Literal["stop", "length"] | None:
        """How; None where it goes on."""
        if self.ids and self.ids[-1] in self.request.stops:
            return "stop"
        return "length" if len(self.ids) >= self.request.most else None

    @property
    def said(self) -> list[int]:
        """The tokens without that which stopped it."""
        return self.ids[: len(self.ids) - (self.ended == "stop")]


Most = Callable[[int], int]
"""Gives each of several processes that share experts the largest of their numbers."""


def alone(number: int) -> int:
    """`Most` of one process."""
    return number


_FAILED = 2**62
"""In place of a number of passes: the process makes none any more."""


@dataclass(frozen=True)
class Generator:
    """Generates with a model in ``slots`` rows or fewer; with ``drafts`` by its MTP block, see
    `speculative`; with Mamba states kept as ``states`` says. While prompts are read they are fp32.
    ``markers`` are of its thinking: budgets need them. ``experts``: rollouts tell which experts
    tokens went to.

    With ``most`` several processes make every pass together, and go on until none has a row left.
    Where one of them fails, or does not ask for more, the texts of all end there without a word:
    they have to agree then on what happened (`Agreement.agreed`).
    """

    model: HybridLM
    slots: int
    _: KW_ONLY
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    drafts: int = 0
    states: StateFormat = "float32"
    markers: Markers | None = None
    experts: bool = False
    most: Most = alone

    @torch.inference_mode()
    def run(
        self, requests: Iterable[Request], watch: Callable[[Rollout], None] | None = None
    ) -> abc.Generator[Rollout, None, None]:
        """The samples of all requests, each when it ends. ``watch`` is shown a rollout whenever it
        has grown. Raises UserError where the model's logits are no numbers, and for a budget where
        there are no markers."""
        waiting = deque(request for request in requests if request.samples)
        if self.markers is None and any(request.budget is not None for request in waiting):
            raise UserError("a budget of thinking needs the markers that open and close it")
        rows = min(self.slots, sum(len(request.samples) for request in waiting))
        speculation = None
        if self.drafts:
            speculation = Speculation(self.model, rows, self.drafts, self.temperature, self.top_p)
        device = self.model.lm_head.weight.device
        thinking = Thinking(self.markers, rows, device) if self.markers else None
        slots = _Slots(self.model, rows, speculation, thinking, self.states, self.experts)
        prompts = self._prompts([])
        while True:
            free = len(slots.free)
            batch: list[Request] = []
            if not prompts.samples and free * _FREE_SHARE >= len(slots.rollouts):
                while waiting and sum(len(request.samples) for request in batch) < free:
                    batch.append(waiting.popleft())
            if batch:
                prompts = self._prompts(batch)
            left = prompts.samples or waiting or free < len(slots.rollouts)
            passes = self.most(1 + bool(batch) * prompts.pieces if left else 0)
            if passes in (0, _FAILED):
                return
            if passes > 1:  # of nobody, where others need the experts of this process
                (prompts if batch else self._prompts([])).read(passes - 1)
            slots.take(prompts, self.seed)
            if not prompts.samples:
                prompts = self._prompts([])  # their caches are not needed any more
            grown = slots.step(self.temperature, self.top_p)
            try:
                for rollout in grown:
                    if watch:
                        watch(rollout)
                    if rollout.ended:
                        yield rollout
            except (Exception, GeneratorExit):  # between two passes: others would wait for them
                self.most(_FAILED)
                raise
            if not waiting and not prompts.samples:
                slots = slots.without_free()

    def _prompts(self, requests: Sequence[Request]) -> _Prompts:
        return _Prompts(self.model, requests, self.drafts > 0, self.experts)


class _Prompts:
    """Prompts that are read together, and samples of them that wait for a slot."""

    def __init__(
        self, model: HybridLM, requests: Sequence[Request], mtp: bool, experts: bool
    ) -> None:
        like, chunk = model.lm_head.weight, model.config.chunk_size
        self.samples = deque(
            (Rollout(request, number), row)
            for row, request in enumerate(requests)
            for number in request.samples
        )
        self.longest = max((len(request.ids) for request in requests), default=0)
        width = _PIECE // max(1, len(requests))
        self._width = max(chunk, width - width % chunk)  # whole chunks, as if it were read at once
        self.pieces = -(-self.longest // self._width)
        rows = [list(r.ids) + [0] * (self.longest - len(r.ids)) for r in requests]
        self._ids_PS = torch.tensor(rows, dtype=torch.int64, device=like.device).view(
            len(requests), self.longest
        )
        counts = [len(request.ids) for request in requests]
        self._counts_P = torch.tensor(counts, dtype=torch.int64, device=like.device)
        self._model = model
        self.caches = model.new_caches(len(requests), self.longest + 1, mtp, experts)
        self.h_PD = like.new_zeros(len(requests), model.config.hidden_size)

    def read(self, pieces: int) -> None:
        """Make so many passes; what there is fits into ``self.pieces``."""
        every_P = torch.arange(len(self._counts_P), device=self._counts_P.device)
        for start in range(0, pieces * self._width, self._width):
            ids_PS = self._ids_PS[:, start : start + self._width]
            if not ids_PS.shape[1]:
                ids_PS = torch.zeros_like(self._counts_P)[:, None]  # of which none counts
            left_P = self._counts_P - start
            now_P = left_P.clamp(0, ids_PS.shape[1])
            h_PSD, after = self._model.read(ids_PS, now_P, self.caches)
            commit(self.caches, after)
            if self.caches.mtp:  # which reads a token's state with the token after it
                ahead_PS = torch.zeros_like(ids_PS)
                known_PS = self._ids_PS[:, start + 1 : start + 1 + ids_PS.shape[1]]
                ahead_PS[:, : known_PS.shape[1]] = known_PS
                followed_P = (left_P - 1).clamp(0, ids_PS.shape[1])
                _, after = self._model.read_mtp(h_PSD, ahead_PS, followed_P, self.caches)
                commit(self.caches.mtp, after)
            last_PD = h_PSD[every_P, (now_P - 1).clamp(min=0)]
            self.h_PD = torch.where((left_P > 0)[:, None], last_PD, self.h_PD)


class _Slots:
    """What goes on: rollouts by slot, what was read of them, and where their numbers come from."""

    def __init__(
        self,
        model: HybridLM,
        rows: int,
        speculation: Speculation | None,
        thinking: Thinking | None,
        states: StateFormat,
        experts: bool,
        room: int = 0,
    ) -> None:
        like = model.lm_head.weight
        self._model, self._speculation, self._thinking = model, speculation, thinking
        self._states: StateFormat = states
        self._experts = experts
        self.rollouts: list[Rollout | None] = [None] * rows
        self._caches = model.new_caches(rows, room, speculation is not None, experts)
        keep_states(self._caches, states)
        self._h_BD = like.new_zeros(rows, model.config.hidden_size)
        self._streams_B, self._places_B = torch.zeros_like(self._caches.lengths_B).repeat(2, 1)
        self._steps = _STEPS.get(like.device.type, _STEPS_ELSEWHERE)

    @property
    def free(self) -> list[int]:
        return [slot for slot, rollout in enumerate(self.rollouts) if rollout is None]

    def take(self, prompts: _Prompts, seed: int) -> None:
        """Give free slots to samples that wait."""
        free = self.free[: len(prompts.samples)]
        if not free:
            return
        starting = [prompts.samples.popleft() for _ in free]
        streams = []
        for slot, (rollout, _) in zip(free, starting, strict=True):
            self.rollouts[slot] = rollout
            streams.append(stream(seed, rollout.request.prompt, rollout.sample))
        self._caches.reserve(prompts.longest)
        to_N, from_N, streams_N = (
            torch.tensor(numbers, device=self._h_BD.device)
            for numbers in (free, [row for _, row in starting], streams)
        )
        draw_from(self._caches, streams_N, to_N)
        copy_rows(prompts.caches, from_N, self._caches, to_N)
        self._h_BD[to_N] = prompts.h_PD[from_N]
        self._streams_B[to_N], self._places_B[to_N] = streams_N, 0
        if self._thinking:
            requests = [rollout.request for rollout, _ in starting]
            self._thinking.begin(to_N, [r.thinks for r in requests], [r.budget for r in requests])

    def step(self, temperature: float, top_p: float) -> Iterator[Rollout]:
        """A few tokens in every slot. Gives the rollouts that have grown, when all passes are made;
        those that have ended leave their slots free."""
        if self._speculation:
            return self._speculate(self._speculation)
        self._reserve(self._steps)
        ids_KB, logprobs_KB, chosen_KB = [], [], []
        for _ in range(self._steps):
            logits_BV = self._model.logits(self._h_BD)
            if temperature == 0:
                ids_B = logits_BV.argmax(-1)
            else:
                numbers_B = uniforms(self._streams_B, self._places_B)
                ids_B = pick(probabilities(logits_BV, temperature, top_p), numbers_B)
            chosen_B = torch.ones_like(ids_B, dtype=torch.bool)
            if self._thinking:
                ids_B, chosen_B = self._thinking.decide(ids_B, chosen_B)
            ids_KB.append(ids_B)
            chosen_KB.append(chosen_B)
            logprobs_KB.append(log_probabilities(logits_BV, ids_B))
            self._h_BD = self._model.decode(ids_B, self._caches)
            self._places_B += 1
        return self._grown(*(torch.stack(of, 1) for of in (ids_KB, logprobs_KB, chosen_KB)))

    def _speculate(self, speculation: Speculation) -> Iterator[Rollout]:
        # A free slot's MTP block may have read more than its backbone.
        self._reserve(2 * (speculation.drafts + 1))
        first: Iterator[Rollout] = iter(())
        if any(rollout and not rollout.ids for rollout in self.rollouts):
            fresh_B = self._places_B == 0
            drawn = speculation.begin(
                self._h_BD, fresh_B, self._streams_B, self._places_B, self._thinking
            )
            self._places_B += fresh_B
            ids_B1, logprobs_B1, chosen_B1 = (of_B[:, None] for of_B in drawn)
            first = self._grown(ids_B1, logprobs_B1, chosen_B1, fresh_B.long())
        ids_BS, logprobs_BS, chosen_BS, counts_B = speculation.round(
            self._caches, self._streams_B, self._places_B, self._thinking
        )
        self._places_B += counts_B
        return chain(first, self._grown(ids_BS, logprobs_BS, chosen_BS, counts_B))

    def _reserve(self, tokens: int) -> None:
        """Room for so many more in every slot. Free ones are read on with the others, but begin
        anew each time."""
        if free := self.free:
            free_N = torch.tensor(free, device=self._h_BD.device)
            self._caches.lengths_B[free_N] = 0
            if self._caches.mtp:
                self._caches.mtp.lengths_B[free_N] = 0
        self._caches.reserve(self._longest() + tokens)

    def _longest(self) -> int:
        """Tokens of the longest text: the caches have read no more, without asking the device."""
        live = (rollout for rollout in self.rollouts if rollout)
        return max((len(rollout.request.ids) + len(rollout.ids) for rollout in live), default=0)

    def _grown(
        self,
        ids_BK: Tensor,
        logprobs_BK: Tensor,
        chosen_BK: Tensor,
        counts_B: Tensor | None = None,
    ) -> Iterator[Rollout]:
        """Give tokens to the rollouts: all, or the first ``counts_B``, of which drafts are some."""
        ids, logprobs, chosen = ids_BK.tolist(), logprobs_BK.tolist(), chosen_BK.tolist()
        counts = [len(row) for row in ids] if counts_B is None else counts_B.tolist()
        for slot, rollout in enumerate(self.rollouts):
            if rollout is None or not counts[slot]:
                continue
            before = len(rollout.ids)
            for place in range(counts[slot]):
                _check_finite(logprobs[slot][place], len(rollout.ids) + 1)
                rollout.ids.append(ids[slot][place])
                rollout.logprobs.append(logprobs[slot][place])
                rollout.chosen.append(chosen[slot][place])
                if rollout.ended:
                    break
            if self._speculation and before:
                rollout.passes.append(len(rollout.ids) - before)
            if rollout.ended:
                self.rollouts[slot] = None
            if rollout.ended and self._experts:
                read = len(rollout.request.ids) + len(rollout.ids) - 1
                experts = experts_of(self._caches, slot, read).numpy()
                rollout = replace(rollout, experts=experts)
            yield rollout

    def without_free(self) -> _Slots:
        """Fewer slots, if half of them are free."""
        live = [slot for slot, rollout in enumerate(self.rollouts) if rollout]
        if 2 * len(live) > len(self.rollouts) or not self.rollouts:
            return self
        live_N = torch.tensor(live, dtype=torch.int64, device=self._h_BD.device)
        speculation = self._speculation and self._speculation.of_rows(live_N)
        thinking = self._thinking and self._thinking.of_rows(live_N)
        fewer = _Slots(
            self._model, len(live), speculation, thinking, self._states, self._experts,
            self._longest(),
        )  # fmt: skip
        fewer.rollouts = [self.rollouts[slot] for slot in live]
        copy_rows(self._caches, live_N, fewer._caches, torch.arange(len(live)).to(live_N))
        fewer._h_BD = self._h_BD[live_N]
        fewer._streams_B, fewer._places_B = self._streams_B[live_N], self._places_B[live_N]
        return fewer


def _check_finite(logprob: float, token: int) -> None:
    if not math.isfinite(logprob):
        raise UserError(
            f"the logits of new token {token} are not finite, though the weights are: the model is "
            "broken"
        )
