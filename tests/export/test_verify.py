"""`verify-export`, on directories made by hand: sound ones pass, and each fault is named."""

import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
import vllm_check
from torch import Tensor

from helpers.exported import (
    ANY,
    EXPERT,
    KINDS,
    WEIGHTS,
    Made,
    build,
    edit_json,
    edit_tensors,
    export_config,
    failed,
    naive_decode,
    nvfp4,
    save_base,
    seal,
)
from helpers.tiny_models import loud_model, random_ids
from nemo_hybrid.checkpoint.load import tensors_by_name
from nemo_hybrid.commands.verify import VerifyOptions, verify_command
from nemo_hybrid.errors import UserError
from nemo_hybrid.export import decode as decoding
from nemo_hybrid.export.assign import planned
from nemo_hybrid.export.calibrate import calibrate
from nemo_hybrid.export.decode import other_decoder
from nemo_hybrid.export.divergence import chosen_device
from nemo_hybrid.export.simulate import quantized_weights
from nemo_hybrid.export.verify import load_exported, verify_directory
from nemo_hybrid.export.write import export_directory
from nemo_hybrid.model.hybrid import HybridLM


@pytest.fixture(scope="module", params=KINDS)
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a sound export, `base` and the model that should be read."""
    place = tmp_path_factory.mktemp(request.param)
    source, wanted = build(place / "export", **KINDS[request.param])
    save_base(source, place)
    wanted.save_hf(str(place / "wanted"))
    return place


def options(directory: Path, **changes: Any) -> VerifyOptions:
    return VerifyOptions(paths=[str(directory)], **changes)


def test_a_sound_export_passes(sound: Path) -> None:
    result = verify_directory(sound / "export", base=str(sound / "base"), tokens=200)
    skipped = ["scales"] if "w4a16" in sound.name else []
    assert [check.name for check in result.checks if not check.passed] == skipped
    assert [check.name for check in result.checks if check.passed is False] == []
    assert result.measured is not None
    assert result.measured.tokens == 200
    assert (result.measured.rounded_kl is None) == bool(skipped)
    assert 1e-4 < (result.measured.kl or 0) < 0.1


def test_the_model_is_the_dequantized_one(sound: Path) -> None:
    model, wanted = load_exported(sound / "export"), HybridLM.from_hf(str(sound / "wanted"))
    for name, tensor in tensors_by_name(wanted).items():
        assert torch.allclose(tensors_by_name(model)[name], tensor, rtol=1e-6, atol=0), name
    ids_BS = random_ids(model.config, 2, 24)
    with torch.no_grad():
        logits = model(ids_BS).logits
        assert torch.allclose(logits, wanted(ids_BS).logits, atol=1e-4)
        source = HybridLM.from_hf(str(sound / "base"), dtype=torch.float32)
        assert (logits - source(ids_BS).logits).abs().max() > 1e-2
    small = load_exported(sound / "export", torch.bfloat16)
    assert small.lm_head.weight.dtype == torch.bfloat16
    assert small.backbone.layers[0].mixer.A_log.dtype == torch.float32


def test_divergence_is_that_of_the_logits(made: Made) -> None:
    directory = made()
    result = verify_directory(directory, base=str(directory.parent / "base"), tokens=30)
    generator = torch.Generator().manual_seed(1234)
    ids = torch.randint(0, 61, (1, 31), generator=generator)
    source = HybridLM.from_hf(str(directory.parent / "base"), dtype=torch.float32)
    with torch.no_grad():
        p = source(ids).logits[0, :-1].double().log_softmax(-1)
        q = load_exported(directory)(ids).logits[0, :-1].double().log_softmax(-1)
    found = result.measured
    assert found is not None
    assert found.kl == pytest.approx(float((p.exp() * (p - q)).sum(-1).mean()), rel=1e-3)
    assert found.loss == pytest.approx(float(-q.gather(1, ids[0, 1:, None]).mean()), rel=1e-5)


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
        (change(f"{EXPERT}.input_scale", lambda x: x * 2), "values", "experts.*.up_proj.input"),
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
            "mixer.qkv_proj.weight_scale_2: differ",
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
    made: Made, fault: Callable[[Tensors], None], check: str, named: str
) -> None:
    directory = made()
    edit_tensors(directory, fault)
    assert named in failed(directory)[check]


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
    formats = {"lm_head": "fp8", "mtp.layers.0.eh_proj": "fp8"}
    directory = made("fp8", formats=formats)
    assert failed(directory) == {}
    edit_tensors(directory, scaled("proj.input_scale", lambda x: x * 1e4))
    edit_tensors(directory, scaled("lm_head.input_scale", lambda x: x * 1e-4))
    said = failed(directory)["scales"]
    assert "inputs of lm_head" in said
    assert "inputs of mtp.layers.0.eh_proj" in said


def test_inputs_are_rounded_by_the_stored_scales(made: Made) -> None:
    """Against hooks that round by hand, of all inputs and of the head's, which states lack."""
    formats = {**KINDS["fp8"]["formats"], "lm_head": "fp8"}
    directory = made("fp8", formats=formats)
    base = str(directory.parent / "base")
    found = verify_directory(directory, base=base, tokens=30).measured
    assert found is not None
    model, source = load_exported(directory), HybridLM.from_hf(base, dtype=torch.float32)
    scale = torch.tensor(4.0) / 448

    def rounded(module: object, args: tuple[Tensor]) -> tuple[Tensor]:
        return ((args[0] / scale).clamp(-448, 448).to(torch.float8_e4m3fn).float() * scale,)

    for name, module in model.named_modules():
        if name.endswith((".in_proj", "shared_experts.up_proj", "shared_experts.down_proj")):
            module.register_forward_pre_hook(rounded)
    model.lm_head.register_forward_pre_hook(rounded)
    ids = torch.randint(0, 61, (1, 31), generator=torch.Generator().manual_seed(1234))
    with torch.no_grad():
        p, q = (m(ids).logits[0, :-1].double().log_softmax(-1) for m in (source, model))
    kl = float((p.exp() * (p - q)).sum(-1).mean())
    assert found.rounded_kl == pytest.approx(kl, rel=1e-3)
    assert found.rounded_loss == pytest.approx(float(-q.gather(1, ids[0, 1:, None]).mean()), 1e-5)
    assert found.kl is not None
    assert found.kl < 0.9 * kl
    # The larger one counts.
    limits = [(found.kl + kl) / 2, kl * 1.01]
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


