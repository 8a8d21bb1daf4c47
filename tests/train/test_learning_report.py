"""The learning report: baselines on exactly the evaluation's targets, bars, exit status."""

import hashlib
import importlib.util
import math
from contextlib import closing
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from nemo_hybrid.config.read import dump_config
from nemo_hybrid.config.run import DataOptions, ModelOptions, PretrainOptions, RunConfig
from nemo_hybrid.data.store import StoreWriter
from nemo_hybrid.train.metrics import MetricsWriter, StepMetrics

V, EOS, LENGTH, SEQUENCES = 40, 2, 16, 6


@pytest.fixture(scope="module")
def script() -> ModuleType:
    path = Path(__file__).parents[2] / "scripts" / "learning_report.py"
    spec = importlib.util.spec_from_file_location("learning_report", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up by name.
    import sys

    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module


def documents(seed: int, n: int) -> list[list[int]]:
    """Noisy walks of 1 to 40 tokens, each ending with eos."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(n):
        ids = [int(rng.integers(3, V))]
        for _ in range(int(rng.integers(0, 39))):
            ids.append(3 + (ids[-1] * 5 + int(rng.integers(0, 4))) % (V - 3))
        out.append([*ids, EOS])
    return out


def make_store(out: Path) -> None:
    out.mkdir()
    (out / "tokenizer.json").write_bytes(b"tokenizer")
    digest = hashlib.sha256(b"tokenizer").hexdigest()
    for name, seed, n in (("train", 1, 150), ("heldout", 2, 40)):
        writer = StoreWriter(out / name, vocab_size=V, eos_id=EOS, tokenizer_sha256=digest)
        for document in documents(seed, n):
            writer.add(np.array(document))
        writer.finish({})


def make_run(
    tmp_path: Path, last: list[float], first: float = 3.9, dead: int = 0, evaluations: int = 2
) -> Path:
    run_dir = tmp_path / "run"
    make_store(tmp_path / "store")
    config = RunConfig(
        run_dir=str(run_dir),
        model=ModelOptions(vocab_size=V),
        data=DataOptions(path=str(tmp_path / "store"), sequence_length=LENGTH),
        train=PretrainOptions(max_steps=30, eval_sequences=SEQUENCES, micro_batch_size=4),
    )
    heldout = {30: last}
    with closing(MetricsWriter(run_dir, 0)) as writer:
        for step in range(1, 31):
            losses = heldout.get(step) if evaluations == 2 else None
            before = [first] * len(last) if step == 1 else None
            writer.write(
                StepMetrics(
                    step=step,
                    loss=1.0,
                    mtp_losses=[1.0] * (len(last) - 1),
                    aux_loss=0.0,
                    lr=1.0,
                    grad_norm=1.0,
                    tokens=64,
                    tokens_total=64 * step,
                    tokens_per_s=1.0,
                    step_seconds=2.5,
                    data_seconds=0.0,
                    mfu=None,
                    memory_gb=1.0,
                    max_vio=0.0,
                    max_vio_per_layer={},
                    dead_experts=dead if step == 29 else (5 if step == 2 else 0),
                    heldout_loss=losses[0] if losses else None,
                    heldout_mtp_losses=losses[1:] if losses else None,
                    heldout_loss_before=before[0] if before else None,
                    heldout_mtp_losses_before=before[1:] if before else None,
                )
            )
    (run_dir / "config.yaml").write_text(dump_config(config))
    return run_dir


def naive_baseline(distance: int) -> float:
    """The same figure, written with loops over documents and windows."""
    pair: dict[tuple[int, int], int] = {}
    context: dict[int, int] = {}
    target: dict[int, int] = {}
    for document in documents(1, 150):
        for v, w in zip(document, document[distance:], strict=False):
            pair[v, w] = pair.get((v, w), 0) + 1
            context[v] = context.get(v, 0) + 1
            target[w] = target.get(w, 0) + 1
    n, d = sum(target.values()), 0.75
    held_out = documents(2, 40)
    stream = [(w, number) for number, document in enumerate(held_out) for w in document]
    windows = (len(stream) - 1) // LENGTH
    total, count = 0.0, 0
    for row in range(SEQUENCES):
        start = (row * windows // SEQUENCES) * LENGTH
        window = stream[start : start + LENGTH + 1]
        for t in range(LENGTH + 1 - distance):
            (v, here), (w, there) = window[t], window[t + distance]
            if here != there:
                continue
            p = max(target.get(w, 0) - d, 0) / n + d * len(target) / n / V
            if v in context:
                after = sum(1 for a, _ in pair if a == v)
                p = max(pair.get((v, w), 0) - d, 0) / context[v] + d * after / context[v] * p
            total, count = total - math.log(p), count + 1
    return total / count


def test_baselines_equal_a_walk_over_windows_and_documents(script, tmp_path):
    run_dir = make_run(tmp_path, [1.0, 1.1, 1.2])
    values = [row.value for row in script.report(run_dir) if "model of" in row.what]
    values.insert(0, next(r.value for r in script.report(run_dir) if "bigram" in r.what))
    for k, value in enumerate(values):
        baseline = naive_baseline(k + 1)
        assert f"against {baseline:.3f}" in value
        # and one window more or a target masked otherwise would show in three decimals
        assert f"{naive_baseline(k + 2):.3f}" != f"{baseline:.3f}"


def test_every_bar_met(script, tmp_path, capsys):
    run_dir = make_run(tmp_path, [1.0, 1.1, 1.2])
    assert script.main([str(run_dir)]) == 0
    out = capsys.readouterr().out
    assert out.count("PASS") == 5
    assert "FAIL" not in out
    assert "(25.6% of the first)" in out
    assert "first evaluation (step 0)" in out
    assert "last evaluation (step 30)" in out
    assert "75 s (1:15)" in out
    assert "1,920 in 30 steps" in out
    assert len({len(line) for line in out.splitlines()}) == 1


@pytest.mark.parametrize(
    ("changes", "missed"),
    [
        (dict(first=1.9), "last evaluation"),
        (dict(last=[9.0, 1.1, 1.2], first=30.0), "bigram"),
        (dict(last=[1.0, 1.1, 9.0]), "MTP depth 2"),
        (dict(dead=1), "dead experts"),
    ],
)
def test_each_bar_can_be_missed(script, tmp_path, capsys, changes, missed):
    run_dir = make_run(tmp_path, **{"last": [1.0, 1.1, 1.2], **changes})
    assert script.main([str(run_dir)]) == 1
    failed = [line for line in capsys.readouterr().out.splitlines() if "FAIL" in line]
    assert len(failed) == 1
    assert missed in failed[0]


def test_a_loss_that_is_not_a_number_fails(script, tmp_path):
    assert script.main([str(make_run(tmp_path, [math.nan] * 3))]) == 1


def test_a_run_that_cannot_be_judged(script, tmp_path, capsys):
    assert script.main([str(tmp_path / "nowhere")]) == 2
    assert script.main([str(make_run(tmp_path, [1.0], evaluations=1))]) == 2
    message = capsys.readouterr().err
    assert "cannot read" in message
    assert "two are needed" in message
