"""The model card: what it must say, what it must not claim, and texts that would be Markdown."""

import re
from dataclasses import replace
from typing import Any

import pytest
import torch
import yaml

from helpers.exported import export_config
from nemo_hybrid.export.assign import assign, places
from nemo_hybrid.export.calibrate import Calibration
from nemo_hybrid.export.card import card, code
from nemo_hybrid.export.layout import ExportFacts
from nemo_hybrid.export.verify import Measured

SHAPE = export_config("MEM*EE-")


def facts(**changes: Any) -> ExportFacts:
    base = ExportFacts(
        source="/home/someone/runs/tiny/checkpoints/step_00000420",
        shape=SHAPE,
        target="mixed",
        assignment=assign(SHAPE, "super", {}),
        search="four_over_six",
        preset="super",
        budget_bits=None,
        calibration=None,
        calibration_data=None,
        percentile=None,
        kv_cache="none",
        parameters=1000,
        bytes_before=2000,
        bytes_after=700,
    )
    return replace(base, **changes)


def rows(text: str) -> list[list[str]]:
    """Cells of all table rows."""
    split = (re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line[:1] == "|")
    return [[cell.strip() for cell in row] for row in split]


def calibration(**changes: Any) -> Calibration:
    amax = {"backbone.layers.1.mixer.experts.up_proj": torch.ones(4)}
    values: dict[str, Any] = dict(amax=amax, unseen={}, kv={}, tokens=65536)
    return Calibration(**(values | changes))


def test_every_place_stands_in_the_table() -> None:
    text = card(facts())
    said = {}
    for name, layers, format, _ in (row for row in rows(text) if len(row) == 4):
        for part in layers.split(", ") if layers else ():
            first, _, last = part.partition("-")
            for i in range(int(first), int(last or first) + 1) if first.isdigit() else ():
                said[name.strip("`").replace(" … ", f".layers.{i}.")] = format
        if not layers:
            said[name.strip("`")] = format
    assert said.keys() == facts().assignment.keys() == places(SHAPE).keys()
    for place, format in facts().assignment.items():
        assert said[place].lower().startswith(format.partition("_")[0]), place
    other = assign(SHAPE, "super", {"backbone.layers.4.mixer.experts.*": "fp8"})
    assert "`backbone … mixer.experts.up_proj` | 4 | FP8" in card(facts(assignment=other))
    assert "`backbone … mixer.experts.up_proj` | 1, 5 | NVFP4" in card(facts(assignment=other))
    assert "`backbone … mixer.experts.up_proj` | 1, 4-5 | NVFP4" in text


def test_it_says_what_was_done() -> None:
    text = card(facts())
    assert yaml.safe_load(text.split("---")[1])["tags"] == ["nemotron_h", "fp8", "nvfp4"]
    assert "5.60 bits each" in text
    assert "35.0% of the 2,000 before" in text
    assert "not NVIDIA's assignment of single layers" in text
    assert "preset `super`" in text
    assert "`four_over_six`: the better of" in text
    assert "nothing was calibrated" in text
    assert "vLLM 0.15 refuses `MIXED_PRECISION`" in text
    assert "kv-cache-dtype" not in text
    assert '"method": "mtp"' in text


def test_calibration_and_cache() -> None:
    seen = calibration(unseen={"backbone.layers.1.mixer.experts.up_proj": [0, 2, 3]})
    text = card(
        facts(
            calibration=seen,
            calibration_data="/home/someone/a.txt",
            percentile=99.9,
            kv_cache="fp8",
        )
    )
    assert "99.9 % of the values on 65,536 tokens of `a.txt`" in text
    assert "3 experts saw no token" in text
    assert "`backbone.layers.1.mixer.experts.up_proj`: 0, 2-3" in text
    assert "vllm serve DIR --kv-cache-dtype fp8\n" in text
    assert "--model-path DIR --kv-cache-dtype fp8_e4m3\n" in text
    assert "What FP8 keys and values cost was not measured" in text
    assert "saw no token" not in card(facts(calibration=calibration()))


def test_nothing_is_claimed_that_was_not_measured() -> None:
    text = card(facts())
    assert "KL divergence and perplexity: not measured" in text
    assert "not compared with the source" in text
    for word in ("faster", "speed-up", "accuracy"):
        assert word not in text
    found = Measured(1.234e-2, 2.0, 2.1, 8192, "held-out.txt")
    text = card(facts(errors={"experts": {"four_over_six": 0.08, "amax": 0.09}}), found)
    assert "KL(source, export) 1.234e-02 nats per token" in text
    assert "perplexity 7.389 before, 8.166 after" in text
    assert "experts: 0.0800 with `four_over_six`, 0.0900 with `amax`" in text
    assert "not compared with the source" not in text
    alone = Measured(None, None, 2.1, 8192, "random token ids")
    assert "KL divergence and perplexity: not measured" in card(facts(), alone)


def test_other_targets() -> None:
    plain = card(facts(target="bf16", assignment=assign(SHAPE, None, {}), preset=None))
    assert "# `tiny/step_00000420` in BF16" in plain
    assert "Nothing is quantized" in plain
    assert "transformers loads this directory, too" in plain
    assert "NVIDIA" not in plain
    text = card(facts(target="compressed-tensors", preset=None, budget_bits=4.75))
    assert "someone" not in text
    assert "computes with wrong values" in text
    assert "at most 4.75 bits per weight on average" in text


@pytest.mark.parametrize(
    "hostile",
    [
        "a`b` <script>alert(1)</script>",
        "x\n---\nlicense: mit\n# Heading",
        "[click](javascript:alert(1)) | extra | cells |",
        "\x1b[31mred\u202e\u2028line",
        "``` \n code",
        "",
    ],
)
def test_texts_of_others_stay_texts(hostile: str) -> None:
    shown = code(hostile)
    assert re.fullmatch(r"`[^`\n]+`", shown)
    assert not re.search(r"(?<!\\)\|", shown)
    assert shown.isprintable()
    quiet = card(facts(calibration=calibration(), calibration_data="data"))
    text = card(facts(source=hostile, calibration=calibration(), calibration_data=hostile))
    assert len(text.splitlines()) == len(quiet.splitlines())
    assert [len(row) for row in rows(text)] == [len(row) for row in rows(quiet)]
    outside = re.sub(r"`[^`]*`", "", text)
    assert "<script" not in outside
    assert "javascript" not in outside
    assert text.split("---")[1] == quiet.split("---")[1]
