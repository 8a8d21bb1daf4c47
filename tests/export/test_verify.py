"""`verify-export`: sound exports pass, and each fault is named."""

import shutil
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import vllm_check
from safetensors.torch import load_file
from torch import Tensor

from helpers.exported import (
    ANY,
    EXPERT,
    WEIGHTS,
    Kind,
    Made,
    edit_json,
    edit_tensors,
    export_config,
    failed,
    seal,
    write_export,
)
from helpers.tiny_models import loud_model
from nemo_hybrid.commands.verify import VerifyOptions, verify_command
from nemo_hybrid.errors import UserError
from nemo_hybrid.export.divergence import chosen_device
from nemo_hybrid.export.verify import load_exported, verify_directory
from nemo_hybrid.hub import HybridLM


def options(directory: Path, **changes: Any) -> VerifyOptions:
    return VerifyOptions(paths=[str(directory)], **changes)


@pytest.mark.parametrize(("kind", "skipped"), [("mixed", []), ("compressed_w4a16", ["scales"])])
def test_a_sound_export_passes(exported: Made, kind: str, skipped: list[str]) -> None:
    result = verify_directory(
        exported(kind) / "export", base=str(exported(kind) / "base"), tokens=200
    )
    assert [check.name for check in result.checks if not check.passed] == skipped
    assert [check.name for check in result.checks if check.passed is False] == []
    assert result.measured is not None
    assert result.measured.tokens == 200
    assert len(result.measured.runs) == 3 - len(skipped)
    assert 1e-4 < (result.measured.runs[1].kl or 0) < 0.1


def test_divergence_is_that_of_the_logits(exported: Made) -> None:
    directory = exported() / "export"
    result = verify_directory(directory, base=str(directory.parent / "base"), tokens=30)
    generator = torch.Generator().manual_seed(1234)
    ids = torch.randint(0, 61, (1, 31), generator=generator)
    source = HybridLM.from_hf(str(directory.parent / "base"), dtype=torch.float32)
    with torch.no_grad():
        p = source(ids).logits[0, :-1].double().log_softmax(-1)
        q = load_exported(directory)(ids).logits[0, :-1].double().log_softmax(-1)
    assert result.measured is not None
    source_run, found, _ = result.measured.runs
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    for run, x in ((source_run, p), (found, q)):
        assert run.loss == pytest.approx(float(-x.gather(1, ids[0, 1:, None]).mean()), rel=1e-5)


def test_exit_status(made: Made, capsys: pytest.CaptureFixture[str]) -> None:
    directory = made()
    base = str(directory.parent / "base")
    assert verify_command(options(directory, tokens=20)) == 0
    assert verify_command(options(directory, base=base, tokens=20, max_kl=10.0)) == 0
    assert "exceeds" not in capsys.readouterr().out
    assert verify_command(options(directory, base=base, tokens=20, max_kl=1e-7)) == 3
    assert "the KL divergence exceeds --max_kl 1e-07" in capsys.readouterr().out
    capsys.readouterr()
    edit_tensors(directory, lambda t: t.pop(f"{EXPERT}.weight_scale"))
    assert verify_command(options(directory, base=base, tokens=20, max_kl=10.0)) == 2
    shown = capsys.readouterr().out
    assert "FAILED" in shown
    assert f"names, shapes, dtypes: {EXPERT}.weight_scale: missing" in shown
    with pytest.raises(UserError, match="--max_kl needs --base"):
        verify_command(options(directory, max_kl=1.0))
    with pytest.raises(UserError, match="not a directory"):
        verify_command(options(directory / "none"))
    (directory / "checkpoints").mkdir()
    with pytest.raises(UserError, match="is a run: name a directory that"):
        verify_command(options(directory))


def test_one_byte(made: Made) -> None:
    directory = made()
    content = bytearray((directory / WEIGHTS).read_bytes())
    content[-1] ^= 1
    (directory / WEIGHTS).write_bytes(content)
    assert WEIGHTS in failed(directory, base=False)["checksums"]


