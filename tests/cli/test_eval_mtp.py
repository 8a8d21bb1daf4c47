"""eval-mtp: what it counts, what it writes, and what it refuses."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from helpers.commands import Commands, commands_in_one_process
from helpers.generated import requests_of
from helpers.once import once
from helpers.tiny_models import loud_model, tiny_config
from nemo_hybrid.commands.eval_mtp import Measured, count, depths_of
from nemo_hybrid.errors import UserError
from nemo_hybrid.generation.batched import Generator

CONFIG = tiny_config("M*", mtp_num_depths=1, mtp_pattern="*")
NEW = 20


def prompts() -> list[list[int]]:
    return [list(r.ids) for r in requests_of(6, [1, 5, 9], [NEW], frozenset())]


def write_models(directory: Path) -> None:
    loud_model(CONFIG).save_hf(str(directory / "drafts"))
    loud_model(tiny_config("M*")).save_hf(str(directory / "bare"))
    lines = [json.dumps({"input_ids": ids}) + "\n" for ids in prompts()]
    (directory / "prompts.jsonl").write_text("".join(lines))


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return once(tmp_path_factory, "drafters", write_models)


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with commands_in_one_process() as commands:
        yield commands


def words(home: Path, *more: object) -> list[object]:
    return ["eval-mtp", "--from", home / "drafts", "--data", home / "prompts.jsonl",
            "--max_new_tokens", NEW, *more]  # fmt: skip


def by_full_passes(stops: set[int]) -> tuple[int, int]:
    """How often the first draft was tried and stayed: of texts without drafts, by the MTP block's
    pass over all of each."""
    model, tried, stayed = loud_model(CONFIG), 0, 0
    requests = requests_of(6, [1, 5, 9], [NEW], frozenset())
    for request in requests:
        (rollout,) = Generator(model, 1).run([request])
        ids = rollout.ids
        ends = [place + 1 for place, token in enumerate(ids) if token in stops]
        ids = ids[: min(ends, default=NEW)]
        text = torch.tensor([[*request.ids, *ids]])
        with torch.no_grad():
            h_BSD, _ = model.forward_hidden(text)
            (u_BSD, *_), _ = model.forward_mtp(h_BSD, text)
            best = model.logits(u_BSD)[0].argmax(-1).tolist()[len(request.ids) - 1 :]
        place = 1  # of the token after the one that is read
        while place + 1 < len(ids):  # of the last token it is not seen where it came from
            hit = best[place - 1] == ids[place]
            tried, stayed, place = tried + 1, stayed + hit, place + 1 + hit
    return tried, stayed


def test_figures_table_and_plot(home: Path, commands: Commands, tmp_path: Path) -> None:
    out = tmp_path / "out"
    said = commands(*words(home, "--depths", "1,3", "--out", out))
    assert said.status == 0, said.err
    assert sorted(p.name for p in out.iterdir()) == ["eval_mtp.json", "eval_mtp.png"]
    assert (out / "eval_mtp.png").read_bytes().startswith(b"\x89PNG")
    figures = json.loads((out / "eval_mtp.json").read_text())
    runs = figures["runs"]
    assert [(r["temperature"], r["drafts"]) for r in runs] == [
        (0, 0), (0, 1), (0, 3), (1, 0), (1, 1), (1, 3)
    ]  # fmt: skip
    assert len({r["tokens"] for r in runs[:3]}) == 1
    first = runs[1]["by_depth"][0]
    assert (first["tried"], first["stayed"]) == by_full_passes({2})
    for run in runs:
        assert len(run["by_depth"]) == run["drafts"]
        assert run["tokens_per_second"] == run["tokens"] / run["seconds"]
        assert f"{run['tokens_per_second']:.1f}" in said.out
        assert not run["drafts"] or f"{run['acceptance_length']:.2f}" in said.out


def test_ends_of_texts_do_not_count_against_drafts() -> None:
    """Texts of random lengths, drafts that stay with known probabilities."""
    shares, draw, texts, naive = [0.8, 0.5, 0.9], random.Random(0), [], []
    for _ in range(4000):
        left, passes = draw.randrange(1, 9), []
        while left > 0:
            stay = next((k for k, share in enumerate(shares) if draw.random() >= share), 3)
            passes.append(min(stay + 1, left))
            left -= passes[-1]
        texts.append(passes)
        naive += passes
    depths = count(texts, 3)
    for depth, share in zip(depths, shares, strict=True):
        assert abs(depth.share - share) < 4 * (share * (1 - share) / depth.tried) ** 0.5
    length = 1 + 0.8 + 0.8 * 0.5 + 0.8 * 0.5 * 0.9
    assert abs(Measured(0, 3, 1, 1, 1, depths).acceptance_length - length) < 0.03
    assert sum(naive) / len(naive) < length - 0.3  # which counting them would have shown
    by_hand = count([[4, 1, 2], [], [3]], 3)
    assert [(d.tried, d.stayed) for d in by_hand] == [(4, 3), (2, 2), (1, 1)]


def test_depths() -> None:
    assert depths_of("1..7") == [1, 2, 3, 4, 5, 6, 7]
    assert depths_of("7, 1,2..3") == [1, 2, 3, 7]
    for text in ("", "0", "8", "3..1", "1..8", "a", "1.5", "-1"):
        with pytest.raises(UserError, match="numbers from 1 to 7"):
            depths_of(text)


def test_what_cannot_be_is_named(home: Path, commands: Commands, tmp_path: Path) -> None:
    def refused(why: str, *more: object) -> None:
        said = commands(*words(home, *more))
        assert (said.status, len(said.err.splitlines())) == (2, 1), said.err
        assert why in said.err
        assert list(tmp_path.iterdir()) == before

    (tmp_path / "none.jsonl").touch()
    before = list(tmp_path.iterdir())
    refused("give numbers from 1 to 7", "--depths", "0..3", "--out", tmp_path / "out")
    refused("has no MTP block", "--from", home / "bare", "--out", tmp_path / "out")
    refused("holds no prompts", "--data", tmp_path / "none.jsonl", "--out", tmp_path / "out")
    refused("exists already", "--out", tmp_path)
    refused("is no directory, so", "--out", tmp_path / "none.jsonl" / "out")
    refused("is no directory, so", "--out", tmp_path / "new" / "out")
    refused("'' names no file", "--out=")
    refused("must be 2 or more, got 1", "--max_new_tokens", "1")
