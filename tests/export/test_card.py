"""The model card: what it must say, what it must not claim, and texts that would be Markdown."""

import json
import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from helpers.exported import export_config
from nemo_hybrid.commands.export import ExportOptions
from nemo_hybrid.export.calibrate import Calibration
from nemo_hybrid.export.card import card, code, lineage
from nemo_hybrid.export.layout import ExportFacts
from nemo_hybrid.export.verify import Measured
from nemo_hybrid.hub import HybridLM
from nemo_hybrid.precision.assign import assign, places

SHAPE = export_config("MEM*EE-")
OPTIONS = ExportOptions(
    from_="tiny", out="out", format="mixed", preset="super", scales="four_over_six"
)


def facts(**changes: Any) -> ExportFacts:
    base = ExportFacts(
        source=Path("/home/someone/runs/tiny/checkpoints/step_00000420"),
        shape=SHAPE,
        assignment=assign(SHAPE, "super", {}),
        calibration=calibration(),
        parameters=1000,
        bytes_before=2000,
        bytes_after=700,
    )
    return replace(base, **changes)


def calibration(**changes: Any) -> Calibration:
    amax = {"backbone.layers.1.mixer.experts.up_proj": torch.ones(4)}
    values: dict[str, Any] = dict(amax=amax, unseen={}, kv={}, tokens=65536)
    return Calibration(**(values | changes))


def made(found: ExportFacts | None = None, measured: Measured | None = None, **changes: Any) -> str:
    options = replace(OPTIONS, **({"calibration": "/home/someone/a.txt"} | changes))
    return card(options, found or facts(), "## Lineage", measured)


def rows(text: str) -> list[list[str]]:
    """Cells of all table rows."""
    split = (re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line[:1] == "|")
    return [[cell.strip() for cell in row] for row in split]


def test_every_weight_stands_in_the_table() -> None:
    text = made()
    said = {}
    for name, layers, format, _ in (row for row in rows(text) if len(row) == 4):
        for part in layers.split(", ") if layers else ():
            first, _, last = part.partition("-")
            for i in range(int(first), int(last or first) + 1) if first.isdigit() else ():
                said[name.strip("`").replace(" … ", f".layers.{i}.")] = format
        if not layers:
            said[name.strip("`")] = format
    model = HybridLM(SHAPE)
    everything = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    assert said.keys() - {"modules"} == {n.removesuffix(".weight") for n in everything}
    for place, format in facts().assignment.items():
        assert said[place].lower().startswith(format.partition("_")[0]), place
    for name in said.keys() - facts().assignment.keys() - {"modules"}:
        fp32 = name.endswith(("A_log", ".D", "dt_bias", "e_score_correction_bias"))
        assert said[name] == ("FP32" if fp32 else "BF16"), name
    other = assign(SHAPE, "super", {"backbone.layers.4.mixer.experts.*": "fp8"})
    assert "`backbone … mixer.experts.up_proj` | 4 | FP8" in made(facts(assignment=other))
    assert "`backbone … mixer.experts.up_proj` | 1, 5 | NVFP4" in made(facts(assignment=other))
    assert "`backbone … mixer.experts.up_proj` | 1, 4-5 | NVFP4" in text


def test_it_says_what_was_done() -> None:
    text = made()
    assert yaml.safe_load(text.split("---")[1])["tags"] == ["nemotron_h", "fp8", "nvfp4"]
    assert "5.60 bits each" in text
    assert "35.0% of what they take in BF16" in text
    assert "preset `super` |" in text
    assert "`four_over_six`: the better of" in text
    assert "| input scales | all of the values on 65,536 tokens of `a.txt` |" in text
    assert "vLLM 0.15 refuses `MIXED_PRECISION`" in text
    assert "kv-cache-dtype" not in text
    assert '"method": "mtp"' in text
    assert "changed by" not in text
    text = made(formats={"*.o_proj": "nvfp4", "mtp.*|`": "fp8"})
    assert "| changed by globs, the last counts | `*.o_proj`: `nvfp4`; `mtp.*\\|'`: `fp8` |" in text


@pytest.mark.parametrize(
    ("changes", "follows"),
    [
        ({}, True),
        ({"format": "nvfp4", "preset": "nano"}, True),
        ({"preset": "conservative"}, False),
        ({"format": "fp8"}, False),
        ({"budget_bits": 5.0, "preset": "conservative"}, False),
    ],
)
def test_what_follows_nvidia(changes: dict[str, Any], follows: bool) -> None:
    text = made(**changes)
    assert ("not NVIDIA's assignment of single layers" in text) == follows
    assert ("NVIDIA" in text) == follows
    assert ("all that it quantizes in FP8" in text) == (changes.get("format") == "fp8")


