"""A step's data out of the model itself: sample answers, have them judged, weigh tokens, pack.

The answers of global batch n depend on the weights, the seed and n alone. All ranks know all of
them; each generates those to its share of the prompts, and trains on its share of the packs.

"""

from __future__ import annotations

import hashlib
import json
import math
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemo_hybrid.checkpoint.manifest import CheckpointError
from nemo_hybrid.config.rl import RlConfig
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.data.loader import Share
from nemo_hybrid.data.packing import best_fit
from nemo_hybrid.data.prompts import Prompt
from nemo_hybrid.data.tokenizer import TextTokenizer
from nemo_hybrid.environments import Score
from nemo_hybrid.environments.pool import Failure, Job, Pool
from nemo_hybrid.errors import TrainingError, Unavailable, UserError
from nemo_hybrid.files import replace_file
from nemo_hybrid.generation.batched import Generator, Most, Request, Rollout, alone
from nemo_hybrid.generation.remote import Remote
from nemo_hybrid.generation.thinking import Markers
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.parallel.world import World
from nemo_hybrid.recipes.answers import (
    Answer,
    Key,
    Packed,
    compared,
    figures,
    from_tensors,
    log_probabilities,
    to_json,
    to_tensors,
)
from nemo_hybrid.recipes.curriculum import Curriculum
from nemo_hybrid.train.run_dir import ENGINE, ROLLOUTS

_PATIENCE = 3
"""Steps in a row that may be as bad as a step must not be."""
_MOST_FILTERED = 0.2
"""Share of the answers that may leave the loss because sampling and training disagree."""


@dataclass(frozen=True)
class Prompts:
    """What a run asks (see `loader.Rows`), and the checkpoint whose tokenizer it is in."""

    train: list[Prompt]
    curriculum: Curriculum
    heldout: list[Prompt]
    tokenizer: TextTokenizer
    tokenizer_dir: Path
    tokenizer_sha256: str
    markers: Markers | None = None
    """Of thinking, where prompts limit it."""
    left_out: int = 0
    solved: int = 0
    """Left out because their answers are always alike."""
    weights: Sequence[float] = (1.0,)
    later_weights: None = None

    @property
    def tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.train)

    @cached_property
    def digests(self) -> list[str]:
        content = json.dumps([[p.number, p.ids, dict(p.row)] for p in self.train], default=str)
        return [hashlib.sha256(content.encode()).hexdigest()]


@dataclass
class Turn:
    """Answers of all processes to the prompts of one turn, which one or more updates learn from."""

    number: int
    answers: list[Answer]
    experts: dict[Key, NDArray[np.int16]]
    """See `Rollout`; of each answer one process keeps them, where training needs them."""
    agreement: dict[str, float] = field(default_factory=dict)
    """How far sampling and training disagree with the weights that sampled, where others learn and
    it could be measured."""


class Asked(NamedTuple):
    """Prompts of this process, and the rollouts to come."""

    prompts: list[Prompt]
    requests: list[Request]
    rollouts: Iterator[Rollout]


