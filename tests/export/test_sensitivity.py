"""Sensitivity against whole passes of changed models, and assignments against all there are."""

import copy
import io
import json
import random
from itertools import product

import pytest
import torch
import torch.nn.functional as F

from helpers.tiny_models import loud_model, random_ids, tiny_config
from nemo_hybrid.errors import UserError
from nemo_hybrid.export.calibrate import calibrate
from nemo_hybrid.export.sensitivity import (
    BITS,
    PLOT_FILE,
    TABLE_FILE,
    Sensitivity,
    assign_within,
    candidates,
    mean_bits,
    measure,
    sensitivity_report,
)
from nemo_hybrid.precision.assign import Format
from nemo_hybrid.precision.simulate import simulated, stored_values, weight_of

CONFIG = tiny_config(
    "ME*-E", moe_intermediate_size=32, moe_shared_expert_intermediate_size=48, mtp_num_depths=1
)
FORMATS: tuple[Format, ...] = ("nvfp4", "fp8")


@torch.no_grad()
def test_each_group_alone_gives_the_kl_of_a_model_with_its_weights_changed() -> None:
    model, ids_BS = loud_model(CONFIG), random_ids(CONFIG, 3, 20)
    before = {name: p.clone() for name, p in model.named_parameters()}
    measured = measure(model, ids_BS.split((2, 1)), FORMATS)
    assert [(s.layer, s.family) for s in measured] == [
        (0, "mamba"), (1, "experts"), (1, "shared_experts"), (2, "attention"), (3, "mlp"),
        (4, "experts"), (4, "shared_experts"),
    ]  # fmt: skip
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    p = model(ids_BS).logits.double().log_softmax(-1)
    found = set()
    for group in measured:
        assert group.weights == sum(weight_of(model, place).numel() for place in group.places)
        if group.family == "attention":
            continue  # q, k and v have one scale, see test_simulate
        for format in FORMATS:
            changed = copy.deepcopy(model)
            for place in group.places:
                weight_of(changed, place).copy_(stored_values(weight_of(model, place), format))
            q = changed(ids_BS).logits.double().log_softmax(-1)
            kl = float(F.kl_div(q, p, log_target=True, reduction="none").sum(-1).mean())
            assert group.kl[format] == pytest.approx(kl, rel=1e-3)
            found.add(kl)
    assert len(found) == 12
    assert min(found) > 0


@torch.no_grad()
def test_with_calibration_inputs_are_quantized_too() -> None:
    model, ids_BS = loud_model(CONFIG), random_ids(CONFIG, 2, 20)
    amax = calibrate(model, [ids_BS]).amax
    group = measure(model, [ids_BS], ["nvfp4"], input_amax=amax)[4]
    p = model(ids_BS).logits.log_softmax(-1)
    with simulated(model, dict.fromkeys(group.places, "nvfp4"), "amax", amax):
        q = model(ids_BS).logits.log_softmax(-1)
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert group.kl["nvfp4"] == pytest.approx(kl, rel=1e-3)
    weights_alone = measure(model, [ids_BS], ["nvfp4"])[4]
    assert abs(group.kl["nvfp4"] / weights_alone.kl["nvfp4"] - 1) > 0.05


def test_widths_that_blocks_do_not_divide_are_not_tried_and_nan_is_an_error() -> None:
    config = tiny_config("-", intermediate_size=40)
    model, ids_BS = loud_model(config), random_ids(config, 1, 10)
    (group,) = measure(model, [ids_BS], FORMATS)
    assert list(group.kl) == ["fp8"]
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(UserError, match="not finite"):
        measure(model, [ids_BS], FORMATS)


def drawn(seed: int, groups: int, size: int | None = None) -> list[Sensitivity]:
    """Groups with convex costs, of one size if it is given."""
    draw = random.Random(seed)
    out = []
    for layer in range(groups):
        nvfp4 = draw.uniform(0.1, 1.0)
        kl: dict[Format, float] = {"nvfp4": nvfp4, "fp8": nvfp4 * draw.uniform(0.01, 0.3)}
        weights = size or draw.randrange(100, 1000)
        out.append(Sensitivity(layer, "mamba", (f"place{layer}",), weights, kl))
    return out


def best_kl(measured: list[Sensitivity], budget: float) -> float:
    """The least sum of KLs of all assignments that keep the budget."""
    total = sum(s.weights for s in measured)
    formats: tuple[Format, ...] = ("nvfp4", "fp8", "bf16")
    return min(
        sum(s.kl_of(f) for s, f in zip(measured, chosen, strict=True))
        for chosen in product(formats, repeat=len(measured))
        if sum(s.weights * BITS[f] for s, f in zip(measured, chosen, strict=True)) <= budget * total
    )


