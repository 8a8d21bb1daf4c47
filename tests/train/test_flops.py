"""Closed formulas for parameters and FLOPs against the released models and against counting."""

import dataclasses

import pytest
import torch

from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.train import flops
from nemo_hybrid.train.flops import parameter_counts, peak_flops, train_flops_per_token

COMMON = dict(
    vocab_size=131072,
    num_key_value_heads=2,
    head_dim=128,
    mamba_head_dim=64,
    ssm_state_size=128,
    n_groups=8,
    conv_kernel=4,
    chunk_size=128,
)
NANO = HybridConfig(
    pattern="MEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEM*EMEMEMEM*EMEMEMEME",
    hidden_size=2688,
    num_attention_heads=32,
    mamba_num_heads=64,
    n_routed_experts=128,
    num_experts_per_tok=6,
    moe_intermediate_size=1856,
    moe_latent_size=None,
    moe_shared_expert_intermediate_size=3712,
    mtp_num_depths=0,
    **COMMON,
)
SUPER = HybridConfig(
    pattern="MEMEMEM*EMEMEMEM*EMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEMEM*EMEMEMEM*"
    "EMEMEMEME",
    hidden_size=4096,
    num_attention_heads=32,
    mamba_num_heads=128,
    n_routed_experts=512,
    num_experts_per_tok=22,
    moe_intermediate_size=2688,
    moe_latent_size=1024,
    moe_shared_expert_intermediate_size=5376,
    mtp_num_depths=2,
    **COMMON,
)
ULTRA = HybridConfig(
    pattern="MEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*EMEMEM*EMEMEMEM*EMEMEMEM*"
    "EMEMEM*EMEMEMEM*EMEMEMEME",
    hidden_size=8192,
    num_attention_heads=64,
    mamba_num_heads=256,
    n_routed_experts=512,
    num_experts_per_tok=22,
    moe_intermediate_size=5120,
    moe_latent_size=2048,
    moe_shared_expert_intermediate_size=10240,
    mtp_num_depths=2,
    **COMMON,
)


@pytest.mark.parametrize(
    ("cfg", "backbone", "mtp", "active"),
    [
        (NANO, 31_577_937_344, 0, 3_580_073_408),
        (SUPER, 120_668_687_360, 2_942_324_736, 12_770_216_960),
        (ULTRA, 549_308_968_960, 11_215_609_856, 56_058_818_560),
    ],
    ids=["nano", "super", "ultra"],
)
def test_counts_of_the_released_models(cfg, backbone, mtp, active):
    counts = parameter_counts(cfg)
    assert counts.backbone == backbone
    assert counts.mtp == mtp
    assert counts.total == backbone + mtp
    assert counts.active == active


def test_totals_with_mtp():
    assert parameter_counts(SUPER).total == 123_611_012_096
    assert parameter_counts(ULTRA).total == 560_524_578_816
    lightning = dataclasses.replace(NANO, mtp_num_depths=2)
    assert parameter_counts(lightning).total == 32_913_263_168


def test_mtp_depths_share_one_block():
    one = dataclasses.replace(SUPER, mtp_num_depths=1)
    assert parameter_counts(one) == parameter_counts(SUPER)


@pytest.mark.parametrize("latent", [None, 64])
def test_counts_equal_those_of_a_built_model(latent):
    from nemo_hybrid import HybridLM

    cfg = HybridConfig(pattern="MEM*E-", vocab_size=64, moe_latent_size=latent)
    model = HybridLM(cfg)
    counts = parameter_counts(cfg)
    assert counts.total == sum(p.numel() for p in model.parameters())
    mtp = sum(p.numel() for name, p in model.named_parameters() if name.startswith("mtp."))
    assert counts.mtp == mtp


