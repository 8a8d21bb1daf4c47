"""metrics.jsonl: full precision, valid JSON, and the cut on resume; TensorBoard's purge."""

import json
import math
import struct
import time
from contextlib import closing
from pathlib import Path

import pytest

from nemo_hybrid.errors import UserError
from nemo_hybrid.train.metrics import (
    MetricsWriter,
    StepMetrics,
    cut_back,
    evaluations,
    read_expert_load,
    read_metrics,
)


def row(step: int, **changes: object) -> StepMetrics:
    values = dict(
        step=step,
        loss=1 / 3 + step,
        mtp_losses=[math.pi, 1e-30],
        aux_loss=0.1,
        lr=1e-3 / 7,
        grad_norm=0.7,
        tokens=4096,
        tokens_total=4096 * step,
        tokens_per_s=1234.5,
        step_seconds=3.3,
        data_seconds=0.01,
        mfu=None,
        memory_gb=1.25,
        max_vio=0.5,
        max_vio_per_layer={"layers.1": 0.5, "layers.4": 0.25},
        dead_experts=0,
        sample_hash="NaN",
    )
    return StepMetrics(**{**values, **changes})


def write(run_dir: Path, resume: int, steps: range) -> None:
    with closing(MetricsWriter(run_dir, resume)) as writer:
        for step in steps:
            writer.write(row(step), {"layers.1": [step, 2, 3]})


def steps_of(path: Path) -> list[int]:
    return [m.step for m in read_metrics(path)]


def test_rows_read_back_exactly(tmp_path):
    rows = [
        row(1, heldout_loss=8.5, heldout_mtp_losses=[8.25, 8.125], heldout_loss_before=9.5),
        row(2, loss=math.inf, grad_norm=-math.inf, mfu=0.1 + 0.2),
    ]
    with closing(MetricsWriter(tmp_path, 0)) as writer:
        for r in rows:
            writer.write(r)
    assert read_metrics(tmp_path / "metrics.jsonl") == rows


def test_not_a_number_stays_valid_json(tmp_path):
    with closing(MetricsWriter(tmp_path, 0)) as writer:
        writer.write(row(1, loss=math.nan, mtp_losses=[math.nan, 1.0]))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    text = (tmp_path / "metrics.jsonl").read_text()
    record = json.loads(text, parse_constant=refuse)
    assert record["loss"] == "NaN"
    assert record["mfu"] is None
    read = read_metrics(tmp_path / "metrics.jsonl")[0]
    assert math.isnan(read.loss)
    assert math.isnan(read.mtp_losses[0])
    assert read.sample_hash == "NaN"


def test_a_row_is_on_file_before_the_writer_is_closed(tmp_path):
    writer = MetricsWriter(tmp_path, 0)
    writer.write(row(1))
    assert steps_of(tmp_path / "metrics.jsonl") == [1]
    writer.close()


def test_resume_cuts_back_to_the_checkpoint(tmp_path):
    write(tmp_path, 0, range(1, 8))
    path = tmp_path / "metrics.jsonl"
    before = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(before) + b'{"step":8,"loss":1.')
    write(tmp_path, 5, range(6, 10))
    assert steps_of(path) == list(range(1, 10))
    assert path.read_bytes().splitlines(keepends=True)[:5] == before[:5]
    assert read_expert_load(tmp_path / "expert_load.jsonl")[0] == list(range(1, 10))
    assert not list(tmp_path.glob("*.tmp"))


def test_a_fresh_start_cuts_everything(tmp_path):
    write(tmp_path, 0, range(1, 4))
    write(tmp_path, 0, range(1, 3))
    assert steps_of(tmp_path / "metrics.jsonl") == [1, 2]


@pytest.mark.parametrize("torn", [b'{"step":4', b"\x00\x00\x00", b"17", b"\xff\xfe"])
def test_a_torn_last_line_is_left_out(tmp_path, torn):
    write(tmp_path, 0, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole + torn)
    assert steps_of(path) == [1, 2, 3]
    cut_back(path, 10)
    assert path.read_bytes() == whole


