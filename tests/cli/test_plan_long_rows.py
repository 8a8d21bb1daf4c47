"""`plan` of long rows: divided over processes, in tiles, offloaded, beside short ones."""

from __future__ import annotations

import re
import shlex
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import long_context_figures
import long_context_fits
import pytest

from helpers.plans import CONFIG, MODELS, family, layout, run
from nemo_hybrid.cli import main
from nemo_hybrid.commands import fit, memory, plan
from nemo_hybrid.commands.fit import CHOICES, changes, ready_divided
from nemo_hybrid.commands.memory import groups_of, layout_of, moments, saved
from nemo_hybrid.commands.plan import Part, PlanOptions, make_plan
from nemo_hybrid.commands.step_time import count, paths_of
from nemo_hybrid.errors import UserError

SWEEP = pytest.mark.sweep


@pytest.mark.parametrize(
    ("name", "length", "cp", "states", "heads"),
    [
        ("super", 1 << 17, 8, 7.4e6, 294e6),
        ("super", 1 << 20, 32, 8.2e6, 1040e6),
        ("nano", 1 << 20, 16, 4.0e6, None),
        ("ultra", 1 << 20, 64, 16.6e6, None),
    ],
)
def test_exchanges_of_divided_rows(
    name: str, length: int, cp: int, states: float, heads: float | None
) -> None:
    """Bytes of one layer and pass against figures worked out for these models by hand: states do
    not grow with the row, queries, keys and values do."""
    shape = family(name)
    config = run(length=length, micro_batch_size=1)
    config.parallel = replace(config.parallel, cp=cp, ep=1)
    config.train.global_batch_size = 1
    at = layout_of(config, shape, cp, cpu=False)
    sizes = {letter: size / 2 * (1 - 1 / cp) for letter, _, size in plan._of_parts(at)}
    # The way to the next process is no all-to-all: the end of the part before goes as a whole.
    assert sizes["M"] == pytest.approx(states, rel=0.02)
    if heads:
        assert sizes["*"] == pytest.approx(heads, rel=0.02)
    again = {c: s for c, _, s in plan._of_parts(replace(at, recompute="M"))}
    assert again["M"] == pytest.approx(3 * sizes["M"] / (1 - 1 / cp))
    assert list(plan._of_parts(replace(at, cp=1))) == []


