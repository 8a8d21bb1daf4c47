"""Learning-rate schedules against values worked out by hand and against their properties."""

import math
from itertools import pairwise

import pytest

from nemo_hybrid.config.run import TrainOptions
from nemo_hybrid.train.optim import describe_schedule, learning_rate


def options(**changes: object) -> TrainOptions:
    values = dict(max_steps=100, lr=1.0, min_lr_ratio=0.1, warmup_steps=9, decay_steps=16)
    return TrainOptions(**{**values, **changes})


def rates(train: TrainOptions) -> list[float]:
    return [learning_rate(step, train) for step in range(train.max_steps)]


@pytest.mark.parametrize("schedule", ["wsd", "cosine", "constant"])
def test_warm_up_is_linear_and_reaches_the_peak(schedule):
    lr = rates(options(schedule=schedule))
    assert lr[:10] == pytest.approx([0.1 * (i + 1) for i in range(10)])
    assert lr[9] == 1.0
    assert max(lr) == 1.0


def test_wsd_decays_by_one_minus_the_square_root():
    lr = rates(options(schedule="wsd"))
    assert lr[9:84] == [1.0] * 75
    # a quarter of the decay is behind after 4 of 16 steps: 1 - sqrt(1/4) = 1/2 of the way is left
    assert lr[87] == pytest.approx(0.1 + 0.9 * 0.5)
    assert lr[84] == pytest.approx(0.1 + 0.9 * 0.75)
    assert lr[99] == pytest.approx(0.1)
    falls = [a - b for a, b in pairwise(lr[83:])]
    assert all(a > b > 0 for a, b in pairwise(falls))


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({}, "after 9 steps of warm-up, then constant, and over the last 16 steps down to 0.1"),
        ({"max_steps": 20}, "over the last 11 steps down to 0.1"),
        ({"schedule": "cosine"}, "then down to 0.1 by a cosine"),
        ({"schedule": "constant"}, "learning rate 1 after 9 steps of warm-up, then constant"),
        ({"max_steps": 9}, "warning: learning rate 1 after 9 steps of warm-up, but the run ends "
                           "after 9, at 0.9: lower train.warmup_steps"),
        ({"max_steps": 1, "warmup_steps": 0}, "learning rate 1 after 0 steps"),
    ],
)  # fmt: skip
def test_the_start_says_what_the_rate_will_do(changes, said):
    train = options(**changes)
    (line,) = describe_schedule(train)
    assert said in line
    assert line.startswith("warning") == (train.max_steps <= train.warmup_steps)


def test_wsd_without_decay_stays_at_the_peak():
    assert rates(options(schedule="wsd", decay_steps=0))[9:] == [1.0] * 91


def test_cosine():
    lr = rates(options(schedule="cosine"))
    assert lr[54] == pytest.approx(0.1 + 0.9 * 0.5)  # half-way between steps 9 and 99
    assert lr[39] == pytest.approx(0.1 + 0.9 * (1 + math.cos(math.pi / 3)) / 2)
    assert lr[99] == pytest.approx(0.1)


def test_constant():
    assert rates(options(schedule="constant"))[9:] == [1.0] * 91


@pytest.mark.parametrize("schedule", ["wsd", "cosine"])
def test_the_last_step_has_the_smallest_rate(schedule):
    for max_steps, warmup, decay in [(1, 0, 1), (2, 1, 1), (25, 9, 16), (30, 0, 30), (50, 5, 1)]:
        train = options(
            schedule=schedule, max_steps=max_steps, warmup_steps=warmup, decay_steps=decay
        )
        assert learning_rate(max_steps - 1, train) == pytest.approx(0.1)
        assert learning_rate(max_steps + 10, train) == pytest.approx(0.1)


def test_the_first_step_moves():
    for warmup in (0, 1, 1000):
        assert learning_rate(0, options(warmup_steps=warmup, max_steps=2000)) > 0


def test_a_run_too_short_for_its_schedule_decays_after_the_warm_up():
    short = rates(options(schedule="wsd", max_steps=12))  # 9 warm-up steps, 16 of decay asked for
    assert short[:9] == rates(options(schedule="wsd"))[:9]
    assert 1.0 > short[9] > short[10] > short[11] == pytest.approx(0.1)
    assert len(rates(options(schedule="wsd", max_steps=5))) == 5  # all of it is warm-up