def test_a_whole_last_line_without_newline_is_kept(tmp_path):
    write(tmp_path, 0, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    whole = path.read_bytes()
    path.write_bytes(whole.rstrip(b"\n"))
    cut_back(path, 3)
    assert path.read_bytes() == whole


def test_a_damaged_line_inside_is_an_error_and_changes_nothing(tmp_path):
    write(tmp_path, 0, range(1, 4))
    path = tmp_path / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    damaged = lines[0] + lines[1][:20] + b"\n" + lines[2]
    path.write_bytes(damaged)
    for act in (lambda: read_metrics(path), lambda: MetricsWriter(tmp_path, 1)):
        with pytest.raises(UserError, match="line 2 is damaged"):
            act()
    assert path.read_bytes() == damaged


def test_missing_file_and_unwritable_directory(tmp_path):
    with pytest.raises(UserError, match="cannot read"):
        read_metrics(tmp_path / "metrics.jsonl")
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="cannot write metrics"):
        MetricsWriter(tmp_path / "file", 0)


def test_rows_of_something_else_are_an_error(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "height": 2}\n')
    with pytest.raises(UserError, match="not a row of metrics"):
        read_metrics(path)


def test_a_full_disk_is_one_clear_message(tmp_path):
    if not Path("/dev/full").exists():
        pytest.skip("needs /dev/full")
    (tmp_path / "expert_load.jsonl").symlink_to("/dev/full")
    from nemo_hybrid.train.metrics import _Appender

    appender = _Appender(tmp_path / "expert_load.jsonl")
    with pytest.raises(UserError, match="No space left"):
        appender.append({"step": 1})


def test_expert_load_is_thinned_and_keeps_the_last(tmp_path):
    write(tmp_path, 0, range(1, 26))
    path = tmp_path / "expert_load.jsonl"
    path.write_bytes(path.read_bytes() + b'{"step":26,"load":{"layers.1":[')
    steps, loads = read_expert_load(path, most=7)
    assert steps == [1, 5, 9, 13, 17, 21, 25]
    assert loads["layers.1"] == [[s, 2, 3] for s in steps]
    assert read_expert_load(path)[0] == list(range(1, 26))


def tensorboard_points(run_dir: Path, tag: str) -> list[tuple[int, float]]:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run_dir / "tensorboard"))
    events.Reload()
    return [(e.step, e.value) for e in events.Scalars(tag)]


def test_tensorboard_shows_each_step_once_after_a_resume(tmp_path):
    write(tmp_path, 0, range(1, 8))
    time.sleep(1.1)  # event files are read in the order of their names: by second, then by text
    write(tmp_path, 5, range(6, 10))
    points = tensorboard_points(tmp_path, "loss/train")
    assert [step for step, _ in points] == list(range(1, 10))
    single = struct.unpack("f", struct.pack("f", 1 / 3 + 9))[0]
    assert points[-1][1] == single
    assert len(tensorboard_points(tmp_path, "loss/mtp_2")) == 9


def evaluated_rows() -> list[StepMetrics]:
    before = dict(heldout_loss_before=9.0, heldout_mtp_losses_before=[9.5, 9.75])
    after = dict(heldout_loss=8.0, heldout_mtp_losses=[8.5, 8.75])
    return [row(1, **before, **after), row(2), row(3, heldout_loss=7.0, heldout_mtp_losses=[])]


def test_evaluation_of_the_initial_weights_is_at_step_0():
    expected = [(0, [9.0, 9.5, 9.75]), (1, [8.0, 8.5, 8.75]), (3, [7.0])]
    assert evaluations(evaluated_rows()) == expected


def test_tensorboard_shows_step_0_once_after_a_fresh_start_again(tmp_path):
    for _ in range(2):
        with closing(MetricsWriter(tmp_path, 0)) as writer:
            for r in evaluated_rows():
                writer.write(r)
    assert tensorboard_points(tmp_path, "heldout/loss") == [(0, 9.0), (1, 8.0), (3, 7.0)]
    assert tensorboard_points(tmp_path, "heldout/mtp_2") == [(0, 9.75), (1, 8.75)]
