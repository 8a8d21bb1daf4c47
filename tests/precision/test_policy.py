"""Which product gets which format: presets, globs, the late switch, the table, and mistakes."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any

import pytest
import torch

from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.read import load_config
from nemo_hybrid.config.run import PrecisionOptions
from nemo_hybrid.errors import UserError
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.precision import policy
from nemo_hybrid.precision.layers import QuantizedExperts, QuantizedLinear
from nemo_hybrid.precision.operands import PassFormats

MODELS = Path(__file__).parents[2] / "configs" / "model"
SHAPE = HybridConfig(pattern="MEM*-EME", mamba_num_heads=16, mamba_head_dim=32)
LOW = {"nvfp4", "mxfp8"}


def shape_of(name: str) -> HybridConfig:
    return load_config([], ["--model", str(MODELS / f"{name}.yaml")]).model.hybrid()


def on_meta(shape: HybridConfig) -> HybridLM:
    with torch.device("meta"):
        return HybridLM(shape)


def chosen(shape: HybridConfig = SHAPE, **options: Any) -> dict[str, PassFormats]:
    found = policy.resolve(on_meta(shape), PrecisionOptions(**options), shape)
    return {p.name: p.formats for p in found}


def check(shape: HybridConfig = SHAPE, tokens: int = 64, **options: Any) -> None:
    given = PrecisionOptions(**options)
    given.validate(max_steps=100)
    policy.check(on_meta(shape), given, shape, tokens)


def objection(shape: HybridConfig = SHAPE, **options: Any) -> str:
    """What is said against these options; nothing if they are valid."""
    try:
        check(shape, **options)
    except UserError as error:
        return str(error)
    return ""


def apply(model: HybridLM, shape: HybridConfig = SHAPE, **options: Any) -> policy.Precision:
    given = PrecisionOptions(**options)
    return policy.Precision(model, given, shape, seed=1, rank=0, device_type="cpu")


def named(formats: dict[str, PassFormats], glob: str) -> set[tuple[str, ...]]:
    found = {tuple(f) for name, f in formats.items() if fnmatchcase(name, glob)}
    assert found, glob
    return found


@pytest.mark.parametrize(("name", "last"), [("super", 14), ("ultra", 16)])
def test_presets_of_the_released_models(name: str, last: int) -> None:
    """nemotron 3's recipe, layer by layer: what it says in words, on the released shapes."""
    shape = shape_of(name)
    formats = chosen(shape, recipe=f"nvfp4_{name}")
    depth = len(shape.pattern)
    for module, passes in formats.items():
        parts = module.split(".")
        expected = "bf16"
        if parts[0] == "backbone" and int(parts[2]) < depth - last:
            if parts[4] in ("in_proj", "experts", "shared_experts"):
                expected = "nvfp4"
            elif parts[4] == "out_proj":
                expected = "mxfp8"
        assert set(passes) == {expected}, module
    kinds = Counter(m.split(".")[-1] for m, f in formats.items() if f.forward == "bf16")
    assert kinds["q_proj"] == kinds["k_proj"] == shape.pattern.count("*") + 1  # and MTP's
    assert kinds["fc1_latent_proj"] == shape.pattern.count("E") + 1
    assert kinds["eh_proj"] == 1


@pytest.mark.parametrize(("name", "nvfp4"), [("super", 58), ("ultra", 63)])
def test_share_of_the_work_in_the_released_models(name: str, nvfp4: int) -> None:
    """Figures derived from the dimensions beforehand: per cent of the multiply-adds of linear
    layers and experts, with the head and two MTP passes; MXFP8 has 8 to 9."""
    shape = shape_of(name)
    table = apply(on_meta(shape), shape, recipe=f"nvfp4_{name}").table
    shares: Counter[str] = Counter()
    for _, _, words, share, runs in table:
        shares[words] += float(share.removesuffix("%"))
        assert runs == ("emulated" if words in LOW else "")
    assert shares["nvfp4"] == pytest.approx(nvfp4, abs=0.5)
    assert 8 <= shares["mxfp8"] <= 9.5
    assert sum(shares.values()) == pytest.approx(100, abs=0.7)


def test_work_is_the_matmul_work_of_the_model() -> None:
    """The same sum as the parameters that a token meets, counted by other code."""
    from nemo_hybrid.train.flops import train_flops_per_token

    model = on_meta(SHAPE)
    found = policy.resolve(model, PrecisionOptions(), SHAPE)
    passes = SHAPE.mtp_num_depths
    macs = sum(
        n * (passes if name.startswith("mtp.") else 1)
        for name, _, n in policy.work_of(model, found, SHAPE)
    )
    # Scan and attention scores are what is left, at the shortest sequence nearly nothing.
    rest = train_flops_per_token(SHAPE, 1) / 6 - macs
    assert 0 < rest < 0.02 * macs


