"""Parameters and floating-point operations of a model, from its shape alone.

Parameters are counted on a model without storage. One multiply-add counts as two operations.
"""

from __future__ import annotations

import functools
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

import torch

from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.latent_moe import LocalDispatcher
from nemo_hybrid.model.layer import Layer
from nemo_hybrid.model.sequence import WholeSequences

MFU_FORMULA = (
    "MFU = tokens/s x train_flops_per_token / (processes x peak of one device). FLOPs per token: "
    "6 x active matmul parameters (head and every MTP pass included, embedding lookup and "
    "recomputation not) + 3 x forward attention scores (causal half) + 3 x forward Mamba-2 scan "
    "(chunked form). Peak: published dense bf16 rate on CUDA, a measured matmul on CPU."
)

# Published dense (no sparsity) bf16 rates in FLOP/s: NVIDIA's data sheets. The first entry whose
# words all stand in the device's name counts, so the narrower names come first.
_CUDA_BF16_PEAKS = {
    "GB300": 2500e12,
    "GB200": 2500e12,
    "B300": 2250e12,
    "B200": 2250e12,
    "GH200": 989e12,
    "H200 NVL": 835e12,
    "H200": 989e12,
    "H100 NVL": 835e12,
    "H100 PCIE": 756e12,
    "H100": 989e12,
    "H800 PCIE": 756e12,
    "H800": 989e12,
    "H20": 148e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
}


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


def without_storage(cfg: ModelConfig, ep: int = 1, dtype: torch.dtype = torch.float32) -> HybridLM:
    """The model of one of ``ep`` processes on the meta device, to look at: callers share it."""
    return _built(tuple(getattr(cfg, f.name) for f in fields(ModelConfig)), ep, dtype)


@functools.lru_cache(maxsize=16)
def _built(shape: tuple[Any, ...], ep: int, dtype: torch.dtype) -> HybridLM:
    cfg = HybridConfig(*shape)
    with torch.device("meta"):
        model = HybridLM(cfg, dispatcher=LocalDispatcher(cfg.n_routed_experts // ep))
    return model.to(dtype)


def layer_parameters(cfg: ModelConfig, letter: str, ep: int = 1) -> dict[str, torch.Tensor]:
    """One layer's parameters by name, without storage, as one of ``ep`` processes holds them."""
    with torch.device("meta"):
        dispatcher = LocalDispatcher(cfg.n_routed_experts // ep)
        layer = Layer(letter, cfg, dispatcher, WholeSequences())
    return dict(layer.named_parameters())


def parameter_counts(cfg: ModelConfig) -> ParameterCounts:
    """Count a model's parameters: matrices without biases, the convolution with one.

    Agrees with the released Nemotron 3 checkpoints to the last parameter.
    """
    parameters = dict(without_storage(cfg).named_parameters())
    backbone = {name: p for name, p in parameters.items() if not name.startswith("mtp.")}
    total = sum(p.numel() for p in parameters.values())
    outside_mtp = sum(p.numel() for p in backbone.values())
    return ParameterCounts(total, outside_mtp, total - outside_mtp, _active(cfg, backbone))


def _active(cfg: ModelConfig, parameters: Mapping[str, torch.Tensor]) -> int:
    """How many of these parameters one token meets: k of E routed experts, all others."""
    k, n = cfg.num_experts_per_tok, cfg.n_routed_experts
    return sum(
        p.numel() * k // n if ".experts." in name else p.numel() for name, p in parameters.items()
    )


def train_flops_per_token(cfg: ModelConfig, sequence_length: int) -> float:
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
    outside = head + depths * (head + 2 * cfg.hidden_size**2)  # MTP: eh_proj, and the head again
    layers = Counter(cfg.pattern + depths * cfg.mtp_pattern)
    inside = sum(n * _layer_flops(cfg, letter, sequence_length) for letter, n in layers.items())
    return 3 * (2 * outside + inside)


def _layer_flops(cfg: ModelConfig, letter: str, sequence_length: int) -> float:
    parameters = layer_parameters(cfg, letter)
    matrices = {n: p for n, p in parameters.items() if p.dim() > 1 and ".conv1d." not in n}
    flops = 2.0 * _active(cfg, matrices)
    if letter == "*":
        flops += 2 * sequence_length * cfg.num_attention_heads * cfg.head_dim
    elif letter == "M":
        chunk = min(cfg.chunk_size, sequence_length)
        flops += chunk * (cfg.n_groups * cfg.ssm_state_size + cfg.mamba_inner_size)
        flops += 4 * cfg.mamba_inner_size * cfg.ssm_state_size
    return flops


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
    fitting = (rate for name, rate in _CUDA_BF16_PEAKS.items() if set(name.split()) <= set(words))
    return next(fitting, None)


@functools.cache
def _measured_cpu_peak(dtype: torch.dtype) -> float:
    size, limit_s = 768, 0.2
    a = torch.ones(size, size, dtype=dtype)
    b = torch.ones(size, size, dtype=dtype)
    a @ b  # the first product also pays for set-up
    best, start = float("inf"), time.perf_counter()
    while (before := time.perf_counter()) - start < limit_s or best == float("inf"):
        a @ b
        best = min(best, time.perf_counter() - before)
    return 2 * size**3 / best
