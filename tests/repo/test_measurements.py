"""The scripts that measure, on problems so small that their figures say nothing."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from helpers.corpus import write_corpus
from helpers.processes import run_python
from helpers.runs import tiny_run
from nemo_hybrid.config.read import dump_config

SCRIPTS = Path(__file__).parents[2] / "scripts"


@pytest.mark.sweep
def test_checkpoint_speed(tmp_path: Path) -> None:
    words = ["--gib", "0.06", "--repeat", "2", "--pause", "0"]
    out = tmp_path / "speed.json"
    (done,) = run_python([SCRIPTS / "checkpoint_speed.py", "--dir", tmp_path, "--out", out, *words])
    found = json.loads(out.read_text())
    assert found["bytes"] >= 0.06 * 2**30
    assert {len(times) for times in found["seconds"].values()} == {2}
    for kind in ("write", "read", "read_cached"):
        ours, plain = found["median"][kind], found["median"][f"{kind}_plain"]
        assert found[f"{kind}_ratio"] == pytest.approx(plain / ours)
    assert found["environment"]["commit"]
    assert "GiB of state, median of 2" in done.stdout
    assert [p.name for p in tmp_path.iterdir()] == ["speed.json"]


def test_ep_overhead(tmp_path: Path) -> None:
    config, out = tmp_path / "run.yaml", tmp_path / "ep.json"
    run = tiny_run(write_corpus(tmp_path / "store"))
    config.write_text(dump_config(run))
    words = [SCRIPTS / "ep_overhead.py", "--config", config, "--steps", "3", "--out", out]
    first, _ = run_python([*words, "--train.seed", "3"], 2)
    found = json.loads(out.read_text())
    assert {name: len(times) for name, times in found["seconds"].items()} == {"ep 1": 3, "ep 2": 3}
    assert found["ratio"] == pytest.approx(found["median"]["ep 2"] / found["median"]["ep 1"])
    assert found["train"]["seed"] == 3
    assert f"EP=2 over EP=1: {found['ratio']:.3f}" in first.stdout
    alone = run_python([*words], 1, succeed=False)[0]
    assert alone.status == 2
    assert "two processes are compared, torchrun started 1" in alone.stderr
