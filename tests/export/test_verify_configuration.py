"""`verify-export` refuses what stands otherwise in configuration files than export writes it."""

from collections.abc import Callable
from typing import Any

import pytest

from helpers.exported import ANY, EXPERT, KINDS, TWIN, Made, edit_json, failed
from nemo_hybrid.errors import UserError
from nemo_hybrid.export.decode import differences, read_export

Json = dict[str, Any]
Edit = tuple[str, Callable[[Json], object]]
FP8 = {"type": "float", "num_bits": 8, "dynamic": False}
LAYERS_EXPERTS = "backbone.layers.1.mixer.experts"


def in_model(**values: object) -> Edit:
    return "config.json", lambda value: value.update(values)


def in_config(change: Callable[[Json], object]) -> Edit:
    return "config.json", lambda value: change(value["quantization_config"])


def in_twin(change: Callable[[Json], object]) -> Edit:
    return TWIN, lambda value: change(value["quantization"])


def in_both(change: Callable[[list[str]], object]) -> list[Edit]:
    """Changes the exclusion list, which stands in two files."""
    return [
        in_config(lambda q: change(q["ignore"])),
        in_twin(lambda q: change(q["exclude_modules"])),
    ]


def second_group(target: str) -> Edit:
    """Adds one of the other format."""

    def change(quantization: Json) -> None:
        group = quantization["config_groups"]["group_0"]
        added = {**group, "targets": [target], "input_activations": None}
        quantization["config_groups"]["group_1"] = added

    return in_config(change)


def in_group(*part: str, **values: object) -> Edit:
    """Changes the first group, or a part of it."""

    def change(quantization: Json) -> None:
        group = next(iter(quantization["config_groups"].values()))
        (group[part[0]] if part else group).update(values)

    return in_config(change)


