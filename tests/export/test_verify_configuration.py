"""`verify-export` names what is wrong in configuration files, by the rules of their readers."""

from collections.abc import Callable
from typing import Any

import pytest

from helpers.exported import ANY, EXPERT, Made, edit_json, failed, seal

Json = dict[str, Any]
Edit = tuple[str, Callable[[Json], object]]
TWIN = "hf_quant_config.json"
FP8 = {"type": "float", "num_bits": 8, "dynamic": False}


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


@pytest.mark.parametrize(
    ("kind", "edit", "named"),
    [
        ("nvfp4", in_twin(lambda q: q.pop("group_size")), "group_size is None"),
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
        ("mixed", in_config(lambda q: q["ignore"].append(ANY)), "but ignore hits it"),
        (
            "mixed",
            in_config(lambda q: q["quantized_layers"].pop("backbone.layers.2.mixer.v_proj")),
            "backbone.layers.2.mixer.qkv_proj, one module in engines, has several formats",
        ),
        ("nvfp4", ("config.json", lambda c: c.pop("mamba_ssm_cache_dtype")), "mamba_ssm_cache"),
        (
            "nvfp4",
            ("config.json", lambda c: c.update(mamba_ssm_cache_dtype="float8")),
            "mamba_ssm_cache_dtype is 'float8', must be 'float32'",
        ),
        ("nvfp4", in_config(lambda q: q.pop("config_groups")), "config_groups is missing"),
        ("nvfp4", in_group("weights", num_bits=8), "group_nvfp4.weights.num_bits must be 4"),
        ("nvfp4", in_group("weights", group_size=32), "weights.group_size must be 16"),
        ("fp8", in_group("weights", group_size=16), "weights.group_size must be None"),
        ("mixed", in_group("weights", type="int"), "weights.type must be 'float'"),
        ("nvfp4", in_group("input_activations", num_bits=8), "input_activations.num_bits must"),
        ("nvfp4", in_group(input_activations=None), "input_activations must be an object"),
        ("w4a16", in_group(input_activations={"num_bits": 4}), "must be null or absent"),
        ("nvfp4", in_group(targets=["Conv1d"]), "targets names Conv1d, which is not quantized"),
        ("nvfp4", in_group(targets=[]), "targets is not of one format"),
        ("mixed", in_group(targets=[EXPERT, ANY]), "targets is not of one format"),
        ("mixed", in_group(targets=[ANY]), "layers.0.mixer.in_proj is in no"),
        (
            "mixed",
            in_config(lambda q: q["config_groups"].update(more=q["config_groups"]["group_fp8"])),
            "a module is in targets twice",
        ),
        ("mixed", in_config(lambda q: q["kv_cache_scheme"].update(num_bits=4)), "num_bits must"),
        ("fp8", in_config(lambda q: q.update(kv_cache_scheme={"dynamic": 1})), "dynamic must"),
        ("compressed", in_config(lambda q: q.update(kv_cache_scheme="FP8")), "num_bits must"),
        ("compressed", in_group("weights", dynamic=True), "weights.dynamic must be False"),
        ("compressed", in_group(format="float-quantized"), "must be 'nvfp4-pack-quantized'"),
        ("compressed", in_group(targets=["Conv1d"]), "one group, whose targets is ['Linear']"),
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
            "the prefixes backbone and model",
        ),
        *[
            ("compressed", in_config(lambda q, e=entry: q["ignore"].append(e)), "neither a module")
            for entry in (
                "re:(", "re:x{99999999999999999999}", "re:" + "(" * 5000 + ")" * 5000, "Linear",
                "re:.*.*.*.*.*x", r"re:.*\d", "re:(a*)*b", "re:(?i).*PROJ",
            )
        ],
        *[
            ("compressed", in_config(lambda q, e=entry: q["ignore"].append(e)), "some of its names")
            for entry in (
                r"re:.*\.qkv_proj$", r"re:.*\.experts\.0\.None$", "re:.*_proj$",
                r"re:.*\.experts\.0\..*", r"re:model\..*", r"re:backbone\..*",
            )
        ],
        *[
            (kind, in_both(lambda names, e=entry: names.append(e)), "nor mtp*: engines differ")
            for entry in (
                "model.layers.0.mixer.in_proj", "model*", "*", "model.layers.1.*", "experts",
                "*backbone.layers.0.mixer.in_proj", "bone.layer*", "e.layers", "proj",
                "backbone.layers.1*", "backbone.layers.2.mixer.qkv_proj", "*.2.mixer.[qkv]_proj",
                "backbone.layers.1.mixer.shared_experts.up_proj.*", "mtp.*", "",
                "backbone.layers.1.mixer.experts.3.down_proj", "\ud800", "backbone.layers.0",
            )
            for kind in ("nvfp4", "fp8")
        ],
        *[
            (kind, in_config(lambda q, k=key: q.update({k: {}})), f"_config: {key} is unknown")
            for kind, key in (
                ("nvfp4", "quantization"), ("fp8", "quantization"), ("mixed", "format"),
                ("compressed", "transform_config"), ("compressed", "sparsity_config"),
                ("compressed", "quantized_layers"), ("compressed", "scale_fmt"),
            )
        ],
        *[
            ("nvfp4", ("config.json", lambda c, k=key: c.update({k: {}})), f"{key} is unknown")
            for key in (
                "compression_config", "auto_map", "text_config", "block_configs", "scoring_func",
                "partial_rotary_factor", "rope_theta",
            )
        ],
        *[
            ("nvfp4", ("config.json", lambda c, k=key, v=value: c.update({k: v})), f": {key} is ")
            for key, value in (
                ("architectures", ["LlamaForCausalLM"]), ("architectures", []),
                ("architectures", "NemotronHForCausalLM"), ("residual_in_fp32", True),
                ("num_nextn_predict_layers", 2),
            )
        ],
        ("compressed", in_group("weights", actorder="group"), "weights.actorder is unknown"),
        ("compressed", in_group("weights", scale_dtype="torch.int8"), "scale_dtype must be"),
        ("compressed", in_group(block_structure="2:4"), "block_structure is unknown"),
        ("nvfp4", in_group("weights", strategy="channel"), "weights.strategy is unknown"),
        ("compressed", second_group("Linear"), "must be one group"),
        ("compressed", second_group("ColumnParallel"), "must be one group"),
        ("compressed", second_group(r"re:.*\.qkv_proj$"), "must be one group"),
        ("compressed", in_group(targets=["Linear", "linear"]), "must be one group"),
        ("compressed", in_group(targets=["FooAttention"]), "must be one group"),
        ("compressed", in_config(lambda q: q.update(kv_cache_scheme=FP8)), "must be null in"),
        ("nvfp4", in_config(lambda q: q.update(quantized_layers={})), "must not be there with"),
        ("mixed", in_config(lambda q: q["kv_cache_scheme"].update(block=1)), "block is unknown"),
        (
            "w4a16",
            in_both(lambda names: names.remove("backbone.layers.2.mixer.q_proj")),
            "ignore names a part of backbone.layers.2.mixer.qkv_proj alone",
        ),
        ("mixed", in_config(lambda q: q["quantized_layers"][ANY].update(x=1)), "x is unknown"),
        ("nvfp4", in_config(lambda q: q.pop("group_size")), "config.json: group_size is None"),
        ("nvfp4", in_twin(lambda q: q.update(group_size=None)), "config.json: group_size is None"),
        ("nvfp4", in_twin(lambda q: q.update(has_zero_point=True)), "has_zero_point is unknown"),
        ("nvfp4", (TWIN, lambda t: t.pop("producer")), "producer.name must be 'modelopt'"),
        ("nvfp4", (TWIN, lambda t: t["producer"].update(name="x")), "producer.name must be"),
        ("nvfp4", (TWIN, lambda t: t.update(compression=1)), "compression is unknown"),
    ],
)  # fmt: skip
def test_faults_of_configuration(
    made: Made, kind: str, edit: Edit | list[Edit], named: str
) -> None:
    directory = made(kind)
    for one in edit if isinstance(edit, list) else [edit]:
        edit_json(directory, *one)
    assert named in failed(directory, base=False)["configuration"]


