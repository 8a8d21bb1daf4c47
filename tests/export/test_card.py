"""The model card: its facts, what it must not claim, and texts that would be Markdown."""

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
from nemo_hybrid import __version__
from nemo_hybrid.commands.export import ExportOptions
from nemo_hybrid.export.calibrate import Calibration
from nemo_hybrid.export.card import Origin, card, code, lineage
from nemo_hybrid.export.layout import ExportFacts
from nemo_hybrid.export.verify import Measured, Run
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
    return card(options, found or facts(), Origin({"checkpoint": "`tiny`"}, ""), measured)


def rows(text: str) -> list[list[str]]:
    """Cells of all table rows."""
    split = (re.split(r"(?<!\\)\|", line)[1:-1] for line in text.splitlines() if line[:1] == "|")
    return [[cell.strip() for cell in row] for row in split]


def told(*args: Any, **changes: Any) -> dict[str, str]:
    """The table of facts."""
    return dict(row for row in rows(made(*args, **changes)) if len(row) == 2)


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


def test_the_table_says_what_was_done() -> None:
    assert yaml.safe_load(made().split("---")[1])["tags"] == ["nemotron_h", "fp8", "nvfp4"]
    assert "# `tiny/step_00000420` in FP8, NVFP4" in made()
    found = told(formats={"*.o_proj": "nvfp4", "mtp.*|`": "fp8"})
    wanted = {
        "exported by": f"nemo_hybrid {__version__}, `--format mixed`",
        "parameters": "1,000",
        "bytes of weights": "700",
        "bits per parameter, scales included": "5.60",
        "share of what BF16 takes": "35.0%",
        "layout": "modelopt",
        "changed by globs, the last counts": "`*.o_proj`: `nvfp4`; `mtp.*\\|'`: `fp8`",
        "calibration": "65,536 tokens of `a.txt`",
        "input scales cover": "all values",
        "checkpoint": "`tiny`",
    }
    assert {name: found.get(name) for name in wanted} == wanted
    assert found["preset"].endswith("not NVIDIA's choice of single layers")
    assert found["NVFP4 block scales"].startswith("`four_over_six`: the better of")
    plain = told(facts(assignment=assign(SHAPE, None, {}), calibration=None),
                 format="bf16", preset="conservative", calibration=None)  # fmt: skip
    absent = {"preset", "NVFP4 block scales", "calibration", "input scales cover"}
    assert not absent & plain.keys()
    assert plain["layout"] == "plain"
    assert "someone" not in made()


def test_calibration_and_cache() -> None:
    seen = calibration(
        unseen={"backbone.layers.1.mixer.experts.up_proj": [0, 2, 3]},
        kv={"backbone.layers.3.mixer.k_proj": 3.0, "mtp.layers.0.mixer.k_proj": 3.0},
    )
    found = told(facts(calibration=seen), percentile=99.9, kv_cache="fp8")
    assert found["input scales cover"] == "99.9 % of the values that are not zero"
    assert found["FP8 scales of keys and values"] == "2, in: backbone, mtp"
    (unreached,) = (name for name in found if name.startswith("experts of"))
    assert "`backbone.layers.1.mixer.experts.up_proj`" in unreached
    assert found[unreached] == "0, 2-3"
    weights_alone: Any = {
        place: "nvfp4_w4a16" if format != "bf16" else format
        for place, format in facts().assignment.items()
    }
    found = told(facts(assignment=weights_alone))
    assert "input scales cover" not in found
    assert "FP8 scales of keys and values" not in found


def test_nothing_is_claimed_that_was_not_measured() -> None:
    text = made()
    assert "## Measured" not in text
    assert "What has no number above was not measured" in text
    for word in ("faster", "speed-up", "accuracy"):
        assert word not in text
    errors = {"experts": {"four_over_six": 0.08, "amax": 0.09}}
    runs = [Run("nothing: the source", None, 2.0), Run("weights", 1.234e-2, 2.1)]
    found = Measured(8192, "/home/held-out.txt", runs)
    text = made(facts(errors=errors), found)
    assert "8,192 tokens of `held-out.txt`, in FP32" in text
    assert "| nothing: the source |  | 7.389 |" in text
    assert "| weights | 1.234e-02 | 8.166 |" in text
    assert "weights, experts | 0.0800 with `four_over_six`, 0.0900 with `amax` |" in text
    store = made(measured=found._replace(text=str(Path(__file__).parent)), calibration="/")
    assert "8,192 tokens of the held-out part of `export`, in FP32" in store
    assert "65,536 tokens of the training part of `/`" in store


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
    found = told(facts(assignment=chosen), budget_bits=9.75, preset="conservative")
    assert found["formats by"] == "measured sensitivity (`sensitivity.json`)"
    assert found["bits per weight that a budget is for"] == f"{mean:.3f}"
    assert found["budget"] == f"9.75 for {sum(spent.values()):,} weights"
    assert "preset" not in found


