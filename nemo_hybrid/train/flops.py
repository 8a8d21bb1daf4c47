"""Parameters and floating-point operations of a model, from its shape alone.

Everything here is closed-form: no model is built. One multiply-add counts as two operations.
"""

from __future__ import annotations

import functools
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nemo_hybrid.config import Architecture

if TYPE_CHECKING:
    import torch

MFU_FORMULA = (
    "MFU = tokens/s x train_flops_per_token / (processes x peak of one device). FLOPs per token: "
    "6 x active matmul parameters (head and every MTP pass included, embedding lookup and "
    "recomputation not) + 3 x forward attention scores (causal half) + 3 x forward Mamba-2 scan "
    "(chunked form). Peak: published dense bf16 rate on CUDA, a measured matmul on CPU."
)

# Published dense (no sparsity) bf16 rates in FLOP/s: NVIDIA's data sheets. The first entry whose
# words all stand in the device's name counts, so the narrower names come first.
_CUDA_BF16_PEAKS: tuple[tuple[tuple[str, ...], float], ...] = (
    (("GB300",), 2500e12),
    (("GB200",), 2500e12),
    (("B300",), 2250e12),
    (("B200",), 2250e12),
    (("GH200",), 989e12),
    (("H200", "NVL"), 835e12),
    (("H200",), 989e12),
    (("H100", "NVL"), 835e12),
    (("H100", "PCIe"), 756e12),
    (("H100",), 989e12),
    (("H800", "PCIe"), 756e12),
    (("H800",), 989e12),
    (("H20",), 148e12),
    (("A100",), 312e12),
    (("A800",), 312e12),
    (("L40S",), 362e12),
)


@dataclass(frozen=True)
class ParameterCounts:
    """Trainable parameters (the router's bias is a buffer and is not among them)."""

    total: int
    """Everything: backbone and MTP block."""
    backbone: int
    """Without the MTP block; embedding and head included."""
    mtp: int
    """The one physical MTP block; 0 without one. Its embedding and head are the backbone's."""
    active: int
    """Backbone parameters that one token meets: k of E routed experts, embedding and head in."""
    embedding: int
    """The embedding matrix."""
    head: int
    """The output matrix, which is not tied to the embedding."""


@dataclass(frozen=True)
class _Layer:
    """One mixer with its input norm: parameters by what a token does with them."""

    matmul: int  # matrices that every token is multiplied with
    expert: int  # one routed expert's matrices
    other: int  # norms, convolution, per-head vectors


def parameter_counts(cfg: Architecture) -> ParameterCounts:
    """Count a model's parameters: matrices without biases, the convolution with one.

    Agrees with the released Nemotron 3 checkpoints to the last parameter.
    """
    embedding = head = cfg.vocab_size * cfg.hidden_size
    outside = embedding + head + cfg.hidden_size  # and the final norm
    backbone = outside + _stored(cfg, cfg.pattern)
    active = outside + _active_matmul(cfg, cfg.pattern)
    active += sum(_layer(cfg, letter).other for letter in cfg.pattern)
    mtp = 0
    if cfg.mtp_num_depths:
        # eh_proj, and the norms of the embedding, of the hidden state and of the output
        mtp = 2 * cfg.hidden_size**2 + 3 * cfg.hidden_size + _stored(cfg, cfg.mtp_pattern)
    return ParameterCounts(backbone + mtp, backbone, mtp, active, embedding, head)


def train_flops_per_token(cfg: Architecture, sequence_length: int) -> float:
    """Useful FLOPs of forward and backward per training token, at sequences of this length.

    3 x (2 x M + A + C): the backward pass costs twice the forward pass, and per token

    - M, matmul parameters met: all projections, router, shared expert, latent projections, k of
      the E routed experts, head; the MTP block and the head once more per depth. The embedding is
      a lookup and costs nothing.
    - A = 2 x sequence_length x heads x head_dim per attention layer: scores and their product
      with the values, halved because they are causal.
    - C = Q x (groups x N + heads x P) + 4 x heads x P x N per Mamba-2 layer, with chunk length Q,
      state size N, head width P: inside a chunk the products C.B and their product with x
      (halved: causal), then each chunk's state and the state's part of the output.

    Not counted: recomputed activations, convolutions, norms, activation functions, the optimizer.
    Packed documents are counted as if attention saw the whole sequence.
    """
    depths = cfg.mtp_num_depths
    head = cfg.vocab_size * cfg.hidden_size
    matmul = _active_matmul(cfg, cfg.pattern) + head
    layers = cfg.pattern
    if depths:
        mtp_matmul = 2 * cfg.hidden_size**2 + _active_matmul(cfg, cfg.mtp_pattern) + head
        matmul += depths * mtp_matmul
        layers += depths * cfg.mtp_pattern

    attention = 2 * sequence_length * cfg.num_attention_heads * cfg.head_dim
    chunk = min(cfg.chunk_size, sequence_length)
    inside_chunk = chunk * (cfg.n_groups * cfg.ssm_state_size + cfg.mamba_inner_size)
    scan = inside_chunk + 4 * cfg.mamba_inner_size * cfg.ssm_state_size
    forward = 2 * matmul + layers.count("*") * attention + layers.count("M") * scan
    return 3.0 * forward