@pytest.mark.parametrize("budget", [4.5, 4.75, 5.3, 6.7, 8.0, 11.0, 16.0, 20.0])
def test_assignments_keep_the_budget_and_are_nearly_the_best_of_all(budget: float) -> None:
    for seed in range(8):
        measured = drawn(seed, 7)
        assignment = assign_within(budget, measured, CONFIG)
        assert mean_bits(measured, assignment) <= budget
        kl = sum(s.kl_of(assignment[s.places[0]]) for s in measured)
        # Greedy loses to the best at most what the one change saves that did not fit.
        lost = max(s.kl["nvfp4"] for s in measured)
        assert best_kl(measured, budget) <= kl + 1e-12 <= best_kl(measured, budget) + lost
        if budget >= 16:
            assert kl == 0


def test_assignments_of_equal_groups_are_the_best() -> None:
    for seed, upgraded in product(range(8), range(1, 7)):
        measured = drawn(seed, 6, size=64)
        budget = 4.5 + upgraded * 3.5 / 6  # what so many groups in fp8 take
        assignment = assign_within(budget, measured, CONFIG)
        kl = sum(s.kl_of(assignment[s.places[0]]) for s in measured)
        assert kl == pytest.approx(best_kl(measured, budget))


def test_only_what_was_measured_is_quantized_and_small_budgets_are_refused() -> None:
    model, ids_BS = loud_model(CONFIG), random_ids(CONFIG, 1, 10)
    measured = measure(model, [ids_BS], FORMATS)
    assignment = assign_within(4.5, measured, CONFIG)
    for place, format in assignment.items():
        kept = place.startswith("mtp.") or "latent" in place or place == "lm_head"
        assert (format == "bf16") == kept
    with pytest.raises(UserError, match=r"--budget_bits 4.4 is too small: give at least 4.5"):
        assign_within(4.4, measured, CONFIG)


def test_a_budget_is_refused_before_anything_is_measured() -> None:
    """Unmeasured groups get what the budget leads to at least."""
    groups = candidates(CONFIG, FORMATS)
    cheapest = assign_within(4.5, groups, CONFIG)
    assert cheapest == assign_within(12.0, groups, CONFIG)
    assert {cheapest[place] for group in groups for place in group.places} == {"nvfp4"}
    with pytest.raises(UserError, match=r"give at least 4\.5"):
        assign_within(4.4, groups, CONFIG)
    narrow = candidates(tiny_config("-M", intermediate_size=40), FORMATS)
    assert [list(group.kl) for group in narrow] == [["fp8"], ["nvfp4", "fp8"]]
    assert [group.weights for group in narrow] == [2 * 32 * 40, 32 * (164 + 48)]
    for width in (24, 40, 56, 72):
        shape = tiny_config("-M", intermediate_size=width)
        groups = candidates(shape, ["nvfp4"])
        with pytest.raises(UserError, match="give at least") as refused:
            assign_within(4.5, groups, shape)
        enough = float(str(refused.value).split()[-1])
        assert mean_bits(groups, assign_within(enough, groups, shape)) == pytest.approx(
            enough, 1e-3
        )
    with pytest.raises(
        UserError, match="no weights that a budget is for have rows that blocks of 16"
    ):
        assign_within(8.0, candidates(tiny_config("-", intermediate_size=40), ["nvfp4"]), CONFIG)


def test_the_report_is_a_table_json_and_a_plot(capsys: pytest.CaptureFixture[str]) -> None:
    measured = drawn(0, 3)
    assignment = assign_within(6.0, measured, CONFIG)
    files = sensitivity_report(measured, assignment, 6.0)
    shown = capsys.readouterr().out
    worst = max(measured, key=lambda s: s.kl["nvfp4"])
    assert f"{worst.kl['nvfp4']:.2e}" in shown
    assert "other weights are not counted" in shown
    content = json.loads(files[TABLE_FILE])
    assert content["bits"] == mean_bits(measured, assignment) <= content["budget_bits"]
    assert [g["format"] for g in content["groups"]] == [
        assignment[f"place{layer}"] for layer in range(3)
    ]
    image = pytest.importorskip("PIL.Image").open(io.BytesIO(files[PLOT_FILE]))
    assert len(image.convert("RGB").getcolors(1 << 20)) > 10