class Rollouts:
    """Data of a run; see `train.run.Data`. ``stops``: ids that end an answer."""

    most: Most = staticmethod(alone)
    """Of the processes that share experts."""
    engine: Remote | None = None
    """What samples in place of this process, with the weights that ``write`` writes to a directory,
    where all processes do so together."""
    write: Callable[[Path], None]
    reference: HybridLM | None = None
    """What the divergence is measured from."""
    teachers: Mapping[str, HybridLM] = MappingProxyType({})
    """On the CPU; the log-probabilities of an answer's teacher take the place of its reward."""

    def __init__(
        self, config: RlConfig, prompts: Prompts, pool: Pool, stops: frozenset[int], pad_id: int
    ) -> None:
        self._config, self._prompts, self._pool = config, prompts, pool
        self._stops, self._pad_id = stops, pad_id
        self._turns: list[Turn] = []  # that are learnt from later on
        self._asked: dict[int, Asked] = {}  # by turn: what a server answers while others are learnt
        self._figures: dict[str, float] = {}
        self._seconds: dict[str, float] = {}
        self._failed: set[str] = set()  # environments of which a failure was shown
        self._bad = 0  # steps in a row in which sampling and training disagreed too much

    def begin(self, model: HybridLM, world: World) -> None:
        self._model, self._world = model, world

    def step(self, number: int, share: Share) -> list[Batch]:
        config = self._config
        number, update = divmod(number, config.rl.updates)
        self._seconds = dict.fromkeys(("rollout_s", "score_s", "prox_s"), 0.0)
        last = (config.train.max_steps - 1) // config.rl.updates
        ahead = max(number, min(number + config.rollout.lag, last))
        there = {turn.number for turn in self._turns}
        for n in sorted({*range(number, ahead + 1)} - there):
            asked = self._asked.pop(n, None) or self._ask(n)
            if self.engine and n > number:
                self._asked[n] = asked
            else:
                self._turns.append(self._received(n, asked, share))
        self._turns.sort(key=lambda turn: turn.number)
        turn = self._turns[0]
        passes, batches = self._measured(turn, share, first=not update)
        with self._timed("prox_s"):
            self._ask_others(passes, batches)
        if config.rl.updates > 1 and not update:
            self._keep_prox(turn, batches)
        weighted = [packed.weighted() for packed in batches]
        agreement = self._agreement(turn, batches)
        if turn.agreement:
            agreement |= {"off_policy": agreement["mismatch"], **turn.agreement}
        self._figures = figures(turn.answers, config.rollout.samples) | agreement | self._seconds
        self._judge_agreement()
        if update + 1 == config.rl.updates:
            del self._turns[0]
        return weighted

    def heldout(self, share: Share) -> Iterator[Batch]:
        return iter(())

    def evaluate(self) -> dict[str, float]:
        """Mean reward of an answer to each held-out prompt, always drawn with the same numbers."""
        prompts = self._prompts.heldout[: self._config.train.eval_sequences]
        own = prompts[self._world.rank :: self._world.size]
        requests = [self._request(prompt, range(1)) for prompt in own]
        with self._world.agreed():
            rollouts = list(self._generate(requests, False))
        answers = self._judged(rollouts, own)
        gathered = [answer for found in self._world.gather(answers) for answer in found]
        return {n: v for n, v in figures(gathered, 1).items() if n.startswith("reward")}

    def state(self) -> dict[str, Any]:
        """Without what a server still answers: whoever goes on asks for it again, with the same
        numbers."""
        turns = [[turn.number, len(turn.answers), turn.agreement] for turn in self._turns]
        return {"disagreed": self._bad, "kept": turns}

    def tensors(self) -> dict[str, Tensor]:
        """The experts that this process keeps, and its share of the answers, which all know."""
        found: dict[str, Tensor] = {}
        for turn in self._turns:
            for place, answer in enumerate(turn.answers):
                name = f"{turn.number}.{place}"
                if place % self._world.size == self._world.rank:
                    found |= {f"{name}.{what}": of for what, of in to_tensors(answer).items()}
                if answer.key in turn.experts:
                    found[f"{name}.experts"] = torch.from_numpy(turn.experts[answer.key])
        return found

    def restore(self, state: dict[str, Any], saved: Mapping[str, Callable[[], Tensor]]) -> None:
        def read(answer: str, what: str) -> Tensor:
            name = f"{answer}.{what}"
            if name not in saved:
                raise CheckpointError(f"damaged checkpoint: it holds no {name} of the answers")
            return saved[name]()

        if state.get("turns"):
            raise UserError(
                "the checkpoint holds answers as an older version kept them: go on with that one"
            )
        self._bad, self._turns = state["disagreed"], []
        for number, count, agreement in state.get("kept", []):
            names = [f"{number}.{place}" for place in range(count)]
            answers = [from_tensors(partial(read, name)) for name in names]
            own = slice(self._world.rank, None, self._world.size)
            experts = {
                answer.key: read(name, "experts").numpy()
                for name, answer in zip(names[own], answers[own], strict=True)
                if self._config.rl.router_replay
            }
            self._turns.append(Turn(number, answers, experts, agreement))

    def metrics(self) -> dict[str, float]:
        return self._figures

    # ---- sampling ------------------------------------------------------------------------------

    def _ask(self, number: int) -> Asked:
        """Ask this process's prompts of a turn, with the weights as they are: a server answers from
        now on, the model itself while the rollouts are gone through."""
        n = self._config.rollout.samples
        own = self._prompts.curriculum.turn(number)[self._world.rank :: self._world.size]
        # Whoever is asked again gives other answers.
        requests = [self._request(p, range(before * n, (before + 1) * n)) for p, before in own]
        prompts = [prompt for prompt, _ in own]
        if self.engine is None:
            rollouts = self._generate(requests, self._config.rl.router_replay)
            return Asked(prompts, requests, rollouts)
        weights = Path(self._config.run_dir) / ENGINE
        with self._sampling():
            self._world.from_rank_0(shutil.rmtree, weights, ignore_errors=True)  # of a killed run
            self.write(weights)
            self._world.from_rank_0(self._hand_over, weights)
            return Asked(prompts, requests, self.engine.run(requests))

    def _hand_over(self, weights: Path) -> None:
        assert self.engine
        try:
            self.engine.update(weights)
        finally:
            shutil.rmtree(weights, ignore_errors=True)

    def _received(self, number: int, asked: Asked, share: Share) -> Turn:
        """The answers to the prompts of a turn, judged and compared."""
        config, world, n = self._config, self._world, self._config.rollout.samples
        with self._sampling(), world.agreed():
            rollouts = list(asked.rollouts)
        order = {id(request): i for i, request in enumerate(asked.requests)}
        rollouts.sort(key=lambda r: (order[id(r.request)], r.sample))
        with self._timed("score_s"):
            judged = compared(self._judged(rollouts, asked.prompts), n, config.rl.std)
        of_rank, size = world.gather(judged), world.size
        places = [(place % size, place // size * n) for place in range(config.prompts_per_step)]
        answers = [a for rank, first in places for a in of_rank[rank][first : first + n]]
        experts = {(r.request.prompt, r.sample): r.experts for r in rollouts}
        turn = Turn(number, answers, {k: of for k, of in experts.items() if of is not None})
        if all(math.isnan(answer.reward) for answer in answers):
            raise UserError(
                f"none of the {len(answers)} answers of a step could be judged: environment "
                f"{answers[0].environment}: {answers[0].note}"
            )
        self._show_failures(answers)
        every = config.rollout.log_every
        if every and number % every == 0:
            world.from_rank_0(self._write, turn)
        if config.rollout.lag and self.engine is None:  # while the weights that sampled are there
            _, batches = self._measured(turn, share, first=True)
            for packed in batches:
                packed.weighted()
            found = self._agreement(turn, batches)
            turn.agreement = {name: found[name] for name in ("mismatch", "mismatch_max")}
        return turn

    @contextmanager
    def _timed(self, name: str) -> Iterator[None]:
        began = time.monotonic()
        yield
        self._seconds[name] += time.monotonic() - began

    @contextmanager
    def _sampling(self) -> Iterator[None]:
        """Counts the time. Raises Unavailable where a server gives no rollouts."""
        try:
            with self._timed("rollout_s"):
                yield
        except UserError as error:
            if self.engine is None:
                raise
            raise Unavailable(str(error)) from error

    def _request(self, prompt: Prompt, numbers: range) -> Request:
        most = self._config.rollout.response_tokens
        return Request(
            prompt.number, prompt.ids, most, numbers, self._stops, prompt.budget, prompt.thinks
        )

    def _generate(self, requests: Sequence[Request], experts: bool) -> Iterator[Rollout]:
        """``experts``: they know which they went to."""
        config = self._config
        generator = Generator(
            self._model, config.rollout.slots, temperature=1.0, seed=config.train.seed,
            markers=self._prompts.markers, experts=experts, most=self.most,
        )  # fmt: skip
        return generator.run(requests)

    def _judged(self, rollouts: Sequence[Rollout], asked: Sequence[Prompt]) -> list[Answer]:
        """Of every rollout."""
        by_number = {prompt.number: prompt for prompt in asked}
        jobs = []
        for rollout in rollouts:
            prompt = by_number[rollout.request.prompt]
            text = self._prompts.tokenizer.decode(rollout.said)
            jobs.append(Job(str(prompt.environment), prompt.row, text, str(rollout.ended)))
        scores = [
            Score(math.nan, extracted=score.why) if isinstance(score, Failure) else score
            for score in self._pool.score(jobs)
        ]
        return [
            Answer(
                prompt=rollout.request.prompt,
                sample=rollout.sample,
                environment=job.environment,
                ids=[*rollout.request.ids, *rollout.ids],
                new=len(rollout.ids),
                logprobs=rollout.logprobs,
                chosen=rollout.chosen,
                ended=job.ended,
                reward=score.reward,
                parts=score.parts,
                note=score.extracted,
            )
            for job, rollout, score in zip(jobs, rollouts, scores, strict=True)
        ]

    def _show_failures(self, answers: Sequence[Answer]) -> None:
        """The first of each environment: all are counted, and leave the loss without a word."""
        for answer in answers:
            if math.isnan(answer.reward) and answer.environment not in self._failed:
                self._failed.add(answer.environment)
                if self._world.rank == 0:
                    why = f"environment {answer.environment} could not judge an answer"
                    print(f"warning: {why}: {answer.note}", flush=True)

    def _write(self, turn: Turn) -> None:
        """As `nemo-hybrid rollout` does, and what was thought of the answers."""
        directory = Path(self._config.run_dir) / ROLLOUTS
        directory.mkdir(exist_ok=True)
        lines = []
        for answer in turn.answers:
            shown = {k: v for k, v in to_json(answer).items() if k not in ("prox", "new")}
            ids = {"prompt_ids": answer.ids[: -answer.new], "ids": answer.ids[-answer.new :]}
            text = self._prompts.tokenizer.decode(answer.said)
            lines.append(json.dumps({"text": text, **shown, **ids}) + "\n")
        replace_file(directory / f"turn_{turn.number + 1:08d}.jsonl", "".join(lines))

    # ---- packing and weighing ------------------------------------------------------------------

    def _measured(
        self, turn: Turn, share: Share, first: bool
    ) -> tuple[list[list[list[Answer]]], list[Packed]]:
        """The rows of each pass, over all ranks, and this rank's micro-batches with the
        log-probabilities by the model as it is. ``first``: it has learnt nothing of them."""
        rl, length = self._config.rl, self._config.data.sequence_length
        passes = _passes(self._packs(turn.answers), share)
        batches = []
        with self._timed("prox_s"):
            for rows in passes:
                own = rows[share.rank :: share.world_size]
                packed = Packed(own, rl, length, self._pad_id)
                if rl.router_replay:  # of a pass at a time: those of a step take much memory
                    here = turn.experts.keys() & {answer.key for row in rows for answer in row}
                    parts = self._world.gather({key: turn.experts[key] for key in here})
                    packed.route(_together(parts))
                packed.measure(self._model, first)
                batches.append(packed)
        return passes, batches

    def _packs(self, of: Sequence[Answer]) -> list[list[Answer]]:
        """All answers, those with the same teacher together."""
        by_teacher: dict[str, list[Answer]] = {name: [] for name in ("", *sorted(self.teachers))}
        for answer in of:
            by_teacher[self._config.teacher_of(answer.environment)].append(answer)
        found = []
        for answers in by_teacher.values():
            lengths = np.array([len(answer.ids) for answer in answers], np.int64)
            packs = best_fit(lengths, self._config.data.sequence_length)
            found += [[answers[int(i)] for i in packs.samples(n)] for n in range(len(packs))]
        return found

    def _ask_others(self, passes: list[list[list[Answer]]], batches: Sequence[Packed]) -> None:
        """Reference and teachers: all ranks make the same passes, one model after the other."""
        device = self._model.lm_head.weight.device
        for name, other in self.teachers.items():
            its = {e for e in self._config.environments if self._config.teacher_of(e) == name}
            other.to(device)
            for rows, packed in zip(passes, batches, strict=True):
                if any(answer.environment in its for row in rows for answer in row):
                    packed.ask(other, its)
            other.to("cpu")
        if self.reference is not None:
            for packed in batches:
                packed.reference_BS = log_probabilities(self.reference, packed.batch)

    def _keep_prox(self, turn: Turn, batches: Sequence[Packed]) -> None:
        """Have all ranks know the log-probabilities before the first update of all answers."""
        own = _together([packed.prox() for packed in batches])
        prox = _together(self._world.gather(own))
        turn.answers = [replace(answer, prox=prox[answer.key]) for answer in turn.answers]

    def _agreement(self, turn: Turn, batches: Sequence[Packed]) -> dict[str, float]:
        """How far sampling and training disagree, over all ranks."""
        parts = self._world.gather([packed.sums for packed in batches])
        sums = [one for rank in parts for one in rank]
        total = {name: sum(one[name] for one in sums) for name in sums[0]}
        tokens = max(1.0, total["tokens"])
        return {
            "mismatch": total["apart"] / tokens,
            "mismatch_max": max(one["apart_max"] for one in sums),
            "advantage_abs": total["advantage"] / tokens,
            "clipped_share": total["bounded"] / tokens,
            "filtered": sum(one["filtered"] for one in sums) / len(turn.answers),
        }

    def _judge_agreement(self) -> None:
        """Raise TrainingError where sampling and training have disagreed for some steps."""
        mismatch, filtered = self._figures["mismatch"], self._figures["filtered"]
        most = self._config.rl.max_mismatch
        good = mismatch <= most and filtered <= _MOST_FILTERED  # which NaN is not
        self._bad = 0 if good else self._bad + 1
        if self._bad >= _PATIENCE:
            raise TrainingError(
                f"sampling and training disagree: for {self._bad} steps the mean of exp|difference "
                f"of log-probabilities| was above rl.max_mismatch {most:g} (now {mismatch:.6g}, at "
                f"most {self._figures['mismatch_max']:.4g}), or more than {_MOST_FILTERED:.0%} of "
                f"the answers left the loss for it (now {filtered:.0%}). In fp32 (precision.recipe "
                "fp32), and without lag, it is 1 to five digits: compare the two. In bf16 a router "
                "may choose other experts, which rl.router_replay prevents; `nemo-hybrid "
                "compare-logprobs` shows two checkpoints apart"
            )


T = TypeVar("T")


def _together(parts: Sequence[Mapping[Key, T]]) -> dict[Key, T]:
    return {key: value for part in parts for key, value in part.items()}


def _passes(packs: list[list[Answer]], share: Share) -> list[list[list[Answer]]]:
    """The rows of each pass, over all ranks: as few passes as can be, with as few rows on each
    rank; empty ones at the end, where there are too few."""
    ranks = share.world_size
    count = -(-len(packs) // (share.micro_batch_size * ranks))
    each = -(-len(packs) // (count * ranks)) * ranks
    padded = packs + [[] for _ in range(count * each - len(packs))]
    return [padded[first : first + each] for first in range(0, count * each, each)]