@pytest.mark.parametrize(
    ("pattern", "recipe", "kept"),
    [
        ("M", "nvfp4_super", 1),
        ("ME" * 4, "nvfp4_super", 1),
        ("ME" * 8, "nvfp4_super", 3),
        ("ME" * 44, "nvfp4_super", 14),
        ("ME" * 8, "nvfp4_ultra", 2),
        ("ME" * 54, "nvfp4_ultra", 16),
        ("ME" * 8, "nvfp4_all", 0),
    ],
)
def test_share_of_layers_at_the_end_follows_the_depth(pattern: str, recipe: str, kept: int) -> None:
    shape = replace(SHAPE, pattern=pattern)
    formats = chosen(shape, recipe=recipe)
    low = [int(m.split(".")[2]) for m, f in formats.items() if LOW & {*f} and m[0] == "b"]
    assert max(low, default=-1) == len(pattern) - 1 - kept


def test_everything_in_nvfp4() -> None:
    formats = chosen(recipe="nvfp4_all")
    assert {tuple(f) for f in formats.values()} == {("nvfp4",) * 3}
    modules = dict(on_meta(SHAPE).named_modules())
    linear = {n for n, m in modules.items() if isinstance(m, torch.nn.Linear)} - {"lm_head"}
    experts = {n for n in modules if n.endswith(".experts")}
    assert set(formats) == linear | experts
    assert any(n.startswith("mtp.") for n in linear)


def test_users_globs_stand_above_the_preset_and_the_last_counts() -> None:
    formats = chosen(
        recipe="nvfp4_super",
        last_layers_bf16=2,
        formats={
            "*.mixer.?_proj": "nvfp4/bf16/mxfp8",
            "backbone.layers.7.*": "mxfp8",  # also in the last layers
            "*.mixer.experts": "nvfp4",
            "backbone.layers.1.mixer.experts": "bf16",
        },
    )
    assert named(formats, "*.mixer.[qkvo]_proj") == {("nvfp4", "bf16", "mxfp8")}
    assert named(formats, "backbone.layers.7.mixer.shared_experts.*") == {("mxfp8",) * 3}
    assert named(formats, "backbone.layers.[57].mixer.experts") == {("nvfp4",) * 3}
    assert named(formats, "backbone.layers.1.mixer.experts") == {("bf16",) * 3}
    assert named(formats, "backbone.layers.6.*") == {("bf16",) * 3}
    assert named(formats, "backbone.layers.4.mixer.*") == {("nvfp4",) * 3}  # dense MLP
    alone = chosen(formats={"*.in_proj": "nvfp4"})
    assert {m for m, f in alone.items() if LOW & {*f}} == {m for m in alone if "in_proj" in m}


def test_modules_get_what_differs_from_bf16() -> None:
    model = on_meta(SHAPE)
    assert apply(model, recipe="bf16").table == []
    assert apply(model, recipe="fp32").table == []
    assert all(getattr(m, "low_precision", None) is None for m in model.modules())
    apply(model, recipe="nvfp4_super", stochastic_rounding=False)
    modules = dict(model.named_modules())
    for name, formats in chosen(recipe="nvfp4_super").items():
        low = modules[name].low_precision
        if LOW & {*formats}:
            kind = QuantizedExperts if name.endswith(".experts") else QuantizedLinear
            assert type(low) is kind
            assert (low.name, low.formats) == (name, formats)
            assert low.ingredients == (True, False, True)
        else:
            assert low is None


def test_switch_follows_the_step_in_both_directions() -> None:
    model = on_meta(SHAPE)
    module = model.get_submodule("backbone.layers.0.mixer.in_proj")
    precision = apply(model, recipe="nvfp4_super", switch_step=7)
    seen = []
    for step in (6, 7, 8, 6):
        precision.start_step(step, batch=step)
        seen.append(module.low_precision is not None)
    assert seen == [True, False, False, True]

    precision = apply(model, recipe="nvfp4_super", switch_step=7, switch_passes="forward")
    formats = []
    for step in (6, 7, 6):
        precision.start_step(step, batch=step)
        formats.append("/".join(module.low_precision.formats))  # type: ignore[union-attr]
    assert formats == ["nvfp4/nvfp4/nvfp4", "bf16/nvfp4/nvfp4", "nvfp4/nvfp4/nvfp4"]

    options = {"formats": {"*.in_proj": "fp32/nvfp4/mxfp8"}, "switch_step": 7}
    apply(model, **options).start_step(7, batch=7)
    assert module.low_precision.formats == ("fp32", "bf16", "bf16")  # type: ignore[union-attr]