@pytest.mark.parametrize(
    ("target", "preset", "rules", "calibrated"),
    [
        ("mixed", "super", {}, True),
        ("mixed", "nano", {"mtp.*": "nvfp4", "*latent*": "fp8", "lm_head": "fp8"}, True),
        ("nvfp4", "nano", {}, True),
        ("nvfp4", "nano", {}, False),
        ("fp8", "super", {}, True),
        ("compressed-tensors", "conservative", {"backbone*.[qkv]_proj": "nvfp4"}, True),
        ("compressed-tensors", "conservative", {}, False),
        ("bf16", "conservative", {}, False),
    ],
)
def test_what_the_writer_writes_passes(
    tmp_path: Path, target: Any, preset: str, rules: dict[str, str], calibrated: bool
) -> None:
    model = loud_model(export_config("MEM*EM-"))
    model.save_hf(str(tmp_path / "base"))
    assignment = planned(model.config, target, preset, rules, calibrated)
    seen = calibrate(model, [random_ids(model.config, 1, 40)]) if calibrated else None
    cache: Literal["none", "fp8"] = (
        "fp8" if seen is not None and target in ("mixed", "nvfp4", "fp8") else "none"
    )
    export_directory(
        tmp_path / "base", tmp_path / "export", assignment, target=target, calibration=seen,
        kv_cache=cache, describe=lambda *_: {"README.md": b"# Card"}, show_progress=False,
    )  # fmt: skip
    result = verify_directory(tmp_path / "export", base=str(tmp_path / "base"), tokens=40)
    assert [check for check in result.checks if check.passed is False] == []
    with quantized_weights(model, assignment):
        weights = {name: t.clone() for name, t in tensors_by_name(model).items()}
    for name, tensor in tensors_by_name(load_exported(tmp_path / "export")).items():
        if assignment.get(name.removesuffix(".weight"), "bf16") != "bf16":
            assert torch.allclose(tensor, weights[name], rtol=1e-6, atol=0), name


