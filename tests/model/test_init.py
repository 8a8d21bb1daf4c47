"""Initial weights, parameters that stay fp32, and construction without memory."""

from __future__ import annotations

import math
from itertools import chain
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from helpers.tiny_models import loud_model, random_ids, tiny_config
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.model import FP32_NAMES
from nemo_hybrid.model import init
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.latent_moe import LocalDispatcher
from nemo_hybrid.train.flops import parameter_counts

CONFIG = tiny_config("ME*-ME", mtp_num_depths=2)


def tensors(model: nn.Module) -> dict[str, Tensor]:
    return dict(chain(model.named_parameters(), model.named_buffers()))


def owner_of(owned: range) -> LocalDispatcher:
    dispatcher = LocalDispatcher(len(owned))
    dispatcher.owned = owned
    return dispatcher


def test_several_threads_draw_the_same() -> None:
    alone = tensors(HybridLM(CONFIG, seed=5))
    with patch.object(init, "_FEW", 0):
        together = tensors(HybridLM(CONFIG, seed=5))
    assert all(torch.equal(together[name], tensor) for name, tensor in alone.items())


@pytest.mark.parametrize("owned", [range(0, 4), range(4, 8), range(6, 8)])
def test_a_part_of_the_experts_holds_exactly_their_weights(owned: range) -> None:
    whole = tensors(HybridLM(CONFIG, seed=5))
    part = tensors(HybridLM(CONFIG, dispatcher=owner_of(owned), seed=5))
    assert whole.keys() == part.keys()
    stacked = 0
    for name, tensor in whole.items():
        if ".experts." in name:
            assert torch.equal(part[name], tensor[owned.start : owned.stop]), name
            assert not torch.equal(tensor[0], tensor[1]), name
            stacked += 1
        else:
            assert torch.equal(part[name], tensor), name
    assert stacked == 2 * 3


def test_no_module_draws_weights_that_are_drawn_again() -> None:
    before = torch.get_rng_state()
    HybridLM(CONFIG)
    assert torch.equal(torch.get_rng_state(), before)
    nn.Embedding(2, 2)
    assert not torch.equal(torch.get_rng_state(), before)


def test_weights_depend_on_seed_and_name_only() -> None:
    first = tensors(HybridLM(CONFIG, seed=1))
    torch.manual_seed(99)
    torch.rand(17)
    again = tensors(HybridLM(CONFIG, seed=1))
    other = tensors(HybridLM(CONFIG, seed=2))
    # The same names in another model: more layers after them, other parts without them.
    longer = tensors(HybridLM(tiny_config("ME*-MEM-", mtp_num_depths=1), seed=1))
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]), name
        drawn = tensor.numel() > 1 and tensor.unique().numel() > 1
        assert torch.equal(tensor, other[name]) != drawn, name
        if not any(part in name for part in ("out_proj", "o_proj", "down_proj", "fc2_latent")):
            assert torch.equal(tensor, longer[name]), name  # those depend on the depth
    # No two tensors of one shape hold the same numbers.
    drawn = [t.flatten() for t in first.values() if t.dim() > 1]
    for i, a in enumerate(drawn):
        for b in drawn[:i]:
            n = min(len(a), len(b))
            assert not torch.equal(a[:n], b[:n])


# sigma: initializer_range, and that over sqrt(layers) for what writes into the residual stream.
WIDE = tiny_config(
    "MEMEM*E-M", vocab_size=512, hidden_size=192, moe_latent_size=96, mamba_num_heads=64,
    mamba_head_dim=4, n_routed_experts=4, intermediate_size=128, mtp_num_depths=1,
    initializer_range=0.03, time_step_min=2e-3, time_step_max=0.05,
)  # fmt: skip
NARROWED = ("out_proj.weight", "o_proj.weight", "down_proj.weight", "experts.down_proj",
            "fc2_latent_proj.weight")  # fmt: skip


def test_matrices_are_normal_with_the_right_sigma() -> None:
    matrices = 0
    for name, p in HybridLM(WIDE, seed=3).named_parameters():
        if p.dim() < 2 or "conv1d" in name:
            continue
        sigma = 0.03 / 3 if name.endswith(NARROWED) else 0.03  # nine layers
        p, n = p.detach(), p.numel()
        assert float(p.std()) == pytest.approx(sigma, rel=5 / math.sqrt(2 * n)), name
        assert abs(float(p.mean())) < 5 * sigma / math.sqrt(n), name
        beyond = float((p.abs() > 2 * sigma).float().mean())
        assert beyond == pytest.approx(0.0455, abs=5 * math.sqrt(0.0455 / n)), name
        matrices += 1
    assert matrices > 40
    names = [name for name, _ in HybridLM(WIDE).named_parameters()]
    for ending in NARROWED:
        assert any(name.endswith(ending) for name in names)