# What engines would read otherwise, or not alike.
EDITS: list[tuple[str, Edit | list[Edit]]] = [
    ("nvfp4", in_twin(lambda q: q.pop("group_size"))),
    ("nvfp4", in_twin(lambda q: q.pop("kv_cache_quant_algo"))),
    ("nvfp4", in_twin(lambda q: q.pop("exclude_modules"))),
    ("fp8", in_twin(lambda q: q.pop("exclude_modules"))),
    ("nvfp4", in_twin(lambda q: q.update(group_size=32))),
    ("nvfp4", in_twin(lambda q: q.update(group_size=None))),
    ("nvfp4", in_twin(lambda q: q.update(quant_algo="FP8"))),
    ("nvfp4", in_twin(lambda q: q["exclude_modules"].pop())),
    ("nvfp4", in_twin(lambda q: q.update(has_zero_point=True))),
    ("mixed", in_twin(lambda q: q.update(kv_cache_quant_algo=None))),
    ("mixed", in_twin(lambda q: q.pop("quantized_layers"))),
    ("mixed", in_twin(lambda q: q["quantized_layers"].popitem())),
    ("nvfp4", (TWIN, lambda t: t.pop("producer"))),
    ("nvfp4", (TWIN, lambda t: t["producer"].update(name="x"))),
    ("nvfp4", (TWIN, lambda t: t.update(compression=1))),
    ("nvfp4", in_config(lambda q: q.update(quant_algo="NVFP3"))),
    ("nvfp4", in_config(lambda q: q.update(quant_method="awq"))),
    ("nvfp4", in_config(lambda q: q.pop("ignore"))),
    ("nvfp4", in_config(lambda q: q.pop("group_size"))),
    ("nvfp4", in_config(lambda q: q.update(quantized_layers={}))),
    ("nvfp4", in_config(lambda q: q.pop("config_groups"))),
    ("mixed", in_config(lambda q: q.update(quantized_layers={}))),
    ("mixed", in_config(lambda q: q["quantized_layers"][ANY].update(quant_algo="INT3"))),
    ("mixed", in_config(lambda q: q["quantized_layers"][ANY].update(x=1))),
    ("mixed", in_config(lambda q: q["quantized_layers"][EXPERT].pop("group_size"))),
    ("mixed", in_config(lambda q: q["quantized_layers"][EXPERT].update(quant_algo="W4A16_NVFP4"))),
    ("mixed", in_config(lambda q: q["quantized_layers"].update(nobody={"quant_algo": "FP8"}))),
    ("mixed", in_config(lambda q: q["quantized_layers"].pop("backbone.layers.2.mixer.v_proj"))),
    ("mixed", in_config(lambda q: q["ignore"].append(ANY))),
    ("mixed", in_both(lambda names: names.append(LAYERS_EXPERTS))),
    ("fp8", in_both(lambda names: names.remove(LAYERS_EXPERTS))),
    ("w4a16", in_both(lambda names: names.remove("backbone.layers.2.mixer.q_proj"))),
    ("nvfp4", in_both(lambda names: names.remove("lm_head"))),
    ("nvfp4", in_both(lambda names: names.remove("backbone.layers.1.mixer.gate"))),
    *[
        (kind, in_both(lambda names, e=entry: names.append(e)))
        for entry in (
            "model.layers.0.mixer.in_proj", "model*", "*", "model.layers.1.*", "experts",
            "*backbone.layers.0.mixer.in_proj", "bone.layer*", "e.layers", "proj",
            "backbone.layers.1*", "backbone.layers.2.mixer.qkv_proj", "*.2.mixer.[qkv]_proj",
            "backbone.layers.1.mixer.shared_experts.up_proj.*", "mtp.*", "",
            "backbone.layers.1.mixer.experts.3.down_proj", "\ud800", "backbone.layers.0",
        )
        for kind in ("nvfp4", "fp8")
    ],
    ("nvfp4", [
        in_config(lambda q: q.update(quant_algo="W4A16_NVFP4")),
        in_twin(lambda q: q.update(quant_algo="W4A16_NVFP4")),
    ]),
    ("nvfp4", in_group("weights", num_bits=8)),
    ("nvfp4", in_group("weights", group_size=32)),
    ("nvfp4", in_group("weights", strategy="channel")),
    ("nvfp4", in_group("input_activations", num_bits=8)),
    ("nvfp4", in_group(input_activations=None)),
    ("nvfp4", in_group(targets=["Conv1d"])),
    ("nvfp4", in_group(targets=[])),
    ("fp8", in_group("weights", group_size=16)),
    ("mixed", in_group("weights", type="int")),
    ("mixed", in_group(targets=[EXPERT, ANY])),
    ("mixed", in_group(targets=[ANY])),
    ("mixed", in_config(
        lambda q: q["config_groups"].update(more=next(iter(q["config_groups"].values()))))),
    ("w4a16", in_group(input_activations={"num_bits": 4})),
    ("mixed", in_config(lambda q: q["kv_cache_scheme"].update(num_bits=4))),
    ("mixed", in_config(lambda q: q["kv_cache_scheme"].update(block=1))),
    ("fp8", in_config(lambda q: q.update(kv_cache_scheme={"dynamic": 1}))),
    ("compressed", in_config(lambda q: q.update(kv_cache_scheme="FP8"))),
    ("compressed", in_config(lambda q: q.update(kv_cache_scheme=FP8))),
    ("compressed", in_config(lambda q: q.update(format="pack"))),
    ("compressed", in_config(lambda q: q.pop("config_groups"))),
    ("compressed", in_config(lambda q: q.update(ignore=[]))),
    ("compressed", in_group("weights", group_size=32)),
    ("compressed", in_group("weights", dynamic=True)),
    ("compressed", in_group("weights", actorder="group")),
    ("compressed", in_group("weights", scale_dtype="torch.int8")),
    ("compressed", in_group("input_activations", dynamic=False)),
    ("compressed", in_group(input_activations=None)),
    ("compressed_w4a16", in_group(input_activations={**FP8, "dynamic": "local"})),
    ("compressed", in_group(format="float-quantized")),
    ("compressed", in_group(block_structure="2:4")),
    ("compressed", in_group(targets=["Conv1d"])),
    ("compressed", in_group(targets=["Linear", "linear"])),
    ("compressed", in_group(targets=["FooAttention"])),
    ("compressed", second_group("Linear")),
    ("compressed", second_group("ColumnParallel")),
    ("compressed", second_group(r"re:.*\.qkv_proj$")),
    *[
        ("compressed", in_config(lambda q, e=entry: q["ignore"].append(e)))
        for entry in (
            "re:(", "re:x{99999999999999999999}", "re:" + "(" * 5000 + ")" * 5000, "Linear", EXPERT,
            "re:.*.*.*.*.*x", r"re:.*\d", "re:(a*)*b", "re:(?i).*PROJ", r"re:.*\.qkv_proj$",
            r"re:.*\.experts\.0\.None$", "re:.*_proj$", r"re:.*\.experts\.0\..*", r"re:model\..*",
            r"re:backbone\..*", "re:.*experts.*",
        )
    ],
    *[
        (kind, in_config(lambda q, k=key: q.update({k: {}})))
        for kind, key in (
            ("nvfp4", "quantization"), ("fp8", "quantization"), ("mixed", "format"),
            ("compressed", "transform_config"), ("compressed", "sparsity_config"),
            ("compressed", "quantized_layers"), ("compressed", "scale_fmt"),
        )
    ],
    ("nvfp4", ("config.json", lambda c: c.pop("quantization_config"))),
    ("bf16", in_model(quantization_config={})),
    ("bf16", in_model(quantization_config={"quant_method": "compressed-tensors"})),
    ("nvfp4", ("config.json", lambda c: c.pop("mamba_ssm_cache_dtype"))),
    ("nvfp4", ("config.json", lambda c: c.pop("torch_dtype"))),
    *[
        ("nvfp4", in_model(**{key: {}}))
        for key in (
            "compression_config", "auto_map", "text_config", "block_configs", "scoring_func",
            "partial_rotary_factor", "rope_theta",
        )
    ],
    *[
        ("nvfp4", in_model(**values))
        for values in (
            {"architectures": ["LlamaForCausalLM"]}, {"architectures": []},
            {"architectures": "NemotronHForCausalLM"}, {"residual_in_fp32": True},
            {"num_nextn_predict_layers": 2}, {"mamba_ssm_cache_dtype": "float8"},
            {"n_routed_experts": 60000}, {"n_groups": 3},
        )
    ],
]  # fmt: skip