def test_streams_know_batch_micro_batch_and_rank() -> None:
    model = on_meta(SHAPE)
    keys = set()
    for rank in (0, 1):
        given = PrecisionOptions(recipe="nvfp4_super")
        precision = policy.Precision(model, given, SHAPE, seed=5, rank=rank, device_type="cpu")
        streams = model.get_submodule("backbone.layers.0.mixer.in_proj").low_precision.streams  # type: ignore[union-attr]
        for step, batch in ((0, 0), (0, 1), (1, 2)):
            precision.start_step(step, batch)
            for number in (1, 2):
                precision.start_micro_batch(number)
                keys.add(streams.next_use("layer"))
    assert len(keys) == 2 * 3 * 2


def test_table_says_native_where_the_chosen_path_is(monkeypatch: pytest.MonkeyPatch) -> None:
    native = [False]
    monkeypatch.setattr(policy.lowp, "native", lambda kind: kind == "cuda" and native[0])
    formats = {"*.q_proj": "nvfp4/bf16/bf16", "*.k_proj": "nvfp4/mxfp8/bf16"}
    given = PrecisionOptions(recipe="nvfp4_super", formats=formats)

    def runs(device_type: str) -> dict[str, str]:
        made = policy.Precision(
            on_meta(SHAPE), given, SHAPE, seed=1, rank=0, device_type=device_type
        )
        return {words: how for _, _, words, _, how in made.table}

    emulated = {"nvfp4", "mxfp8", "nvfp4/bf16/bf16", "nvfp4/mxfp8/bf16"}
    plain = {"bf16": "", "fp32": ""}
    nowhere = plain | dict.fromkeys(emulated, "emulated")
    assert runs("cuda") == nowhere
    native[0] = True
    assert runs("cuda") == nowhere | {"nvfp4": "native", "nvfp4/bf16/bf16": "native"}
    assert runs("cpu") == nowhere


@pytest.mark.parametrize(
    ("formats", "said"),
    [
        ({"*.in_porj": "nvfp4"},
         "the model, whose layers are counted from 0; the nearest name is backbone.layers.*.mixer."
         "in_proj"),
        ({"backbone.layers.*.mixer.experts.*": "nvfp4"}, "is backbone.layers.*.mixer.experts"),
        ({"*.shared_expert.up_proj": "bf16"}, "is backbone.layers.*.mixer.shared_experts.up_proj"),
        ({"backbone.layers.8.*": "bf16"}, "matches nothing in the model, whose layers are counted"),
        ({"backbone.layers.1.mixer.in_proj": "bf16"}, "name is backbone.layers.*.mixer.in_proj"),
        ({"*.shared_experts": "bf16"}, "matches backbone.layers.1.mixer.shared_experts, whose for"),
        ({"*.shared_experts": "bf16"}, "in it is backbone.layers.*.mixer.shared_experts.up_proj"),
        ({"lm_head": "nvfp4"}, "matches lm_head, whose format cannot be chosen: linear layers and"),
        ({"*.embeddings": "nvfp4"}, "matches backbone.embeddings, whose format cannot be chosen"),
        ({"*.gate": "nvfp4"}, "mixer.gate, whose format cannot be chosen"),
        ({"*.norm_f": "bf16"}, "matches backbone.norm_f, whose format cannot be chosen"),
        ({"*": "fp8"}, "*: unknown format 'fp8'; known: bf16, fp32, nvfp4, mxfp8"),
        ({"*": "nvfp4/bf16"}, r"expected FORMAT or FORWARD/DGRAD/WGRAD, got 'nvfp4/bf16'"),
        ({"*": "nvfp4/bf16/"}, "unknown format ''"),
    ],
)  # fmt: skip
def test_globs_and_formats_that_mean_nothing(formats: dict[str, str], said: str) -> None:
    message = objection(recipe="nvfp4_super", formats=formats)
    assert message.startswith("precision.formats: ")
    assert said in message