def test_a_file_that_nobody_listed(made: Made) -> None:
    directory = made()
    (directory / "more.safetensors").write_bytes((directory / WEIGHTS).read_bytes())
    found = failed(directory)
    assert "more.safetensors" in found["checksums"]
    assert "more.safetensors" in found["names, shapes, dtypes"]


Tensors = dict[str, Tensor]


def rename(old: str, new: str) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({new: tensors.pop(old)})


def change(name: str, by: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    return lambda tensors: tensors.update({name: by(tensors[name]).contiguous()})


def one_nan(t: Tensor) -> Tensor:
    t = t.clone()
    t.view(-1)[3] = torch.nan
    return t


ROW = slice(0, 1)


def at(place: Any, by: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Changes the bytes of a part."""

    def changed(tensor: Tensor) -> Tensor:
        tensor = tensor.clone()
        found = tensor.view(torch.uint8)
        found[place] = by(found[place])
        return tensor

    return changed


def rows_swapped(tensors: Tensors) -> None:
    order = [1, 0, *range(2, 32)]
    for part in ("weight", "weight_scale"):
        stored = tensors[f"{EXPERT}.{part}"]
        tensors[f"{EXPERT}.{part}"] = stored.view(torch.uint8)[order].view(stored.dtype)


@pytest.fixture(scope="module")
def one(exported: Made, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export whose tensors tests damage and bring back."""
    place = tmp_path_factory.mktemp("one")
    for name in ("base", "export"):
        shutil.copytree(exported() / name, place / name)
    return place / "export"


@pytest.mark.parametrize(
    ("fault", "check", "named"),
    [
        (lambda t: t.pop(f"{EXPERT}.weight"), "names, shapes, dtypes", f"{EXPERT}.weight: missing"),
        (lambda t: t.pop(f"{ANY}.input_scale"), "names, shapes, dtypes", f"{ANY}.input_scale"),
        (lambda t: t.pop("mtp.layers.0.enorm.weight"), "names, shapes, dtypes", "mtp.layers.0"),
        (
            lambda t: t.pop("backbone.layers.2.mixer.k_proj.k_scale"),
            "names, shapes, dtypes",
            "k_proj.k_scale: missing",
        ),
        (
            rename(f"{EXPERT}.weight_scale_2", f"{EXPERT}.weight_global_scale"),
            "names, shapes, dtypes",
            "weight_global_scale: unexpected",
        ),
        (
            change(f"{EXPERT}.weight_scale_2", lambda x: x.view(1)),
            "names, shapes, dtypes",
            "is F32 [1], should be F32 []",
        ),
        (
            change(f"{EXPERT}.weight_scale", Tensor.float),
            "names, shapes, dtypes",
            "should be F8_E4M3 [32, 1]",
        ),
        (change(f"{EXPERT}.weight", lambda x: x[:-1]), "names, shapes, dtypes", "is U8 [31, 8]"),
        (change("backbone.layers.0.mixer.D", Tensor.bfloat16), "names, shapes, dtypes", "mixer.D"),
        (change(f"{EXPERT}.weight_scale_2", lambda x: -x), "values", "weight_scale_2"),
        (change(f"{EXPERT}.input_scale", lambda x: x * 0), "values", "input_scale"),
        (
            change(f"{EXPERT}.input_scale", lambda x: x * 2),
            "values",
            "up_proj.input_scale and 3 more differ",
        ),
        (change("lm_head.weight", one_nan), "values", "lm_head.weight: not finite"),
        (
            change("backbone.layers.2.mixer.v_proj.v_scale", lambda x: x * 0),
            "values",
            "v_proj.v_scale: not positive",
        ),
        (
            change(f"{EXPERT}.weight_scale", lambda x: one_nan(x.float()).to(x.dtype)),
            "values",
            "up_proj.weight_scale: not finite",
        ),
        (
            change("backbone.layers.2.mixer.q_proj.weight_scale_2", lambda x: x * 1.01),
            "values",
            "q_proj.weight_scale_2 and 2 more differ",
        ),
        (change(f"{EXPERT}.weight_scale_2", lambda x: x * 1.5), "source", EXPERT),
        (change(f"{ANY}.weight_scale", lambda x: x * 1.1), "source", ANY),
        (change(f"{EXPERT}.weight", lambda x: x << 4 | x >> 4), "source", EXPERT),
        # Damage that a norm over the matrix hides.
        (change(f"{ANY}.weight", at(ROW, lambda x: x ^ 2)), "source", f"{ANY}: "),
        (change(f"{ANY}.weight", at(ROW, lambda x: x + 1)), "source", ANY),
        (change(f"{ANY}.weight", at((0, 3), lambda x: x ^ 4)), "source", "row 0, column 3"),
        (change(f"{EXPERT}.weight", at(ROW, lambda x: x * 0)), "source", f"{EXPERT}: 1"),
        (change(f"{EXPERT}.weight", at(ROW, lambda x: x ^ 0x88)), "source", EXPERT),
        (change(f"{EXPERT}.weight", at((5, 2), lambda x: x ^ 7)), "source", "values of nvfp4"),
        (change(f"{EXPERT}.weight_scale", at(ROW, lambda x: x * 0)), "source", EXPERT),
        (change(f"{EXPERT}.weight_scale", at((3, 0), lambda x: x + 8)), "source", EXPERT),
        (change(f"{EXPERT}.weight_scale", at((3, 0), lambda x: x - 8)), "source", EXPERT),
        (rows_swapped, "source", EXPERT),
        (change("mtp.layers.0.eh_proj.weight", lambda x: x * 1.01), "source", "eh_proj"),
        (change("backbone.layers.0.mixer.dt_bias", lambda x: x + 1e-6), "source", "dt_bias"),
    ],
)
def test_faults_of_tensors(
    one: Path, fault: Callable[[Tensors], None], check: str, named: str
) -> None:
    whole = {path: path.read_bytes() for path in one.iterdir()}
    edit_tensors(one, fault)
    found = failed(one)
    for path, content in whole.items():
        path.write_bytes(content)
    assert named in found[check]


@pytest.mark.parametrize(
    "fault",
    [
        lambda t: t.pop(f"{ANY}.weight"),  # whose format is then unknown
        lambda t: t.pop("backbone.layers.0.mixer.in_proj.weight_scale"),
        change(f"{ANY}.weight", Tensor.bfloat16),
        change("backbone.layers.1.mixer.gate.weight", lambda x: x.to(torch.float8_e4m3fn)),
        lambda t: [t.pop(name) for name in list(t) if name.endswith((".k_scale", ".v_scale"))],
        lambda t: [t.pop(n) for n in list(t) if ".experts." in n and n.endswith("input_scale")],
    ],
)
def test_tensors_of_another_format_are_unlike_the_configuration(
    one: Path, fault: Callable[[Tensors], None]
) -> None:
    whole = {path: path.read_bytes() for path in one.iterdir()}
    edit_tensors(one, fault)
    found = failed(one)
    for path, content in whole.items():
        path.write_bytes(content)
    assert found.keys() & {"configuration", "names, shapes, dtypes"}


def test_faults_of_another_model(made: Made, tmp_path: Path) -> None:
    directory = made()
    loud_model(export_config(), seed=1).bfloat16().save_hf(str(tmp_path / "other"))
    result = verify_directory(directory, base=str(tmp_path / "other"), tokens=20)
    notes = "".join(check.note for check in result.checks if check.passed is False)
    assert "fp8 differs from the source" in notes
    loud_model(export_config(routed_scaling_factor=1.0)).save_hf(str(tmp_path / "third"))
    result = verify_directory(directory, base=str(tmp_path / "third"), tokens=20)
    assert result.checks[-1].passed is False
    assert "another model" in result.checks[-1].note


def scaled(part: str, by: Callable[[Tensor], Tensor]) -> Callable[[Tensors], None]:
    """Changes all tensors whose names hold a part."""
    return lambda tensors: tensors.update({n: by(t) for n, t in tensors.items() if part in n})


@pytest.mark.parametrize(
    ("kind", "fault", "named"),
    [
        ("fp8", scaled("in_proj.input_scale", Tensor.reciprocal), "inputs of backbone.layers.0"),
        ("fp8", scaled(f"{ANY}.input_scale", lambda x: x * 1e-6), f"inputs of {ANY}"),
        ("fp8", scaled(f"{ANY}.input_scale", lambda x: x * 448), f"inputs of {ANY}"),
        ("fp8", scaled(f"{ANY}.input_scale", lambda x: x / 448), f"inputs of {ANY}"),
        ("nvfp4", scaled(".up_proj.input_scale", Tensor.reciprocal), "mixer.experts.up_proj"),
        ("nvfp4", scaled(".down_proj.input_scale", lambda x: x * 2688), "mixer.experts.down_proj"),
        (
            "mixed",
            scaled("k_scale", Tensor.reciprocal),
            "outputs of backbone.layers.2.mixer.k_proj",
        ),
        (
            "mixed",
            scaled("v_scale", lambda x: x / 1000),
            "outputs of backbone.layers.2.mixer.v_proj",
        ),
        (
            "compressed",
            scaled("input_global_scale", Tensor.reciprocal),
            "inputs of backbone.layers.2.mixer.q_proj",
        ),
        ("compressed", scaled("input_global_scale", lambda x: x / 448), "mixer.experts.up_proj"),
    ],
)
def test_scales_that_fit_no_activation(
    made: Made, kind: str, fault: Callable[[Tensors], None], named: str
) -> None:
    directory = made(kind)
    edit_tensors(directory, fault)
    assert named in failed(directory)["scales"]


def test_scales_of_head_and_mtp_block(made: Made) -> None:
    directory = made("everything")
    edit_tensors(directory, scaled("eh_proj.input_scale", lambda x: x * 1e4))
    edit_tensors(directory, scaled("lm_head.input_scale", lambda x: x * 1e-4))
    said = failed(directory)["scales"]
    assert "inputs of lm_head" in said
    assert "inputs of mtp.layers.0.eh_proj" in said


def test_inputs_are_rounded_by_the_stored_scales(tmp_path: Path) -> None:
    """Against hooks that round by hand, of all inputs and of the head's, which states lack."""
    rules = {"*.mixer.in_proj": "fp8", "*.shared_experts.*": "fp8", "lm_head": "fp8"}
    write_export(tmp_path, Kind("fp8", rules))
    directory, base = tmp_path / "export", str(tmp_path / "base")
    measured = verify_directory(directory, base=base, tokens=30).measured
    assert measured is not None
    _, weights, both = measured.runs
    model, source = load_exported(directory), HybridLM.from_hf(base, dtype=torch.float32)
    stored = load_file(directory / WEIGHTS)

    def rounded(scale: Tensor, module: object, args: tuple[Tensor]) -> tuple[Tensor]:
        return ((args[0] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale,)

    for name, module in model.named_modules():
        if f"{name}.input_scale" in stored:
            module.register_forward_pre_hook(partial(rounded, stored[f"{name}.input_scale"]))
    ids = torch.randint(0, 61, (1, 31), generator=torch.Generator().manual_seed(1234))
    with torch.no_grad():
        p, q = (m(ids).logits[0, :-1].double().log_softmax(-1) for m in (source, model))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert both.kl == pytest.approx(kl, rel=1e-3)
    assert both.loss == pytest.approx(float(-q.gather(1, ids[0, 1:, None]).mean()), 1e-5)
    assert weights.kl is not None
    assert weights.kl < 0.9 * kl
    # The larger one counts.
    limits = [(weights.kl + kl) / 2, kl * 1.01]
    status = [verify_command(options(directory, base=base, tokens=30, max_kl=x)) for x in limits]
    assert status == [3, 0]


def test_companions(made: Made) -> None:
    directory = made()
    base = directory.parent / "base"
    for place in (base, directory):
        (place / "tokenizer.json").write_text("{}")
        (place / "chat_template.jinja").write_text("{{ messages }}")
        seal(place)
    assert failed(directory) == {}
    (directory / "tokenizer.json").unlink()
    (directory / "chat_template.jinja").write_text("{{ something }}")
    seal(directory)
    assert failed(directory, base=False) == {}
    said = failed(directory)["companions"]
    assert "tokenizer.json is missing; the base has it" in said
    assert "chat_template.jinja is not that of the base" in said
    (base / "tokenizer.json").unlink()
    (directory / "added_tokens.json").write_text("{}")
    for name in ("modeling_other.py", "pytorch_model.bin", "params.json"):
        (directory / name).write_text("")
    edit_json(directory, "config.json", lambda c: c.update(eos_token_id=[c["eos_token_id"], 77]))
    said = failed(directory)["companions"]
    assert "added_tokens.json is there, but the base has none" in said
    assert "eos_token_id is not that of the base" in said
    (base / "generation_config.json").unlink()
    said = failed(directory)["companions"]
    assert "generation_config.json and config.json disagree about eos_token_id" in said
    said = failed(directory, base=False)["companions"]
    for name in ("modeling_other.py", "pytorch_model.bin", "params.json"):
        assert f"{name}: no export has such a file" in said
    (directory / "README.md").unlink()
    seal(directory)
    assert "README.md, the model card, is missing" in failed(directory, base=False)["companions"]


@pytest.mark.parametrize(
    ("free", "device"),
    [(4 * 10**9, "cuda"), (3 * 10**9, "cpu"), (0, "cpu")],
)
def test_a_device_without_room_is_left_alone(
    free: int, device: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert chosen_device(2 * 10**9, free) == device
    assert ("running on the CPU" in capsys.readouterr().err) == (device == "cpu")


def test_load_exported_refuses_what_does_not_fit(made: Made) -> None:
    directory = made()
    edit_tensors(directory, lambda t: t.pop(f"{EXPERT}.weight_scale"))
    with pytest.raises(UserError, match=r"not a sound export:\n.*up_proj.weight_scale: missing"):
        load_exported(directory)


def test_a_model_that_is_not_quantized(made: Made) -> None:
    """Whatever wrote it, such as save_hf, if it has a card."""
    base = made().parent / "base"
    (base / "README.md").write_text("# Plain")
    seal(base)
    result = verify_directory(base, base=str(base), tokens=20)
    assert result.passed
    assert result.measured is not None
    assert [run.kl for run in result.measured.runs] == [None, 0]


def test_text_is_read_with_the_tokenizer_of_the_export(made: Made, tmp_path: Path) -> None:
    directory = made()
    (tmp_path / "text.txt").write_text("some words")
    with pytest.raises(UserError, match=r"tokenizer"):
        verify_directory(directory, data=str(tmp_path / "text.txt"))


@pytest.mark.skipif(find_spec("vllm") is not None, reason="vLLM is installed here")
def test_the_check_in_vllm_says_when_there_is_none(
    made: Made, capfd: pytest.CaptureFixture[str]
) -> None:
    assert vllm_check.check(made(), sys.executable, 8, 1.0) == vllm_check.ABSENT
    assert "NOT CHECKED" in capfd.readouterr().out


@pytest.mark.parametrize("tokens", ["-1", "1"])
def test_the_check_in_vllm_refuses_too_few_tokens(
    made: Made, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tokens: str
) -> None:
    monkeypatch.setattr(sys, "argv", ["vllm_check.py", str(made()), "--tokens", tokens])
    assert vllm_check.main() == 2
    assert "--tokens" in capsys.readouterr().err


@pytest.mark.parametrize(("python", "status"), [("/nope", 2), ("/tmp", 2), ("/bin/false", 4)])
def test_the_check_in_vllm_needs_a_python(
    made: Made,
    monkeypatch: pytest.MonkeyPatch,
    capfd: pytest.CaptureFixture[str],
    python: str,
    status: int,
) -> None:
    monkeypatch.setattr(sys, "argv", ["vllm_check.py", str(made()), "--vllm_python", python])
    assert vllm_check.main() == status
    assert python in capfd.readouterr().err or status == vllm_check.REFUSED