@pytest.mark.parametrize("kind", sorted({kind for kind, _ in EDITS}))
def test_every_edit_is_noticed(made: Made, kind: str) -> None:
    directory = made(kind)
    before = {name: (directory / name).read_bytes() for name in ("config.json", TWIN)
              if (directory / name).exists()}  # fmt: skip
    assert list(read_export(directory).faults_of_configuration()) == []
    missed = []
    for i, (_, edits) in enumerate(case for case in EDITS if case[0] == kind):
        for edit in edits if isinstance(edits, list) else [edits]:
            edit_json(directory, *edit)
        assert any((directory / name).read_bytes() != content for name, content in before.items())
        try:
            if not list(read_export(directory).faults_of_configuration()):
                missed.append(i)
        except UserError:
            pass
        for name, content in before.items():
            (directory / name).write_bytes(content)
    assert missed == []


def test_both_values_are_shown(made: Made) -> None:
    directory = made()
    edit_json(directory, *in_config(lambda q: q["ignore"].append(ANY)))
    edit_json(directory, *in_config(lambda q: q["quantized_layers"][EXPERT].pop("group_size")))
    edit_json(directory, *in_twin(lambda q: q.update(kv_cache_quant_algo=None)))
    edit_json(directory, *in_model(residual_in_fp32=True))
    assert failed(directory, base=False)["configuration"].splitlines() == [
        f'config.json: quantization_config.ignore: has "{ANY}", which export would not write',
        f"config.json: quantization_config.quantized_layers.{EXPERT}.group_size: is absent, should "
        "be 16",
        "config.json: residual_in_fp32: is true, should be false",
        f'{TWIN}: quantization.kv_cache_quant_algo: is null, should be "FP8"',
    ]
    (made("compressed") / TWIN).write_text("{}")
    assert f"{TWIN} is there" in failed(directory, base=False)["configuration"]
    (made("fp8") / TWIN).unlink()
    assert f"{TWIN} is missing" in failed(directory, base=False)["configuration"]


@pytest.mark.parametrize(
    ("found", "wanted", "said"),
    [
        ({"a": 1}, {"a": True}, ["a: is 1, should be true"]),
        ({"a": {"b": None}}, {"a": {}}, ["a.b: is null, should be absent"]),
        ({"a": ["x", "x"]}, {"a": ["x"]}, ['a: has "x", which export would not write']),
        ({"a": ["x"]}, {"a": ["y", "x"]}, ['a: lacks "y", which export would write']),
        ({"a": ["x", "y"]}, {"a": ["y", "x"]}, ["a: is in another order than export would wri"]),
        ({"a": {"b": 1}}, {"a": 1}, ['a: is {"b": 1}, should be 1']),
        ({"a": [1.0, {}]}, {"a": [1.0, {}]}, []),
    ],
)
def test_differences(found: Json, wanted: Json, said: list[str]) -> None:
    lines = list(differences(found, wanted))
    assert len(lines) == len(said)
    assert all(map(str.startswith, lines, said))


def test_what_other_releases_wrote_is_sound(made: Made) -> None:
    """The version alone may be another one, and must be the same in both files."""
    directory = made("nvfp4")

    def older(value: Json) -> None:
        value["producer"]["version"] = "nemo_hybrid 0.0.1"

    edit_json(directory, *in_config(older))
    assert "producer.version" in failed(directory, base=False)["configuration"]
    edit_json(directory, TWIN, older)
    assert failed(directory) == {}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_written_is_sound(exported: Made, kind: str) -> None:
    assert failed(exported(kind) / "export") == {}
