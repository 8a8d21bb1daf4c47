"""A step's data out of the model itself: sample answers, have them judged, weigh tokens, pack.

The answers of global batch n depend on the weights, the seed and n alone. All ranks know all of
them; each generates those to its share of the prompts, and trains on its share of the packs.

Shapes: B rows, S tokens per row, T = B*S; P prompts of a step, N samples of each.
"""

from __future__ import annotations

import hashlib
import json
import math
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemo_hybrid.config.rl import RlConfig
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.data.loader import Share, permute
from nemo_hybrid.data.packing import best_fit
from nemo_hybrid.data.prompts import Prompt
from nemo_hybrid.data.tokenizer import TextTokenizer
from nemo_hybrid.environments import Score
from nemo_hybrid.environments.pool import Failure, Job, Pool
from nemo_hybrid.errors import TrainingError, UserError
from nemo_hybrid.files import replace_file
from nemo_hybrid.generation.batched import Generator, Most, Request, Rollout, alone
from nemo_hybrid.generation.thinking import Markers
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.objectives import policy
from nemo_hybrid.parallel.world import World
from nemo_hybrid.train.run_dir import ROLLOUTS
from nemo_kernels.loss import linear_cross_entropy

_PATIENCE = 3
"""Steps in a row that may be as bad as a step must not be."""
_MOST_FILTERED = 0.2
"""Share of the answers that may leave the loss because sampling and training disagree."""


@dataclass(frozen=True)
class Prompts:
    """What a run asks (see `loader.Rows`), and the checkpoint whose tokenizer it is in."""

    train: list[Prompt]
    heldout: list[Prompt]
    tokenizer: TextTokenizer
    tokenizer_dir: Path
    tokenizer_sha256: str
    markers: Markers | None = None
    """Of thinking, where prompts limit it."""
    left_out: int = 0
    weights: Sequence[float] = (1.0,)
    later_weights: None = None

    @property
    def tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.train)

    @cached_property
    def digests(self) -> list[str]:
        content = json.dumps([[p.number, p.ids, dict(p.row)] for p in self.train], default=str)
        return [hashlib.sha256(content.encode()).hexdigest()]


@dataclass(frozen=True)
class Answer:
    """A judged sample: ids of the prompt and of the ``new`` tokens that were sampled."""

    prompt: int
    """Its place among the prompts of the step."""
    environment: str
    ids: list[int]
    new: int
    logprobs: list[float]
    """Of the new tokens at sampling; prox: by the training forward, before the first update."""
    chosen: list[bool]
    ended: str
    reward: float
    """NaN: it could not be judged."""
    advantage: float = 0.0
    parts: Mapping[str, float] = field(default_factory=dict)
    note: str | None = None
    """What was taken for the answer, or why it could not be judged."""
    prox: list[float] = field(default_factory=list)

    def laid(self, end: int) -> slice:
        """Where a row that it ends at has what belongs to its new tokens: position t says what
        token t + 1 is."""
        return slice(end - 1 - self.new, end - 1)


