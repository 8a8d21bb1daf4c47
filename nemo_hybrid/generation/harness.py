"""Our models under EleutherAI's evaluation harness (lm-eval), which this file alone imports.

What of lm-eval's Hugging Face backend decides scores is the same here: how texts become tokens,
where they are cut, what stops an answer. Log-likelihoods come from packed forward passes, answers
from our generator.

Shapes: S tokens of one packed row, C tokens whose logits are made at once, D hidden, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from lm_eval import simple_evaluate, utils
from lm_eval.api.instance import Instance
from lm_eval.api.model import TemplateLM
from lm_eval.models.utils import (
    handle_stop_sequences,
    normalize_gen_kwargs,
    postprocess_generated_text,
)
from lm_eval.tasks import TaskManager
from torch import Tensor
from torch.nn import functional as F

from nemo_hybrid.data.batch import Batch
from nemo_hybrid.data.prompts import PromptReader
from nemo_hybrid.data.tokenizer import TextTokenizer
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import naming
from nemo_hybrid.generation.batched import Generator, Request
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.terminal import progress_bar

_CHUNK_BYTES = 64 << 20
_MOST_NEW = 256
"""Tokens of an answer where the task does not say, as in lm-eval."""

Asked = tuple[Any, list[int], list[int]]
"""Of one log-likelihood: what it is called, the tokens before, and those that are asked about."""


class Harness(TemplateLM):
    """A model to lm-eval. ``row_tokens``: of a packed row; ``slots`` and ``drafts``: of the
    generator. ``closing``: text up to which an answer is thinking, and not judged."""

    def __init__(
        self,
        model: HybridLM,
        text_tokenizer: TextTokenizer,
        reader: PromptReader,
        stops: frozenset[int],
        *,
        row_tokens: int,
        slots: int,
        drafts: int,
        seed: int,
        closing: str | None,
        show: bool,
    ) -> None:
        super().__init__()
        self.model, self.text_tokenizer, self.reader = model, text_tokenizer, reader
        self.stops = stops
        self.row_tokens, self.slots, self.drafts, self.seed = row_tokens, slots, drafts, seed
        self.closing, self.show = closing, show
        self.max_length = model.config.max_position_embeddings

    # ---- texts and tokens ------------------------------------------------------------------------

    @property
    def eot_token_id(self) -> int:
        return self.text_tokenizer.eos_id

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text that has nothing before it."""
        begins = self.text_tokenizer.named_tokens.get("bos_token")
        return self.eot_token_id if begins is None else self._id(begins)

    def _id(self, token: str) -> int:
        found = self.text_tokenizer.tokenizer.token_to_id(token)
        if found is None:
            raise UserError(
                f"the tokenizer of {self.reader.directory} names {token}, and has it not"
            )
        return int(found)

    def tok_encode(
        self, string: str, add_special_tokens: bool | None = None, **_: Any
    ) -> list[int]:
        """Token ids of a text; special tokens that it spells are special tokens."""
        opened = string.startswith(self.text_tokenizer.decode([self.prefix_token_id]))
        if add_special_tokens is False or (add_special_tokens is None and opened):
            return self.text_tokenizer.encode_chat(string)[0].tolist()
        return self.text_tokenizer.encode_prompt(string).tolist()

    @property
    def tokenizer_name(self) -> str:
        return str(self.reader.directory).replace("/", "__")

    def chat_template(self, chat_template: bool | str = False) -> str | None:
        """The template's text, which lm-eval records."""
        return self.reader.template_text if chat_template else None

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        options = {"add_generation_prompt": add_generation_prompt}
        if not add_generation_prompt:
            options["continue_final_message"] = True
        return self.reader.written(chat_history, **options)

    # ---- log-likelihoods ---------------------------------------------------------------------

    def _loglikelihood_tokens(
        self, requests: Sequence[Asked], disable_tqdm: bool = False, **_: Any
    ) -> list[tuple[float, bool]]:
        """Sum of the log-probabilities of the tokens that are asked about, and whether each was the
        most probable one."""
        found: list[tuple[float, bool]] = [(0.0, True)] * len(requests)
        if (longest := max((len(asked) for _, _, asked in requests), default=0)) > self.max_length:
            raise UserError(
                f"a task asks about {longest} tokens at once, and the model is declared for "
                f"{self.max_length}"
            )
        # As lm-eval's backend: the last max_length tokens, of which the first is only read.
        rows = [(before + asked)[-(self.max_length + 1) :] for _, before, asked in requests]
        order = sorted(range(len(rows)), key=lambda i: (-len(rows[i]), i))
        with progress_bar("log-likelihoods", len(rows), self.show) as progress:
            done = 0
            for numbers in _packed(order, [len(row) for row in rows], self.row_tokens):
                h_TD = self._hidden([rows[i] for i in numbers])
                end = 0
                for i in numbers:
                    end += len(rows[i])
                    asked = rows[i][-len(requests[i][2]) :]
                    # The state before a token predicts it.
                    first = max(end - 1 - len(asked), end - len(rows[i]))
                    found[i] = self._judged(h_TD[first : end - 1], asked[-(end - 1 - first) :])
                done += len(numbers)
                progress(done)
        return found

    @torch.inference_mode()
    def _hidden(self, rows: Sequence[list[int]]) -> Tensor:
        """Final hidden states [S, D] of texts that do not see each other, one behind the other."""
        samples = [(np.array(row), np.ones(len(row), np.bool_)) for row in rows]
        batch = Batch.from_packs([samples], sum(map(len, rows)), 0)
        batch = batch.to(self.model.lm_head.weight.device)
        return self.model.forward_hidden(batch.ids_BS, batch.packing)[0][0]

    @torch.inference_mode()
    def _judged(self, h_SD: Tensor, ids: list[int]) -> tuple[float, bool]:
        head_VD, total, greedy = self.model.lm_head.weight, 0.0, True
        chunk = max(1, _CHUNK_BYTES // (4 * len(head_VD)))
        for start in range(0, len(ids), chunk):
            label_C = torch.tensor(ids[start : start + chunk], device=h_SD.device)
            logits_CV = F.linear(h_SD[start : start + chunk].float(), head_VD.float())
            total -= float(F.cross_entropy(logits_CV, label_C, reduction="sum"))
            greedy = greedy and bool((logits_CV.argmax(1) == label_C).all())
        return total, greedy

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = False
    ) -> list[float]:
        """Of whole texts, in windows of max_length tokens that do not overlap."""
        windows: list[Asked] = []
        owners: list[int] = []
        for number, request in enumerate(requests):
            for window in utils.get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0]),
                prefix_token=self.prefix_token_id,
                max_seq_len=self.max_length,
                context_len=1,
            ):
                windows.append((None, *utils.make_disjoint_window(window)))
                owners.append(number)
        sums = [0.0] * len(requests)
        for owner, (total, _) in zip(owners, self._loglikelihood_tokens(windows), strict=True):
            sums[owner] += total
        return sums

    # ---- answers -----------------------------------------------------------------------------

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """Answers, each up to the first of its stop sequences."""
        eos = self.text_tokenizer.decode([self.eot_token_id])
        groups: dict[tuple[float, float], list[Request]] = {}
        ends: list[list[str]] = []
        for number, request in enumerate(requests):
            text, given = request.args
            wanted: dict[str, Any] = {**normalize_gen_kwargs(given, _MOST_NEW)}
            ends.append(handle_stop_sequences(wanted.pop("until"), eos=eos))
            most, sampled = wanted.pop("max_gen_toks"), wanted.pop("do_sample")
            temperature, top_p = wanted.pop("temperature", 1.0), wanted.pop("top_p", 1.0)
            if further := {name: value for name, value in wanted.items() if value}:
                raise UserError(f"a task wants its answers with {further}, which cannot be had")
            if (room := self.max_length - most) < 1:
                raise UserError(
                    f"a task wants {most} tokens, and the model is declared for {self.max_length}"
                )
            how = (float(temperature), float(top_p)) if sampled else (0.0, 1.0)
            asked = Request(number, self.tok_encode(text)[-room:], most, stops=self.stops)
            groups.setdefault(how, []).append(asked)
        answers = [""] * len(requests)
        with progress_bar("answers", len(requests), self.show) as progress:
            done = 0
            for (temperature, top_p), requests_of in groups.items():
                generator = Generator(
                    self.model, self.slots, temperature=temperature, top_p=top_p, seed=self.seed,
                    drafts=self.drafts,
                )  # fmt: skip
                for rollout in generator.run(requests_of):
                    number = int(rollout.request.prompt)
                    said = self.text_tokenizer.tokenizer.decode(rollout.said)
                    answers[number] = postprocess_generated_text(said, ends[number], self.closing)
                    done += 1
                    progress(done)
        return answers