def test_input_scales_are_claimed_where_there_are_some() -> None:
    weights_alone: Any = {
        place: "nvfp4_w4a16" if format != "bf16" else format
        for place, format in facts().assignment.items()
    }
    text = made(facts(assignment=weights_alone, calibration=None), calibration=None)
    assert "| input scales | none: nothing was calibrated, inputs stay BF16 |" in text
    assert "rounding of inputs" not in text
    text = made(facts(assignment=weights_alone), kv_cache="fp8")
    assert "| input scales | none: weights alone are quantized, inputs stay BF16 |" in text
    assert "FP8, with scales for the largest ones on 65,536 tokens of `a.txt`" in text
    assert "rounding of inputs costs is not part" in made()


def test_calibration_and_cache() -> None:
    seen = calibration(unseen={"backbone.layers.1.mixer.experts.up_proj": [0, 2, 3]})
    text = made(facts(calibration=seen), percentile=99.9, kv_cache="fp8")
    assert "99.9 % of the values that are not zero on 65,536 tokens of `a.txt`" in text
    assert "the largest ones on 65,536 tokens of `a.txt`; none for the multi-token-pred" in text
    drafts = calibration(kv={"mtp.layers.0.mixer.k_proj": 3.0})
    assert "; none for the multi" not in made(facts(calibration=drafts), kv_cache="fp8")
    assert "3 experts saw no token" in text
    assert "`backbone.layers.1.mixer.experts.up_proj`: 0, 2-3" in text
    assert "vllm serve DIR --kv-cache-dtype fp8\n" in text
    assert "--model-path DIR --kv-cache-dtype fp8_e4m3\n" in text
    assert "What FP8 keys and values cost was not measured" in text
    assert "saw no token" not in made()


def test_nothing_is_claimed_that_was_not_measured() -> None:
    text = made()
    assert "KL divergence and perplexity: not measured" in text
    assert "neither compared with the source one by one" in text
    for word in ("faster", "speed-up", "accuracy"):
        assert word not in text
    errors = {"experts": {"four_over_six": 0.08, "amax": 0.09}}
    found = Measured(1.234e-2, 2.0, 2.1, 8192, "/home/held-out.txt")
    text = made(facts(errors=errors), found)
    assert "8,192 tokens of `held-out.txt`, in FP32" in text
    assert "| nothing: the source |  | 7.389 |" in text
    assert "| weights | 1.234e-02 | 8.166 |" in text
    assert "rounding of inputs costs is not part" in text
    assert "experts: 0.0800 with `four_over_six`, 0.0900 with `amax`" in text
    store = made(measured=found._replace(text=str(Path(__file__).parent)), calibration="/")
    assert "8,192 tokens of the held-out part of `export`, in FP32" in store
    assert "65,536 tokens of the training part of `/`" in store
    text = made(measured=found._replace(rounded_kl=2e-2, rounded_loss=2.2))
    assert "| weights, and inputs of products | 2.000e-02 | 9.025 |" in text
    assert "rounding of inputs costs" not in text
    assert "not measured. `nemo" not in text


def test_a_budget_is_of_the_weights_that_it_is_for() -> None:
    """Not of all weights: counted here over the layers' matrices by name."""
    bits = {"bf16": 16, "fp8": 8, "nvfp4": 4.5}
    chosen = assign(SHAPE, "super", {"backbone.layers.5.*": "bf16", "mtp.*": "fp8"})
    spent = {
        place: math.prod(shape)
        for place, shape in places(SHAPE).items()
        if place.startswith("backbone.layers.") and "latent" not in place
    }
    mean = sum(size * bits[chosen[place]] for place, size in spent.items()) / sum(spent.values())
    text = made(facts(assignment=chosen), budget_bits=9.75, preset="conservative")
    assert (
        f"measured sensitivity (`sensitivity.json`): {mean:.3f} bits on average, at most 9.75, of "
        f"the {sum(spent.values()):,} weights that a budget may quantize" in text
    )


def test_other_targets() -> None:
    none = facts(assignment=assign(SHAPE, None, {}), calibration=None)
    plain = made(none, format="bf16", preset="conservative", calibration=None)
    assert "# `tiny/step_00000420` in BF16" in plain
    assert "Nothing is quantized" in plain
    assert "transformers loads this directory, too" in plain
    text = made(format="compressed-tensors")
    assert "someone" not in text
    assert "computes with wrong values" in text
    dense = export_config("M-*")
    few = facts(shape=dense, assignment=assign(dense, "nano", {}))
    assert "wrong values" not in made(few, format="compressed-tensors")
    assert "one common tensor scale, which they had not there" in made(scales="training")