def utilization(
    tokens_per_s: float, flops_per_token: float, peak: float | None, processes: int
) -> float | None:
    """Model FLOP utilization (MFU, a fraction) by MFU_FORMULA; None where the peak is unknown.

    ``tokens_per_s`` is that of the whole run, ``peak`` the FLOP/s of one process's device.
    """
    if peak is None:
        return None
    return tokens_per_s * flops_per_token / (processes * peak)


def peak_flops(device_type: str, dtype: torch.dtype) -> float | None:
    """Largest matmul rate in FLOP/s of this process's device, or None where it is not known.

    CUDA: the published dense bf16 rate by device name, for bf16 and fp16 only. CPU: a large
    matmul in ``dtype`` measured for 0.2 s with this process's threads, once per process; let all
    processes of a machine measure at the same time, as they will compute at the same time.
    """
    import torch

    if device_type == "cpu":
        return _measured_cpu_peak(dtype)
    if device_type == "cuda" and dtype in (torch.bfloat16, torch.float16):
        return _published_peak(torch.cuda.get_device_name())
    return None


def peak_source(device_type: str) -> str:
    """Where peak_flops takes its figure from, to be shown beside an MFU."""
    return "measured matmul" if device_type == "cpu" else "published dense bf16 rate"


def _published_peak(device_name: str) -> float | None:
    words = device_name.upper().replace("-", " ").split()
    if "MIG" in words:  # a slice of a device
        return None
    for needed, rate in _CUDA_BF16_PEAKS:
        if all(word.upper() in words for word in needed):
            return rate
    return None


@functools.cache
def _measured_cpu_peak(dtype: torch.dtype) -> float:
    import torch

    size, limit_s = 768, 0.2
    a = torch.ones(size, size, dtype=dtype)
    b = torch.ones(size, size, dtype=dtype)
    a @ b  # the first product also pays for set-up
    best, start = float("inf"), time.perf_counter()
    while (before := time.perf_counter()) - start < limit_s or best == float("inf"):
        a @ b
        best = min(best, time.perf_counter() - before)
    return 2 * size**3 / best


def _layer(cfg: Architecture, letter: str) -> _Layer:
    d = cfg.hidden_size
    if letter == "M":
        inner, conv = cfg.mamba_inner_size, cfg.conv_channels
        in_proj = d * (inner + conv + cfg.mamba_num_heads)
        # convolution with bias; A_log, D and dt_bias; gated norm; input norm
        other = conv * (cfg.conv_kernel + 1) + 3 * cfg.mamba_num_heads + inner + d
        return _Layer(in_proj + inner * d, 0, other)
    if letter == "*":
        heads = 2 * cfg.num_attention_heads + 2 * cfg.num_key_value_heads
        return _Layer(d * heads * cfg.head_dim, 0, d)
    if letter == "-":
        return _Layer(2 * d * cfg.intermediate_size, 0, d)
    router = cfg.n_routed_experts * d
    shared = 2 * d * cfg.moe_shared_expert_intermediate_size
    latent = 2 * d * cfg.moe_latent_size if cfg.moe_latent_size else 0
    expert = 2 * cfg.expert_size * cfg.moe_intermediate_size
    return _Layer(router + shared + latent, expert, d)


def _stored(cfg: Architecture, pattern: str) -> int:
    layers = [_layer(cfg, letter) for letter in pattern]
    return sum(x.matmul + cfg.n_routed_experts * x.expert + x.other for x in layers)


def _active_matmul(cfg: Architecture, pattern: str) -> int:
    layers = [_layer(cfg, letter) for letter in pattern]
    return sum(x.matmul + cfg.num_experts_per_tok * x.expert for x in layers)