def test_glob_of_mtp_in_a_model_without_it() -> None:
    alone = replace(SHAPE, mtp_num_depths=0)
    message = objection(alone, recipe="nvfp4_super", formats={"mtp.*": "nvfp4"})
    assert message.startswith("precision.formats: mtp.* matches nothing in the model")


@pytest.mark.parametrize(
    ("shape", "formats", "said"),
    [
        ({"mamba_num_heads": 8, "mamba_head_dim": 64}, {},
         "backbone.layers.0.mixer.in_proj has 1160 outputs, which is not divisible by 16"),
        ({"hidden_size": 264}, {}, "in_proj has 264 inputs, which is not divisible by 16"),
        ({"hidden_size": 272}, {}, "out_proj has 272 outputs, which is not divisible by 32, the "
         "block of mxfp8: change model.hidden_size, mamba_num_heads or mamba_head_dim, or set "
         "--precision.formats \"{'backbone.layers.*.mixer.out_proj': bf16}\""),
        ({"moe_intermediate_size": 100}, {}, "experts has 100 inner channels, which is not"),
        ({"moe_latent_size": 40}, {}, "experts has 40 inputs, which is not divisible by 16"),
        ({"moe_shared_expert_intermediate_size": 100}, {}, "shared_experts.up_proj has 100 out"),
        ({"intermediate_size": 100}, {}, "backbone.layers.4.mixer.up_proj has 100 outputs"),
        ({"head_dim": 10}, {"*.o_proj": "nvfp4"}, "o_proj has 40 inputs"),
        ({"hidden_size": 272}, {"mtp.*.eh_proj": "mxfp8", "*.out_proj": "bf16"},
         "eh_proj has 272 outputs, which is not divisible by 32"),
        ({"moe_latent_size": 40}, {}, "change model.moe_latent_size or moe_intermediate_size, or"),
        ({"moe_latent_size": None, "hidden_size": 264},
         {"*.in_proj": "bf16", "*.out_proj": "bf16"},
         "experts has 264 inputs, which is not divisible by 16, the block of nvfp4: change "
         "model.hidden_size or moe_intermediate_size, or"),
    ],
)  # fmt: skip
def test_dimension_that_blocks_do_not_divide_names_layer_and_way_out(
    shape: dict[str, int], formats: dict[str, str], said: str
) -> None:
    changed = replace(SHAPE, **shape)  # type: ignore[arg-type]
    message = objection(changed, recipe="nvfp4_super", formats=formats)
    assert said in message
    glob = message.rsplit('"', 2)[1].removesuffix(": bf16")
    layer = message.split()[0]
    assert layer not in objection(changed, recipe="nvfp4_super", formats={**formats, glob: "bf16"})


@pytest.mark.parametrize("formats", ["nvfp4/bf16/bf16", "bf16/nvfp4/bf16", "bf16/bf16/nvfp4"])
def test_nvfp4_needs_both_dimensions_for_every_pass(formats: str) -> None:
    """Its quantizers, and the units of Blackwell, take no others."""
    wide = replace(SHAPE, mamba_num_heads=8, mamba_head_dim=64)  # 1160 outputs of in_proj
    for two_dimensional in (True, False):
        options: dict[str, Any] = {"formats": {"*.in_proj": formats}}
        if "nvfp4" in formats.split("/")[:2]:
            options["two_dimensional_weights"] = two_dimensional
        with pytest.raises(UserError, match=r"in_proj has 1160 outputs, .* divisible by 16"):
            check(wide, **options)
        with pytest.raises(UserError, match=r"in_proj has 264 inputs, .* divisible by 16"):
            check(replace(SHAPE, hidden_size=264), **options)
        check(SHAPE, **options)


def test_only_the_dimension_that_a_pass_sums_over_counts_in_mxfp8() -> None:
    narrow = replace(SHAPE, hidden_size=272)
    check(narrow, formats={"*.q_proj": "bf16/mxfp8/mxfp8", "*.o_proj": "mxfp8/bf16/mxfp8"})
    with pytest.raises(UserError, match=r"q_proj has 272 inputs, .* divisible by 32"):
        check(narrow, formats={"*.q_proj": "mxfp8/bf16/bf16"})
    with pytest.raises(UserError, match=r"o_proj has 272 outputs, .* divisible by 32"):
        check(narrow, formats={"*.o_proj": "bf16/mxfp8/bf16"})


