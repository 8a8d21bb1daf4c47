"""Thousands of broken directories: each ends in a UserError, or in the very weights that were
saved; never in another exception, a hang, or memory taken on the word of a header."""

from __future__ import annotations

import json
import os
import random
import resource
import shutil
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from helpers.tiny_models import tiny_config
from nemo_hybrid.checkpoint.convert import import_directory
from nemo_hybrid.checkpoint.load import load_model, tensors_by_name
from nemo_hybrid.checkpoint.names import to_hub
from nemo_hybrid.checkpoint.tensors import TensorFile
from nemo_hybrid.errors import UserError
from nemo_hybrid.model.hybrid import HybridLM

SHARDS = ("a.safetensors", "b.safetensors")
INDEX = "model.safetensors.index.json"
CASES = 3000
SECONDS_PER_CASE = 2.0
MEMORY = 1 << 30  # bytes beyond those of the start

HUGE = [2**31, 2**63 - 1, 2**63, 2**64, 10**30, 10**4000]
VALUES = [None, True, -1, 0, 1, 7, 1.0, 1e308, float("nan"), float("inf"), "", "x", "0", "\ud800",
          [], [[]], [0], [-1, 2], {}, {"a": 1}, *HUGE]  # fmt: skip
FILE_NAMES = [None, 3, ["a.safetensors"], {}, "", ".", "..", "../a.safetensors", "/etc/passwd",
              "/a.safetensors", "c.safetensors", "a.bin", "a.safetensors/", "./a.safetensors",
              "x" * 300 + ".safetensors", "\0.safetensors", "\ud800.safetensors", "A.safetensors",
              "b.safetensors", "d/a.safetensors", "..\\a.safetensors",
              "a.safetensors\n"]  # fmt: skip


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> tuple[Path, dict[str, torch.Tensor]]:
    """A directory of two shards in BF16, and the weights in it."""
    directory = tmp_path_factory.mktemp("good")
    cfg = tiny_config("ME", n_routed_experts=2, num_experts_per_tok=1, mtp_num_depths=1,
                      mtp_pattern="E")  # fmt: skip
    model = HybridLM(cfg, seed=5)
    hub = {n: part.detach().bfloat16().contiguous()
           for name, tensor in tensors_by_name(model).items()
           for n, part in to_hub(name, tensor)}  # fmt: skip
    halves = {file: {n: hub[n] for n in sorted(hub)[i::2]} for i, file in enumerate(SHARDS)}
    for file, tensors in halves.items():
        save_file(tensors, directory / file, {"format": "pt"})
    weight_map = {n: file for file, tensors in halves.items() for n in tensors}
    (directory / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    (directory / "config.json").write_text(json.dumps(cfg.to_hf()))
    return directory, {n: t.clone() for n, t in tensors_by_name(load_model(directory)).items()}


# ---- mutations: each takes a source of randomness and a file's bytes, and gives new ones --------


def flip(rng: random.Random, text: bytes) -> bytes:
    """Change, insert or remove a few bytes, or repeat a stretch."""
    out = bytearray(text)
    for _ in range(rng.choice([1, 1, 1, 2, 8])):
        at = rng.randrange(len(out) + 1)
        match rng.randrange(4):
            case 0:
                out[at : at + 1] = bytes([rng.randrange(256)])
            case 1:
                out[at:at] = rng.choice([b'"', b"{", b"[", b",", b"0", b"-", b"\xff", b"\0", b"\\"])
            case 2:
                del out[at : at + rng.choice([1, 1, 2, 30])]
            case 3:
                out[at:at] = out[at : at + rng.randrange(200)]
    return bytes(out)


def nest(rng: random.Random, text: bytes) -> bytes:
    depth = rng.choice([10, 900, 100_000])
    return text[:-1] + b',"deep":' + rng.choice([b"[", b'{"a":']) * depth + b"}"


def repeat_key(rng: random.Random, text: bytes) -> bytes:
    """An object's first entry twice, the second time perhaps with another value."""
    pairs = list(json.loads(text).items())
    key, value = rng.choice(pairs)
    pair = f"{json.dumps(key)}:{json.dumps(rng.choice([value, value, 0, {}]))}"
    return b"{" + pair.encode() + b"," + text.lstrip()[1:]


def change_value(rng: random.Random, value: object) -> object:
    """Replace something somewhere in a JSON value, remove or rename it."""
    if isinstance(value, dict) and value and rng.random() < 0.9:
        key = rng.choice(list(value))
        out = dict(value)
        match rng.randrange(8):
            case 0:
                del out[key]
            case 1:
                out[rng.choice(["x", "", "é", key + "x", key[1:], "\ud800"])] = out.pop(key)
            case 2:
                out[key] = value[rng.choice(list(value))]
            case _:
                out[key] = change_value(rng, value[key])
        return out
    if isinstance(value, list) and value and rng.random() < 0.7:
        at = rng.randrange(len(value))
        return [*value[:at], change_value(rng, value[at]), *value[at + 1 :]]
    if isinstance(value, int) and rng.random() < 0.2:
        return rng.choice([float(value), bool(value), str(value), [value]])
    if isinstance(value, int) and rng.random() < 0.5:
        return value + rng.choice([-(2**64), -1000, -8, -2, -1, 1, 2, 4, 1000, 2**62, 2**64])
    if isinstance(value, str) and rng.random() < 0.3:
        return rng.choice(["F64", "I32", "U8", "F8_E4M3", "F4", "BOOL", "C64", value[::-1]])
    return rng.choice(VALUES)


def change_json(rng: random.Random, text: bytes) -> bytes:
    return json.dumps(change_value(rng, json.loads(text))).encode()


def change_text(rng: random.Random, text: bytes) -> bytes:
    return rng.choice([flip, flip, nest, repeat_key, change_json, change_json, change_json])(
        rng, text
    )


def change_shard(rng: random.Random, content: bytes) -> bytes:
    length = int.from_bytes(content[:8], "little")
    text, data = content[8 : 8 + length], content[8 + length :]
    match rng.randrange(10):
        case 0:
            return content[: rng.choice([0, 1, 7, 8, 9, length, length + 8, len(content) - 1,
                                         rng.randrange(len(content))])]  # fmt: skip
        case 1:
            return content + bytes(rng.choice([1, 8, 4096]))
        case 2:
            claimed = rng.choice([0, 1, 2, length - 1, length + 1, length + 8, len(content) - 8,
                                  len(content), 100_000_001, 2**31, 2**63, 2**64 - 1])  # fmt: skip
            return claimed.to_bytes(8, "little") + content[8:]
        case 3:
            return flip(rng, content[: 8 + length]) + data
        case 4:
            return content[:8] + flip(rng, text)[:length].ljust(length) + data
    text = change_text(rng, text.rstrip())
    return len(text).to_bytes(8, "little") + text + data


def change_index(rng: random.Random, content: bytes) -> bytes:
    if rng.random() < 0.6:
        return change_text(rng, content)
    index = json.loads(content)
    weight_map = index["weight_map"]
    for key in rng.sample(list(weight_map), rng.choice([1, 1, len(weight_map)])):
        weight_map[key] = rng.choice(FILE_NAMES)
    return json.dumps(index).encode()


CHANGES: dict[str, Callable[[random.Random, bytes], bytes]] = {
    SHARDS[0]: change_shard,
    SHARDS[1]: change_shard,
    INDEX: change_index,
    "config.json": change_text,
}


@contextmanager
def limited_memory() -> Iterator[None]:
    """Make an allocation of more than ``MEMORY`` fail."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    old = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, old[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, old)


def broken_directories(good: Path, place: Path, count: int) -> Iterator[tuple[str, bytes]]:
    """Give ``place`` one broken file after the other; yields its name and content."""
    place.mkdir()
    for name in CHANGES:  # links, because overwriting files is slow
        (place / name).symlink_to(good / name)
    for case in range(count):
        rng = random.Random(case)
        name = rng.choice([*SHARDS, *SHARDS, INDEX, "config.json"])
        changed = CHANGES[name](rng, (good / name).read_bytes())
        # Bits that are read as another format of the same size are other weights, and valid.
        if b'"F16"' in changed:
            continue
        (place / name).unlink()
        (place / name).write_bytes(changed)
        yield name, changed
        (place / name).unlink()
        (place / name).symlink_to(good / name)


def outcome(directory: Path, expected: dict[str, torch.Tensor]) -> str:
    """ "refused" or "loaded"; anything else fails."""
    try:
        model = load_model(directory)
    except UserError:
        return "refused"
    loaded = tensors_by_name(model)
    assert loaded.keys() == expected.keys()
    assert all(torch.equal(loaded[name], expected[name]) for name in expected)
    return "loaded"


@pytest.mark.slow
def test_broken_files_are_refused_or_change_nothing(good, tmp_path) -> None:
    directory, expected = good
    outcomes: Counter[tuple[str, str]] = Counter()
    with limited_memory():
        with pytest.raises(RuntimeError, match="memory"):
            torch.empty(2 * MEMORY, dtype=torch.uint8)
        for name, _ in broken_directories(directory, tmp_path / "bad", CASES):
            began = time.process_time()
            result = outcome(tmp_path / "bad", expected)
            outcomes[name, result] += 1
            assert time.process_time() - began < SECONDS_PER_CASE
    assert outcomes.total() > 0.95 * CASES
    for name in CHANGES:
        assert outcomes[name, "refused"] > 200, outcomes
        assert outcomes[name, "loaded"] > 5, outcomes  # such as blanks, and fields nobody reads


def test_importing_broken_directories_leaves_nothing(good, tmp_path) -> None:
    directory, expected = good
    outcomes: Counter[str] = Counter()
    for case, _ in enumerate(broken_directories(directory, tmp_path / "bad", 250)):
        out = tmp_path / "out" / str(case)
        try:
            import_directory(tmp_path / "bad", out, show_progress=False)
        except UserError:
            outcomes["refused"] += 1
            assert not out.parent.exists() or not os.listdir(out.parent)
        else:
            assert outcome(out, expected) == "loaded"
            outcomes["imported"] += 1
            shutil.rmtree(out)
    assert outcomes["refused"] > 150
    assert outcomes["imported"] > 5


@pytest.mark.parametrize("name", [*SHARDS, INDEX, "config.json"])
@pytest.mark.parametrize("kind", ["absent", "directory", "fifo", "loop", "device", "dangling"])
def test_what_is_no_file(good, tmp_path, name, kind) -> None:
    directory, expected = good
    shutil.copytree(directory, tmp_path / "bad")
    path = tmp_path / "bad" / name
    path.unlink()
    if kind == "directory":
        path.mkdir()
    elif kind == "fifo":
        os.mkfifo(path)
    elif kind != "absent":
        path.symlink_to({"loop": name, "device": "/dev/zero", "dangling": "nowhere"}[kind])
    assert outcome(tmp_path / "bad", expected) == "refused"


def test_links_are_followed(good, tmp_path) -> None:
    """The Hugging Face cache holds links to files elsewhere."""
    directory, expected = good
    for path in directory.iterdir():
        (tmp_path / path.name).symlink_to(path)
    assert outcome(tmp_path, expected) == "loaded"


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [-1, -4]},
        {"shape": [4.0]},
        {"shape": [True, 4]},
        {"shape": [2, 1]},
        {"shape": "4"},
        {"shape": [0, 2**64], "data_offsets": [16, 16]},
        {"data_offsets": [0.0, 16.0]},
        {"data_offsets": [False, 16]},
        {"data_offsets": [16, 0]},
        {"data_offsets": [0, 16, 16]},
        {"dtype": ["F32"]},
        {"dtype": "F33"},
    ],
    ids=str,
)
def test_entries_that_make_no_sense(tmp_path, entry) -> None:
    good = {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}
    for change, valid in (({}, True), (entry, False)):
        text = json.dumps({"x": good | change}).encode()
        path = tmp_path / "x.safetensors"
        path.write_bytes(len(text).to_bytes(8, "little") + text + bytes(16))
        if valid:
            with TensorFile(path) as file:
                assert torch.equal(file.read("x"), torch.zeros(4))
                assert torch.equal(file.read("x", range(1, 3)), torch.zeros(2))
        else:
            with pytest.raises(UserError, match=r"x\.safetensors is not a valid safetensors file"):
                TensorFile(path)


@pytest.mark.parametrize("name", [INDEX, "config.json"])
def test_a_key_given_twice_is_an_error_even_with_the_same_value(good, tmp_path, name) -> None:
    """Which of the two counts differs between programs."""
    directory, _ = good
    shutil.copytree(directory, tmp_path / "bad")
    text = (directory / name).read_bytes()
    key, value = list(json.loads(text).items())[-1]
    text = f"{{{json.dumps(key)}:{json.dumps(value)},".encode() + text[1:]
    (tmp_path / "bad" / name).write_bytes(text)
    with pytest.raises(UserError, match=f"{name}: the key '{key}' appears twice"):
        load_model(tmp_path / "bad")
