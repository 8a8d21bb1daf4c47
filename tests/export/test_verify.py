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
    WEIGHTS,
    build,
    edit_json,
    edit_tensors,
    export_config,
    naive_decode,
    nvfp4,
    seal,
)
from helpers.tiny_models import loud_model, random_ids
from nemo_hybrid.checkpoint.load import tensors_by_name
from nemo_hybrid.command_options import VerifyOptions
from nemo_hybrid.errors import UserError
from nemo_hybrid.export import decode as decoding
from nemo_hybrid.export.assign import planned
from nemo_hybrid.export.calibrate import calibrate
from nemo_hybrid.export.card import card
from nemo_hybrid.export.decode import other_decoder
from nemo_hybrid.export.simulate import quantized_weights
from nemo_hybrid.export.verify import load_exported, verify_command, verify_directory
from nemo_hybrid.export.write import export_directory
from nemo_hybrid.model.hybrid import HybridLM

MIXED = {
    "backbone*.experts.*": "nvfp4",
    "*.shared_experts.*": "fp8",
    "*.mixer.in_proj": "fp8",
    "backbone.layers.2.mixer.[qkv]_proj": "nvfp4_w4a16",
}
KINDS: dict[str, dict[str, Any]] = {
    "mixed": {"formats": MIXED, "kv_cache": True},
    "nvfp4": {"formats": {"backbone*.experts.*": "nvfp4"}, "algo": "NVFP4"},
    "w4a16": {"formats": {"backbone*.experts.*": "nvfp4_w4a16"}, "algo": "W4A16_NVFP4"},
    "fp8": {"formats": {"*.mixer.in_proj": "fp8", "*.shared_experts.*": "fp8"}, "algo": "FP8"},
    "compressed": {
        "formats": {"backbone*.experts.*": "nvfp4", "*.mixer.[qkv]_proj": "nvfp4"},
        "layout": "compressed-tensors",
    },
    "compressed_w4a16": {
        "formats": {"backbone*.experts.*": "nvfp4_w4a16"},
        "layout": "compressed-tensors",
    },
}
EXPERT = "backbone.layers.1.mixer.experts.0.up_proj"
ANY = "backbone.layers.1.mixer.shared_experts.up_proj"
Made = Callable[..., Path]


