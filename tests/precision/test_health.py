"""Health metrics: counts against loops over blocks, on tensors that are made to lose something."""

import math

import pytest
import torch
from torch import Tensor

from helpers.corpus import write_corpus
from helpers.processes import run_command
from nemo_hybrid.config.read import dump_config
from nemo_hybrid.precision.health import Probe
from nemo_hybrid.train import metrics
from nemo_hybrid.train.metrics import StepMetrics, read_metrics
from nemo_kernels.lowp import hadamard, scales
from nemo_kernels.lowp.operand import Rounding
from nemo_kernels.lowp.reference import dequantize, quantize
from train.low_precision import low_run

NAME = "backbone.layers.0.mixer.in_proj"
SQUARE = Rounding((16, 16))


def draw(*shape: int) -> Tensor:
    """bf16 over many octaves, so that some of it becomes zero; with zeros."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(shape, generator=generator)
    x *= torch.exp(torch.randn(shape, generator=generator))
    return (x * (torch.rand(shape, generator=generator) > 0.1)).bfloat16()


def figures(x: Tensor, rounding: Rounding, columnwise: bool = False, **more: Tensor) -> list[float]:
    """Shares of x that became zero and that were limited."""
    probe = Probe([NAME], 1, "cpu")
    probe.operand(NAME, "dy", x, rounding, columnwise, **more)
    found = probe.read([], lambda t: t)["in_proj"]
    assert found.keys() == {"dy_flushed", "dy_saturated"}
    return [found["dy_flushed"], found["dy_saturated"]]


def looked_up(x: Tensor, rounding: Rounding, columnwise: bool) -> list[int]:
    """(Not zero, flushed, saturated) of one matrix that has one tensor scale, from its bytes."""
    if rounding.rht:
        x = hadamard.transform(x, -2 if columnwise else -1)
    q = quantize(x, columnwise=columnwise, tile=rounding.tile, seed=rounding.seed)
    x = (x.mT if columnwise else x).double()
    decoded = dequantize(q).double()
    largest = 6 * q.block_scale.double().repeat_interleave(16, -1) * q.tensor_scale.double()
    beyond = x.abs() > largest * (1 + 1e-6)
    return [int((x != 0).sum()), int(((x != 0) & (decoded == 0)).sum()), int(beyond.sum())]


@pytest.mark.parametrize("columnwise", [False, True])
@pytest.mark.parametrize(
    "rounding", [Rounding(), SQUARE, Rounding(rht=True), Rounding(rht=True, seed=3)]
)
def test_counts_are_those_of_the_quantized_tensor(rounding, columnwise):
    x = draw(48, 80)
    there, flushed, saturated = looked_up(x, rounding, columnwise)
    assert flushed > 10
    assert saturated > 2
    found = figures(x, rounding, columnwise)
    assert found == [flushed / there, saturated / there]
    # The transform spreads large values, so that less is lost: both are seen.
    if rounding.rht:
        assert figures(x, Rounding(), columnwise)[0] > 1.5 * found[0]


@pytest.mark.parametrize("columnwise", [False, True])
@pytest.mark.parametrize("rounding", [Rounding(), SQUARE, Rounding(rht=True)])
@pytest.mark.parametrize("part", [1 << 22, 40 * 32])
def test_experts_have_tensor_scales_of_their_own(monkeypatch, rounding, columnwise, part):
    monkeypatch.setitem(scales._PART, "cpu", part)
    if rounding.tile == (16, 16):
        x, more = draw(3, 32, 48), {}
        x *= torch.tensor([1, 1e-6, 1e3]).view(3, 1, 1)
        experts = list(x)
    else:
        x, ends = draw(112, 48), torch.tensor([32, 32, 96], dtype=torch.int32)
        x[:32] *= 1e-6
        x[96:] = 0
        more = {"ends_E": ends}
        experts = [x[:32], x[32:96]]
    counts = torch.tensor([looked_up(expert, rounding, columnwise) for expert in experts]).sum(0)
    there, flushed, saturated = counts.tolist()
    assert figures(x, rounding, columnwise, **more) == [flushed / there, saturated / there]
    # With one scale for all of them, the small expert is lost.
    one = figures(x.flatten(0, -2), rounding, columnwise)
    assert one[0] > 1.2 * flushed / there


def test_known_losses():
    x = torch.full((16, 16), 6.0)
    x[:, 1] = 0.2  # below a quarter of the smallest code's step
    x[:, 2] = 0.0
    x[0, 3] = -0.3
    assert figures(x, Rounding()) == [16 / 240, 0.0]
    # A row's block scale of 5.7 / 6 is rounded down to 0.9375 in E4M3, another row's fits.
    x = torch.full((2, 16), 1.0)
    x[:, 0] = torch.tensor([448 * 6.0, 5.7])
    flushed, saturated = figures(x, Rounding())
    assert flushed == 15 / 32
    assert saturated == 1 / 32


def test_nothing_and_not_a_number():
    probe = Probe([NAME], 1, "cpu")
    probe.operand(NAME, "x", torch.empty(0, 16), Rounding(), False)
    assert probe.read([], lambda t: t) == {"in_proj": {}}
    probe.operand(NAME, "x", torch.full((16, 16), math.nan), Rounding(), False)
    assert probe.read([], lambda t: t) == {"in_proj": {}}


def test_every_nth_step_is_sampled_and_starts_anew():
    probe = Probe([NAME], 3, "cpu")
    active = []
    for step in range(1, 8):
        probe.start_step(step)
        active.append(probe.active)
    assert active == [False, False, True, False, False, True, False]
    probe.start_step(3)
    probe.operand(NAME, "w", draw(16, 16), SQUARE, False)
    gradient = torch.tensor([0.0, -0.0, 1e-30, math.nan])
    parts = [(f"{NAME}.weight", gradient), ("backbone.embeddings.weight", torch.zeros(9))]
    found = probe.read(iter(parts), lambda counts: 2 * counts)["in_proj"]
    assert found["zero_gradients"] == 0.5
    assert found.keys() == {"zero_gradients", "w_flushed", "w_saturated"}
    assert not probe.active
    probe.start_step(6)
    assert probe.read([], lambda t: t) == {"in_proj": {}}
    never = Probe([NAME], 0, "cpu")
    never.start_step(0)
    assert not never.active


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> dict[int, list[StepMetrics]]:
    """Of a run of two steps in NVFP4, without samples and with one of every second step."""
    out = tmp_path_factory.mktemp("health")
    config = low_run(write_corpus(out / "store"))
    found = {}
    for every in (0, 2):
        config.precision.health_every = every
        config.run_dir = str(out / str(every))
        (out / "run.yaml").write_text(dump_config(config))
        words = ("--train.max_steps", "2", "--train.eval_sequences", "8")
        run_command("pretrain", "--config", out / "run.yaml", *words)
        found[every] = read_metrics(out / str(every) / "metrics.jsonl")
    return found


@pytest.mark.slow
def test_a_run_records_its_samples_and_is_not_changed_by_them(rows):
    assert [row.low_precision for row in rows[0]] == [None, None]
    first, second = rows[2]
    assert first.low_precision is None
    assert second.loss == rows[0][1].loss
    assert second.heldout_loss == rows[0][1].heldout_loss
    found = second.low_precision
    low = {f"{role}_{what}" for role in ("x", "w", "dy") for what in ("flushed", "saturated")}
    assert found["in_proj"].keys() == found["experts"].keys() == {"zero_gradients", *low}
    assert found["attention"].keys() == found["mtp.experts"].keys() == {"zero_gradients"}
    shares = [share for group in found.values() for share in group.values()]
    assert all(0 <= share < 0.6 for share in shares)
    # A gradient's elements lie over more octaves than an activation's behind a norm.
    assert 0.01 < found["in_proj"]["x_flushed"] < found["in_proj"]["dy_flushed"]


def test_samples_are_curves_of_tensorboard(rows):
    before, sampled = (metrics.curves(row)[row.step] for row in rows[2][:2])
    share = rows[2][1].low_precision["experts"]["w_flushed"]
    assert sampled["precision/experts/w_flushed"] == share
    assert not any(name.startswith("precision/") for name in before)
