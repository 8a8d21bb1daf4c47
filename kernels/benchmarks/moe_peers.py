"""Ways to compute a MoE layer: the paths of nemo_kernels, and libraries where they are there.

A builder takes a problem and returns a function without arguments that runs the layer forward. It
raises one of ``measuring.UNUSABLE`` where the way is not open; the benchmark reports the reason.
None of these libraries is needed, and none is part of this project.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from moe_problem import Problem
from torch import Tensor

from nemo_kernels import backend, moe

Layer = Callable[[], Tensor]


def on_path(name: str, call: Callable[[], Any]) -> Callable[[], Any]:
    """The call with op moe on a path of nemo_kernels. Raises ValueError if there is none such."""
    backend.choose(moe=name)

    def chosen() -> Any:
        backend.choose(moe=name)
        return call()

    return chosen


def nemo_kernels_layer(name: str, p: Problem) -> Layer:
    return on_path(name, lambda: moe.moe_mlp(p.x_TL, p.ids_TK, p.weights_TK, p.up_EFL, p.down_ELF))


def transformers_config(p: Problem) -> Any:
    from transformers import NemotronHConfig

    return NemotronHConfig(
        hidden_size=p.shape.width,
        n_routed_experts=p.shape.experts,
        num_experts_per_tok=p.shape.k,
        moe_intermediate_size=p.shape.inner,
        moe_latent_size=None,
        routed_scaling_factor=p.scaling,
        hybrid_override_pattern="E",
    )


def transformers_layer(implementation: str, p: Problem) -> Layer:
    from transformers.models.nemotron_h.modeling_nemotron_h import NemotronHExperts

    config = transformers_config(p)
    config._experts_implementation = implementation
    with torch.device("meta"):
        experts = NemotronHExperts(config)
    experts.up_proj, experts.down_proj = p.up_EFL, p.down_ELF
    return lambda: experts(p.x_TL, p.ids_TK, p.weights_TK)


def scattermoe_layer(p: Problem) -> Layer:
    """As its MLP module does it; its kernels multiply by the routing weights after the second
    product, and those need x's dtype."""
    from scattermoe import flatten_sort_count, parallel_linear

    def layer() -> Tensor:
        slots = flatten_sort_count(p.ids_TK, p.shape.experts)
        up, down = p.up_EFL.permute(0, 2, 1), p.down_ELF.permute(0, 2, 1)
        h_RF = parallel_linear(p.x_TL, up, p.shape.k, *slots, grouped_out=True)
        gates_TK = p.weights_TK.to(p.x_TL.dtype)
        return parallel_linear(
            h_RF.relu().square(), down, 1, *slots, gates=gates_TK, grouped_in=True
        )

    return layer


LAYERS: dict[str, Callable[[Problem], Layer]] = {
    "grouped_mm": lambda p: nemo_kernels_layer("grouped_mm", p),
    "transformers grouped_mm": lambda p: transformers_layer("grouped_mm", p),
    "scattermoe": scattermoe_layer,
}
"""Peers. "grouped_mm" is this project's own chain of sort, gather, F.grouped_mm and combine."""