def test_load_exported_refuses_what_does_not_fit(made: Made) -> None:
    directory = made()
    edit_tensors(directory, lambda t: t.pop(f"{EXPERT}.weight_scale"))
    with pytest.raises(UserError, match=r"not a sound export:\n.*up_proj.weight_scale: missing"):
        load_exported(directory)


def test_an_unquantized_export(tmp_path: Path) -> None:
    model = loud_model(export_config()).bfloat16()
    model.save_hf(str(tmp_path / "base"))
    (tmp_path / "base" / "README.md").write_text("# Plain")
    seal(tmp_path / "base")
    result = verify_directory(tmp_path / "base", base=str(tmp_path / "base"), tokens=20)
    assert result.passed
    assert result.measured is not None
    assert result.measured.kl == 0
    assert result.measured.rounded_kl is None
    (tmp_path / "base" / "hf_quant_config.json").write_text("{}")
    seal(tmp_path / "base")
    assert "has no quantization_config" in failed(tmp_path / "base")["configuration"]


def test_text_is_read_with_the_tokenizer_of_the_export(made: Made, tmp_path: Path) -> None:
    directory = made()
    (tmp_path / "text.txt").write_text("some words")
    with pytest.raises(UserError, match=r"tokenizer"):
        verify_directory(directory, data=str(tmp_path / "text.txt"))


@pytest.mark.parametrize("library", ["compressed_tensors", "modelopt"])
@pytest.mark.parametrize("format", ["fp8", "nvfp4"])
@pytest.mark.parametrize("layout", ["modelopt", "compressed-tensors"])
def test_decoders_agree_and_notice(library: str, format: Any, layout: str) -> None:
    pytest.importorskip(library, reason=f"{library} is not installed; the dev extra has it")
    theirs = {"compressed_tensors": decoding._compressed_tensors, "modelopt": decoding._modelopt}
    w = torch.randn(48, 64, generator=torch.Generator().manual_seed(0)) * 0.02
    if format == "fp8":
        scale = w.abs().max() / 448
        parts = {"weight": (w / scale).to(torch.float8_e4m3fn), "weight_scale": scale}
    else:
        parts = nvfp4(w, w.abs().max(), compressed=layout == "compressed-tensors")
    ours = decoding.decode(parts, format)
    assert torch.allclose(ours, naive_decode(parts), rtol=1e-6, atol=0)
    assert torch.allclose(ours, theirs[library]()(parts, format), rtol=1e-6, atol=0)
    name = next(n for n, t in parts.items() if t.dim() == 2 and n.startswith("weight"))
    parts[name] = parts[name].view(torch.uint8).roll(1, 1).view(parts[name].dtype)
    assert not torch.allclose(ours, theirs[library]()(parts, format), rtol=1e-2, atol=0)


def test_another_decoder_that_disagrees_is_a_fault(
    made: Made, monkeypatch: pytest.MonkeyPatch
) -> None:
    directory = made()
    where = "nemo_hybrid.export.verify.other_decoder"
    monkeypatch.setattr(where, lambda: ("other 1", lambda p, f: decoding.decode(p, f) * 1.0001))
    assert "other 1 decodes other values" in failed(directory)["second decoder"]
    monkeypatch.setattr(where, lambda: None)
    notes = {c.name: (c.passed, c.note) for c in verify_directory(directory, tokens=20).checks}
    assert notes["second decoder"][0] is None
    assert "neither compressed-tensors nor nvidia-modelopt" in notes["second decoder"][1]


def test_nothing_is_printed_on_the_way(capfd: pytest.CaptureFixture[str]) -> None:
    found = other_decoder()
    assert capfd.readouterr() == ("", "")
    assert found is None or found[0].split()[0] in ("compressed-tensors", "nvidia-modelopt")


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