@pytest.fixture(scope="module", params=KINDS)
def sound(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a sound export, `base` and the model that should be read."""
    place = tmp_path_factory.mktemp(request.param)
    source, wanted = build(place / "export", **KINDS[request.param])
    source.save_hf(str(place / "base"))
    wanted.save_hf(str(place / "wanted"))
    return place


@pytest.fixture
def made(tmp_path: Path) -> Made:
    """Builds an export of a kind, whose base stands beside it."""

    def build_one(kind: str = "mixed", **changes: Any) -> Path:
        source, _ = build(tmp_path / "export", **(KINDS[kind] | changes))
        source.save_hf(str(tmp_path / "base"))
        return tmp_path / "export"

    return build_one


def failed(directory: Path, base: bool = True) -> dict[str, str]:
    """Name of a check that failed -> what it says."""
    result = verify_directory(
        directory, base=str(directory.parent / "base") if base else None, tokens=40
    )
    return {check.name: check.note for check in result.checks if check.passed is False}


def options(directory: Path, **changes: Any) -> VerifyOptions:
    return VerifyOptions(paths=[str(directory)], **changes)


def test_a_sound_export_passes(sound: Path) -> None:
    result = verify_directory(sound / "export", base=str(sound / "base"), tokens=200)
    assert [check.name for check in result.checks if not check.passed] == []
    assert result.measured is not None
    assert result.measured.tokens == 200
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
    assert verify_command(options(directory, base=base, tokens=20, max_kl=1e-7)) == 3
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
            "{q,k,v}_proj.weight_scale_2: differ",
        ),
        (change(f"{EXPERT}.weight_scale_2", lambda x: x * 1.5), "source", EXPERT),
        (change(f"{ANY}.weight_scale", lambda x: x * 1.1), "source", ANY),
        (change(f"{EXPERT}.weight", lambda x: x << 4 | x >> 4), "source", EXPERT),
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
    assert f"{EXPERT}: nvfp4 differs from the source" in notes or "and" in notes
    loud_model(export_config(routed_scaling_factor=1.0)).save_hf(str(tmp_path / "third"))
    result = verify_directory(directory, base=str(tmp_path / "third"), tokens=20)
    assert result.checks[-1].passed is False
    assert "another model" in result.checks[-1].note


Json = dict[str, Any]


def in_config(change: Callable[[Json], object]) -> tuple[str, Callable[[Json], object]]:
    return "config.json", lambda value: change(value["quantization_config"])


def in_twin(change: Callable[[Json], object]) -> tuple[str, Callable[[Json], object]]:
    return "hf_quant_config.json", lambda value: change(value["quantization"])


@pytest.mark.parametrize(
    ("kind", "edit", "named"),
    [
        ("nvfp4", in_twin(lambda q: q.pop("group_size")), "group_size is missing"),
        ("nvfp4", in_twin(lambda q: q.pop("kv_cache_quant_algo")), "kv_cache_quant_algo is miss"),
        ("nvfp4", in_twin(lambda q: q.pop("exclude_modules")), "exclude_modules is missing"),
        ("fp8", in_twin(lambda q: q.pop("exclude_modules")), "exclude_modules is missing"),
        ("nvfp4", in_twin(lambda q: q.update(group_size=32)), "group_size is 32"),
        ("nvfp4", in_twin(lambda q: q.update(quant_algo="FP8")), "disagree about quant_algo"),
        ("nvfp4", in_twin(lambda q: q["exclude_modules"].pop()), "disagree about ignore"),
        ("mixed", in_twin(lambda q: q.update(kv_cache_quant_algo=None)), "about the KV cache"),
        ("mixed", in_twin(lambda q: q.pop("quantized_layers")), "quantized_layers is missing"),
        ("mixed", in_twin(lambda q: q["quantized_layers"].popitem()), "about quantized_layers"),
        ("nvfp4", in_config(lambda q: q.update(quant_algo="NVFP3")), "known: FP8, NVFP4"),
        ("nvfp4", in_config(lambda q: q.update(quant_method="awq")), "quant_method is 'awq'"),
        ("nvfp4", in_config(lambda q: q.pop("ignore")), "ignore is not a list"),
        ("mixed", in_config(lambda q: q.update(quantized_layers={})), "quantized_layers is mis"),
        (
            "mixed",
            in_config(lambda q: q["quantized_layers"][ANY].update(quant_algo="INT3")),
            f"quant_algo of {ANY} is 'INT3'",
        ),
        (
            "mixed",
            in_config(lambda q: q["quantized_layers"][EXPERT].pop("group_size")),
            f"group_size of {EXPERT} is missing",
        ),
        (
            "mixed",
            in_config(lambda q: q["quantized_layers"][EXPERT].update(quant_algo="W4A16_NVFP4")),
            "several formats",
        ),
        (
            "mixed",
            in_config(lambda q: q["quantized_layers"].update(nobody={"quant_algo": "FP8"})),
            "quantized_layers names nobody",
        ),
        ("mixed", in_config(lambda q: q["ignore"].append("proj")), "but ignore hits it"),
        (
            "mixed",
            in_config(lambda q: q["quantized_layers"].pop("backbone.layers.2.mixer.v_proj")),
            "v_proj of backbone.layers.2.mixer have several formats, which engines fuse",
        ),
        ("nvfp4", ("config.json", lambda c: c.pop("mamba_ssm_cache_dtype")), "mamba_ssm_cache"),
        ("nvfp4", ("config.json", lambda c: c.pop("torch_dtype")), "dtype is None"),
        ("nvfp4", ("config.json", lambda c: c.update(n_routed_experts=60000)), "expert weights"),
        ("nvfp4", ("config.json", lambda c: c.update(n_groups=3)), "n_groups"),
        ("nvfp4", ("config.json", lambda c: c.pop("quantization_config")), "has no quantization_c"),
        ("compressed", in_config(lambda q: q.update(format="pack")), "must be 'nvfp4-pack"),
        ("compressed", in_config(lambda q: q.pop("config_groups")), "config_groups is missing"),
        (
            "compressed",
            in_config(lambda q: q["config_groups"]["group_0"]["weights"].update(group_size=32)),
            "config_groups.group_0.weights.group_size must be 16",
        ),
        (
            "compressed",
            in_config(
                lambda q: q["config_groups"]["group_0"]["input_activations"].update(dynamic=False)
            ),
            "input_activations.dynamic must be 'local'",
        ),
        (
            "compressed",
            in_config(lambda q: q["ignore"].append("backbone.layers.1.mixer.experts.0.up_proj")),
            "backbone or model alone",
        ),
        ("compressed", in_config(lambda q: q["ignore"].append("re:(")), "no regular expression"),
    ],
)  # fmt: skip
def test_faults_of_configuration(
    made: Made, kind: str, edit: tuple[str, Callable[[Json], object]], named: str
) -> None:
    directory = made(kind)
    edit_json(directory, *edit)
    assert named in failed(directory, base=False)["configuration"]


@pytest.mark.parametrize(
    ("kind", "edit", "named"),
    [
        # vLLM looks for entries inside names: `gate` hits nothing more, `experts` a great deal.
        ("nvfp4", lambda q: q["ignore"].append("experts"), f"{EXPERT}.weight: is U8"),
        ("nvfp4", lambda q: q["ignore"].append("backbone.layers.1*"), f"{EXPERT}.weight: is U8"),
        ("nvfp4", lambda q: q["ignore"].remove("lm_head"), "lm_head.weight: is BF16"),
        (
            "nvfp4",
            lambda q: q["ignore"].remove("backbone.layers.1.mixer.gate"),
            "backbone.layers.1.mixer.gate.weight: is BF16",
        ),
        ("nvfp4", lambda q: q.update(quant_algo="W4A16_NVFP4"), "input_scale: unexpected"),
        ("compressed", lambda q: q["ignore"].append("re:.*experts.*"), "experts.0.up_proj.weight"),
        ("compressed", lambda q: q.update(ignore=[]), "lm_head.weight_packed: missing"),
    ],
)
def test_lists_that_hit_more_or_less(
    made: Made,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
    edit: Callable[[Json], object],
    named: str,
) -> None:
    directory = made(kind)
    edit_json(directory, *in_config(edit))
    if kind == "nvfp4":
        edit_json(directory, *in_twin(lambda q: edit(Both(q))))
    monkeypatch.setattr("nemo_hybrid.export.verify._SHOWN", 1000)
    assert named in failed(directory, base=False)["names, shapes, dtypes"]


class Both(dict[str, Any]):
    """hf_quant_config.json under the names of config.json."""

    def __init__(self, twin: Json) -> None:
        super().__init__(twin, ignore=twin["exclude_modules"])
        self.update = twin.update  # type: ignore[method-assign]


def test_a_list_of_the_layers_experts_is_read(made: Made) -> None:
    directory = made()

    def merge(q: Json) -> None:
        layers = q["quantized_layers"]
        entry = layers[EXPERT]
        for name in [n for n in layers if ".mixer.experts." in n]:
            del layers[name]
        layers["backbone.layers.1.mixer.experts"] = entry

    edit_json(directory, *in_config(merge))
    edit_json(directory, *in_twin(merge))
    assert failed(directory) == {}


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
        kv_cache=cache, card=card, show_progress=False,
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
    result = verify_directory(tmp_path / "base", base=str(tmp_path / "base"), tokens=20)
    assert result.passed
    assert result.measured is not None
    assert result.measured.kl == 0
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
