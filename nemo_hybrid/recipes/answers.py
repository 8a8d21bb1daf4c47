"""Answers to prompts, and micro-batches of them in which every sampled token has its weight.

Shapes: B rows, S tokens per row, T = B*S; Q answers of a micro-batch; P prompts, N samples of each.
"""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nemo_hybrid.config.rl import PolicyOptions
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.objectives import policy
from nemo_kernels.loss import linear_cross_entropy

Key = tuple[int | str, int]
_OF_TOKENS = {
    "ids": torch.int32,
    "logprobs": torch.float64,
    "chosen": torch.bool,
    "prox": torch.float64,
}
"""Fields of an answer that are lists, and what holds their numbers exactly."""


@dataclass(frozen=True)
class Answer:
    """A judged sample: ids of the prompt and of the ``new`` tokens that were sampled."""

    prompt: int | str
    sample: int
    """Numbers, see `Rollout`."""
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

    @property
    def key(self) -> Key:
        """What tells it from the others of its step."""
        return self.prompt, self.sample

    @property
    def said(self) -> list[int]:
        """The new tokens without that which stopped it."""
        return self.ids[-self.new : len(self.ids) - (self.ended == "stop")]

    def laid(self, end: int) -> slice:
        """Where a row that it ends at has what belongs to its new tokens: position t says what
        token t + 1 is."""
        return slice(end - 1 - self.new, end - 1)


class Packed:
    """A micro-batch of answers and what is known of their tokens [B, S]: their log-probabilities by
    the model as it is, and, of the same kind, by others."""

    pi_BS: Tensor
    prox_BS: Tensor
    """Before the first update on them."""
    reference_BS: Tensor | None = None
    """By what the divergence is measured from."""
    teacher_BS: Tensor | None = None
    """By each answer's own teacher."""
    experts_BSLK: Tensor | None = None
    """What the model's own passes send tokens to; see `Batch`."""

    def __init__(
        self, rows: list[list[Answer]], options: PolicyOptions, length: int, pad_id: int
    ) -> None:
        self.rows, self._options, self._length = rows, options, length
        packs = [[(np.array(a.ids, np.int64), _new(a)) for a in row] for row in rows]
        numbers = tuple(0 if row else -1 for row in rows)
        self.batch = Batch.from_packs(packs, length, pad_id, numbers)
        self.sums: dict[str, float] = {}

    def route(self, experts: Mapping[Key, NDArray[np.int16]]) -> None:
        """Have the model's own passes send tokens to the experts that they went to when they were
        sampled: of all tokens of each answer but the last."""
        shape = next(iter(experts.values())).shape[1:]
        out_BSLK = np.full((len(self.rows), self._length, *shape), -1, np.int16)
        for b, row in enumerate(self.rows):
            for answer, end in _ends(row):
                out_BSLK[b, end - len(answer.ids) : end - 1] = experts[answer.key]
        self.experts_BSLK = torch.from_numpy(out_BSLK)

    def measure(self, model: HybridLM, first: bool) -> None:
        """``first``: no update was made yet."""
        self.pi_BS = log_probabilities(model, self._routed)
        self.prox_BS = self.pi_BS if first else self._laid(lambda a: a.prox)

    def ask(self, teacher: HybridLM, environments: set[str]) -> None:
        """A teacher of the answers to prompts of some environments."""
        its_BS = self._laid(lambda a: [a.environment in environments] * a.new) > 0
        said_BS = log_probabilities(teacher, self.batch)
        before_BS = self.prox_BS if self.teacher_BS is None else self.teacher_BS
        self.teacher_BS = torch.where(its_BS, said_BS, before_BS)

    @property
    def _routed(self) -> Batch:
        return replace(self.batch, experts_BSLK=self.experts_BSLK)

    def prox(self) -> dict[Key, list[float]]:
        return {
            answer.key: self.prox_BS[b, answer.laid(end)].tolist()
            for b, row in enumerate(self.rows)
            for answer, end in _ends(row)
        }

    def weighted(self) -> Batch:
        """The batch to train on; counts what was done to it in ``sums``."""
        options, of = self._options, [answer for row in self.rows for answer in row]
        numbers = {answer.key: number for number, answer in enumerate(of)}
        sequence_BS = self._laid(lambda a: [numbers[a.key]] * a.new)
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
        if self.teacher_BS is not None:
            advantage_T = policy.distillation(self.teacher_BS, self.prox_BS).flatten()
        self.sums["advantage"] = float(advantage_T[known.learnt_T].abs().sum())
        mask_BS = known.learnt_T.view_as(self.pi_BS)
        return replace(
            self._routed,
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


@torch.inference_mode()
def log_probabilities(model: HybridLM, batch: Batch) -> Tensor:
    """Of the next tokens [B, S] that are targets, fp32 on the CPU, by the forward pass of training;
    0 elsewhere."""
    head_VD = model.lm_head.weight
    there = batch.to(head_VD.device)
    h_BSD, _ = model.forward_hidden(there.ids_BS, there.packing, there.experts_BSLK)
    labels_T, mask_T = there.labels_BS.flatten(), there.loss_mask_BS.flatten().float()
    _, ce_T = linear_cross_entropy(h_BSD.flatten(0, 1), head_VD, labels_T, mask_T)
    return -ce_T.view(batch.ids_BS.shape).cpu()


def compared(answers: Sequence[Answer], samples: int, std: str) -> list[Answer]:
    """With advantages; all answers to a prompt stand together."""
    rewards_PN = torch.tensor([a.reward for a in answers], dtype=torch.float64).view(-1, samples)
    advantages = policy.advantages(rewards_PN, std).flatten().tolist()
    return [replace(a, advantage=value) for a, value in zip(answers, advantages, strict=True)]


def figures(answers: Sequence[Answer], samples: int) -> dict[str, float]:
    """What is to be known of a step's answers."""
    by_name: dict[str, list[float]] = defaultdict(list)
    several = len({a.environment for a in answers}) > 1
    for a in answers:
        by_name["truncated"].append(a.ended != "stop")
        by_name["response_tokens"].append(a.new)
        by_name["verifier_failures"].append(math.isnan(a.reward))
        by_name["entropy"].append(-sum(a.logprobs) / a.new)
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
    means = {name: sum(values) / len(values) for name, values in by_name.items()}
    if answers:
        means["verifier_failures"] = sum(by_name["verifier_failures"])
    return means


def to_json(answer: Answer) -> dict[str, Any]:
    return {**vars(answer), "reward": None if math.isnan(answer.reward) else answer.reward}


def to_tensors(answer: Answer) -> dict[str, Tensor]:
    """All of it: lists of tokens one by one, and the rest, ``about``, as JSON."""
    about = {name: value for name, value in vars(answer).items() if name not in _OF_TOKENS}
    return {
        "about": torch.frombuffer(bytearray(json.dumps(about).encode()), dtype=torch.uint8),
        **{n: torch.tensor(getattr(answer, n), dtype=dtype) for n, dtype in _OF_TOKENS.items()},
    }


def from_tensors(read: Callable[[str], Tensor]) -> Answer:
    """``read`` gives what `to_tensors` gave."""
    lists = {name: read(name).tolist() for name in _OF_TOKENS}
    return Answer(**(json.loads(bytes(read("about").tolist())) | lists))
