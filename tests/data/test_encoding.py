"""Encoding piece by piece, what an interrupted `prepare` leaves, and the tokenizer's sample."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from helpers.processes import HANG_S
from nemo_hybrid.data import documents as module
from nemo_hybrid.data import encoding
from nemo_hybrid.data.documents import prepare
from nemo_hybrid.data.tokenizer import TextTokenizer, train_tokenizer
from nemo_hybrid.errors import UserError

LINES = [f"line {i} says {'ja' * (i % 7)} and {i * i}, naïve 光 🎉" for i in range(60)]


def write(path: Path, lines: Iterable[str]) -> Path:
    path.write_text("".join(json.dumps({"text": line}) + "\n" for line in lines))
    return path


@pytest.fixture
def corpus(tmp_path: Path) -> Path:
    return write(tmp_path / "a.jsonl", LINES)


@pytest.fixture
def tokenizer(corpus: Path, tmp_path: Path) -> str:
    make(corpus, tmp_path / "tok", vocab_size=300)
    return str(tmp_path / "tok")


@pytest.fixture
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(encoding, "PIECE_CHARACTERS", 300)
    monkeypatch.setattr(encoding, "_AT_ONCE", 70)


def make(paths: Path, out: Path, **options: Any) -> dict[str, bytes]:
    """The files of the stores."""
    prepare(out, [str(paths)], heldout=0.3, progress=False, **options)
    files = (p for p in out.rglob("*") if p.is_file() and p.name != "prepare.json")
    return {str(p.relative_to(out)): p.read_bytes() for p in files}


class Encoded:
    """Counts the texts that are encoded, and ends before ``limit`` would be passed."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.limit, encode = 0, len(LINES), TextTokenizer.encode

        def counted(tokenizer: TextTokenizer, texts: list[str], **options: Any) -> Any:
            if self.count + len(texts) > self.limit:
                raise KeyboardInterrupt
            self.count += len(texts)
            return encode(tokenizer, texts, **options)

        monkeypatch.setattr(TextTokenizer, "encode", counted)


