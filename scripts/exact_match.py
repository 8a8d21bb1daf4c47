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
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from itertools import islice
from pathlib import Path

import torch
from numpy.typing import NDArray

from nemo_hybrid.checkpoint.companions import read_companions
from nemo_hybrid.checkpoint.load import load_model
from nemo_hybrid.checkpoint.steps import resolve
from nemo_hybrid.data.chat import check_answers, read_messages, read_tools
from nemo_hybrid.data.readers import read_records
from nemo_hybrid.data.sources import BadRecord, Unusable, find_sources
from nemo_hybrid.data.template import ChatTemplate, load_template, need_template
from nemo_hybrid.data.tokenizer import load_tokenizer
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import replace_file
from nemo_hybrid.generation.batched import Generator, Request
from nemo_hybrid.terminal import print_table

SHOWN, WIDTH = 4, 60
"""Answers that are printed, and how much of each."""
AT_ONCE = 32
"""Questions that are answered together."""


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


def ask(directory: Path, data: Path, chat_template: str | None, limit: int) -> list[Question]:
    """The first ``limit`` questions of the file and the model's answers. Raises UserError."""
    directory = resolve(directory)
    tokenizer = load_tokenizer(directory)
    template = need_template(load_template(tokenizer, directory, chat_template), directory)
    asked = list(islice(read_questions(data, template), limit or None))
    questions = [question for question, _ in asked]
    if not questions:
        raise UserError(f"{data} holds no conversation")
    model = load_model(directory).eval()
    if torch.cuda.is_available():
        model = model.to("cuda")
    stops = frozenset(read_companions(directory).stops(model.config.eos_token_id))
    longest = max(len(ids) for ids in tokenizer.encode([q.right for q in questions]))
    requests = (
        Request(number, ids.tolist(), longest + 8, stops=stops)
        for number, (_, ids) in enumerate(asked)
    )
    for rollout in Generator(model, AT_ONCE).run(requests):
        questions[rollout.request.prompt].answer = tokenizer.decode(rollout.said)
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
