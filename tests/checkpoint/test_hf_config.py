"""config.json: our reading against transformers' own, and every refusal by name."""

from __future__ import annotations

import json
from dataclasses import fields, replace

import pytest

from nemo_hybrid.config.hf import HybridConfig, config_json, read_config
from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.errors import UserError

SUPER = "MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*EMEMEMEME"
# No two fields share a value, so that a swapped pair shows.
ODD = HybridConfig(
    pattern="ME*-ME", vocab_size=96, hidden_size=40, num_attention_heads=6, num_key_value_heads=3,
    head_dim=10, mamba_num_heads=28, mamba_head_dim=9, ssm_state_size=11, n_groups=7, conv_kernel=5,
    chunk_size=17, time_step_min=0.002, time_step_max=0.2, time_step_floor=2e-4,
    n_routed_experts=13, num_experts_per_tok=4, moe_intermediate_size=19, moe_latent_size=21,
    moe_shared_expert_intermediate_size=23, routed_scaling_factor=1.5, norm_topk_prob=False,
    intermediate_size=29, mtp_pattern="*E*", mtp_num_depths=8, layer_norm_epsilon=2e-5,
    initializer_range=0.03, max_position_embeddings=31, bos_token_id=16, eos_token_id=18,
    pad_token_id=20,
)  # fmt: skip


NO_MTP = {
    "num_nextn_predict_layers": 0,
    "mtp_num_depths": 0,
    "mtp_hybrid_override_pattern": None,
}


def transformers_config(**values: object):
    from transformers import NemotronHConfig

    return NemotronHConfig(**values)


@pytest.mark.parametrize(
    "cfg",
    [HybridConfig(), ODD, replace(ODD, moe_latent_size=None), HybridConfig(mtp_num_depths=0),
     HybridConfig(moe_shared_expert_intermediate_size=0), HybridConfig(pattern=SUPER)],
)  # fmt: skip
def test_round_trip_through_strict_json(cfg: HybridConfig) -> None:
    text = json.dumps(cfg.to_hf(), allow_nan=False)
    assert read_config(json.loads(text)) == cfg


def test_transformers_reads_what_we_write(tmp_path) -> None:
    from transformers import AutoConfig

    (tmp_path / "config.json").write_text(json.dumps(config_json(ODD)))
    theirs = AutoConfig.from_pretrained(tmp_path)
    assert type(theirs).__name__ == "NemotronHConfig"
    for f in fields(ModelConfig):
        if f.name not in ("pattern", "mtp_pattern", "mtp_num_depths"):
            assert getattr(theirs, f.name) == getattr(ODD, f.name), f.name
    assert theirs.hybrid_override_pattern == ODD.pattern
    assert theirs.mtp_hybrid_override_pattern == ODD.mtp_pattern
    assert theirs.num_nextn_predict_layers == 1
    assert str(theirs.dtype).removeprefix("torch.") == "bfloat16"
    assert theirs.mamba_ssm_cache_dtype == "float32"


def test_we_read_what_transformers_writes(tmp_path) -> None:
    ours = config_json(ODD)
    del ours["mtp_num_depths"]  # transformers would carry an unknown field along
    transformers_config(**ours).save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert "layers_block_type" in written
    assert "hybrid_override_pattern" not in written
    assert HybridConfig.from_hf(str(tmp_path)) == replace(ODD, mtp_num_depths=2)


def test_absent_fields_mean_what_transformers_says() -> None:
    keep = ("model_type", "hybrid_override_pattern", "vocab_size", "hidden_size",
            "mamba_num_heads", "mamba_head_dim", "ssm_state_size", "n_groups", "n_routed_experts",
            "num_experts_per_tok", "moe_intermediate_size", "num_attention_heads", "head_dim",
            "num_key_value_heads", "intermediate_size",
            "moe_shared_expert_intermediate_size")  # fmt: skip
    sparse = {k: v for k, v in config_json(ODD).items() if k in keep}
    ours, theirs = read_config(sparse), transformers_config(**sparse)
    for f in fields(ModelConfig):
        if f.name not in ("pattern", "mtp_pattern", "mtp_num_depths"):
            assert getattr(ours, f.name) == getattr(theirs, f.name), f.name
    assert ours.mtp_num_depths == theirs.num_nextn_predict_layers == 0


def test_both_vocabularies_and_the_pattern_agree() -> None:
    base = config_json(ODD)
    del base["hybrid_override_pattern"]
    old = ["mamba", "moe", "attention", "mlp", "mamba", "moe"]
    new = ["linear_attention", "moe", "full_attention", "mlp", "linear_attention", "moe"]
    for names in (old, new):
        assert read_config(base | {"layers_block_type": names}) == ODD
        assert read_config(config_json(ODD) | {"layers_block_type": names}) == ODD
    mtp = {"mtp_layers_block_type": ["attention", "moe", "full_attention"]}
    assert read_config(config_json(ODD) | mtp) == ODD


def test_layers_of_an_absent_mtp_block(tmp_path) -> None:
    """transformers writes them into every config.json; nothing reads them."""
    cfg = replace(ODD, mtp_num_depths=0, mtp_pattern="*E")
    transformers_config(**config_json(cfg)).save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["mtp_layers_block_type"]
    assert read_config(tmp_path) == cfg


