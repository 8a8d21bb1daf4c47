"""What the version before left behind still resumes, opens, merges and verifies.

The files in tests/fixtures/last_version were made by that version's code
(tests/fixtures/make_fixtures.py), together with what it made of them.
"""

from __future__ import annotations

import hashlib
import json
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file
from torch import Tensor

from helpers.commands import Commands, commands_in_one_process
from nemo_hybrid.data.store import Store

LAST = Path(__file__).parents[1] / "fixtures/last_version"
EXPECTED = json.loads((LAST / "expected.json").read_text())
BAND = {"loss": 1e-3, "mtp_losses": 1e-3, "grad_norm": 5e-3}
"""Relative. Weights and state are the stored ones, so what differs is how another processor or
torch rounds in bf16; more than two steps would not stay in the bands."""
LARGEST = 100_000


@pytest.fixture(scope="module")
def commands() -> Iterator[Commands]:
    with commands_in_one_process() as run:
        yield run


def off(found: list[dict[str, Any]], expected: list[dict[str, Any]]) -> float:
    """Largest distance, in bands."""
    return max(
        float(np.max(np.abs(np.subtract(ours[field], theirs[field])) / theirs[field])) / band
        for ours, theirs in zip(found, expected, strict=True)
        for field, band in BAND.items()
    )


def rows(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def resume(commands: Commands, command: str, kind: str, out: Path, *words: str | Path) -> None:
    """Go on with a copy of the stored run; the steps that follow must be those of the version that
    made it."""
    shutil.copytree(LAST / kind, out)
    before, config = rows(out), out / "config.yaml"
    # Where the base lies is part of which run it is, and the base has moved.
    moved = re.sub("/.*(?=/run/checkpoints/)", str(LAST), config.read_text())
    config.write_text(moved)
    said = commands(command, "--config", config, "--run_dir", out, *words)
    assert said.status == 0, said.err
    assert "going on from" in said.out
    made = rows(out)
    expected = EXPECTED[kind]["resumed"]
    assert made[: len(before)] == before
    found = made[len(before) :]
    for field in ("step", "sample_hash"):
        assert [row[field] for row in found] == [row[field] for row in expected]
    print(f"{kind}: {off(found, expected):.3g} bands")
    assert off(found, expected) < 1


def test_a_run_of_two_processes_goes_on_as_it_did(commands: Commands, tmp_path: Path) -> None:
    words = ("--data.path", LAST / "store", "--parallel.ep", "1")
    resume(commands, "pretrain", "run", tmp_path / "run", *words)


def test_an_adapter_s_run_goes_on_as_it_did(commands: Commands, tmp_path: Path) -> None:
    resume(commands, "finetune", "adapter", tmp_path / "adapter", "--data.path", LAST / "samples")


@pytest.mark.parametrize("kind", ["run", "adapter"])
def test_bands_fit(kind: str) -> None:
    """By the same version: they hold what another division over processes rounds (the run was
    unbroken on two), and not the loss of the optimizer's first moments."""
    assert off(EXPECTED[kind]["unbroken"], EXPECTED[kind]["resumed"]) < 0.5
    assert off(EXPECTED[kind]["without_moments"], EXPECTED[kind]["resumed"]) > 5


def as_recorded(ids: np.ndarray, recorded: dict[str, Any]) -> bool:
    digest = hashlib.sha256(ids.astype("<i8").tobytes()).hexdigest()
    return ids[:64].tolist() == recorded["first"] and digest == recorded["sha256"]


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_token_store_gives_the_recorded_ids(split: str) -> None:
    recorded = EXPECTED["store"][split]
    store = Store.open(LAST / "store" / split)
    end = recorded["documents"][-1]
    ids = store.read(0, end)
    assert as_recorded(ids, recorded["tokens"])
    assert np.flatnonzero(store.document_starts(0, end)).tolist() == recorded["documents"][:-1]
    ids[-1] ^= 1
    assert not as_recorded(ids, recorded["tokens"])


@pytest.mark.parametrize("split", ["train", "heldout"])
def test_sample_store_gives_the_recorded_ids_and_targets(split: str) -> None:
    recorded = EXPECTED["samples"][split]
    store = Store.open(LAST / "samples" / split, samples=True)
    samples = [store.sample(number) for number in range(len(recorded["documents"]) - 1)]
    assert [len(ids) for ids, _ in samples] == np.diff(recorded["documents"]).tolist()
    assert as_recorded(np.concatenate([ids for ids, _ in samples]), recorded["tokens"])
    assert as_recorded(np.concatenate([learnt for _, learnt in samples]), recorded["targets"])


def weights(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = {}
    for path in directory.glob("model*.safetensors"):
        found |= load_file(path)
    return found


def updates(adapter: Path) -> dict[str, np.ndarray]:
    """B A alpha / r of every adapted weight, from PEFT's files alone.

    Of stacked experts PEFT stores A [E r, in] and B [out, r E], the expert running fastest in B; of
    two stacks in a layer the first in target_parameters is wrapped by the other.
    """
    settings = json.loads((adapter / "adapter_config.json").read_text())
    scale, r = settings["lora_alpha"] / settings["r"], settings["r"]
    tensors = {
        n: t.double().numpy() for n, t in load_file(adapter / "adapter_model.safetensors").items()
    }
    found = {}
    for name, a in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        b = tensors[name.replace("lora_A", "lora_B")]
        place = name.removeprefix("base_model.model.model.").removesuffix(".lora_A.weight")
        if ".experts" not in place:
            found[f"backbone.{place}.weight"] = scale * b @ a
            continue
        leaf = "up_proj" if place.endswith(".base_layer") else "down_proj"
        place = place.removesuffix(".base_layer")
        experts = len(a) // r
        for e in range(experts):
            each = scale * b[:, e::experts] @ a[e * r : (e + 1) * r]
            found[f"backbone.{place}.{e}.{leaf}.weight"] = each
    return found


def test_the_adapter_merges_to_base_plus_update(commands: Commands, tmp_path: Path) -> None:
    base, merged = LAST / "run/checkpoints/step_00000004", tmp_path / "merged"
    said = commands("merge", "--from", LAST / "adapter", "--base", base, "--out", merged)
    assert said.status == 0, said.err
    before, after = weights(base), weights(merged)
    added = updates(LAST / "adapter/checkpoints/step_00000002")
    assert before.keys() == after.keys() > added.keys()
    assert len(added) == 2 + 4 * 2  # in_proj, q_proj, both matrices of four experts
    for name, weight in before.items():
        assert after[name].dtype == weight.dtype
        ours = after[name].double().numpy()
        exact = weight.double().numpy() + added.get(name, 0.0)
        # bf16 keeps 8 bits of the sum, which fp32 rounds first.
        assert np.all(np.abs(ours - exact) <= 2.0**-7.99 * np.abs(exact) + 1e-7), name
        if name in added:  # were it lost, or half of it
            assert np.abs(ours - exact).max() < 0.1 * np.abs(added[name]).max()


def test_the_export_verifies(commands: Commands, tmp_path: Path) -> None:
    said = commands("verify-export", LAST / "export")
    assert said.status == 0, said.out + said.err
    damaged = shutil.copytree(LAST / "export", tmp_path / "export")
    path = next(damaged.glob("*.safetensors"))
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert commands("verify-export", damaged).status == 2


@pytest.mark.parametrize("name", ["store", "samples", "run", "adapter", "export"])
def test_fixtures_are_small(name: str) -> None:
    assert 0 < sum(p.stat().st_size for p in (LAST / name).rglob("*") if p.is_file()) < LARGEST