@pytest.mark.parametrize("formats", ["mxfp8/bf16/bf16", "bf16/mxfp8/bf16"])
def test_experts_sum_over_both_dimensions_in_either_pass(formats: str) -> None:
    """Up and down have them the other way round."""
    given = {"*.experts": formats}
    with pytest.raises(UserError, match=r"experts has 48 inner channels, .* by 32, .* of mxfp8"):
        check(replace(SHAPE, moe_intermediate_size=48), formats=given)
    with pytest.raises(UserError, match=r"experts has 48 inputs, .* by 32, the block of mxfp8"):
        check(replace(SHAPE, moe_latent_size=48), formats=given)
    check(replace(SHAPE, moe_latent_size=96, moe_intermediate_size=96), formats=given)


def test_tokens_count_for_weight_gradients_alone() -> None:
    with pytest.raises(UserError, match=r"data.sequence_length, .* \(40\), is not divisible by 16"):
        check(SHAPE, tokens=40, formats={"*.in_proj": "bf16/bf16/nvfp4"})
    check(SHAPE, tokens=40, formats={"*.in_proj": "mxfp8/nvfp4/bf16"})
    check(SHAPE, tokens=41, formats={"*.experts": "nvfp4"})  # whose rows are padded
    with pytest.raises(UserError, match=r"\(48\), is not divisible by 32, the block of mxfp8"):
        check(SHAPE, tokens=48, recipe="nvfp4_super")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"recipe": "fp32", "formats": {"*": "nvfp4"}}, "formats has no effect with precision.rec"),
        ({"rht": False}, "precision.rht has no effect with precision.recipe bf16"),
        ({"recipe": "fp32", "stochastic_rounding": False}, "stochastic_rounding has no effect"),
        ({"two_dimensional_weights": False}, "two_dimensional_weights has no effect"),
        ({"switch_step": 5}, "precision.switch_step has no effect"),
        ({"last_layers_bf16": 1}, "precision.last_layers_bf16 has no effect"),
        ({"last_layers_bf16": 1, "formats": {"*": "nvfp4"}}, "last_layers_bf16 has no effect"),
        ({"recipe": "nvfp4_super", "last_layers_bf16": 9}, r"(9) exceeds the number of layers, 8"),
        ({"recipe": "nvfp4_super", "last_layers_bf16": 8}, "leaves every product of this model in"),
        ({"formats": {"*": "bf16"}}, "leaves every product of this model in bf16"),
        ({"recipe": "nvfp4_all", "switch_passes": "forward"}, "switch_passes has no effect with"),
        ({"recipe": "nvfp4_all", "switch_step": 100}, "must be below train.max_steps (100)"),
        ({"formats": {"*.q_proj": "bf16/nvfp4/nvfp4"}, "switch_step": 5,
          "switch_passes": "forward"},
         "switch_step has no effect: no product of the passes that precision.switch_passes (forwa"),
        ({"formats": {"*.q_proj": "fp32/nvfp4/nvfp4"}, "switch_step": 5,
          "switch_passes": "forward"}, "switch_step has no effect: no product of the passes"),
        ({"formats": {"*.q_proj": "fp32"}, "switch_step": 5},
         "switch_passes (all) names is in nvfp4 or mxfp8"),
        ({"formats": {"*.q_proj": "nvfp4/nvfp4/bf16"}, "rht": False}, "rht has no effect: no wgr"),
        ({"formats": {"*.q_proj": "nvfp4/bf16/bf16"}, "stochastic_rounding": False},
         "stochastic_rounding has no effect: no dgrad or wgrad product is in nvfp4"),
        ({"formats": {"*.q_proj": "mxfp8/mxfp8/nvfp4"}, "two_dimensional_weights": False},
         "two_dimensional_weights has no effect: no forward or dgrad product is in nvfp4"),
    ],
)  # fmt: skip
def test_options_without_effect(options: dict[str, Any], said: str) -> None:
    assert said in objection(**options)


def test_valid_options() -> None:
    check(recipe="nvfp4_super")
    check(recipe="nvfp4_ultra", last_layers_bf16=0, rht=False, stochastic_rounding=False)
    check(
        recipe="nvfp4_all", two_dimensional_weights=False, switch_step=99, switch_passes="forward"
    )
    check(formats={"*.q_proj": "fp32"})
    check(formats={"*.q_proj": "nvfp4"}, switch_step=5)
    assert policy.weight_dtype(PrecisionOptions(recipe="fp32")) == torch.float32
    for recipe in ("bf16", "nvfp4_super", "nvfp4_ultra", "nvfp4_all"):
        assert policy.weight_dtype(PrecisionOptions(recipe=recipe)) == torch.bfloat16  # type: ignore[arg-type]