def write_checkpoint(directory: Path, run: object, state: object, own: str) -> None:
    directory.mkdir(parents=True)
    (directory / "run.yaml").write_text(yaml.safe_dump(run))
    (directory / "run_state.json").write_text(json.dumps(state))
    (directory / "manifest.json").write_text(json.dumps({"files": {}, "sha256": "abc123"}))
    (directory / "README.md").write_text(own)


def test_lineage_is_what_the_checkpoint_says(tmp_path: Path) -> None:
    run = {
        "model": {"from_hf": "/home/someone/runs/base/checkpoints/step_00000420"},
        "data": {
            "path": None,
            "blend": {"/data/a": 0.3, "/data/b": 0.7},
            "phases": {1e9: {"/data/b": 1.0, "/data/c": 1.0}},
            "sequence_length": 256,
        },
        "train": {"global_batch_size": 16},
        "precision": {"recipe": "nvfp4_super"},
        "distill": {"preset": "nano"},
    }
    directory = tmp_path / "mine" / "checkpoints" / "step_00001500"
    write_checkpoint(directory, run, {"step": 1500, "data": ["f00d"]}, "# Mine\n<b>bold</b>")
    found = lineage(directory)
    assert found.facts == {
        "checkpoint": "`mine/step_00001500`",
        "SHA-256 in its manifest, not checked": "`abc123`",
        "began as": "`base/step_00000420`",
        "optimizer steps": "1,500",
        "sequences per step": "16",
        "tokens per sequence": "256",
        "number formats of training": "`nvfp4_super`",
        "distilled for": "`nano`",
        "training data": "`a`, `b`, `c`",
        "digests of the data": "`f00d`",
    }
    text = card(OPTIONS, facts(), found)
    assert text.endswith("\n\n    # Mine\n    <b>bold</b>\n")
    assert "| optimizer steps | 1,500 |" in text
    assert "someone" not in text


def test_lineage_of_what_says_nothing(tmp_path: Path) -> None:
    """Or the wrong things: nothing is made up."""
    unknown = {"number formats of training": "not known"}
    assert lineage(tmp_path) == ({"checkpoint": f"`{tmp_path.name}`"} | unknown, "")
    run = {"model": 3, "data": {"path": [1], "blend": [2]}, "distill": {"preset": "none"}}
    write_checkpoint(tmp_path / "odd", run, {"step": "x", "data": 7}, "")
    assert list(lineage(tmp_path / "odd").facts) == [
        "checkpoint", "SHA-256 in its manifest, not checked", "number formats of training",
    ]  # fmt: skip
    write_checkpoint(tmp_path / "huge", {}, {"step": 10**20}, "x" * 5000)
    (tmp_path / "huge" / "run.yaml").write_text(
        "train: {global_batch_size: 0x1" + "0" * 5000 + "}\ndata: {sequence_length: 2}"
    )
    found = lineage(tmp_path / "huge")
    assert "optimizer steps" not in found.facts
    assert "sequences per step" not in found.facts
    assert found.own == "x" * 4000


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
    assert lineage(tmp_path).facts["could not be read"] == f"`{name}`"


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
    text = made(
        facts(source=Path(hostile)),
        Measured(5, hostile, [Run("weights", 0.1, 2.0)]),
        formats=glob,
        calibration=hostile,
    )
    measured = Measured(5, "data", [Run("weights", 0.1, 2.0)])
    noisy = made(measured=measured, formats={"*": "fp8"}, calibration="data")
    (_, head, text), (_, usual, noisy) = (t.split("---\n", 2) for t in (text, noisy))
    base = {"base_model": Path(hostile).name} if hostile else {}
    assert yaml.safe_load(head) == yaml.safe_load(usual) | base
    assert len(text.splitlines()) == len(noisy.splitlines())
    assert [len(row) for row in rows(text)] == [len(row) for row in rows(noisy)]
    outside = re.sub(r"`[^`]*`", "", text)
    assert "<script" not in outside
    assert "javascript" not in outside
    (tmp_path / "README.md").write_text(hostile)
    (tmp_path / "run.yaml").write_text(yaml.safe_dump({"data": {"path": hostile}}))
    text = card(OPTIONS, facts(), lineage(tmp_path))
    own = text.partition("## The beginning of the source's README.md\n\n")[2]
    assert bool(own) == bool(hostile)
    assert all(line[:4] in ("", "    ") for line in own.splitlines())
    assert "<script" not in re.sub(r"`[^`]*`", "", text.removesuffix(own))
