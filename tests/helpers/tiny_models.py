"""Tiny models whose every path matters.

Freshly initialised tiny models hide errors: their mixers add so little to the residual stream that
a broken one changes the logits by less than a comparison's tolerance. ``loud`` gives every layer
an output as large as its input, and the scan a memory that outlives its chunks.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import chain

import torch
from torch import Tensor

from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.hub import HybridLM
from nemo_hybrid.model.recompute import recompute_layers

CONV, CHUNK = 4, 8


def tiny_config(pattern: str, **changes: object) -> HybridConfig:
    """A model of a few thousand parameters; no multi-token prediction unless asked for."""
    values: dict[str, object] = dict(
        vocab_size=61,
        hidden_size=32,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        mamba_num_heads=4,
        mamba_head_dim=12,
        ssm_state_size=16,
        n_groups=2,
        conv_kernel=CONV,
        chunk_size=CHUNK,
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=24,
        moe_latent_size=16,
        moe_shared_expert_intermediate_size=40,
        intermediate_size=48,
        mtp_num_depths=0,
    )
    return HybridConfig(pattern=pattern, **(values | changes))  # type: ignore[arg-type]


def loud_model(
    config: HybridConfig, seed: int = 0, recompute: str = "", tile: int = 0, offload: bool = False
) -> HybridLM:
    model = HybridLM(config)
    recompute_layers(model, recompute, tile, offload)
    return loud(model, seed)


@torch.no_grad()
def loud(model: HybridLM, seed: int = 0) -> HybridLM:
    """Fill all parameters and router biases anew, so that no path is quiet."""
    generator = torch.Generator().manual_seed(seed)

    def normal(tensor: Tensor, sigma: float, mean: float = 0.0) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * sigma + mean)

    for name, tensor in chain(model.named_parameters(), model.named_buffers()):
        leaf, owner = name.split(".")[-1], name.split(".")[-2]
        if leaf == "A_log":
            normal(tensor, 0.7, -1.0)  # decay rates around 0.4
        elif leaf == "dt_bias":
            normal(tensor, 0.5, -1.5)  # time steps around 0.2
        elif leaf == "D":
            normal(tensor, 0.3, 0.5)
        elif leaf == "e_score_correction_bias":
            normal(tensor, 0.2)
        elif owner == "embeddings":
            normal(tensor, 1.0)
        elif owner == "gate":
            normal(tensor, 1.5 / math.sqrt(tensor.shape[1]))
        elif owner == "conv1d":
            normal(tensor, 0.6)
        elif tensor.dim() == 1:
            normal(tensor, 0.2, 1.0)  # norms
        else:
            normal(tensor, 1.0 / math.sqrt(tensor.shape[-1]))
    return model


def random_ids(config: HybridConfig, rows: int, length: int, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(1, config.vocab_size, (rows, length), generator=generator)


def document_numbers(*lengths: int) -> Tensor:
    """seq_idx [1, S] of one row that holds documents of these lengths."""
    numbers = torch.arange(len(lengths), dtype=torch.int32)
    return numbers.repeat_interleave(torch.tensor(lengths))[None]


def packed_batch(config: HybridConfig, rows: list[list[int]], seed: int = 0) -> Batch:
    """Rows of documents of these lengths. Each row's lengths sum to S + 1, the window."""
    width = sum(rows[0])
    starts_BW = torch.zeros(len(rows), width, dtype=torch.bool)
    for row, lengths in enumerate(rows):
        assert sum(lengths) == width
        starts_BW[row, torch.tensor([0, *lengths[:-1]]).cumsum(0)] = True
    return Batch.from_windows(random_ids(config, len(rows), width, seed), starts_BW)


def smallest_routing_margin(
    model: HybridLM, ids_BS: Tensor, run: Callable[[], object] | None = None
) -> float:
    """How close any token of any MoE layer comes to another choice of experts: the smallest
    difference between the last chosen and the first rejected expert's score with bias. Infinite
    when there is no choice. ``run`` is the pass to look at, by default logits of the tokens."""
    margins = [math.inf]

    def observe(gate: torch.nn.Module, _args: object, output: tuple[Tensor, ...]) -> None:
        choice_TE = output[2] + gate.e_score_correction_bias
        ordered_TE = choice_TE.sort(dim=-1, descending=True).values
        k = model.config.num_experts_per_tok
        if k < model.config.n_routed_experts:
            margins.append(float((ordered_TE[:, k - 1] - ordered_TE[:, k]).min()))

    gates = [m for name, m in model.named_modules() if name.endswith(".gate")]
    handles = [gate.register_forward_hook(observe) for gate in gates]
    with torch.no_grad():
        run() if run else model(ids_BS)
    for handle in handles:
        handle.remove()
    return min(margins)


def decided_model(
    config: HybridConfig, ids_BS: Tensor, margin: float, first_seed: int = 0
) -> HybridLM:
    """The first loud model whose choices of experts on these tokens are not close: rounding must
    not decide between experts where two implementations are compared."""
    for seed in range(first_seed, first_seed + 100):
        model = loud_model(config, seed)
        if smallest_routing_margin(model, ids_BS) > margin:
            return model
    raise AssertionError(f"every model comes closer than {margin} to another choice of experts")