def test_a_twin_in_another_layout(made: Made) -> None:
    directory = made("compressed")
    (directory / TWIN).write_text("{}")
    seal(directory)
    assert f"{TWIN} is there" in failed(directory, base=False)["configuration"]


@pytest.mark.parametrize(
    ("kind", "edit", "named"),
    [
        ("nvfp4", lambda q: q["ignore"].remove("lm_head"), "lm_head.weight: is BF16"),
        (
            "nvfp4",
            lambda q: q["ignore"].remove("backbone.layers.1.mixer.gate"),
            "backbone.layers.1.mixer.gate.weight: is BF16",
        ),
        ("nvfp4", lambda q: q.update(quant_algo="W4A16_NVFP4"), "input_scale: unexpected"),
        ("compressed", lambda q: q["ignore"].append("re:.*experts.*"), "experts.0.up_proj.weight"),
        ("compressed", lambda q: q.update(ignore=[]), "lm_head.weight_packed: missing"),
        # Inputs' numbers say alone whether there are scales.
        (
            "compressed",
            lambda q: q["config_groups"]["group_0"].update(input_activations=None),
            f"{EXPERT}.input_global_scale: unexpected",
        ),
        (
            "compressed_w4a16",
            lambda q: q["config_groups"]["group_0"].update(
                input_activations={**q["config_groups"]["group_0"]["weights"], "dynamic": "local"}
            ),
            f"{EXPERT}.input_global_scale: missing",
        ),
        (
            "nvfp4",
            lambda q: q.update(
                ignore=[n for n in q["ignore"] if ".2.mixer.k" not in n and ".2.mixer.q" not in n]
            ),
            "backbone.layers.2.mixer.k_proj.weight: is BF16",
        ),
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
        groups = q.get("config_groups")
        if groups:
            groups["group_nvfp4"]["targets"] = ["backbone.layers.1.mixer.experts"]

    edit_json(directory, *in_config(merge))
    edit_json(directory, *in_twin(merge))
    assert failed(directory) == {}


@pytest.mark.parametrize(
    "formats",
    [
        {"*.shared_experts.*": "fp8"},
        {"*.fc1_latent_proj": "fp8"},
        {"*.fc2_latent_proj": "nvfp4_w4a16", "backbone.layers.2.mixer.*": "nvfp4_w4a16"},
    ],
)
def test_experts_that_no_list_names_are_quantized_in_vllm(
    made: Made, formats: dict[str, str]
) -> None:
    """By what else is listed of their layer: the rule is its _resolve_quant_algo's."""
    directory, experts = made(formats=formats), "backbone.layers.1.mixer.experts"
    assert failed(directory) == {}
    edit_json(directory, *in_config(lambda q: q["ignore"].remove(experts)))
    edit_json(directory, *in_twin(lambda q: q["exclude_modules"].remove(experts)))
    said = failed(directory, base=False)["configuration"]
    assert f"{experts} is neither in quantized_layers nor in ignore" in said
    assert "backbone.layers.1.mixer." in said.partition("because")[2]
    # Without anything beside them, they are what they are.
    directory = made(formats={"*.mixer.in_proj": "fp8"})
    edit_json(directory, *in_config(lambda q: q["ignore"].remove(experts)))
    edit_json(directory, *in_twin(lambda q: q["exclude_modules"].remove(experts)))
    assert failed(directory) == {}
