"""A user's mistake ends with one message that names it, and leaves nothing behind."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from checkpoint.conftest import ThreadWorld, in_ranks
from helpers.corpus import TINY_MODEL, flip_byte, write_corpus
from helpers.processes import run_command
from helpers.runs import tiny_run
from nemo_hybrid import cli
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.read import dump_config
from nemo_hybrid.config.run import ModelOptions
from nemo_hybrid.errors import UserError
from nemo_hybrid.train import loop
from nemo_hybrid.train.run_dir import RunLock, claim_run, open_run
from train.conftest import Unbroken

Refused = Callable[..., str]


@pytest.fixture
def refused(
    store: Path,
    tmp_path: Path,
    pretrain: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> Refused:
    """refused(words, run_dir=...): the one line on stderr of a run that does not start."""
    config = tmp_path / "run.yaml"
    config.write_text(dump_config(tiny_run(store)))

    def run(*words: str | Path, run_dir: Path = tmp_path / "run") -> str:
        before = contents(run_dir)
        status = pretrain("--config", config, "--run_dir", run_dir, *words)
        output = capsys.readouterr()
        assert status == 2, output
        lines = [x for x in output.err.splitlines() if not x.endswith(" ...")]  # what it did
        lines = [x for x in lines if not x.startswith("skipping checkpoint")]
        assert len(lines) == 1, output.err
        assert lines[0].startswith("error: ")
        assert "Traceback" not in output.err + output.out
        assert contents(run_dir) == before, "something was written"
        return lines[0]

    return run


def contents(directory: Path) -> dict[Path, bytes | None] | None:
    """Every file below a directory but the lock; None if there is no such directory."""
    if not directory.is_dir():
        return None
    paths = (p for p in directory.rglob("*") if p.name != ".lock")
    return {p: p.read_bytes() if p.is_file() else None for p in paths}


@pytest.fixture
def own_store(store: Path, tmp_path: Path) -> Path:
    """A copy of the token store that may be damaged."""
    return Path(shutil.copytree(store, tmp_path / "damaged"))


@pytest.mark.parametrize(
    ("words", "named"),
    [
        (("--model.pattern", "MEXE"), ["model.pattern", "'X'", "M (Mamba-2)"]),
        (("--model.pattern", ""), ["model.pattern", "empty"]),
        (("--model.mtp_pattern", "M"), ["model.mtp_pattern", "'M'"]),
        (("--parallel.ep", "3"), ["model.n_routed_experts (8)", "parallel.ep (3)"]),
        (("--parallel.ep", "2"), ["parallel.ep (2)", "processes (1)"]),
        (("--profile", "0:3"), ["profile must be STEP or STEP:COUNT, such as 20 or 20:3, got 0:3"]),
        (("--profile", "99999"), ["profile names step 99999, the run has"]),
        (("--track", "wandB"), ["track: expected one of none, wandb, trackio, got wandB"]),
        (("--parallel.zero", "0"), ["parallel.zero must be 1 or 2, got 0", "no fp32 masters"]),
        (("--parallel.zero", "3"), ["parallel.zero must be 1 or 2, got 3", "ZeRO-3", "MoE"]),
        (("--parallel.zero", "4"), ["parallel.zero must be 1 or 2, got 4"]),
        (("--train.global_batch_size", "6"), ["train.global_batch_size (6)", "micro_batch_size"]),
        (("--data.sequence_length", "0"), ["data.sequence_length", "positive"]),
        (("--data.sequence_length", "2"), ["data.sequence_length (2)", "mtp_num_depths (2)"]),
        (("--data.sequence_length", "100000"), ["too few", "sequence_length (100000)"]),
        (("--train.max_stepz", "3"), ["train.max_stepz", "train.max_steps"]),
        (("--lr", "3"), ["--lr", "train.lr"]),
        (("--train.lr", "fast"), ["train.lr", "a number", "fast"]),
        (("--train.lr", "nan"), ["train.lr", "a number", "nan"]),
        (("--train.max_steps", "-1"), ["train.max_steps", "positive"]),
        (("--train.seed", "-1"), ["train.seed", "[0, 2**63)", "-1"]),
        (("--train.seed", str(2**63)), ["train.seed", "[0, 2**63)"]),
        (("--model.time_step_min", "0.2"), ["model.time_step_min (0.2)", "time_step_max (0.1)"]),
        (("--model.time_step_floor", "0.2"), ["model.time_step_floor (0.2)", "exceeds"]),
        (("--data.path", "null", "--data.blend", "{a: .inf}"), ["weight of", "finite, got inf"]),
        (("--data.path", "null", "--data.blend", "{a: .nan}"), ["weight of", "finite, got nan"]),
        (("--model.vocab_size", "50"), ["model.vocab_size (50)", "at least 96"]),
        (("--model.from_hf", "nowhere"), ["nowhere"]),
        (("--resume", "nowhere"), ["nowhere", "does not exist"]),
        (("--config", "nowhere.yaml"), ["nowhere.yaml"]),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, tuple) else "",
)
def test_options(refused: Refused, words: tuple[str, ...], named: list[str]) -> None:
    message = refused(*words)
    assert all(name in message for name in named), message


def launched(monkeypatch: pytest.MonkeyPatch, size: int) -> None:
    """What torchrun tells the first of so many processes."""
    told = {"RANK": 0, "LOCAL_RANK": 0, "WORLD_SIZE": size, "MASTER_PORT": 1}
    for name, value in ({"MASTER_ADDR": "localhost"} | told).items():
        monkeypatch.setenv(name, str(value))


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """What is looked at first of a Hugging Face directory, of a model of 6 experts."""
    shape = HybridConfig(**TINY_MODEL | {"n_routed_experts": 6})
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights/config.json").write_text(json.dumps(shape.to_hf()))
    return tmp_path / "weights"


def test_shape_of_from_hf_is_the_one_that_counts(
    refused: Refused, store: Path, weights: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Against the 6 experts there, not the 16 that are the default."""
    own = tiny_run(store)
    own.model = ModelOptions(from_hf=str(weights))
    (tmp_path / "run.yaml").write_text(dump_config(own))
    launched(monkeypatch, 12)
    assert "model.n_routed_experts (6)" in refused("--parallel.ep", "4")
    assert "processes (12)" in refused("--parallel.ep", "3")  # one check further