def write_checkpoint(directory: Path, run: object, state: object, own: str) -> None:
    directory.mkdir(parents=True)
    (directory / "run.yaml").write_text(yaml.safe_dump(run))
    (directory / "run_state.json").write_text(json.dumps(state))
    (directory / "manifest.json").write_text(json.dumps({"files": {}, "sha256": "abc123"}))
    (directory / "README.md").write_text(own)


def test_lineage_is_what_the_checkpoint_says(tmp_path: Path) -> None:
    run = {
        "model": {"from_hf": "/home/someone/runs/base/checkpoints/step_00000420"},
        "data": {"path": None, "blend": {"/data/a": 0.3, "/data/b": 0.7}, "sequence_length": 256},
        "train": {"global_batch_size": 16},
        "precision": {"recipe": "nvfp4_super"},
        "distill": {"preset": "nano"},
    }
    directory = tmp_path / "mine" / "checkpoints" / "step_00001500"
    write_checkpoint(directory, run, {"step": 1500, "data": ["f00d"]}, "# Mine\n<b>bold</b>")
    text = lineage(directory)
    assert dict(row for row in rows(text) if row[0] not in ("", "---")) == {
        "checkpoint": "`mine/step_00001500`",
        "SHA-256 in its manifest": "`abc123`, not checked against the files",
        "began as": "`base/step_00000420`",
        "optimizer steps": "1,500",
        "each of": "16 sequences of 256 tokens",
        "number formats of training": "`nvfp4_super`",
        "distilled for": "`nano`",
        "training data": "`a`, `b`",
        "digests of the data": "`f00d`",
    }
    assert text.endswith("\n\n    # Mine\n    <b>bold</b>")
    assert "someone" not in text
    assert text in card(OPTIONS, facts(), text)


def test_lineage_of_what_says_nothing(tmp_path: Path) -> None:
    """Or the wrong things: nothing is made up."""
    unknown = ["number formats of training", "not known"]
    named = ["checkpoint", f"`{tmp_path.name}`"]
    assert [row for row in rows(lineage(tmp_path))][2:] == [named, unknown]
    run = {"model": 3, "data": {"path": [1], "blend": [2]}, "distill": {"preset": "none"}}
    write_checkpoint(tmp_path / "odd", run, {"step": "x", "data": 7}, "")
    assert [row[0] for row in rows(lineage(tmp_path / "odd"))][2:] == [
        "checkpoint", "SHA-256 in its manifest", "number formats of training",
    ]  # fmt: skip
    write_checkpoint(tmp_path / "huge", {}, {"step": 10**20}, "x" * 5000)
    (tmp_path / "huge" / "run.yaml").write_text(
        "train: {global_batch_size: 0x1" + "0" * 5000 + "}\ndata: {sequence_length: 2}"
    )
    text = lineage(tmp_path / "huge")
    assert "optimizer steps" not in text
    assert "sequences" not in text
    assert text.endswith(f"says, in its first 4,000 characters:\n\n    {'x' * 4000}")


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("manifest.json", b"[1]"),
        ("run.yaml", b"model: !odd 3"),
        ("run.yaml", b"model: " + b"1" * 5000),
        ("run_state.json", b"\xff"),
    ],
)
def test_lineage_that_cannot_be_read_is_said_to_be_so(tmp_path, name, content) -> None:
    (tmp_path / name).write_bytes(content)
    assert ["could not be read", f"`{name}`"] in rows(lineage(tmp_path))


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
def test_texts_of_others_stay_texts(hostile: str, tmp_path: Path) -> None:
    shown = code(hostile)
    assert re.fullmatch(r"`[^`\n]+`", shown)
    assert not re.search(r"(?<!\\)\|", shown)
    assert shown.isprintable()
    glob = {hostile or "*": "fp8"}
    quiet = made(formats={"*": "fp8"}, calibration="data")
    text = made(
        facts(source=Path(hostile)),
        Measured(0.1, 2.0, 2.0, 5, hostile),
        formats=glob,
        calibration=hostile,
    )
    noisy = made(measured=Measured(0.1, 2.0, 2.0, 5, "data"), formats={"*": "fp8"})
    assert len(text.splitlines()) == len(noisy.splitlines())
    assert [len(row) for row in rows(text)] == [len(row) for row in rows(noisy)]
    outside = re.sub(r"`[^`]*`", "", text)
    assert "<script" not in outside
    assert "javascript" not in outside
    assert text.split("---")[1] == quiet.split("---")[1]
    (tmp_path / "README.md").write_text(hostile)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"data": {"path": hostile}}))
    said = lineage(tmp_path).partition("says:")
    assert all(line[:4] in ("", "    ") for line in said[2].splitlines())
    assert "<script" not in re.sub(r"`[^`]*`", "", said[0])
