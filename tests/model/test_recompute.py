"""Recomputing activations changes memory and time, and nothing else."""

from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from helpers.bands import band, jittered
from helpers.tiny_models import loud_model, packed_batch, tiny_config
from nemo_hybrid.commands.step_time import paths_of
from nemo_hybrid.config.run import TrainOptions
from nemo_hybrid.meter import Meter
from nemo_hybrid.model import recompute
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.layer import Layer
from nemo_hybrid.model.recompute import Host, recompute_layers, tiles
from nemo_hybrid.objectives.base import LossParts, Normalizer
from nemo_hybrid.objectives.next_token import NextToken, count_targets
from nemo_kernels import backend
from nemo_kernels.documents import Documents, Shard

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


@pytest.mark.parametrize("tile", [1, 7, 16, 40, 1000])
def test_tiles_change_nothing_but_rounding(tile: int) -> None:
    """Of 2 x 20 tokens; 1000: one piece. Statistics of routing are sums."""
    config = tiny_config(PATTERN, mtp_num_depths=2)
    expected, expected_gradients, _ = step(loud_model(config))
    _rough, rough_gradients, _ = jittered(lambda: step(loud_model(config)))
    parts, gradients, calls = step(loud_model(config, tile=tile))
    pieces = min(20, -(-40 // tile))
    assert calls["E"] == [2 * pieces, 2 * pieces, 4 * pieces]
    assert calls["-"] == [2 * pieces]
    assert calls["M"] == [1, 1]
    assert furthest(parts.loss.detach(), expected.loss.detach()) <= band(torch.float32, 40)
    for name, gradient in expected_gradients.items():
        bound = max(2 * furthest(rough_gradients[name], gradient), band(torch.float32, 40))
        assert furthest(gradients[name], gradient) <= bound, name
    for name, counts_E in expected.loads.items():
        assert torch.equal(parts.loads[name], counts_E)


def test_tiles_that_no_gradient_leaves_for_the_router() -> None:
    """Experts alone are trained, in a first layer: the loss of balance has no part in that."""

    def gradient(tile: int) -> Tensor:
        model = loud_model(tiny_config("E"), tile=tile)
        for name, parameter in model.named_parameters():
            parameter.requires_grad_(".experts." in name)
        return step(model)[1]["backbone.layers.0.mixer.experts.up_proj"]

    torch.testing.assert_close(gradient(4), gradient(0))


def furthest(a: Tensor, b: Tensor) -> float:
    return float((a - b).norm() / b.norm()) if b.norm() else float(a.norm())


def test_gradients_of_pieces_are_summed_in_fp32() -> None:
    """And rounded once: in bf16 nearly every number is that without tiles. Weights in bf16 would
    round the share of every piece."""
    config = tiny_config("-")

    def gradient(tile: int) -> Tensor:
        gradients = step(loud_model(config, tile=tile).bfloat16())[1]
        return gradients["backbone.layers.0.mixer.down_proj.weight"]

    whole = gradient(0)
    assert (gradient(4) == whole).float().mean() > 0.99
    with patch.object(recompute, "widened", lambda weight: weight):
        rounded = gradient(4)
    assert (rounded == whole).float().mean() < 0.8


@pytest.mark.parametrize(("letters", "tile"), [("E-", 0), ("", 8)])
def test_copies_in_fp32_are_of_one_layer_and_of_its_backward_pass(letters: str, tile: int) -> None:
    """Counted on tensors without data: what is left by the forward pass are inputs and the last
    output, and what the whole step takes at most does not grow with the copies of more layers."""
    kept, most = {}, {}
    for layers in (2, 6):
        config = tiny_config("E-" * (layers // 2), moe_intermediate_size=96, intermediate_size=384)
        with torch.device("meta"):
            model = HybridLM(config).bfloat16()
        recompute_layers(model, letters, tile)
        for parameter in model.parameters():
            parameter.register_post_accumulate_grad_hook(lambda p: setattr(p, "grad", None))
        ids_BS = torch.zeros(2, 20, dtype=torch.int64, device="meta")
        with Meter() as meter, backend.choosing(**paths_of("gpu")):
            h_BSD, _ = model.forward_hidden(ids_BS)
            kept[layers] = meter.live
            h_BSD.sum().backward()
        most[layers] = meter.peak
        copies = 4 * sum(p.numel() for p in model.backbone.layers.parameters())
    more = 4 * 40 * config.hidden_size * 2  # inputs of four layers
    assert kept[6] - kept[2] == pytest.approx(more, rel=0.5)
    assert most[6] - most[2] < 2 * more < copies / 10


@pytest.mark.parametrize("part", [0, 1])
def test_all_parts_have_equally_many_pieces(part: int) -> None:
    """Else experts of other processes would wait for ever. Parts of 251 and 250 tokens, tiles of
    250: by its own size the second would take one piece."""
    documents = Documents.from_starts(torch.zeros(1, 501, dtype=torch.bool))
    shard = Shard.cut(documents, [251, 250], part, 3)
    found = tiles(1, [251, 250][part], shard, 250)
    assert found == [[126, 125], [125, 125]][part]


@pytest.mark.parametrize(("recompute", "tile"), [("ME*-", 0), ("M", 7)])
def test_inputs_that_wait_elsewhere_are_the_same(recompute: str, tile: int) -> None:
    """Bit for bit; and autograd is left none of them."""
    config = tiny_config(PATTERN, mtp_num_depths=2)
    taken: list[int] = []
    keep = Host.keep

    def watched(self: Host, x: Tensor) -> object:
        taken.append(x.nbytes)
        return keep(self, x)

    expected, expected_gradients, _ = step(loud_model(config, recompute=recompute, tile=tile))
    with patch.object(Host, "keep", watched):
        parts, gradients, _ = step(loud_model(config, recompute=recompute, tile=tile, offload=True))
    assert torch.equal(parts.loss, expected.loss)
    for name, gradient in expected_gradients.items():
        assert torch.equal(gradients[name], gradient), name
    layers = PATTERN + 2 * config.mtp_pattern
    recomputed = sum(c in recompute or (tile > 0 and c in "E-") for c in layers)
    assert sum(taken) == recomputed * 2 * 20 * config.hidden_size * 4


def test_nothing_is_recomputed_without_gradients() -> None:
    model = loud_model(tiny_config("M"), recompute="M")
    ids_BS = torch.ones(1, 5, dtype=torch.int64)
    calls = []
    model.backbone.layers[0].mixer.register_forward_pre_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(ids_BS)
    assert len(calls) == 1