def forward_flops_by_walking(cfg: HybridConfig, length: int) -> float:
    """Forward FLOPs of one whole sequence, product by product: rows x inner x columns."""

    def product(rows: int, inner: int, columns: int) -> float:
        return 2.0 * rows * inner * columns

    d, s, total = cfg.hidden_size, length, 0.0

    def layer(letter: str) -> float:
        if letter == "*":
            q, kv = cfg.num_attention_heads * cfg.head_dim, cfg.num_key_value_heads * cfg.head_dim
            projections = product(s, d, q) + 2 * product(s, d, kv) + product(s, q, d)
            scores = cfg.num_attention_heads * product(s, cfg.head_dim, s)
            return projections + 0.5 * (scores + scores)
        if letter == "E":
            latent, f = cfg.moe_latent_size or d, cfg.moe_intermediate_size
            out = product(s, d, cfg.n_routed_experts)
            out += 2 * product(s, d, cfg.moe_shared_expert_intermediate_size)
            out += 2 * product(s * cfg.num_experts_per_tok, latent, f)
            if cfg.moe_latent_size:
                out += 2 * product(s, d, latent)
            return out
        if letter == "-":
            return 2 * product(s, d, cfg.intermediate_size)
        inner = cfg.mamba_num_heads * cfg.mamba_head_dim
        n, g = cfg.ssm_state_size, cfg.n_groups
        width = 2 * inner + 2 * g * n + cfg.mamba_num_heads
        out = product(s, d, width) + product(s, inner, d)
        q = cfg.chunk_size
        for _ in range(length // q):
            out += 0.5 * g * product(q, n, q)
            out += 0.5 * cfg.mamba_num_heads * product(q, q, cfg.mamba_head_dim)
            out += cfg.mamba_num_heads * product(cfg.mamba_head_dim, q, n)  # chunk state
            out += cfg.mamba_num_heads * product(q, n, cfg.mamba_head_dim)  # state to output
        return out

    total = sum(layer(letter) for letter in cfg.pattern) + product(s, d, cfg.vocab_size)
    for _ in range(cfg.mtp_num_depths):
        total += product(s, 2 * d, d) + sum(layer(letter) for letter in cfg.mtp_pattern)
        total += product(s, d, cfg.vocab_size)
    return total


@pytest.mark.parametrize("depths", [0, 2])
@pytest.mark.parametrize("latent", [None, 64])
def test_flops_equal_a_walk_through_the_products(depths, latent):
    cfg = HybridConfig(pattern="MEM*E-", mtp_num_depths=depths, moe_latent_size=latent)
    walked = 3 * forward_flops_by_walking(cfg, 256) / 256
    assert train_flops_per_token(cfg, 256) == pytest.approx(walked, rel=1e-12)


def test_flops_of_super_are_about_six_per_active_parameter():
    no_mtp = dataclasses.replace(SUPER, mtp_num_depths=0)
    counts = parameter_counts(no_mtp)
    expected = 6 * (counts.active - no_mtp.vocab_size * no_mtp.hidden_size)
    assert train_flops_per_token(no_mtp, 8192) == pytest.approx(expected, rel=0.1)
    assert train_flops_per_token(no_mtp, 8192) > expected


def test_peak_of_the_cpu_is_plausible_and_measured_once():
    peak = peak_flops("cpu", torch.float32)
    assert peak is not None
    assert 1e8 < peak < 1e14
    assert peak_flops("cpu", torch.float32) == peak
    assert flops.peak_source("cpu") == "measured matmul"


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA H100 80GB HBM3", 989e12),
        ("NVIDIA H100 PCIe", 756e12),
        ("NVIDIA H200", 989e12),
        ("NVIDIA GH200 480GB", 989e12),
        ("NVIDIA B200", 2250e12),
        ("NVIDIA GB200", 2500e12),
        ("NVIDIA A100-SXM4-80GB", 312e12),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", None),
        ("NVIDIA GeForce GTX 1080", None),
    ],
)
def test_published_peaks(monkeypatch, name, peak):
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: name)
    assert peak_flops("cuda", torch.bfloat16) == peak
    assert peak_flops("cuda", torch.float32) is None


def test_utilization():
    assert flops.utilization(1000.0, 5e6, 1e10, 2) == pytest.approx(0.25)
    assert flops.utilization(1000.0, 5e6, None, 2) is None