class Rollouts:
    """Data of a run; see `train.run.Data`. ``stops``: ids that end an answer."""

    most: Most = staticmethod(alone)
    """Of the processes that share experts."""
    reference: HybridLM | None = None
    """What the divergence is measured from."""

    def __init__(
        self, config: RlConfig, prompts: Prompts, pool: Pool, stops: frozenset[int], pad_id: int
    ) -> None:
        self._config, self._prompts, self._pool = config, prompts, pool
        self._stops, self._pad_id = stops, pad_id
        self._answers: list[Answer] = []
        self._figures: dict[str, float] = {}
        self._bad = 0  # steps in a row in which sampling and training disagreed too much

    def begin(self, model: HybridLM, world: World) -> None:
        self._model, self._world = model, world

    def step(self, number: int, share: Share) -> list[Batch]:
        turn, update = divmod(number, self._config.rl.updates)
        if update:
            self._figures |= {"rollout_s": 0.0, "score_s": 0.0}
        else:
            self._sample(turn)
        batches = [_Packed(rows, self) for rows in self._rows(share)]
        began = time.monotonic()
        for packed in batches:
            packed.measure(self._model, self.reference, first=not update)
        if self._config.rl.updates > 1 and not update:
            self._keep_prox(batches)
        weighted = [packed.weighted() for packed in batches]
        self._figures |= self._agreement(batches, time.monotonic() - began)
        self._judge_agreement()
        return weighted

    def heldout(self, share: Share) -> Iterator[Batch]:
        return iter(())

    def evaluate(self) -> dict[str, float]:
        """Mean reward of the most probable answers to held-out prompts."""
        prompts = self._prompts.heldout[: self._config.train.eval_sequences]
        own = prompts[self._world.rank :: self._world.size]
        requests = [self._request(prompt, range(1)) for prompt in own]
        answers = self._judged(list(self._generate(requests, 0.0)), dict(enumerate(prompts)))
        rewards = [a.reward for found in self._world.gather(answers) for a in found]
        known = [reward for reward in rewards if not math.isnan(reward)]
        return {"reward": sum(known) / max(1, len(known))}

    def state(self) -> dict[str, Any]:
        """With the answers, where they are learnt from more than once."""
        answers = self._answers if self._config.rl.updates > 1 else []
        return {"disagreed": self._bad, "answers": [_to_json(answer) for answer in answers]}

    def restore(self, state: dict[str, Any]) -> None:
        self._bad = state["disagreed"]
        self._answers = [_from_json(answer) for answer in state["answers"]]
        self._figures = _figures(self._answers, self._config.rollout.samples)

    def metrics(self) -> dict[str, float]:
        return self._figures

    # ---- sampling ------------------------------------------------------------------------------

    def _sample(self, turn: int) -> None:
        """Answers to the prompts of a turn, judged and compared."""
        config, world, count = self._config, self._world, len(self._prompts.train)
        n, per_step = config.rollout.samples, config.prompts_per_step
        asked, requests = {}, []
        for place in range(per_step):
            epoch, index = divmod(turn * per_step + place, count)
            index = permute(index, count, config.train.seed, "prompts", epoch)
            asked[place] = self._prompts.train[index]
            if place % world.size == world.rank:
                # Whoever is asked again gives other answers.
                numbers = range(epoch * n, (epoch + 1) * n)
                requests.append((place, self._request(asked[place], numbers)))
        began = time.monotonic()
        with world.agreed():
            rollouts = list(self._generate([request for _, request in requests], 1.0))
        rollout_s, began = time.monotonic() - began, time.monotonic()
        places = {id(request): place for place, request in requests}
        rollouts.sort(key=lambda r: (places[id(r.request)], r.sample))
        judged = self._judged(rollouts, asked, [places[id(r.request)] for r in rollouts])
        own = _compared(judged, n, config.rl.std)
        score_s = time.monotonic() - began
        gathered = [answer for answers in world.gather(own) for answer in answers]
        self._answers = sorted(gathered, key=lambda answer: answer.prompt)  # is stable
        self._figures = _figures(self._answers, n) | {"rollout_s": rollout_s, "score_s": score_s}
        if all(math.isnan(answer.reward) for answer in self._answers):
            raise UserError(
                f"none of the {len(self._answers)} answers of a step could be judged: environment "
                f"{self._answers[0].environment}: {self._answers[0].note}"
            )
        every = config.rollout.log_every
        if every and turn % every == 0:
            world.from_rank_0(self._write, turn)

    def _request(self, prompt: Prompt, numbers: range) -> Request:
        most = self._config.rollout.response_tokens
        return Request(
            prompt.number, prompt.ids, most, numbers, self._stops, prompt.budget, prompt.thinks
        )

    def _generate(self, requests: Sequence[Request], temperature: float) -> Iterator[Rollout]:
        config = self._config
        generator = Generator(
            self._model, config.rollout.slots, temperature=temperature, seed=config.train.seed,
            markers=self._prompts.markers, most=self.most,
        )  # fmt: skip
        return generator.run(requests)

    def _judged(
        self,
        rollouts: Sequence[Rollout],
        asked: Mapping[int, Prompt],
        places: Sequence[int] | None = None,
    ) -> list[Answer]:
        """Of every rollout; ``places``: of their prompts in ``asked``, where that matters."""
        by_number = {prompt.number: prompt for prompt in asked.values()}
        jobs = []
        for rollout in rollouts:
            prompt = by_number[rollout.request.prompt]
            text = self._prompts.tokenizer.decode(rollout.said)
            jobs.append(Job(str(prompt.environment), prompt.row, text, str(rollout.ended)))
        scores = self._pool.score(jobs)
        answers = []
        for place, rollout, score in zip(places or range(len(jobs)), rollouts, scores, strict=True):
            known = isinstance(score, Score)
            answers.append(
                Answer(
                    prompt=place,
                    environment=str(by_number[rollout.request.prompt].environment),
                    ids=[*rollout.request.ids, *rollout.ids],
                    new=len(rollout.ids),
                    logprobs=rollout.logprobs,
                    chosen=rollout.chosen,
                    ended=str(rollout.ended),
                    reward=score.reward if isinstance(score, Score) else math.nan,
                    parts=score.parts if isinstance(score, Score) else {},
                    note=score.why if isinstance(score, Failure) else score.extracted,
                )
            )
            assert known or answers[-1].note
        return answers

    def _write(self, turn: int) -> None:
        directory = Path(self._config.run_dir) / ROLLOUTS
        directory.mkdir(exist_ok=True)
        lines = []
        for answer in self._answers:
            shown = {k: v for k, v in _to_json(answer).items() if k not in ("prox", "chosen")}
            texts = {"text": self._prompts.tokenizer.decode(answer.ids)}
            lines.append(json.dumps({**texts, **shown}) + "\n")
        replace_file(directory / f"turn_{turn + 1:08d}.jsonl", "".join(lines))

    # ---- packing and weighing ------------------------------------------------------------------

    def _rows(self, share: Share) -> Iterator[list[list[Answer]]]:
        """This rank's micro-batches: rows of answers, equally many everywhere."""
        lengths = np.array([len(answer.ids) for answer in self._answers], np.int64)
        packs = best_fit(lengths, self._config.data.sequence_length)
        size, stride = share.micro_batch_size, share.micro_batch_size * share.world_size
        for first in range(share.rank * size, -(-len(packs) // stride) * stride, stride):
            mine = range(first, first + size)
            rows = [packs.samples(i) if i < len(packs) else np.empty(0, np.int64) for i in mine]
            yield [[self._answers[int(i)] for i in row] for row in rows]

    def _keep_prox(self, batches: Sequence[_Packed]) -> None:
        """Have all ranks know the log-probabilities before the first update of all answers."""
        own = {id(a): a for packed in batches for row in packed.rows for a in row}
        found = dict[int, list[float]]()
        for packed in batches:
            found |= packed.prox()
        numbers = {id(answer): i for i, answer in enumerate(self._answers)}
        gathered = self._world.gather({numbers[i]: found[i] for i in own})
        everything = {number: prox for part in gathered for number, prox in part.items()}
        self._answers = [replace(a, prox=everything[i]) for i, a in enumerate(self._answers)]

    def _agreement(self, batches: Sequence[_Packed], seconds: float) -> dict[str, float]:
        """How far sampling and training disagree, over all ranks."""
        parts = self._world.gather([packed.sums for packed in batches])
        sums = [one for rank in parts for one in rank]
        total = {name: sum(one[name] for one in sums) for name in ("tokens", "apart", "bounded")}
        tokens = max(1.0, total["tokens"])
        return {
            "mismatch": total["apart"] / tokens,
            "mismatch_max": max(one["apart_max"] for one in sums),
            "clipped_share": total["bounded"] / tokens,
            "filtered": sum(one["filtered"] for one in sums) / len(self._answers),
            "prox_s": seconds,
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
                "fp32) it is 1 to five digits: compare the two. In bf16 a router may choose other "
                "experts; `nemo-hybrid compare-logprobs` shows two checkpoints apart"
            )


class _Packed:
    """A micro-batch of answers and what is known of their tokens [B, S]."""

    def __init__(self, rows: list[list[Answer]], data: Rollouts) -> None:
        self.rows, self._options = rows, data._config.rl
        self._length = data._config.data.sequence_length
        packs = [[(np.array(a.ids, np.int64), _new(a)) for a in row] for row in rows]
        numbers = tuple(0 if row else -1 for row in rows)
        self.batch = Batch.from_packs(packs, self._length, data._pad_id, numbers)
        self.sums: dict[str, float] = {}

    def measure(self, model: HybridLM, reference: HybridLM | None, first: bool) -> None:
        """Log-probabilities by the model as it is; ``first``: no update was made yet."""
        self.pi_BS = _log_probabilities(model, self.batch)
        self.prox_BS = self.pi_BS if first else self._laid(lambda a: a.prox)
        self.reference_BS = None if reference is None else _log_probabilities(reference, self.batch)

    def prox(self) -> dict[int, list[float]]:
        """By identity of the answers."""
        return {
            id(answer): self.prox_BS[b, answer.laid(end)].tolist()
            for b, row in enumerate(self.rows)
            for answer, end in _ends(row)
        }

    def weighted(self) -> Batch:
        """The batch to train on; counts what was done to it in ``sums``."""
        options, of = self._options, [answer for row in self.rows for answer in row]
        sequence_BS = self._laid(lambda a: [of.index(a)] * a.new)
        learnt_BS = self._laid(lambda a: [c and _counts(a, options.overlong) for c in a.chosen])
        known = policy.Tokens(
            pi_T=self.pi_BS.flatten(),
            prox_T=self.prox_BS.flatten(),
            behav_T=self._laid(lambda a: a.logprobs).flatten(),
            learnt_T=learnt_BS.flatten() > 0,
            sequence_T=sequence_BS.flatten().long(),
            sequences=max(1, len(of)),
            reference_T=None if self.reference_BS is None else self.reference_BS.flatten(),
        )
        kept_Q = policy.kept(known, options)
        self._count(known, kept_Q[: len(of)])
        known = known._replace(learnt_T=known.learnt_T & kept_Q[known.sequence_T])
        advantage_T = self._laid(lambda a: [a.advantage] * a.new).flatten()
        mask_BS = known.learnt_T.view_as(self.pi_BS)
        return replace(
            self.batch,
            loss_mask_BS=mask_BS,
            labels_BS=self.batch.labels_BS.masked_fill(~mask_BS, 0),
            weight_BS=policy.weights(known, advantage_T, options).float().view_as(self.pi_BS),
        )

    def _count(self, known: policy.Tokens, kept_Q: Tensor) -> None:
        apart_T = policy.apart(known)[known.learnt_T]
        ratio_T = (known.prox_T - known.behav_T).exp()
        changed_T = (policy.importance(known, self._options) != ratio_T)[known.learnt_T]
        self.sums = {
            "tokens": float(len(apart_T)),
            "apart": float(apart_T.double().sum()),
            "apart_max": float(apart_T.max()) if len(apart_T) else 1.0,
            "bounded": float(changed_T.sum()),
            "filtered": float((~kept_Q).sum()),
        }

    def _laid(self, values: Callable[[Answer], Sequence[float]]) -> Tensor:
        """What the answers' new tokens have, where the batch predicts them; 0 elsewhere: fp32."""
        out_BS = np.zeros((len(self.rows), self._length), np.float32)
        for b, row in enumerate(self.rows):
            for answer, end in _ends(row):
                out_BS[b, answer.laid(end)] = values(answer)
        return torch.from_numpy(out_BS)


def _ends(row: Sequence[Answer]) -> Iterator[tuple[Answer, int]]:
    end = 0
    for answer in row:
        end += len(answer.ids)
        yield answer, end


def _new(answer: Answer) -> NDArray[np.bool_]:
    return np.arange(len(answer.ids)) >= len(answer.ids) - answer.new


def _counts(answer: Answer, overlong: str) -> bool:
    """Whether an answer may be learnt from."""
    return not math.isnan(answer.reward) and (overlong == "keep" or answer.ended == "stop")


@torch.no_grad()
def _log_probabilities(model: HybridLM, batch: Batch) -> Tensor:
    """Of the next tokens [B, S] that are targets, fp32 on the CPU, by the forward pass of training;
    0 elsewhere."""
    head_VD = model.lm_head.weight
    there = batch.to(head_VD.device)
    h_BSD, _ = model.forward_hidden(there.ids_BS, there.packing)
    labels_T, mask_T = there.labels_BS.flatten(), there.loss_mask_BS.flatten().float()
    _, ce_T = linear_cross_entropy(h_BSD.flatten(0, 1), head_VD, labels_T, mask_T)
    return -ce_T.view(batch.ids_BS.shape).cpu()


def _compared(answers: Sequence[Answer], samples: int, std: str) -> list[Answer]:
    """With advantages; all answers to a prompt stand together."""
    rewards_PN = torch.tensor([a.reward for a in answers], dtype=torch.float64).view(-1, samples)
    advantages = policy.advantages(rewards_PN, std).flatten().tolist()
    return [replace(a, advantage=value) for a, value in zip(answers, advantages, strict=True)]


def _figures(answers: Sequence[Answer], samples: int) -> dict[str, float]:
    """What is to be known of a step's answers."""
    by_name: dict[str, list[float]] = defaultdict(list)
    several = len({a.environment for a in answers}) > 1
    for a in answers:
        by_name["truncated"].append(a.ended != "stop")
        by_name["response_tokens"].append(a.new)
        by_name["verifier_failures"].append(math.isnan(a.reward))
        by_name["entropy"].append(-sum(a.logprobs) / a.new)
        by_name["advantage_abs"].append(abs(a.advantage))
        if not math.isnan(a.reward):
            by_name["reward"].append(a.reward)
            if several:
                by_name[f"reward_of_{a.environment}"].append(a.reward)
            for name, value in a.parts.items():
                by_name[f"score_{name}"].append(value)
    for start in range(0, len(answers), samples):
        rewards = [a.reward for a in answers[start : start + samples]]
        by_name["solved_all"].append(min(rewards) >= 1)
        by_name["solved_none"].append(max(rewards) <= 0)
    figures = {name: sum(values) / len(values) for name, values in by_name.items()}
    if answers:
        figures["verifier_failures"] = sum(by_name["verifier_failures"])
    return figures


def _to_json(answer: Answer) -> dict[str, Any]:
    content = asdict(answer)
    return content | {"reward": None if math.isnan(answer.reward) else answer.reward}


def _from_json(content: Mapping[str, Any]) -> Answer:
    reward = content["reward"]
    return Answer(**{**content, "reward": math.nan if reward is None else reward})
