"""A checkpoint read and written again: the same weights; and what travels with them."""

from __future__ import annotations

import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.tiny_models import loud_model, tiny_config
from nemo_hybrid import HybridLM, UserError
from nemo_hybrid.checkpoint.load import tensors_by_name
from nemo_hybrid.checkpoint.names import to_hub
from nemo_hybrid.config.model import FP32_NAMES

CONFIG = tiny_config("ME*-E", mtp_num_depths=2)
INDEX = "model.safetensors.index.json"


def from_transformers(out: Path, **options: object) -> None:
    """A directory as transformers writes it: everything in BF16, and no MTP block."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    torch.manual_seed(0)
    config = NemotronHConfig(**replace(CONFIG, mtp_num_depths=0).to_hf())
    model = NemotronHForCausalLM(config).to(torch.bfloat16)
    for parameter in model.parameters():
        parameter.data.normal_()
    model.save_pretrained(out, **options)


def by_hand(out: Path, dtype: torch.dtype, prefix: str = "backbone.") -> None:
    """Two shards with MTP block, whose headers no library would write like this: against the order
    of names, with blanks and metadata."""
    out.mkdir()
    hub = {
        n.replace("backbone.", prefix): part.detach()
        for name, tensor in tensors_by_name(loud_model(CONFIG)).items()
        for n, part in to_hub(name, tensor)
    }
    weight_map = {}
    for i in range(2):
        entries, data, file = {}, b"", f"part{i}.safetensors"
        for name in sorted(hub, reverse=True)[i::2]:
            mixed = torch.float32 if name.endswith(("A_log", "norm.weight")) else dtype
            part = hub[name].to(mixed).contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
            kind = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}[mixed]
            entries[name] = {"data_offsets": [len(data), len(data) + len(part)],
                             "shape": list(hub[name].shape), "dtype": kind}  # fmt: skip
            data += part
            weight_map[name] = file
        entries["__metadata__"] = {"é": "last", "format": "pt"}
        text = json.dumps(entries, indent=2, ensure_ascii=False).encode() + b"   "
        (out / file).write_bytes(len(text).to_bytes(8, "little") + text + data)
    index = {"weight_map": weight_map, "metadata": {"total_size": 7, "by": "hand"}}
    (out / INDEX).write_text(json.dumps(index, indent=3))
    (out / "config.json").write_text(json.dumps(CONFIG.to_hf() | {"rope_theta": 1e4}, indent=5))


SOURCES: dict[str, Callable[[Path], None]] = {
    "transformers": from_transformers,
    "transformers, shards": lambda out: from_transformers(out, max_shard_size="20KB"),
    "transformers, its names in memory": lambda out: from_transformers(
        out, save_original_format=False, max_shard_size="20KB"
    ),
    "mixed bf16": lambda out: by_hand(out, torch.bfloat16),
    "mixed fp16": lambda out: by_hand(out, torch.float16),
    "all fp32": lambda out: by_hand(out, torch.float32, prefix="model."),
    "ours": lambda out: HybridLM(CONFIG).bfloat16().save_hf(str(out)),
}


def contents(directory: Path) -> dict[str, bytes]:
    return {p.name: p.read_bytes() for p in directory.iterdir() if p.name != "manifest.json"}


@pytest.mark.parametrize("name", SOURCES)
def test_weights_stay_what_they_are(tmp_path, name, caplog) -> None:
    SOURCES[name](tmp_path / "source")
    model = HybridLM.from_hf(str(tmp_path / "source"))
    assert type(model) is HybridLM
    theirs = {}
    for path in (tmp_path / "source").glob("*.safetensors"):
        theirs |= load_file(path)
    shutil.rmtree(tmp_path / "source")  # nothing of it is needed any more
    assert "rounded" not in caplog.text

    model.save_hf(str(tmp_path / "ours"))
    ours = {}
    for path in (tmp_path / "ours").glob("*.safetensors"):
        ours |= load_file(path)
    assert {t.dtype for n, t in ours.items() if n.endswith(FP32_NAMES)} == {torch.float32}
    theirs = {re.sub(r"^model\.", "backbone.", key): tensor for key, tensor in theirs.items()}
    # transformers may write experts as stacks.
    assert all(
        key.endswith(("experts.up_proj", "experts.down_proj"))
        for key in theirs.keys() - ours.keys()
    )
    for key in theirs.keys() & ours.keys():
        assert torch.equal(ours[key], theirs[key].to(ours[key].dtype)), key
    again = HybridLM.from_hf(str(tmp_path / "ours"))
    for (key, a), b in zip(
        tensors_by_name(again).items(), tensors_by_name(model).values(), strict=True
    ):
        assert torch.equal(a, b), key
        assert a.dtype == b.dtype


def test_widening_is_reported_and_rounding_is_a_warning(tmp_path, caplog) -> None:
    from_transformers(tmp_path / "theirs")
    with caplog.at_level(logging.INFO):
        model = HybridLM.from_hf(str(tmp_path / "theirs"))
    (record,) = caplog.records
    assert record.levelno == logging.INFO
    # A_log, D, dt_bias, and two router biases
    assert "5 mapped (widened from BF16 to F32)" in record.message
    assert model.lm_head.weight.dtype == torch.bfloat16
    stored = load_file(tmp_path / "theirs" / "model.safetensors")
    name = "backbone.layers.0.mixer.A_log"
    assert torch.equal(tensors_by_name(model)[name], stored[name].float())

    by_hand(tmp_path / "hand", torch.float32)
    caplog.clear()
    HybridLM.from_hf(str(tmp_path / "hand"), dtype=torch.bfloat16)
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert "(rounded from F32 to BF16)" in record.message


@pytest.mark.parametrize("dtype", [torch.float64, torch.int32, torch.uint8, torch.float8_e4m3fn])
def test_impossible_dtypes(tmp_path, dtype) -> None:
    from_transformers(tmp_path / "theirs")
    path = tmp_path / "theirs" / "model.safetensors"
    content = load_file(path)
    name = "backbone.layers.0.mixer.A_log"
    save_file(content | {name: content[name].to(dtype)}, path)
    with pytest.raises(UserError, match=rf"{name}: has dtype \w+; only F32, BF16, F16"):
        HybridLM.from_hf(str(tmp_path / "theirs"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_config_says_what_is_written(tmp_path, dtype) -> None:
    HybridLM(CONFIG).save_hf(str(tmp_path / "source"))
    HybridLM.from_hf(str(tmp_path / "source"), dtype).save_hf(str(tmp_path / "out"))
    stored = json.loads((tmp_path / "out" / "config.json").read_text())
    assert stored["torch_dtype"] == str(dtype).removeprefix("torch.")
    assert HybridLM.from_hf(str(tmp_path / "out"), dtype).lm_head.weight.dtype == dtype


def test_dtypes_that_no_model_can_have(tmp_path) -> None:
    HybridLM(CONFIG).save_hf(str(tmp_path / "source"))
    for dtype in (torch.float64, torch.int8, torch.float8_e4m3fn, "bf16"):
        with pytest.raises(UserError, match=r"dtype must be torch\.bfloat16, float16 or float32"):
            HybridLM.from_hf(str(tmp_path / "source"), dtype)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"is torch\.float64; weights must be F32, BF16, F16"):
        HybridLM(CONFIG).double().save_hf(str(tmp_path / "out"))
    assert [p.name for p in tmp_path.iterdir()] == ["source"]


def test_companions_travel_unchanged(tmp_path) -> None:
    source = tmp_path / "source"
    HybridLM(CONFIG).save_hf(str(source))
    stored = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(stored | {"eos_token_id": [2, 11]}))
    companions = {
        "generation_config.json": b'{ "eos_token_id":[2, 11], "temperature" : 0.6}',
        "tokenizer.json": b"{}\n",
        "tokenizer_config.json": b" {}",
        "chat_template.jinja": "{# é #}".encode(),
    }
    for name, content in companions.items():
        (source / name).write_bytes(content)
    model = HybridLM.from_hf(str(source))
    assert model.config.eos_token_id == 2
    model.save_hf(str(tmp_path / "out"))
    assert contents(tmp_path / "out").items() >= companions.items()
    assert json.loads((tmp_path / "out" / "config.json").read_text())["eos_token_id"] == [2, 11]
    again = HybridLM.from_hf(str(tmp_path / "out"))
    assert again.config == model.config

    again.config.eos_token_id = 5  # the user's own choice beats the list
    again.save_hf(str(tmp_path / "changed"))
    assert json.loads((tmp_path / "changed" / "config.json").read_text())["eos_token_id"] == 5
    for wrong in ("[]", '{"eos_token_id": "2"}', '{"eos_token_id": [2, true]}'):
        (source / "generation_config.json").write_text(wrong)
        with pytest.raises(UserError, match="generation_config"):
            HybridLM.from_hf(str(source))


def test_a_dropped_mtp_block_says_what_to_do(tmp_path) -> None:
    """As when transformers saves a model that had one."""
    from_transformers(tmp_path / "theirs")
    path = tmp_path / "theirs" / "config.json"
    stored = json.loads(path.read_text())
    path.write_text(json.dumps(stored | {"num_nextn_predict_layers": 1, "mtp_num_depths": 2}))
    with pytest.raises(UserError, match="set num_nextn_predict_layers to 0") as caught:
        HybridLM.from_hf(str(tmp_path / "theirs"))
    assert "mtp.layers.0" in str(caught.value)
    path.write_text(json.dumps(stored | {"num_nextn_predict_layers": 0}))
    assert HybridLM.from_hf(str(tmp_path / "theirs")).mtp is None


def test_an_mtp_block_that_config_json_forgot(tmp_path) -> None:
    HybridLM(CONFIG).save_hf(str(tmp_path / "ours"))
    path = tmp_path / "ours" / "config.json"
    path.write_text(json.dumps(replace(CONFIG, mtp_num_depths=0).to_hf()))
    with pytest.raises(UserError, match="set num_nextn_predict_layers to 1 there"):
        HybridLM.from_hf(str(tmp_path / "ours"))


def test_an_absurd_configuration_takes_no_time_or_memory(tmp_path) -> None:
    HybridLM(CONFIG).save_hf(str(tmp_path / "ours"))
    path = tmp_path / "ours" / "config.json"
    stored = json.loads(path.read_text())
    for change, says in (
        ({"n_routed_experts": 10**8}, "at most 65536"),
        ({"n_routed_experts": 2**16}, r"describes at least \d+ tensors, .* hold 98$"),
        ({"hybrid_override_pattern": "M" * 10**6, "num_hidden_layers": 10**6}, "at most 4096"),
        ({"hybrid_override_pattern": "M" * 4000, "num_hidden_layers": 4000}, "at least 4018"),
        ({"mtp_num_depths": 10**6}, "from 1 to 1024"),
        ({"hidden_size": 2**30, "mamba_num_heads": 2**30, "mamba_head_dim": 2**30}, "impossible"),
        ({"hidden_size": 2**28}, "does not fit the model"),
        ({"hidden_size": 10**400}, r"hidden_size is 10{23}, at most"),
        ({"layer_norm_epsilon": 10**400}, r"layer_norm_epsilon is 10{23}, at most"),
        ({"eos_token_id": []}, "eos_token_id"),
        ({"eos_token_id": [2, "x"]}, "eos_token_id"),
        ({"num_nextn_predict_layers": 1.0}, "num_nextn_predict_layers"),
        ({"dtype": "bfloat16"}, "torch_dtype is 'float32', but dtype"),
    ):
        path.write_text(json.dumps(stored | change))
        with pytest.raises(UserError, match=says):
            HybridLM.from_hf(str(tmp_path / "ours"))


@pytest.mark.parametrize(("dtype", "shape"), [("U8", [1]), ("F32", [10**12, 1, 0])])
def test_a_shape_without_bytes_is_no_tensor(tmp_path, dtype, shape) -> None:
    """Else it would vouch for any number of experts."""
    HybridLM(CONFIG).save_hf(str(tmp_path / "ours"))
    path = tmp_path / "ours" / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"n_routed_experts": 2**16}))
    data = b"" if 0 in shape else b"1"
    header = {
        f"x.{i}.mixer.experts.up_proj": {
            "dtype": dtype,
            "shape": shape,
            "data_offsets": [i * len(data), (i + 1) * len(data)],
        }
        for i in range(20)
    }
    text = json.dumps(header).encode()
    (tmp_path / "ours" / INDEX).unlink()
    for old in (tmp_path / "ours").glob("*.safetensors"):
        old.unlink()
    (tmp_path / "ours" / "model.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + 20 * data
    )
    with pytest.raises(UserError, match="but the weight files hold 20"):
        HybridLM.from_hf(str(tmp_path / "ours"))
