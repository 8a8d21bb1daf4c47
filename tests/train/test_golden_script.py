"""scripts/golden.py: what its comparison notices. The runs themselves are made by hand."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import golden
import pytest
from golden_runs import WORKS, with_needs, write_inputs

Row = dict[str, Any]


def write_rows(path: Path, rows: list[Row]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows() -> list[Row]:
    return [
        {
            "step": step,
            "loss": 1 / (step + 2),
            "mtp_losses": [0.1 * step, 0.3 * step],
            "max_vio_per_layer": {"layers.1": 0.25, "layers.3": 0.7 / step},
            "sample_hash": f"{step:016x}",
            "step_seconds": 0.1,
            "heldout_loss": None,
        }
        for step in (1, 2, 3)
    ]


def flip_last_bit(row: Row) -> None:
    row["loss"] = math.nextafter(row["loss"], 1)


def flip_in_list(row: Row) -> None:
    row["mtp_losses"][1] = math.nextafter(row["mtp_losses"][1], 9)


def flip_in_dict(row: Row) -> None:
    row["max_vio_per_layer"]["layers.3"] += 2**-50


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (flip_last_bit, "step 2 loss: 0.25 != 0.25000000000000006"),
        (flip_in_list, "step 2 mtp_losses: [0.2, 0.6] != [0.2, 0.6000000000000001]"),
        (flip_in_dict, "step 2 max_vio_per_layer.layers.3: 0.35 != 0.35000000000000087"),
        (lambda row: row.update(sample_hash="0" * 16), "step 2 sample_hash"),
        (lambda row: row.update(heldout_loss=2.0), "step 2 heldout_loss: None != 2.0"),
        (lambda row: row.update(loss="NaN"), "step 2 loss: 0.25 != 'NaN'"),
        (lambda row: row.update(loss=-0.0), "step 2 loss: 0.25 != -0.0"),
        (lambda row: row.update(step=4), "step 2 is of the base alone"),
        (lambda row: row.update(losses={"kl": 1.0}), "step 2 losses.kl: a field of this checkout"),
        (lambda row: row.pop("loss"), "step 2 loss: a field of the base alone"),
        (lambda row: row.update(step_seconds=9.0), ""),
        (lambda row: None, ""),
    ],
)
def test_rows(tmp_path: Path, change: Callable[[Row], object], words: str) -> None:
    changed = rows()
    change(changed[1])
    write_rows(tmp_path / "base", rows())
    write_rows(tmp_path / "now", changed)
    found = golden.difference_of_rows(tmp_path / "base", tmp_path / "now")
    assert found.startswith(words)
    assert bool(found) == bool(words)


def test_a_missing_step_is_noticed_on_either_side(tmp_path: Path) -> None:
    write_rows(tmp_path / "base", rows())
    for kept in (rows()[:2], []):
        write_rows(tmp_path / "now", kept)
        missing = len(kept) + 1
        found = golden.difference_of_rows(tmp_path / "base", tmp_path / "now")
        assert found == f"step {missing} is of the base alone"
        found = golden.difference_of_rows(tmp_path / "now", tmp_path / "base")
        assert found == f"step {missing} is of this checkout alone"


def test_minus_zero_is_not_zero(tmp_path: Path) -> None:
    write_rows(tmp_path / "base", [{"step": 1, "aux_loss": 0.0}])
    write_rows(tmp_path / "now", [{"step": 1, "aux_loss": -0.0}])
    assert golden.difference_of_rows(tmp_path / "base", tmp_path / "now")


def test_only_a_new_field_may_be_allowed(tmp_path: Path) -> None:
    changed = rows()
    for row in changed:
        row["losses"] = {"kl": 1.0}
    write_rows(tmp_path / "base", rows())
    write_rows(tmp_path / "now", changed)
    sides = tmp_path / "base", tmp_path / "now"
    assert golden.difference_of_rows(*sides, ["loss"])
    assert not golden.difference_of_rows(*sides, ["losses"])
    assert not golden.difference_of_rows(*sides, ["losses.kl"])
    flip_last_bit(changed[2])
    write_rows(tmp_path / "now", changed)
    assert "step 3 loss" in golden.difference_of_rows(*sides, ["losses", "loss"])


def write_run(directory: Path) -> Path:
    """What a run of fine-tuning leaves; durations, plots and older checkpoints differ."""
    here = str(directory).encode()
    files: dict[str, bytes] = {
        "checkpoints/step_00000010/model.safetensors": here,
        "checkpoints/step_00000020/model.safetensors": bytes(range(256)) * 40,
        "model/adapter_model.safetensors": b"adapter",
        "model/seconds.json": b'{"seconds": %d.5e-07}' % len(here),
        "plots/losses.png": here,
    }
    for name, content in files.items():
        (directory / name).parent.mkdir(parents=True, exist_ok=True)
        (directory / name).write_bytes(content)
    return directory


@pytest.fixture
def runs(tmp_path: Path) -> tuple[Path, Path]:
    return write_run(tmp_path / "base" / "lora"), write_run(tmp_path / "checkout" / "lora")


WEIGHTS = "checkpoints/step_00000020/model.safetensors"


def test_one_flipped_bit_of_a_file_is_noticed(runs: tuple[Path, Path]) -> None:
    assert golden.difference_of_files(*runs) == ""
    for name, place in ((WEIGHTS, 5000), (WEIGHTS, -1), ("model/adapter_model.safetensors", 0)):
        path = runs[1] / name
        whole = path.read_bytes()
        content = bytearray(whole)
        content[place] ^= 1
        path.write_bytes(content)
        assert golden.difference_of_files(*runs).startswith(f"{name}: sha256 ")
        assert golden.difference_of_files(*runs, [path.name]) == ""
        path.write_bytes(whole)
    assert golden.difference_of_files(*runs) == ""


def test_a_missing_file_is_noticed_on_either_side(runs: tuple[Path, Path]) -> None:
    (runs[1] / WEIGHTS).unlink()
    assert golden.difference_of_files(*runs) == f"{WEIGHTS}: a file of the base alone"
    assert golden.difference_of_files(*runs[::-1]) == f"{WEIGHTS}: a file of this checkout alone"


def test_a_manifest_is_named_only_where_it_alone_differs(runs: tuple[Path, Path]) -> None:
    manifest = f"{Path(WEIGHTS).parent}/manifest.json"
    for run in runs:
        (run / manifest).write_text(str(run))
    assert golden.difference_of_files(*runs).startswith(f"{manifest}: sha256 ")
    (runs[0] / WEIGHTS).write_bytes(b"other")
    assert golden.difference_of_files(*runs).startswith(f"{WEIGHTS}: sha256 ")


def test_a_missing_checkpoint_is_noticed(runs: tuple[Path, Path]) -> None:
    shutil.rmtree((runs[1] / WEIGHTS).parent)
    assert "step_00000010" in golden.difference_of_files(*runs)


def test_nothing_is_not_equal_to_nothing(tmp_path: Path) -> None:
    assert golden.difference_of_files(tmp_path / "a", tmp_path / "b") == "there is no file"


def test_report_counts_what_differs_and_what_failed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sides = [golden.Side(tmp_path, tmp_path, tmp_path / n, tmp_path) for n in ("base", "now")]
    for side in sides:
        for name in ("lora", "distill"):
            write_rows(write_run(side.directory / name) / "metrics.jsonl", rows())
    fine = {"lora": "", "distill": ""}
    assert golden.report(*sides, [fine, fine], []) == 0
    assert capsys.readouterr().out.count("equal\n") == 4
    assert golden.report(*sides, [fine, fine | {"distill": "status 2: error: x"}], []) == 1
    assert "done | status 2: error: x" in capsys.readouterr().out
    write_rows(sides[1].directory / "lora" / "metrics.jsonl", rows()[:2])
    (sides[0].directory / "lora" / WEIGHTS).write_bytes(b"other")
    assert golden.report(*sides, [fine, fine], []) == 2


def test_a_work_that_fails_stops_what_needs_it(tmp_path: Path) -> None:
    """With an interpreter that says that it is the tree's and can do nothing else."""
    python = tmp_path / "python"
    here = f"{tmp_path}/nemo_hybrid/__init__.py"
    python.write_text(
        f'#!/bin/sh\n[ "$1" = -c ] && echo {here} && exit\necho error: no >&2\nexit 3'
    )
    python.chmod(0o755)
    names = with_needs(["lora"])
    assert names == ["store", "samples", "pretrain", "import", "lora"]
    failed = golden.Side(tmp_path, python, tmp_path, tmp_path).work(names)
    assert failed["store"] == "status 3: error: no"
    assert failed["pretrain"] == "not run, for want of store"
    assert failed["lora"] == "not run, for want of samples"
    with pytest.raises(SystemExit, match="nemo_hybrid is"):
        golden.Side(tmp_path / "elsewhere", python, tmp_path, tmp_path).work([])


def test_inputs_are_the_same_at_every_call(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        write_inputs(tmp_path / name)
    assert golden.difference_of_files(tmp_path / "a", tmp_path / "b") == ""
    assert 200_000 < (tmp_path / "a/corpus.jsonl").stat().st_size < 500_000
    assert all(need in WORKS for work in WORKS.values() for need in work.needs.split())


def test_an_unknown_revision_is_a_mistake(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        golden.main(["--base", "no-such-revision"])
    assert "no revision no-such-revision" in capsys.readouterr().err