def _packed(order: Sequence[int], lengths: Sequence[int], most: int) -> Iterator[list[int]]:
    """Numbers in their order, as many at once as make rows of ``most`` tokens."""
    numbers: list[int] = []
    tokens = 0
    for number in order:
        if numbers and tokens + lengths[number] > most:
            yield numbers
            numbers, tokens = [], 0
        numbers.append(number)
        tokens += lengths[number]
    if numbers:
        yield numbers


KEPT = ("results", "groups", "versions", "n-shot", "n-samples", "higher_is_better", "configs")
"""What is worth keeping of lm-eval's results."""


class Tasks(NamedTuple):
    """Tasks that are there: their names, and who knows them."""

    names: list[str]
    manager: TaskManager


def find_tasks(words: Sequence[str]) -> Tasks:
    """Tasks by their names, or by the YAML files of one's own. Raises UserError."""
    files = [word for word in words if word.endswith((".yaml", ".yml"))]
    names = [_named(word) if word in files else word for word in words]
    places = dict.fromkeys(str(Path(file).parent) for file in files)
    manager = TaskManager(include_path=[*places] or None)
    if missing := [name for name in names if name not in manager.all_tasks]:
        raise UserError(
            f"lm-eval has no task {', '.join(missing)}; name a file of your own, which ends in "
            ".yaml, by its path"
        )
    return Tasks(names, manager)


def _named(file: str) -> str:
    """The task's name that a YAML file gives. Raises UserError."""
    with naming("read task file", Path(file)):
        lines = Path(file).read_text(encoding="utf-8").splitlines()
    # It may hold tags of lm-eval's own, which a YAML reader would refuse.
    name = next((line.partition(":")[2] for line in lines if line.startswith("task:")), "")
    if not name.strip():
        raise UserError(f"{file} has no line `task: NAME`")
    return name.strip().strip("'\"")


def scores(
    model: Harness, tasks: Tasks, num_fewshot: int | None, limit: int | None, chat: bool
) -> dict[str, Any]:
    """What lm-eval finds."""
    found = simple_evaluate(
        model=model,
        tasks=[*tasks.names],
        num_fewshot=num_fewshot,
        limit=limit,
        apply_chat_template=chat,
        log_samples=False,
        bootstrap_iters=1000,
        task_manager=tasks.manager,
    )
    assert found is not None
    return dict(found)
