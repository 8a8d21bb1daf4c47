"""What git leaves in place of a large file is named as such, wherever it stands."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.chats import write_base, write_chats
from nemo_hybrid.cli import main

POINTER = (
    "version https://git-lfs.github.com/spec/v1\n"
    "oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\n"
    "size 12345\n"
)
Words = Callable[[Path, Path], list[str]]


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_base(tmp_path_factory.mktemp("lfs") / "base")


def generate(model: Path, _: Path) -> list[str]:
    return ["generate", "--from", str(model), "--prompt", "a"]


def imported(model: Path, out: Path) -> list[str]:
    return ["import", str(model), "--out", str(out / "out")]


def inspected(model: Path, _: Path) -> list[str]:
    return ["inspect", str(model)]


def tuned(model: Path, out: Path) -> list[str]:
    chats = write_chats(out / "chats.jsonl", 4)
    return ["prepare", str(chats), "--for", "finetune", "--tokenizer", str(model), "--out",
            str(out / "out")]  # fmt: skip


def prepared(model: Path, out: Path) -> list[str]:
    (out / "text.txt").write_text("some text")
    return ["prepare", str(out / "text.txt"), "--tokenizer", str(model), "--out", str(out / "out"),
            "--heldout", "0"]  # fmt: skip


def refused(words: list[str], file: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(file.parent.rglob("*"))
    assert main(words) == 2
    said = capsys.readouterr().err
    assert f"error: {file} is a Git LFS pointer" in said
    assert "git lfs pull" in said
    assert sorted(file.parent.rglob("*")) == before


@pytest.mark.parametrize(
    ("name", "commands"),
    [
        ("WEIGHTS", [generate, imported, inspected]),
        ("model.safetensors.index.json", [generate, imported, inspected]),
        ("config.json", [generate, imported, inspected]),
        ("generation_config.json", [generate, imported]),
        ("tokenizer.json", [generate, imported, tuned, prepared]),
        ("tokenizer_config.json", [generate, imported, tuned, prepared]),
        ("special_tokens_map.json", [generate, imported, tuned, prepared]),
        ("chat_template.jinja", [generate, imported, tuned]),
        ("tokenizer.model", [imported]),
    ],
)
def test_in_a_model(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, commands: list[Words]
) -> None:
    name = next(base.glob("*.safetensors")).name if name == "WEIGHTS" else name
    model = tmp_path / "model"
    model.mkdir()
    for file in base.iterdir():
        (model / file.name).symlink_to(file)
    (model / name).unlink(missing_ok=True)
    (model / name).write_text(POINTER)
    for command in commands:
        refused(command(model, tmp_path), model / name, capsys)


@pytest.mark.parametrize(
    "name",
    ["a.txt", "a.jsonl", "a.parquet", "a.bin", "a.idx", "data/part.arrow", "data/state.json"],
)
def test_in_data(base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    given, out = tmp_path / "given", tmp_path / "out"
    file = given / name
    file.parent.mkdir(parents=True)
    (given / "a.idx").write_bytes(b"MMIDIDX\0\0")
    (given / "a.bin").write_bytes(b"\0\0")
    if file.parent != given:
        for own in ("state.json", "dataset_info.json"):
            (file.parent / own).write_text("{}")
    file.write_text(POINTER)
    path = file.parent if file.parent != given else file
    words = ["prepare", str(path), "--tokenizer", str(base), "--out", str(out), "--heldout", "0"]
    refused(words, file, capsys)
    if file.suffix not in (".bin", ".idx"):
        refused([*words, "--for", "finetune"], file, capsys)
    assert not out.exists()
    if file.suffix == ".txt":
        refused(["compare-logprobs", str(base), str(base), "--data", str(file)], file, capsys)


def test_in_a_store_and_in_a_configuration(
    base: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    store, chats = tmp_path / "store", write_chats(tmp_path / "chats.jsonl", 4)
    words = ["prepare", str(chats), "--for", "finetune", "--tokenizer", str(base), "--out"]
    assert main([*words, str(store), "--heldout", "0"]) == 0
    shard = store / "train" / "tokens-00000.bin"
    shard.write_text(POINTER)
    refused(["eval", "--from", str(base), "--data", str(store)], shard, capsys)
    (store / "train" / "store.json").write_text(POINTER)
    words = ["pretrain", "--model.from_hf", str(base), "--data.path", str(store), "--run_dir"]
    refused([*words, str(tmp_path / "run")], store / "train" / "store.json", capsys)
    config = tmp_path / "run.yaml"
    config.write_text(POINTER)
    refused(["pretrain", "--config", str(config), "--print_config", "true"], config, capsys)


def test_text_about_pointers_is_text(base: Path, tmp_path: Path) -> None:
    file = tmp_path / "a.jsonl"
    file.write_text(json.dumps({"text": POINTER}))
    out = str(tmp_path / "out")
    assert (
        main(["prepare", str(file), "--tokenizer", str(base), "--out", out, "--heldout", "0"]) == 0
    )
