"""`eval --rollouts`: how many samples of `rollout` are the answers that their prompts have."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from nemo_hybrid.commands.rollout import Work
from nemo_hybrid.data.prompts import read_answers
from nemo_hybrid.environments.builtin import Exact
from nemo_hybrid.errors import UserError
from nemo_hybrid.files import naming, read_json
from nemo_hybrid.terminal import print_table

Number = int | str


class Passed(NamedTuple):
    """Of the samples of one prompt."""

    samples: int
    right: int

    @property
    def rate(self) -> float:
        return self.right / self.samples

    def at(self, k: int) -> float:
        """The probability that one of k samples is right, unbiased from k or more of them (Chen et
        al. 2021, arXiv 2107.03374, equation 1)."""
        return 1 - math.comb(self.samples - self.right, k) / math.comb(self.samples, k)


def exact_match(rollouts: Path, data: str, after: str) -> dict[Number, Passed]:
    """By prompt, in the order of ``data``; of a text counts what follows the last ``after``. Raises
    UserError for files that cannot be read or do not belong together, and for prompts without
    answers or samples."""
    answers, asked = read_answers(data)
    about = Work(rollouts).about
    if about.is_file() and read_json(about).get("asked", asked) != asked:
        raise UserError(
            f"{rollouts} holds samples of other prompts than those of {data}, as {about} tells: "
            "name the prompts that `rollout` had; only what stands beside them may differ"
        )
    if missing := [number for number, answer in answers.items() if answer is None]:
        raise UserError(
            f"{data}: {len(missing)} of {len(answers)} prompts have no field answer to compare "
            f"with, such as prompt {missing[0]!r}"
        )
    marks = _marks(rollouts, answers, Exact(after=after))
    if not marks:
        raise UserError(f"{rollouts} is empty: it holds no samples")
    if silent := [number for number in answers if number not in marks]:
        raise UserError(
            f"{rollouts} holds no samples of {len(silent)} prompts of {data}, such as prompt "
            f"{silent[0]!r}"
        )
    return {number: Passed(len(marks[number]), sum(marks[number].values())) for number in answers}


def _marks(
    path: Path, answers: Mapping[Number, str | None], exact: Exact
) -> dict[Number, dict[int, bool]]:
    """Whether each sample of each prompt is right."""
    found: defaultdict[Number, dict[int, bool]] = defaultdict(dict)
    with naming("read", path), path.open("rb") as file:
        for line, written in enumerate(file, 1):
            try:
                row = json.loads(written)
                number, sample, text = row["prompt"], row["sample"], row["text"]
                fresh = sample not in found[number]
            except (ValueError, LookupError, TypeError) as e:
                raise UserError(f"{path} line {line} is no sample that `rollout` wrote") from e
            if text is None:
                raise UserError(f"{path} line {line} has no text: its model has no tokenizer")
            if not isinstance(text, str):
                raise UserError(f"{path} line {line} is no sample that `rollout` wrote")
            if number not in answers:
                raise UserError(f"{path} line {line} is of prompt {number!r}, which --data lacks")
            if not fresh:
                raise UserError(f"{path} line {line} is sample {sample} of {number!r} once more")
            score = exact.score({"answer": answers[number]}, text, "")
            found[number][sample] = score.reward > 0
    return found


def summary(found: Mapping[Number, Passed]) -> dict[str, Any]:
    """Means over the prompts: pass@k for powers of two up to the fewest samples of a prompt, and
    that number."""
    most = min(passed.samples for passed in found.values())
    ks = sorted({*(1 << i for i in range(most.bit_length())), most})
    return {
        "prompts": len(found),
        "samples": sum(passed.samples for passed in found.values()),
        "pass_at": {k: sum(p.at(k) for p in found.values()) / len(found) for k in ks},
        "by_prompt": [
            {"prompt": number, **passed._asdict(), "rate": passed.rate}
            for number, passed in found.items()
        ],
    }


def print_exact_match(rollouts: Path, data: str, after: str, as_json: bool) -> None:
    """Print it as tables, or as one JSON object. Raises as `exact_match`."""
    found = summary(exact_match(rollouts, data, after))
    if as_json:
        print(json.dumps(found, indent=1))
        return
    rows = [[str(value) for value in row.values()] for row in found["by_prompt"]]
    print_table(("prompt", "samples", "right", "pass rate"), rows)
    print_table(
        ("of all prompts", f"{found['prompts']:,}"),
        [(f"pass@{k}", f"{share:.2%}") for k, share in found["pass_at"].items()],
    )