def test_the_smallest_layout_that_fits(capsys: pytest.CaptureFixture[str]) -> None:
    words = "--parallel.ep 8 --train.micro_batch_size 1 --train.global_batch_size 64"
    words += f" --model {MODELS / 'nano.yaml'} --data.sequence_length 262144 --plan.processes 64"
    assert main(["plan", *words.split(), "--plan.device", "h100", "--plan.fit"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 2 + len(CHOICES)
    sizes = [int(line.split()[0]) for line in said[1:-1]]
    found = re.fullmatch(r"smallest: --parallel.cp (\d+) (.*): .* GB of 76 GB", said[-1])
    assert found
    assert sizes[-1] == min(sizes) < min(sizes[:-2])  # nothing saves more than all of it
    # What is proposed fits, and half of it does not, nor the same without tiles and offloading.
    cp, taken = found[1], shlex.split(found[2])
    assert cp == str(min(sizes))
    for size, chosen, fits in (
        (cp, taken, True), (str(int(cp) // 2), taken, False), (cp, taken[:2], False)
    ):  # fmt: skip
        given = [*words.split(), "--plan.device", "h100", "--parallel.cp", size, *chosen]
        if size != "0":
            main(["plan", *given])
            assert ("\nfits: " if fits else "\ndoes not fit: ") in capsys.readouterr().out


@pytest.mark.parametrize(
    ("batch", "given", "ready"),
    [
        (24, 1, 8),  # of 64 processes: 16 readers do not divide 24 rows
        (24, 3, 8),  # nor do 3 parts the heads
        (24, 16, 16),
        (64, 1, 1),
        (3, 1, 0),
    ],
)
def test_what_is_looked_at_may_have_fewer_rows_than_processes(
    batch: int, given: int, ready: int
) -> None:
    config = run(length=1024, micro_batch_size=1, global_batch_size=batch)
    config.model = replace(config.model, num_attention_heads=32)
    config.parallel = replace(config.parallel, cp=given)
    if not ready:
        with pytest.raises(UserError, match=r"train\.global_batch_size \(3\) is not divisible by"):
            ready_divided(config, PlanOptions(processes=64))
    else:
        divided, _ = ready_divided(config, PlanOptions(processes=64))
        assert divided.parallel.cp == ready


def test_parts_that_are_no_blocks_are_not_proposed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Of rows of 128 tokens, eight parts are no multiples of 32."""
    config = run(length=128, micro_batch_size=1, global_batch_size=8)
    config.precision = replace(config.precision, recipe="nvfp4_super")
    for needed, found in ((4, {4}), (8, set())):
        monkeypatch.setattr(
            fit, "make_plan", lambda c, *_, n=needed: SimpleNamespace(fits=c.parallel.cp >= n)
        )
        fits = fit.fitting(config, PlanOptions(processes=8), family("nano"))
        assert {cp for cp, _ in fits.values()} == found


def test_tiles_and_offloading_keep_inputs_or_nothing() -> None:
    """On the device."""
    shape = replace(CONFIG, pattern="E-E-", mtp_num_depths=0)
    at = layout(cfg=shape, width=2, length=512, processes=1, cpu=False, reference=(), tile=200)
    for letter in "E-":
        assert saved(at, letter) == 3 * 512 * 2 * shape.hidden_size
        assert saved(at, letter) < saved(replace(at, tile=0), letter) / 2
    again = replace(at, tile=0, recompute="E-")
    kept = [sum(count(each, paths_of("gpu")).kept.values()) for each in (at, again)]
    assert kept[0] == kept[1] >= 4 * saved(at, "E")
    there = replace(at, offload=True, recompute="M")
    assert [saved(there, letter) for letter in "ME-*"] == [0, 0, 0, saved(at, "*")]
    assert {m.offloaded for m in moments(there)} == {4 * saved(at, "E")}
    assert {m.offloaded for m in moments(replace(there, cpu=True))} == {0}


def test_what_tiles_take_of_weights() -> None:
    """Per parameter, of twice the experts: that of the layer at work, whose sums are counted as
    the step on tensors without data has them, beside what every layer has (weights, state and
    gradients)."""
    taken, counted, numel = [], [], []
    for experts in (32, 64):
        given = {"pattern": "EEEE", "mtp_num_depths": 0, "vocab_size": 1024}
        shape = replace(family("nano"), n_routed_experts=experts, **given)
        at = layout(cfg=shape, rows=1, length=16384, cpu=False, reference=(), tile=2048)
        taken.append(memory._backward(at, "E"))
        numel.append(sum(g.numel for g in groups_of(at)) / 4)
        counted.append(count(at, paths_of("gpu")).peak)
    each = (taken[1] - taken[0]) / (numel[1] - numel[0])
    found = (counted[1] - counted[0]) / (numel[1] - numel[0])
    assert each + 4 * (2 + 4 + 12 / 4) == pytest.approx(found, rel=0.01)


def test_tiles_take_the_time_of_recomputation() -> None:
    def parts(**train: Any) -> dict[str, Part]:
        config = run(ep=4, length=4096, micro_batch_size=1, **train)
        return make_plan(config, CONFIG, PlanOptions(processes=4)).parts

    plain, again, tiled = parts(), parts(recompute="E-"), parts(tile=8192)
    name = "all-to-all of routed slots"
    assert plain[name].sent < again[name].sent == tiled[name].sent
    assert tiled["compute"].seconds == pytest.approx(again["compute"].seconds, rel=0.1)
    assert plain["compute"].seconds < 0.95 * again["compute"].seconds


def test_changes_divide_rows() -> None:
    """Where all else that does not change what is learnt is done."""
    shape = family("nano")
    config = run(ep=8, length=1 << 19, micro_batch_size=1, recompute="ME*-")
    options = PlanOptions(processes=64, device="h100")
    said = list(changes(config, options, shape))
    names = [line.partition(":")[0] for line in said]
    assert names[:2] == ["--train.tile 8192", "--train.offload true"]
    assert "--parallel.cp 2" in names
    assert said[-1].startswith("--parallel.cp ")
    assert said[-1].endswith(", fits")


def test_steps_on_short_rows_take_their_own_time(capsys: pytest.CaptureFixture[str]) -> None:
    common = "--parallel.cp 2 --plan.processes 4 --train.max_steps 1000 --train.micro_batch_size 1"
    words = f"plan {common} --train.global_batch_size 4 --data.sequence_length 16384".split()
    short = [*words, "--data.short.sequence_length", "1024", "--data.short.share", "0.25"]

    def told(words: list[str]) -> tuple[float, float, str]:
        """Seconds of a step and hours of the run."""
        assert main(words) == 0
        said = capsys.readouterr().out
        step, hours = re.search(r"together ([\d.]+) s", said), re.search(r": ([\d.]+) hours", said)
        assert step
        assert hours
        return float(step[1]), float(hours[1]), said

    long_s, long_hours, said = told(words)
    assert "a step on rows of" not in said
    same_s, hours, said = told(short)
    assert same_s == long_s
    # The same tokens per process and step: 8192, in eight rows of 1024 that are not divided.
    alone = "--plan.processes 4 --train.max_steps 1000 --train.micro_batch_size 8"
    other = f"plan {alone} --train.global_batch_size 64 --data.sequence_length 1024".split()
    short_s, short_hours, _ = told(other)
    assert short_s < 0.95 * long_s
    found = re.search(r"a step on rows of 1024 tokens ([\d.]+) s; 0.25 of the steps", said)
    assert found
    assert float(found[1]) == pytest.approx(short_s, rel=0.01)
    assert hours == pytest.approx(0.75 * long_hours + 0.25 * short_hours, rel=0.02)


@pytest.mark.parametrize(
    "name", ["nano", pytest.param("super", marks=SWEEP), pytest.param("ultra", marks=SWEEP)]
)
@pytest.mark.parametrize(
    "tokens", [pytest.param(n, marks=SWEEP) for n in long_context_fits.TOKENS[:-1]] + [1 << 20]
)
def test_the_table_of_the_page_is_what_the_script_prints(name: str, tokens: int) -> None:
    page = (MODELS.parents[1] / "docs/long_context.md").read_text().splitlines()
    (line,) = long_context_fits.lines(name, tokens)
    assert line in page


def test_the_script_of_figures_counts_what_offloading_leaves() -> None:
    """As many inputs of 24 layers as of 8."""
    (_, few, bar), (_, many, _) = long_context_figures.offload()
    assert 1 <= few <= bar
    assert many == pytest.approx(few, abs=0.1)