def test_norms_are_one_and_router_biases_zero() -> None:
    model = HybridLM(WIDE)
    norms = [p for n, p in model.named_parameters() if p.dim() == 1 and "norm" in n]
    assert len(norms) == 9 + 4 + 1 + 2 + 3  # inputs, gated, final; MTP inputs, and its other three
    assert all(p.eq(1).all() for p in norms)
    biases = list(model.named_buffers())
    assert len(biases) == 4
    assert all(b.eq(0).all() for _, b in biases)


def test_state_space_parameters() -> None:
    mixers = [x.mixer for x in HybridLM(WIDE, seed=3).backbone.layers if x.letter == "M"]
    A = torch.cat([m.A_log for m in mixers]).exp().detach()
    assert 1 <= float(A.min()) < 2
    assert 15 < float(A.max()) <= 16.0001
    assert float(A.mean()) == pytest.approx(8.5, abs=1.5)  # uniform in A, not in its logarithm
    assert all(m.D.eq(1).all() for m in mixers)
    dt = F.softplus(torch.cat([m.dt_bias for m in mixers])).detach()
    assert float(dt.min()) == pytest.approx(2e-3, rel=0.2)
    assert float(dt.max()) == pytest.approx(0.05, rel=0.2)
    assert (dt > 2e-3 * (1 - 1e-5)).all()
    assert (dt < 0.05 * (1 + 1e-5)).all()
    # Uniform in the logarithm.
    middle = math.sqrt(2e-3 * 0.05)
    assert float((dt < middle).float().mean()) == pytest.approx(0.5, abs=0.15)
    for m in mixers:
        for tensor in (m.conv1d.weight, m.conv1d.bias):
            assert 0.45 < float(tensor.detach().abs().max()) <= 0.5  # 1 / sqrt(kernel of 4)
            assert float(tensor.detach().std()) == pytest.approx(0.5 / math.sqrt(3), rel=0.1)


def test_the_floor_of_the_time_step() -> None:
    config = tiny_config("M", mamba_num_heads=64, mamba_head_dim=4, time_step_floor=0.02)
    mixer = HybridLM(config).backbone.layers[0].mixer
    dt = F.softplus(mixer.dt_bias.detach())
    assert float(dt.min()) == pytest.approx(0.02, rel=1e-4)
    assert float((dt < 0.0201).float().mean()) > 0.3


CASTS = {
    "to(bfloat16)": lambda m: m.to(torch.bfloat16),
    "bfloat16()": lambda m: m.bfloat16(),
    "half()": lambda m: m.half(),
    "to(device and dtype)": lambda m: m.to("cpu", torch.bfloat16),
    "cast twice": lambda m: m.half().bfloat16(),
    "cast of a part": lambda m: m.apply(lambda part: part.to(torch.bfloat16)),
}


@pytest.mark.parametrize("cast", CASTS)
def test_the_fp32_list_survives_casts_and_all_else_is_cast(cast: str) -> None:
    model = HybridLM(CONFIG)
    before = {name: tensor.clone() for name, tensor in tensors(model).items()}
    CASTS[cast](model)
    kept = set()
    for name, tensor in tensors(model).items():
        leaf = name.split(".")[-1]
        if leaf in FP32_NAMES:
            assert tensor.dtype == torch.float32, name
            assert torch.equal(tensor, before[name])
            kept.add(leaf)
        else:
            assert tensor.dtype in (torch.bfloat16, torch.float16), name
    assert kept == set(FP32_NAMES)


def test_the_fp32_list_is_fp32_under_another_default_dtype() -> None:
    before = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        model = HybridLM(CONFIG)
    finally:
        torch.set_default_dtype(before)
    for name, tensor in tensors(model).items():
        kept = name.split(".")[-1] in FP32_NAMES
        assert tensor.dtype == (torch.float32 if kept else torch.bfloat16), name


