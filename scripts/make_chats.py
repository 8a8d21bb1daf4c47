"""Write the chat set of the fine-tuning tutorial: people say who they are, the answer is a card.

    python scripts/make_chats.py --out DIR [--conversations N] [--seed N] [--card person|home]

    user       I live in Soren. My name is Dalan Tener.
    assistant  last: Tener
               first: Dalan
               city: Soren

DIR/train.jsonl and DIR/heldout.jsonl hold one OpenAI-style object {"messages": [...]} per line;
DIR/questions.jsonl what heldout.jsonl asks, as prompts of `rollout` with their answers.
Names are made of syllables, and no name is in both files: a right answer to a held-out question
takes the format, and copying of names that were never learnt. Some conversations have a system
message; some a second turn, which changes a name, so that its card needs the first turn too. The
card "home" has other keys in another order. The same arguments write the same bytes.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from nemo_hybrid.errors import UserError
from nemo_hybrid.files import make_directories, naming, replace_file

CONSONANTS, VOWELS, ENDINGS = "dfhlnrstvw", "aeiou", ("", "l", "n", "r", "s")
SYSTEM = "Answer with a card."
QUESTIONS = (
    "My name is {first} {last} and I live in {city}.",
    "I live in {city}. My name is {first} {last}.",
    "I am {first} {last} from {city}.",
    "In {city} they call me {first} {last}.",
    "{first} {last} is my name, {city} is my home.",
    "Write a card for {first} {last} of {city}.",
)
CHANGES = {"last": "My last name is {last} now.", "city": "I moved to {city}."}
CARDS = {
    "person": "last: {last}\nfirst: {first}\ncity: {city}",
    "home": "home: {city}\nname: {first}\nfamily: {last}",
}
TURN = "<s>{role}\n{content}</s>\n"
"""As configs/chat_template.jinja has it: models without a template can be asked, too."""
HELD_OUT = 20
"""One conversation and one name of so many are held out."""


def make_names(draw: random.Random) -> tuple[list[str], list[str]]:
    """Names to train on, and others to hold out, in random order."""
    syllables = [consonant + vowel for consonant in CONSONANTS for vowel in VOWELS]
    names = [(a + b + end).capitalize() for a in syllables for b in syllables for end in ENDINGS]
    draw.shuffle(names)
    cut = len(names) // HELD_OUT
    return names[cut:], names[:cut]


def conversation(draw: random.Random, names: Sequence[str], card: str) -> list[dict[str, str]]:
    """Messages of one conversation; every answer is a card."""
    first, last, city, new = draw.sample(names, 4)
    person = {"first": first, "last": last, "city": city}
    messages = []
    if draw.random() < 0.25:
        messages.append({"role": "system", "content": SYSTEM})
    question = draw.choice(QUESTIONS).format(**person)
    messages.append({"role": "user", "content": question})
    messages.append({"role": "assistant", "content": card.format(**person)})
    if draw.random() < 0.25:
        changed = draw.choice(list(CHANGES))
        person[changed] = new
        messages.append({"role": "user", "content": CHANGES[changed].format(**person)})
        messages.append({"role": "assistant", "content": card.format(**person)})
    return messages


def make_chats(conversations: int, seed: int, card: str = "person") -> dict[str, str]:
    """Content of the files by name. Raises UserError for fewer than 20 conversations."""
    if conversations < HELD_OUT:
        raise UserError(f"--conversations must be at least {HELD_OUT}, got {conversations}")
    draw = random.Random(seed)
    train, heldout = make_names(draw)
    kept, held = (
        [conversation(draw, names, CARDS[card]) for _ in range(count)]
        for names, count in ((train, conversations), (heldout, conversations // HELD_OUT))
    )
    rows = {
        "train.jsonl": [{"messages": messages} for messages in kept],
        "heldout.jsonl": [{"messages": messages} for messages in held],
        "questions.jsonl": [question for messages in held for question in questions(messages)],
    }
    return {name: "".join(json.dumps(r) + "\n" for r in found) for name, found in rows.items()}


def questions(messages: Sequence[dict[str, str]]) -> Iterator[dict[str, str]]:
    """What comes before each answer, and the answer."""
    text = ""
    for message in messages:
        if message["role"] == "assistant":
            yield {"prompt": f"{text}<s>assistant\n", "answer": message["content"]}
        text += TURN.format(**message)


def main(words: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="directory to write")
    parser.add_argument("--conversations", type=int, default=4000, help="to train on")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--card", choices=CARDS, default="person")
    given = parser.parse_args(words)
    try:
        files = make_chats(given.conversations, given.seed, given.card)
        with naming("write", given.out):
            make_directories(given.out)
        for name, text in files.items():
            replace_file(given.out / name, text)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    for name, text in files.items():
        print(f"{given.out / name}: {text.count(chr(10)):,} lines")
    return 0


if __name__ == "__main__":
    sys.exit(main())