def test_pieces_change_nothing(
    corpus: Path, tokenizer: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    one = make(corpus, tmp_path / "one", tokenizer=tokenizer)
    request.getfixturevalue("small_pieces")
    assert make(corpus, tmp_path / "many", tokenizer=tokenizer) == one


@pytest.mark.usefixtures("small_pieces")
def test_an_interrupted_run_goes_on(
    corpus: Path,
    tokenizer: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    whole = make(corpus, tmp_path / "whole", tokenizer=tokenizer)
    (tmp_path / "made").mkdir()
    out = tmp_path / "made" / "out"
    encoded = Encoded(monkeypatch)

    def interrupt(limit: int) -> list[Path]:
        shutil.rmtree(out, ignore_errors=True)
        encoded.count, encoded.limit = 0, limit
        with pytest.raises(KeyboardInterrupt):
            make(corpus, out, tokenizer=tokenizer)
        assert [p.name for p in out.parent.iterdir()] == [".encoded-out"]
        assert f"waits in {out.parent / '.encoded-out'}" in capsys.readouterr().err
        return sorted((out.parent / ".encoded-out").iterdir())

    def go_on() -> dict[str, bytes]:
        encoded.count, encoded.limit = 0, len(LINES)
        files = make(corpus, out, tokenizer=tokenizer)
        assert not capsys.readouterr().err
        assert [p.name for p in out.parent.iterdir()] == ["out"]
        return files

    kept = interrupt(40)
    assert len(kept) > 3
    assert go_on() == whole
    assert 20 <= encoded.count < 30  # of 60; what ended within a piece is encoded again

    # A damaged piece, another text and another tokenizer are never taken for what they were.
    damaged = interrupt(40)[0]
    damaged.write_bytes(damaged.read_bytes()[:-1] + b"?")
    assert go_on() == whole
    assert encoded.count > 25
    interrupt(40)
    write(corpus, ["changed", *LINES[1:]])
    files = go_on()
    assert files != whole
    encoded.count = 0
    assert files == make(corpus, tmp_path / "changed", tokenizer=tokenizer)
    interrupt(40)
    encoded.count, encoded.limit = 0, len(LINES)
    files = make(corpus, out, vocab_size=290)
    assert encoded.count == len(LINES)
    encoded.count = 0
    assert files == make(corpus, tmp_path / "other", vocab_size=290)


@pytest.mark.usefixtures("small_pieces")
def test_a_bad_record_does_not_cost_what_was_encoded(
    corpus: Path, tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is found while pieces before it are encoded; mended, the rest is encoded alone."""
    whole = make(corpus, tmp_path / "whole", tokenizer=tokenizer)
    good = corpus.read_text()
    corpus.write_text(good + "{\n")
    with pytest.raises(UserError, match=r"a\.jsonl line 61: not JSON"):
        make(corpus, tmp_path / "out", tokenizer=tokenizer)
    corpus.write_text(good)
    encoded = Encoded(monkeypatch)
    assert make(corpus, tmp_path / "out", tokenizer=tokenizer) == whole
    assert encoded.count < 15


def test_a_real_interrupt_leaves_nothing_but_pieces(tokenizer: str, tmp_path: Path) -> None:
    big = write(tmp_path / "big.jsonl", [" ".join(LINES)] * 5000)
    (tmp_path / "made").mkdir()
    code = (  # a shell's background job ignores Ctrl-C, and so would its children
        "import signal, sys; signal.signal(signal.SIGINT, signal.default_int_handler);"
        "from nemo_hybrid.data.documents import prepare;"
        "prepare(sys.argv[2], [sys.argv[1]], tokenizer=sys.argv[3])"
    )
    arguments = [str(big), str(tmp_path / "made" / "out"), tokenizer]
    process = subprocess.Popen([sys.executable, "-c", code, *arguments], stderr=subprocess.PIPE)
    deadline = time.monotonic() + HANG_S
    while not list((tmp_path / "made").rglob("*.bin")):
        assert process.poll() is None
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, error = process.communicate(timeout=HANG_S)
    assert b"KeyboardInterrupt" in error
    assert [p.name for p in (tmp_path / "made").iterdir()] == [".encoded-out"]


@pytest.mark.parametrize("many_files", [False, True])
def test_the_tokenizer_sees_its_sample(
    many_files: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of every file the beginning; of many small ones some, from all over."""
    seen: list[str] = []

    def train(texts: Iterator[str], vocab_size: int) -> TextTokenizer:
        seen.extend(texts)
        return train_tokenizer(seen, vocab_size)

    monkeypatch.setattr(module, "train_tokenizer", train)
    folder = tmp_path / "in"
    folder.mkdir()
    files = 200 if many_files else 4
    records = 2000 // files
    for n in range(files):
        write(folder / f"{n:03}.jsonl", (f"{n} {i:04} {'x' * 990}" for i in range(records)))
    summary = prepare(
        tmp_path / "out", [str(folder)], vocab_size=300, tokenizer_sample_mb=1, heldout=0.0,
        progress=False,
    )  # fmt: skip
    assert summary.entries == {"train": 2000}
    size = sum(p.stat().st_size for p in folder.iterdir())
    assert size == pytest.approx(2e6, rel=0.02)
    assert 1000 * 0.97 <= len(seen) <= 1000 + files / 2
    numbers = [tuple(map(int, text.split()[:2])) for text in seen]
    of_files = {n: [i for m, i in numbers if m == n] for n in range(files)}
    assert all(found == list(range(len(found))) for found in of_files.values())
    assert all(abs(len(found) - records / 2) <= records / 2 for found in of_files.values())
    half = sum(n < files // 2 for n, _ in numbers)
    assert half == pytest.approx(len(seen) / 2, rel=0.05)


def test_mistaken_options() -> None:
    for words, why in (
        (["--tokenizer", "t", "--tokenizer_sample_mb", "5"], "give tokenizer or tokenizer_sample"),
        (
            ["--for", "finetune", "--tokenizer", "t", "--workers", "2"],
            "workers is about token stor",
        ),
        (["--workers", "0"], "workers"),
    ):
        code = "import sys; from nemo_hybrid.cli import main; sys.exit(main(sys.argv[1:]))"
        command = [sys.executable, "-c", code, "prepare", "a.txt", "--out", "o", *words]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert why in done.stderr
        assert done.stderr.count("\n") <= 2, done.stderr