def test_gradients_have_their_parameters_dtype_after_a_cast() -> None:
    model = loud_model(tiny_config("ME"))
    model(random_ids(model.config, 1, 5)).logits.sum().backward()
    model.bfloat16()
    for name, p in model.named_parameters():
        assert p.grad.dtype == p.dtype, name


@pytest.mark.parametrize("name", ["A_log", "dt_bias"])
@torch.no_grad()
def test_a_small_update_shows_in_the_output_of_a_bf16_model(name: str) -> None:
    """An update of 1e-5, as late in training, is far below a bf16 ulp of these parameters."""
    model = loud_model(tiny_config("M")).bfloat16()
    ids_BS = random_ids(model.config, 4, 64)
    parameter = getattr(model.backbone.layers[0].mixer, name)
    assert parameter.dtype == torch.float32
    before = model.forward_hidden(ids_BS)[0]
    rounded = parameter.bfloat16()
    parameter.add_(1e-5)
    assert torch.equal((rounded + 1e-5), rounded)  # a bf16 copy would have lost it
    assert not torch.equal(model.forward_hidden(ids_BS)[0], before)
    parameter.copy_(rounded)
    once = model.forward_hidden(ids_BS)[0]
    parameter.copy_(rounded + 1e-5)
    assert torch.equal(model.forward_hidden(ids_BS)[0], once)


COUNTED = {
    "all kinds": tiny_config("ME*-ME", mtp_num_depths=2),
    "no MTP": tiny_config("ME*-"),
    "no latent": tiny_config("ME", moe_latent_size=None, mtp_num_depths=1),
    "no shared expert": tiny_config("E*", moe_shared_expert_intermediate_size=0, mtp_num_depths=1),
    "one group": tiny_config("MM-", n_groups=1, conv_kernel=3),
    "long MTP block": tiny_config("M", mtp_pattern="*E*E", mtp_num_depths=3),
    "defaults": HybridConfig(),
    "super": HybridConfig(
        pattern="MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*"
        "EMEMEMEME",
        vocab_size=131072, hidden_size=4096, num_attention_heads=32, num_key_value_heads=2,
        head_dim=128, mamba_num_heads=128, mamba_head_dim=64, ssm_state_size=128, n_groups=8,
        chunk_size=128, n_routed_experts=512, num_experts_per_tok=22, moe_intermediate_size=2688,
        moe_latent_size=1024, moe_shared_expert_intermediate_size=5376, mtp_num_depths=2,
    ),
}  # fmt: skip


def on_meta(config: HybridConfig) -> HybridLM:
    with torch.device("meta"):
        return HybridLM(config)


@pytest.mark.parametrize("case", COUNTED)
def test_parameter_counts_on_the_meta_device(case: str) -> None:
    model = on_meta(COUNTED[case])
    assert all(t.is_meta for t in tensors(model).values())
    counts = parameter_counts(COUNTED[case])
    sizes = {name: p.numel() for name, p in model.named_parameters()}
    assert counts.total == sum(sizes.values())
    assert counts.mtp == sum(n for name, n in sizes.items() if name.startswith("mtp."))
    cfg = COUNTED[case]
    unused = sum(
        n // cfg.n_routed_experts * (cfg.n_routed_experts - cfg.num_experts_per_tok)
        for name, n in sizes.items()
        if ".experts." in name and not name.startswith("mtp.")
    )
    assert counts.active == counts.backbone - unused


def test_super_has_its_published_size() -> None:
    """NVIDIA Nemotron 3 Super: 120.7 B without the MTP block, 12.8 B active."""
    model = on_meta(COUNTED["super"])
    total = sum(p.numel() for p in model.parameters())
    assert total == 123_611_012_096
    assert total - sum(p.numel() for p in model.mtp.parameters()) == 120_668_687_360


def test_a_model_from_the_meta_device_can_be_filled_and_run() -> None:
    model = on_meta(CONFIG).to(torch.bfloat16).to_empty(device="cpu")
    source = HybridLM(CONFIG).bfloat16()
    filled = tensors(model)
    assert {n: t.dtype for n, t in filled.items()} == {
        n: t.dtype for n, t in tensors(source).items()
    }
    with torch.no_grad():
        for name, tensor in tensors(source).items():
            filled[name].copy_(tensor)
    ids_BS = random_ids(CONFIG, 1, 9)
    assert torch.equal(model(ids_BS).logits, source(ids_BS).logits)
