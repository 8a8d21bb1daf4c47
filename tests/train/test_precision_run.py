"""Runs in low precision: resumes, recomputation, the late switch, NaN, what a run says of itself,
and what is refused."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from helpers.once import once
from helpers.processes import run_python
from nemo_hybrid.cli import main
from nemo_hybrid.config.read import dump_config, load_config
from nemo_hybrid.errors import UserError
from nemo_hybrid.precision import policy
from nemo_hybrid.train.checks import check_precision
from nemo_hybrid.train.metrics import StepMetrics, evaluations, read_metrics
from nemo_hybrid.train.run_dir import RunLock, open_run
from train.low_precision import SAVED, low_run


@pytest.fixture(scope="session")
def runs(tmp_path_factory: pytest.TempPathFactory, store: Path) -> Path:
    program = Path(__file__).with_name("low_precision.py")
    return once(tmp_path_factory, "low", lambda out: run_python([program, store, out]) and None)


@pytest.fixture
def rows(runs: Path) -> Callable[[str], list[StepMetrics]]:
    return lambda name: read_metrics(runs / name / "run/metrics.jsonl")


@pytest.fixture
def weights(runs: Path) -> Callable[[str], dict[str, bytes]]:
    def read(name: str) -> dict[str, bytes]:
        (*_, newest) = sorted((runs / name / "run/checkpoints").glob("step_*"))
        return {path.name: path.read_bytes() for path in newest.glob("*.safetensors")}

    return read


def figures(rows: list[StepMetrics]) -> list[tuple[float, ...]]:
    return [(r.loss, *r.mtp_losses, r.grad_norm) for r in rows]


Rows = Callable[[str], list[StepMetrics]]
Weights = Callable[[str], dict[str, bytes]]


def test_resumed_run_is_bit_identical(rows: Rows, weights: Weights) -> None:
    plain, resumed = rows("plain"), rows("resumed")
    seconds = [r.step_seconds for r in plain]
    assert [r.step_seconds for r in resumed][:SAVED] == seconds[:SAVED]
    assert [r.step_seconds for r in resumed][SAVED:] != seconds[SAVED:]  # made again
    assert figures(resumed) == figures(plain)
    assert evaluations(resumed) == evaluations(plain)
    assert len(weights("plain")) >= 3
    assert weights("resumed") == weights("plain")


def test_other_rounding_streams_would_be_noticed(rows: Rows, weights: Weights) -> None:
    """Other random bits change gradients, but neither data nor the forward pass."""
    plain, other = rows("plain"), rows("forgetful")
    assert other[SAVED].loss == plain[SAVED].loss
    assert other[SAVED].grad_norm != plain[SAVED].grad_norm
    assert weights("forgetful") != weights("plain")


@pytest.mark.parametrize(
    ("name", "same"),
    # In the last one MTP's block too, which is used twice in a pass.
    [("recomputed", "plain"), ("experts recomputed", "plain"), ("all recomputed", "all")],
)
def test_recomputation_changes_nothing(rows: Rows, weights: Weights, name: str, same: str) -> None:
    assert len(weights(name)) >= 3
    assert figures(rows(name)) == figures(rows(same))
    assert weights(name) == weights(same)


def test_low_precision_is_near_bf16_but_is_not_bf16(rows: Rows) -> None:
    for low, bf16 in zip(rows("plain"), rows("bf16"), strict=True):
        assert low.loss != bf16.loss
        assert low.loss == pytest.approx(bf16.loss, rel=0.05)
        assert low.sample_hash == bf16.sample_hash
    assert rows("plain")[-1].loss < rows("plain")[0].loss - 0.2


def test_held_out_losses_are_those_of_the_training_formats(rows: Rows) -> None:
    """Before the first step the weights are those of the bf16 run."""
    low, bf16 = (evaluations(rows(name)) for name in ("plain", "bf16"))
    assert low[0][0] == bf16[0][0] == 0
    assert low[0][1] != bf16[0][1]
    assert low[0][1] == pytest.approx(bf16[0][1], rel=0.02)


@pytest.mark.parametrize("name", ["switched", "forward switched"])
def test_switch_comes_at_its_step(rows: Rows, name: str) -> None:
    low, switched = rows("plain"), rows(name)
    assert figures(switched[:SAVED]) == figures(low[:SAVED])
    assert evaluations(switched)[:2] == evaluations(low)[:2]
    assert switched[SAVED].loss != low[SAVED].loss


def test_switch_of_the_forward_pass_leaves_the_backward_pass(rows: Rows, runs: Path) -> None:
    low, every, forward = (rows(name)[SAVED] for name in ("plain", "switched", "forward switched"))
    # The order of the sums in bf16 products is another one.
    assert abs(every.loss - forward.loss) < 0.1 * abs(every.loss - low.loss)
    assert every.grad_norm != forward.grad_norm
    assert "after step 2: all passes in bf16" in (runs / "switched/said").read_text()
    assert "after step 2: forward passes in bf16" in (runs / "forward switched/said").read_text()


def test_switched_run_is_a_bf16_run_of_that_checkpoint(rows: Rows, weights: Weights) -> None:
    """And going on from it with another recipe is what a run directory allows."""
    assert figures(rows("branch")) == figures(rows("switched"))
    assert weights("branch") == weights("switched")


def test_precision_may_change_but_not_the_dtype_of_weights(runs: Path, store: Path) -> None:
    config = replace(low_run(store), run_dir=str(runs / "plain/run"))
    with RunLock(config) as lock:
        config.precision.recipe, config.precision.formats = "nvfp4_all", {"*.o_proj": "bf16"}
        assert open_run(config, lock) is None
        config.precision.recipe = "fp32"
        with pytest.raises(UserError, match=r"precision\.recipe: 'bf16 weights' there, 'fp32 w"):
            open_run(config, lock)


@pytest.mark.parametrize(
    ("where", "named"),
    [("activation", "loss"), ("weight", "loss"), ("gradient", "gradient norm")],
)
def test_nan_is_seen_by_the_guard(rows: Rows, runs: Path, where: str, named: str) -> None:
    """One NaN, which a code of four bits cannot hold."""
    said = (runs / f"nan in {where}/said").read_text()
    assert f"batch 2 passed over: {named} is nan" in said
    found = rows(f"nan in {where}")
    assert [r.skipped_batches for r in found] == [0, 1]
    assert all(math.isfinite(x) for row in figures(found) for x in row)


def test_run_says_what_runs_in_which_format(runs: Path) -> None:
    said = (runs / "formats/said").read_text()
    assert "ZeRO-2, accumulation 2, nvfp4_super" in said
    lines = [[cell.strip() for cell in line.split("│")] for line in said.splitlines()]
    table = {(cells[1], cells[3]): cells for cells in lines if len(cells) == 7}
    assert table["Mamba-2 in_proj", "nvfp4"][2:6:3] == ["1", "emulated"]
    assert table["Mamba-2 in_proj", "bf16"][2:6:3] == ["1", ""]  # in the last layer
    assert table["attention", "nvfp4"][2] == "1"
    assert table["attention", "bf16"][2] == "3"
    assert said.count(policy.EMULATED) == 1

    said = (runs / "bf16/said").read_text()
    assert policy.HEADER[3] not in said
    assert "emulated" not in said


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--model.moe_intermediate_size", "24"),
         ["backbone.layers.1.mixer.experts has 24 inner", "model.moe_latent_size or moe_inter",
          "\"{'backbone.layers.*.mixer.experts': bf16}\""]),
        (("--data.sequence_length", "30", "--train.micro_batch_size", "1"),
         ["train.micro_batch_size x data.sequence_length,", "(30), is not divisible by 16"]),
        (("--precision.formats", "{'*.inproj': nvfp4}"),
         ["matches nothing", "the nearest name is backbone.layers.*.mixer.in_proj"]),
        (("--precision.formats", "{'*.in_proj': fp4}"), ["unknown format 'fp4'; known: bf16"]),
        (("--precision.switch_step", "4"), ["switch_step (4) must be below train.max_steps (4)"]),
        (("--precision.recipe", "fp32", "--precision.rht", "false"), ["rht has no effect"]),
    ],
)  # fmt: skip
def test_mistakes_end_before_data_and_processes_are_looked_at(
    pretrain: Callable[..., int],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    words: tuple[str, ...],
    named: list[str],
) -> None:
    monkeypatch.setattr("nemo_hybrid.train.loop.World", None)
    (tmp_path / "run.yaml").write_text(dump_config(low_run(tmp_path / "not there")))
    command = ["--config", tmp_path / "run.yaml", "--run_dir", tmp_path / "run", *words]
    assert pretrain(*command) == 2
    message = capsys.readouterr().err
    assert all(words in message for words in named), message
    assert not (tmp_path / "run").exists()


def test_plan_refuses_the_same_and_says_how_it_plans(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    (tmp_path / "run.yaml").write_text(dump_config(low_run(tmp_path)))
    command = ["plan", "--config", str(tmp_path / "run.yaml")]
    assert main(command) == 0
    assert "nvfp4_super (planned as bf16)" in capsys.readouterr().out
    assert main([*command, "--model.moe_intermediate_size", "24"]) == 2
    assert "experts has 24 inner channels" in capsys.readouterr().err


def test_configuration_of_the_tiny_run_fits_its_recipe() -> None:
    runs = Path(__file__).parents[2] / "configs/run"
    names = ("pretrain_tiny_cpu.yaml", "pretrain_tiny_nvfp4.yaml")
    config = load_config([runs / name for name in names])
    config.validate()
    assert config.precision.low
    check_precision(config, config.model.hybrid())
    config = load_config([runs / names[0]], ["--precision.recipe", config.precision.recipe])
    with pytest.raises(UserError, match=r"in_proj has 902 outputs, .* by 16"):
        check_precision(config, config.model.hybrid())


def test_configuration_with_globs_is_read_back(tmp_path: Path) -> None:
    config = low_run(tmp_path)
    config.precision.formats = {"*.o_proj": "nvfp4", "mtp.*": "nvfp4/bf16/bf16"}
    (tmp_path / "run.yaml").write_text(dump_config(config))
    read = load_config([tmp_path / "run.yaml"]).precision
    assert [*read.formats.items()] == [*config.precision.formats.items()]
    assert (
        load_config([tmp_path / "run.yaml"], ["--precision.formats", "{}"]).precision.formats == {}
    )


def test_globs_of_a_later_file_or_word_replace_all_earlier_ones(tmp_path: Path) -> None:
    """As docs/precision.md says."""
    files = [tmp_path / "a.yaml", tmp_path / "b.yaml"]
    for file, glob in zip(files, ("*.o_proj", "*.k_proj"), strict=True):
        file.write_text(f'precision: {{formats: {{"{glob}": nvfp4}}}}')
    assert load_config(files).precision.formats == {"*.k_proj": "nvfp4"}
    words = ["--precision.formats", "{'*.v_proj': nvfp4/bf16/bf16, 'mtp.*': mxfp8}"]
    found = load_config(files, words).precision.formats
    assert found == {"*.v_proj": "nvfp4/bf16/bf16", "mtp.*": "mxfp8"}


def test_library_that_is_missing_is_named(
    pretrain: Callable[..., int],
    store: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "run.yaml").write_text(dump_config(low_run(store)))
    command = ["--config", tmp_path / "run.yaml", "--run_dir", tmp_path / "run"]
    assert pretrain(*command, "--kernels.nvfp4", "transformer_engine") == 2
    assert "path transformer_engine of op nvfp4 cannot be used" in capsys.readouterr().err