def test_eos_list_and_dead_rope_fields() -> None:
    dead = {"rope_theta": 10000, "partial_rotary_factor": 1.0, "eos_token_id": [18, 11],
            "norm_eps": 2e-5, "time_step_limit": [0.0, {"__float__": "Infinity"}]}  # fmt: skip
    assert read_config(config_json(ODD) | dead) == ODD
    assert read_config(config_json(ODD) | {"time_step_limit": [0, float("inf")]}) == ODD


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"use_bias": True}, "use_bias"),
        ({"mlp_bias": True}, "mlp_bias"),
        ({"use_conv_bias": False}, "use_conv_bias"),
        ({"n_group": 2}, "n_group"),
        ({"n_group": True}, "n_group"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings"),
        ({"mlp_hidden_act": "silu"}, "mlp_hidden_act"),
        ({"sliding_window": 128}, "sliding_window"),
        ({"model_type": "llama"}, "model_type"),
        ({"model_type": None}, "model_type"),
        ({"quantization_config": {"quant_method": "modelopt"}}, "quantization_config"),
        ({"time_step_limit": [0.001, 0.1]}, "time_step_limit"),
        ({"num_hidden_layers": 7}, "num_hidden_layers"),
        ({"num_hidden_layers": 6.0}, "num_hidden_layers is 6.0"),
        ({"eos_token_id": [18, 96]}, "eos_token_id is [18, 96]"),
        ({"eos_token_id": [18, True]}, "eos_token_id"),
        ({"n_shared_experts": True}, "n_shared_experts"),
        ({"n_shared_experts": 1.0}, "n_shared_experts"),
        (NO_MTP | {"mtp_hybrid_override_pattern": "*E"}, "mtp_hybrid_override_pattern"),
        (
            NO_MTP | {"num_nextn_predict_layers": None, "mtp_hybrid_override_pattern": "ZZ"},
            "mtp_hybrid_override_pattern",
        ),
        (NO_MTP | {"mtp_layers_block_type": ["rnn"]}, "'rnn'"),
        (NO_MTP | {"mtp_hybrid_override_pattern": 3}, "mtp_hybrid_override_pattern"),
        ({"layers_block_type": ["moe"] * 6}, "layers_block_type"),
        ({"layers_block_type": ["rnn"] * 6}, "rnn"),
        ({"hybrid_override_pattern": "MXE"}, "'X'"),
        ({"hybrid_override_pattern": "ME*-ME/*E"}, "'/'"),
        ({"hybrid_override_pattern": None}, "hybrid_override_pattern"),
        ({"mtp_hybrid_override_pattern": "ME"}, "'M'"),
        ({"mtp_layers_block_type": ["moe"]}, "mtp_layers_block_type"),
        ({"num_nextn_predict_layers": 2}, "num_nextn_predict_layers"),
        ({"num_nextn_predict_layers": 0}, "mtp_num_depths"),
        ({"mtp_num_depths": 0}, "mtp_num_depths"),
        ({"n_shared_experts": 2}, "n_shared_experts"),
        ({"n_shared_experts": 0}, "n_shared_experts"),
        ({"hidden_size": "40"}, "hidden_size"),
        ({"hidden_size": None}, "hidden_size"),
        ({"ssm_state_size": None}, "ssm_state_size"),
        ({"norm_topk_prob": 1}, "norm_topk_prob"),
        ({"layer_norm_epsilon": float("nan")}, "layer_norm_epsilon"),
        ({"norm_eps": 1e-6}, "norm_eps"),
        ({"n_groups": 6}, "n_groups"),
    ],
)
def test_refusals_name_the_field(change: dict[str, object], named: str) -> None:
    with pytest.raises(UserError, match=r"config\.json") as caught:
        read_config(config_json(ODD) | change)
    assert named in str(caught.value)


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "not valid JSON"), ("[]", "JSON object"), ('{"a": 1, "a": 2}', "twice")],
)
def test_broken_files(tmp_path, text: str, says: str) -> None:
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match=says):
        read_config(tmp_path)
    with pytest.raises(UserError, match="cannot read"):
        read_config(tmp_path / "absent.json")


@pytest.mark.parametrize(
    "layers",
    [
        ["mamba", "moe", "attention", "mlp"],
        ["linear_attention", "E", "full_attention", "-"],
        ("M", "E", "*", "-"),
    ],
)
def test_a_list_of_layers_is_the_same_model(layers) -> None:
    cfg = HybridConfig(pattern=layers, mtp_pattern=["attention", "moe"])
    assert cfg == HybridConfig(pattern="ME*-", mtp_pattern="*E")
    cfg.validate()


@pytest.mark.parametrize("layers", [["ME", "*"], ["mamba", ""], ["rnn"], [["M"]], 3, None])
def test_unknown_layers_of_a_list(layers) -> None:
    with pytest.raises(UserError, match=r"model\.pattern"):
        HybridConfig(pattern=layers)
    cfg = HybridConfig()
    cfg.pattern = layers  # past the constructor
    with pytest.raises(UserError, match=r"model\.pattern"):
        cfg.validate()
