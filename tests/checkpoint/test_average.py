"""average: the coefficients, the sum against fp64, and which checkpoints are refused."""

from __future__ import annotations

import json
import re
from itertools import accumulate, pairwise
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.tiny_models import loud_model, tiny_config
from nemo_hybrid import HybridLM, cli
from nemo_hybrid.agreement import ALONE
from nemo_hybrid.checkpoint.average import REPORT, average, checkpoints_of, coefficients
from nemo_hybrid.checkpoint.companions import Companions
from nemo_hybrid.checkpoint.directory import verify
from nemo_hybrid.checkpoint.load import tensors_by_name
from nemo_hybrid.checkpoint.state import KINDS, Fragment, save_checkpoint
from nemo_hybrid.checkpoint.steps import step_name
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.errors import UserError
from nemo_hybrid.model.fp32 import keeps_fp32

CONFIG = tiny_config("ME*-", mtp_num_depths=1)
FROZEN = "backbone.embeddings.weight"
C = [0.5, 0.3, 0.2]


def save(
    run: Path, step: int, config: HybridConfig = CONFIG, tokenizer: bytes = b"{}"
) -> dict[str, Tensor]:
    """A checkpoint of a model that the step makes, in bf16 beside fp32 masters; every master in
    three pieces that end anywhere, but for a parameter that is not trained. Returns the masters,
    and what has none."""
    tensors = {n: t.detach() for n, t in tensors_by_name(loud_model(config, seed=step)).items()}
    stored = {n: t if keeps_fp32(n) else t.bfloat16() for n, t in tensors.items()}
    fragments = []
    for name, tensor in tensors.items():
        if name == FROZEN or name.endswith("correction_bias"):
            tensors[name] = stored[name].float()
            continue
        cuts = [0, tensor.numel() // 3 + 1, tensor.numel() // 2 + 1, tensor.numel()]
        for start, stop in pairwise(cuts):
            piece = tensor.flatten()[start:stop]
            kinds = {kind: piece if kind == "master" else piece + 7 for kind in KINDS}
            fragments.append(Fragment(name, start, stop - start, tuple(tensor.shape), kinds))
    save_checkpoint(
        run / "checkpoints",
        step,
        ALONE,
        config=config,
        weights=[(name, tensor, 0) for name, tensor in stored.items()],
        fragments=fragments,
        run_state={},
        rank_state={},
        companions=Companions({"tokenizer.json": tokenizer}),
        resolved_config="",
        keep=0,
        frozen=[FROZEN],
    )
    return tensors


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> tuple[Path, list[dict[str, Tensor]]]:
    """A run with checkpoints of the steps 10, 20, 30, and what these hold."""
    run = tmp_path_factory.mktemp("run")
    return run, [save(run, step) for step in (10, 20, 30)]


def test_coefficients_are_those_of_the_published_schedules() -> None:
    """Those of five checkpoints as Megatron-LM's weighted_merge.py gives them; in general the
    update between checkpoint i - 1 and i is kept by 1 - sqrt(i / n)."""
    published = [0.4472, 0.1852, 0.1421, 0.1198, 0.1056]
    assert coefficients("minus_sqrt", 5) == pytest.approx(published, abs=5e-5)
    for n in (2, 7, 20):
        c = coefficients("minus_sqrt", n)
        kept = list(accumulate(c[::-1]))[::-1]
        assert kept == pytest.approx([1 - (i / n) ** 0.5 for i in range(n)])
        assert coefficients("linear", n) == pytest.approx([1 / n] * n)
    assert coefficients("1, 2,1", 3) == [0.25, 0.5, 0.25]


def broken(out: HybridLM, wanted: dict[str, Tensor]) -> list[str]:
    """Names of the tensors that are not the given fp64 ones, summed in fp32 and rounded once."""
    wrong = []
    for name, tensor in tensors_by_name(out).items():
        exact = wanted[name]
        # Half a unit in the last of 8 bits and the sum's own error in fp32, for the parts of which
        # stands the largest element.
        rounding = 0.0 if keeps_fp32(name) else 2.0**-8
        bound = rounding * exact.abs() + 2.0**-22 * exact.abs().max()
        if ((tensor.double() - exact).abs() > bound).any():
            wrong.append(name)
    return wrong


def mean(parts: list[dict[str, Tensor]], c: list[float]) -> dict[str, Tensor]:
    return {
        name: sum(w * part[name].double() for w, part in zip(c, parts, strict=True))
        for name in parts[0]
    }


def test_the_mean_is_that_of_the_masters_rounded_once(tmp_path, run) -> None:
    run_dir, parts = run
    assert cli.main(["average", str(run_dir), "--weights", "5,3,2", "--out", f"{tmp_path}/o"]) == 0
    verify(tmp_path / "o")
    out = HybridLM.from_hf(str(tmp_path / "o"))
    assert broken(out, mean(parts, C)) == []

    # The check notices the other order, and weights in place of masters.
    assert len(broken(out, mean(parts, C[::-1]))) == len(parts[0])
    rounded = [{n: t.bfloat16().float() for n, t in part.items()} for part in parts]
    assert FROZEN not in broken(out, mean(rounded, C))
    assert {n for n in parts[0] if n.endswith("_proj.weight")} <= {*broken(out, mean(rounded, C))}

    assert (tmp_path / "o" / "tokenizer.json").read_bytes() == b"{}"
    report = json.loads((tmp_path / "o" / REPORT).read_text())["checkpoints"]
    assert [part["coefficient"] for part in report] == C
    assert [Path(part["path"]).name for part in report] == [step_name(s) for s in (10, 20, 30)]
    assert {part["read"] for part in report} == {"fp32 masters"}
    card = (tmp_path / "o" / "README.md").read_text()
    assert "| step_00000010 | fp32 masters | 0.5000 |" in card
    assert "Context length: declared for " in card


def test_directories_without_masters_give_their_weights(tmp_path, run) -> None:
    for i, part in enumerate(run[1][:2]):
        model = HybridLM(CONFIG)
        for name, tensor in tensors_by_name(model).items():
            tensor.data.copy_(part[name])
        model.save_hf(str(tmp_path / str(i)))
    parts = [(tmp_path / "0", 0.25), (tmp_path / "1", 0.75)]
    assert average([path for path, _ in parts], "1,3", tmp_path / "o") == parts
    out = HybridLM.from_hf(str(tmp_path / "o"))
    assert {t.dtype for t in tensors_by_name(out).values()} == {torch.float32}
    for name, tensor in tensors_by_name(out).items():
        exact = mean(run[1][:2], [0.25, 0.75])[name]
        assert (tensor.double() - exact).abs().max() <= 2.0**-22 * exact.abs().max(), name


def test_which_checkpoints_of_a_run(run) -> None:
    def steps(*chosen: int | None) -> list[int]:
        return [int(path.name[-8:]) for path in checkpoints_of(run[0], *chosen)]

    assert steps(None, None, None) == steps(0, 99, 10) == [10, 20, 30]
    assert steps(11, None, None) == [20, 30]
    assert steps(None, 20, 1) == [10, 20]
    assert steps(None, None, 11) == [10, 30]
    with pytest.raises(UserError, match=r"1 checkpoints of .* those of the steps 10, 20, 30"):
        steps(25, None, None)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("", "two or more checkpoints, got none"),
        ("RUN RUN --every 10", "choose among the checkpoints of one run"),
        ("RUN --from 30", "an average takes two or more"),
        ("RUN --every 0", "every must be positive, got 0"),
        ("RUN/checkpoints/step_00000010", "is not a run with checkpoints"),
        ("RUN --weights 1,2", "gives 2 numbers for 3 checkpoints"),
        ("RUN --weights 1,-1,1", "must be 0 or more"),
        ("RUN --weights sqrt", "expected minus_sqrt, linear or numbers"),
        ("RUN RUN", "named twice"),
        ("RUN OTHER", "has 'ME': these are not versions of one model"),
        ("RUN TOKENS", "do not have the same tokenizer"),
        ("RUN ADAPTER", "holds an adapter"),
        ("RUN BROKEN", "NaN or infinity"),
        ("RUN nowhere", "nowhere does not exist"),
    ],
)
def test_mistakes_leave_nothing_behind(tmp_path, run, words, message, capsys) -> None:
    places = {"RUN": run[0], **{n: tmp_path / n for n in ("OTHER", "TOKENS", "ADAPTER", "BROKEN")}}
    if "OTHER" in words:
        save(tmp_path / "OTHER", 1, tiny_config("ME"))
    if "TOKENS" in words:
        save(tmp_path / "TOKENS", 1, tokenizer=b"{ }")
    if "ADAPTER" in words:
        places["ADAPTER"].mkdir()
        (places["ADAPTER"] / "adapter_config.json").write_text("{}")
        (places["ADAPTER"] / "config.json").write_text("{}")
    if "BROKEN" in words:
        model = loud_model(CONFIG)
        model.lm_head.weight.data[3, 4] = torch.nan
        model.save_hf(str(places["BROKEN"]))
        (places["BROKEN"] / "tokenizer.json").write_bytes(b"{}")
    for name, place in places.items():
        words = words.replace(name, str(place))
    assert cli.main(["average", *words.split(), "--out", str(tmp_path / "o")]) == 2
    error = capsys.readouterr().err
    assert error.startswith("error: ") or "\nerror: " in error
    assert re.search(message, error), error
    assert not (tmp_path / "o").exists()


def test_an_order_that_steps_contradict_is_warned_of(tmp_path, run, capsys) -> None:
    places = [f"{run[0]}/checkpoints/{step_name(step)}" for step in (20, 10)]
    for order, warned in ((places, True), (places[::-1], False)):
        assert cli.main(["average", *order, "--out", f"{tmp_path}/{warned}"]) == 0
        assert ("warning: the first is taken for the oldest" in capsys.readouterr().out) == warned
    assert len(checkpoints_of(run[0] / "checkpoints", None, None, None)) == 3


def test_a_directory_that_is_there_stays(tmp_path, run, capsys) -> None:
    (tmp_path / "o").mkdir()
    (tmp_path / "o" / "mine").write_text("mine")
    assert cli.main(["average", str(run[0]), "--out", f"{tmp_path}/o"]) == 2
    assert "is not empty" in capsys.readouterr().err
    assert [path.name for path in (tmp_path / "o").iterdir()] == ["mine"]
