"""Recomputing activations changes memory and time, and nothing else."""

import pytest
import torch
from torch import Tensor

from helpers.tiny_models import loud_model, packed_batch, tiny_config
from nemo_hybrid.config.run import TrainOptions
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.layer import Layer
from nemo_hybrid.objectives.base import LossParts, Normalizer
from nemo_hybrid.objectives.next_token import NextToken, count_targets

PATTERN = "ME*-ME"


def step(model: HybridLM) -> tuple[LossParts, dict[str, Tensor], dict[str, list[int]]]:
    """One forward and backward pass: losses, gradients, and how often each layer ran, by letter."""
    calls: dict[str, list[int]] = {}
    for layer in model.modules():
        if isinstance(layer, Layer):
            calls.setdefault(layer.letter, []).append(0)
            count, i = calls[layer.letter], len(calls[layer.letter]) - 1

            def counter(*_: object, count: list[int] = count, i: int = i) -> None:
                count[i] += 1

            layer.mixer.register_forward_pre_hook(counter)
    batch = packed_batch(model.config, [[7, 12, 2], [21]])
    depths = model.config.mtp_num_depths
    objective = NextToken(model, TrainOptions(aux_loss_weight=0.05))
    parts = objective(batch, Normalizer(count_targets(batch, depths), 2))
    parts.loss.backward()
    return parts, {n: p.grad for n, p in model.named_parameters()}, calls


@pytest.mark.parametrize("letters", ["M", "E", "*", "ME*", "ME*-", "e", "Me"])
def test_recomputation_is_exact_and_counts_once(letters: str) -> None:
    config = tiny_config(PATTERN, mtp_num_depths=2)
    expected, expected_gradients, once = step(loud_model(config))
    parts, gradients, calls = step(loud_model(config, recompute=letters))
    # The MTP block's layers come last; they run once per depth.
    assert once == {"M": [1, 1], "E": [1, 1, 2], "*": [1, 2], "-": [1]}
    for letter, counts in once.items():
        times = 2 if letter in letters else 1
        assert calls[letter] == [times * n for n in counts]
    assert torch.equal(parts.loss, expected.loss)
    for name, gradient in expected_gradients.items():
        assert torch.equal(gradients[name], gradient), name
    assert parts.loads.keys() == expected.loads.keys()
    for name, counts_E in expected.loads.items():
        assert torch.equal(parts.loads[name], counts_E)
    tokens = 2 * 20  # windows of 21 tokens
    assert int(parts.loads["backbone.layers.1"].sum()) == tokens * config.num_experts_per_tok


def test_the_experts_inner_activations_are_recomputed_alone() -> None:
    """What autograd keeps of a layer is less by these, [T * K, F], and by nothing else."""
    config = tiny_config("E")
    kept = []
    for letters in ("", "e"):
        model = loud_model(config, recompute=letters)
        sizes: list[int] = []

        def pack(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            model(torch.ones(2, 5, dtype=torch.int64))
        kept.append(sum(sizes))
    slots = 10 * config.num_experts_per_tok
    assert kept[0] - kept[1] == 4 * slots * config.moe_intermediate_size


def test_nothing_is_recomputed_without_gradients() -> None:
    model = loud_model(tiny_config("M"), recompute="M")
    ids_BS = torch.ones(1, 5, dtype=torch.int64)
    calls = []
    model.backbone.layers[0].mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(ids_BS)
    assert len(calls) == 1
