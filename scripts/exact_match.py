"""Share of a model's answers that equal those of conversations, letter by letter.

    python scripts/exact_match.py --from DIR --data FILE [--chat_template FILE] [--limit N]
        [--out FILE] [--at_least SHARE]

Each turn of the assistant is one question: the model is shown the turns before it, as they stand in
the file, and answers greedily. White space around an answer does not count. Prints the score and
some answers; --out writes all of them as JSON.

Exit status: 0 done, 1 the score is below --at_least, 2 a mistake in options or files.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from nemo_hybrid.checkpoint.load import load_model
from nemo_hybrid.checkpoint.steps import resolve
from nemo_hybrid.commands.generate import stop_ids
from nemo_hybrid.data.chat import check_answers, read_messages, read_tools
from nemo_hybrid.data.readers import read_records
from nemo_hybrid.data.sources import BadRecord, Unusable, find_sources
from nemo_hybrid.data.template import ChatTemplate, load_template, need_template
from nemo_hybrid.data.tokenizer import load_tokenizer
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import replace_file
from nemo_hybrid.generation.sampling import generate
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.terminal import print_table

SHOWN, WIDTH = 4, 60
"""Answers that are printed, and how much of each."""
AT_ONCE = 32
"""Prompts of equal length that are answered together."""


@dataclass
class Question:
    """What is asked last, the right answer, and the model's."""

    where: str
    asked: str
    right: str
    answer: str = ""

    @property
    def matched(self) -> bool:
        return self.answer.strip() == self.right.strip()


def read_questions(path: Path, template: ChatTemplate) -> Iterator[tuple[Question, NDArray]]:
    """Every question of a file's conversations, and the token ids [n] of its prompt.

    Raises UserError for a record that is no conversation.
    """
    for source in find_sources([path]).sources:
        for record in read_records(source, ""):
            try:
                if isinstance(record, Unusable):
                    raise BadRecord(record.why)
                messages = read_messages(record.content.get("messages"))
                tools = read_tools(record.content.get("tools"))
                check_answers(messages)
                template.check([messages, tools])
                for turn, message in enumerate(messages):
                    if message["role"] == "assistant":
                        prompt = template.render(messages[:turn], tools, add_generation_prompt=True)
                        asked = messages[turn - 1].get("content", "")
                        question = Question(record.where, asked, message.get("content", ""))
                        yield question, template.tokenizer.encode_chat(prompt)[0]
            except BadRecord as error:
                raise UserError(f"{record.where}: {error}") from error


def answer(model: HybridLM, prompt_BS: torch.Tensor, most: int, ends: list[int]) -> list[list[int]]:
    """Token ids of the greedy answers, at most ``most``, without the token that ends them."""
    answers: list[list[int]] = [[] for _ in prompt_BS]
    going = set(range(len(prompt_BS)))
    for ids_B in generate(model, prompt_BS, most):
        going = {row for row in going if int(ids_B[row]) not in ends}
        for row in going:
            answers[row].append(int(ids_B[row]))
        if not going:
            break
    return answers


def ask(directory: Path, data: Path, chat_template: str | None, limit: int) -> list[Question]:
    """The first ``limit`` questions of the file and the model's answers. Raises UserError."""
    directory = resolve(directory)
    tokenizer = load_tokenizer(directory)
    template = need_template(load_template(tokenizer, directory, chat_template), directory)
    questions, groups = [], defaultdict(list)
    for question, ids in read_questions(data, template):
        questions.append(question)
        groups[len(ids)].append((question, ids))
        if len(questions) == limit:
            break
    if not questions:
        raise UserError(f"{data} holds no conversation")
    model = load_model(directory).eval()
    if torch.cuda.is_available():
        model = model.to("cuda")
    ends = stop_ids(directory, model.config.eos_token_id)
    longest = max(len(ids) for ids in tokenizer.encode([q.right for q in questions]))
    for group in groups.values():
        for start in range(0, len(group), AT_ONCE):
            some = group[start : start + AT_ONCE]
            prompt_BS = torch.from_numpy(np.stack([ids for _, ids in some]))
            prompt_BS = prompt_BS.to(model.lm_head.weight.device)
            found = answer(model, prompt_BS, longest + 8, ends)
            for (question, _), answered in zip(some, found, strict=True):
                question.answer = tokenizer.decode(answered)
    return questions


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("--from", dest="from_", type=Path, required=True, help="model directory")
    parser.add_argument("--data", type=Path, required=True, help="file of conversations")
    parser.add_argument("--chat_template", help="Jinja file, instead of the model's own")
    parser.add_argument("--limit", type=int, default=0, help="questions; 0: all")
    parser.add_argument("--out", type=Path, help="JSON file for the result")
    parser.add_argument("--at_least", type=float, default=0.0, help="score to be reached")
    given = parser.parse_args(words)
    try:
        questions = ask(given.from_, given.data, given.chat_template, given.limit)
        score = sum(q.matched for q in questions) / len(questions)
        if given.out:
            answers = [{**asdict(q), "matched": q.matched} for q in questions]
            result = {"score": score, "answers": answers}
            replace_file(given.out, json.dumps(result, indent=1, ensure_ascii=False))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    wrong_first = sorted(questions, key=lambda q: q.matched)
    shown = wrong_first[: SHOWN // 2] + wrong_first[-SHOWN // 2 :]
    rows = [
        (q.asked, _short(q.right), _short(q.answer), "yes" if q.matched else "no") for q in shown
    ]
    print_table(("asked", "right answer", "the model's", "equal"), rows, "Examples", ruled=range(4))
    print(f"exact match: {score:.1%} of {len(questions)} answers")
    return 0 if score >= given.at_least else 1


def _short(text: str) -> str:
    text = text.strip().replace("\n", " | ")
    return text if len(text) <= WIDTH else text[:WIDTH] + " ..."


if __name__ == "__main__":
    sys.exit(main())