def test_shape_beside_from_hf(refused: Refused, weights: Path) -> None:
    message = refused("--model.from_hf", weights)
    assert "model.n_routed_experts is 8 here, 6 there" in message
    assert "hidden_size" not in message
    assert "leave such options out" in message


@pytest.mark.parametrize("missing", [True, False])
def test_kernels_that_cannot_be_used(
    refused: Refused, monkeypatch: pytest.MonkeyPatch, missing: bool
) -> None:
    """The library is missing, or it is there and wants another device."""
    from nemo_kernels import backend

    module = SimpleNamespace(DEVICE_TYPES=("cuda",))
    stubs = {} if missing else {"nemo_kernels.ssd.external": module}
    monkeypatch.setattr(backend, "_probe", lambda name: "" if name in stubs else "not installed")
    for name, stub in stubs.items():
        monkeypatch.setitem(sys.modules, name, stub)  # type: ignore[arg-type]
    try:
        message = refused("--kernels.ssd", "mamba_ssm")
    finally:
        backend.choose(ssd="auto")
    assert "kernels: path mamba_ssm of op ssd" in message
    assert ("not installed" if missing else "choose auto, reference or triton") in message


def test_layout_that_does_not_fit_the_processes(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found before the other processes are waited for: here there are none."""
    launched(monkeypatch, 3)
    assert "parallel.ep (2) does not divide the number of processes (3)" in refused(
        "--parallel.ep", "2"
    )
    assert "processes (3) = 12" in refused()


def test_more_processes_than_gpus(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    launched(monkeypatch, 2)
    monkeypatch.setenv("LOCAL_RANK", "2")
    assert "there are 2: start torchrun with --nproc_per_node=2" in refused()


def test_missing_and_empty_data(refused: Refused, tmp_path: Path) -> None:
    absent, empty = tmp_path / "absent", tmp_path / "empty"
    (empty / "train").mkdir(parents=True)
    for path in (absent, empty):
        message = refused("--data.path", path)
        assert str(path) in message
        assert "nemo-hybrid prepare" in message


def test_store_that_one_node_lacks(store: Path, tmp_path: Path) -> None:
    """No process is left waiting for the one that cannot open it."""
    from nemo_hybrid.recipes.pretrain import Pretrain

    def open_data(world: ThreadWorld) -> object:
        config = tiny_run(store if world.rank == 0 else tmp_path / "absent")
        return Pretrain(config).open_data(world, None)  # type: ignore[arg-type]

    for result in in_ranks(2, open_data):
        assert isinstance(result, UserError)
        assert str(tmp_path / "absent") in str(result)


def test_mistyped_path_is_not_the_default_corpus(
    refused: Refused, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from nemo_hybrid.recipes import pretrain

    made: list[str] = []
    monkeypatch.setattr(pretrain, "prepare", lambda out, **_: made.append(out))
    place, mistyped = tmp_path / "corpus", tmp_path / "corpsu"
    message = refused("--data.default_corpus", place, "--data.path", mistyped)
    assert str(mistyped) in message
    assert made == []
    refused("--data.default_corpus", place, "--data.path", place)  # nothing was really made
    assert made == [str(place)]


def test_a_mended_mistake_is_not_held_against_the_directory(
    refused: Refused, tmp_path: Path
) -> None:
    """The directory does not remember a configuration that never trained."""
    refused("--data.path", tmp_path / "absent")
    assert not (tmp_path / "run").exists()


def test_damaged_store(refused: Refused, own_store: Path) -> None:
    flip_byte(own_store / "train/tokens-00000.bin", 1000)
    assert "train/tokens-00000.bin is damaged" in refused("--data.path", own_store)


def test_truncated_store(refused: Refused, own_store: Path) -> None:
    tokens = own_store / "train/tokens-00000.bin"
    tokens.write_bytes(tokens.read_bytes()[:-2])
    assert "tokens-00000.bin has" in refused("--data.path", own_store)


def test_tokenizer_of_another_store(refused: Refused, own_store: Path) -> None:
    flip_byte(own_store / "tokenizer.json", -2)
    assert "is not the tokenizer" in refused("--data.path", own_store)


def test_no_held_out_part(refused: Refused, own_store: Path) -> None:
    shutil.rmtree(own_store / "heldout")
    assert "train.eval_sequences" in refused("--data.path", own_store)


def test_unwritable_run_directory(refused: Refused, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.write_text("text")
    for run_dir in (file, file / "run", file / "deep/run"):
        message = refused(run_dir=run_dir)
        assert str(run_dir) in message
        assert "not a directory" in message
    assert file.read_text() == "text"


def test_directory_that_is_not_a_run(refused: Refused, tmp_path: Path) -> None:
    other = tmp_path / "photos"
    other.mkdir()
    (other / "cat.jpg").write_text("meow")
    assert "cat.jpg" in refused(run_dir=other)


@pytest.mark.parametrize("content", ["{not yaml", "- a list", "", "\udc80"])
def test_directory_with_a_foreign_configuration(
    refused: Refused, tmp_path: Path, content: str
) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text(content, errors="surrogateescape")
    assert f"{other / 'config.yaml'} is not the configuration of a run" in refused(run_dir=other)


def test_directory_of_a_different_run(refused: Refused, store: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    (other / "config.yaml").write_text(dump_config(tiny_run(store, train={"seed": 5})))
    message = refused(run_dir=other)
    assert "holds a different run (train.seed: 5 there, 1234 here)" in message


def test_leftovers_of_a_killed_start_do_not_matter(
    store: Path, refused: Refused, tmp_path: Path
) -> None:
    """A kill between the temporary configuration file and its final name."""
    (tmp_path / "run").mkdir()
    (tmp_path / "run/.tmp-config.yaml").write_text("half")
    # The next mistake is reported, so the directory was accepted.
    assert "absent" in refused("--data.path", tmp_path / "absent")


def test_checkpoint_that_cannot_be_resumed(
    refused: Refused, unbroken: Unbroken, tmp_path: Path
) -> None:
    damaged = unbroken.copy(tmp_path / "damaged_run") / "checkpoints/step_00000012"
    file = next(damaged.glob("model-*.safetensors"))
    flip_byte(file, -1)
    assert f"{file} does not match its checksum" in refused("--resume", damaged)
    exported = Path(shutil.copytree(damaged, tmp_path / "exported"))
    assert "exported is not a checkpoint directory" in refused("--resume", exported)


def test_checkpoint_of_another_model_is_refused_before_a_model_is_built(
    refused: Refused, unbroken: Unbroken, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(loop, "build_run", None)
    checkpoint = unbroken.run_dir / "checkpoints/step_00000012"
    message = refused("--resume", checkpoint, "--model.hidden_size", "65536")
    assert f"has model.hidden_size {TINY_MODEL['hidden_size']}, this run has 65536" in message
    message = refused("--resume", checkpoint, "--train.seed", "77")
    assert "this run has 77" in message


def test_resume_before_the_newest_checkpoint(
    unbroken: Unbroken,
    tmp_path: Path,
    pretrain: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """What it would train would never be taken up again."""
    run_dir = unbroken.copy(tmp_path / "run", without=(12,))
    before = contents(run_dir)
    words = ["--config", unbroken.config, "--run_dir", run_dir, "--resume"]
    assert pretrain(*words, run_dir / "checkpoints/step_00000004") == 2
    message = capsys.readouterr().err
    assert "beyond step 4 (step_00000008), one of which the next start would take" in message
    assert "--resume auto" in message
    assert contents(run_dir) == before


def test_every_checkpoint_damaged(
    unbroken: Unbroken,
    tmp_path: Path,
    pretrain: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    run_dir = unbroken.copy(tmp_path / "all_damaged")
    for manifest in run_dir.glob("checkpoints/*/manifest.json"):
        manifest.unlink()
    assert pretrain("--config", unbroken.config, "--run_dir", run_dir) == 2
    message = capsys.readouterr().err.splitlines()[-1]
    assert "none of the 3 checkpoints" in message
    assert "Traceback" not in message
    assert "bring a whole one back, or begin anew in another directory" in message
    # Without them it would not begin anew here either.
    (run_dir / "checkpoints").rename(tmp_path / "away")
    assert pretrain("--config", unbroken.config, "--run_dir", run_dir) == 2


def test_diverged_training_ends_with_status_3(store: Path, tmp_path: Path) -> None:
    config = tmp_path / "run.yaml"
    config.write_text(dump_config(tiny_run(store, train={"lr": 1e30})))
    finished = run_command(
        "pretrain", "--config", config, "--run_dir", tmp_path / "run", succeed=False
    )[0]
    assert finished.status == 3, finished
    assert "Traceback" not in finished.stderr
    message = finished.stderr.splitlines()[-1]
    assert "is nan, and there is no checkpoint to go back to" in message
    assert finished.stdout.count("passed over") == 4
    assert not list(tmp_path.glob("run/checkpoints/*"))


def test_store_of_another_seed_is_another_store(tmp_path: Path, store: Path) -> None:
    """A condition of the resume tests: the helper's seed matters."""
    other = write_corpus(tmp_path / "store", seed=1) / "train/tokens-00000.bin"
    assert other.read_bytes() != (store / "train/tokens-00000.bin").read_bytes()


def test_data_of_another_tokenizer(
    unbroken: Unbroken,
    store: Path,
    tmp_path: Path,
    pretrain: Callable[..., int],
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The same ids would mean other text: neither measured nor trained on."""
    checkpoint = unbroken.copy(tmp_path / "run", without=(4, 8)) / "checkpoints/step_00000012"
    evaluation = ["eval", "--from", str(checkpoint), "--data", str(store)]
    evaluation += ["--sequences", "16"]
    fresh = ["--config", unbroken.config, "--run_dir", tmp_path / "new"]
    fresh += ["--model.from_hf", checkpoint, "--train.max_steps", "1"]
    capsys.readouterr()
    assert cli.main(evaluation) == 0
    assert f"{store}: held-out sequences of 32 tokens" in capsys.readouterr().out  # as the run's
    with (checkpoint / "tokenizer.json").open("a") as file:
        file.write("\n")
    capsys.readouterr()
    for command in (lambda: cli.main(evaluation), lambda: pretrain(*fresh)):
        assert command() == 2
        assert f"another tokenizer than that of {checkpoint}" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


def test_shape_options_beside_from_hf_do_not_make_another_run(
    unbroken: Unbroken, tmp_path: Path
) -> None:
    """The shape comes from there, whether or not an option repeats it."""
    config = tiny_run(tmp_path / "store")
    config.run_dir = str(tmp_path / "run")
    config.model = ModelOptions(from_hf=str(unbroken.run_dir), hidden_size=32)
    lock = RunLock(config)
    claim_run(config, lock)
    config.model.hidden_size = ModelOptions().hidden_size
    assert open_run(config, lock) is None
    config.model.from_hf = "/elsewhere"
    with pytest.raises(UserError, match=r"model\.from_hf"):
        open_run(config, lock)
