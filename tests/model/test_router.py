"""Choice of experts, and the bias that balances them."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from helpers.bands import SABOTAGE, band
from helpers.tiny_models import loud_model, tiny_config
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.model.router import Router
from nemo_hybrid.train.optim import max_violation, update_router_bias


def router(**changes: object) -> Router:
    config: HybridConfig = tiny_config("E", **changes)
    gate = Router(config)
    torch.nn.init.normal_(gate.weight, 0, 0.3, generator=torch.Generator().manual_seed(0))
    return gate


def tokens(n: int = 40) -> Tensor:
    return torch.randn(n, 32, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("normalize", [True, False])
def test_routing_equals_a_loop(normalize: bool) -> None:
    gate = router(norm_topk_prob=normalize, routed_scaling_factor=2.5)
    gate.e_score_correction_bias.copy_(torch.linspace(-0.2, 0.2, 8))
    x_TD = tokens()
    ids_TK, weights_TK, scores_TE = gate(x_TD)
    for t, x_D in enumerate(x_TD):
        scores = [float(torch.sigmoid(row @ x_D)) for row in gate.weight.detach()]
        biased = [s + float(b) for s, b in zip(scores, gate.e_score_correction_bias, strict=True)]
        chosen = sorted(range(8), key=biased.__getitem__)[-3:]
        total = sum(scores[e] for e in chosen) if normalize else 1.0
        expected = {e: 2.5 * scores[e] / total for e in chosen}
        ours = dict(zip(ids_TK[t].tolist(), weights_TK[t].tolist(), strict=True))
        assert ours == pytest.approx(expected, rel=1e-5)
        assert scores_TE[t].tolist() == pytest.approx(scores, rel=1e-5)


def test_bias_moves_the_choice_but_not_the_weights() -> None:
    gate = router()
    x_TD = tokens()
    before_ids, before_weights, before_scores = gate(x_TD)
    with torch.no_grad():
        gate.e_score_correction_bias[5] = 10.0
    ids_TK, weights_TK, scores_TE = gate(x_TD)
    assert (ids_TK == 5).any(1).all()
    assert not (before_ids == 5).any(1).all()
    assert torch.equal(scores_TE, before_scores)
    # The weights are those of the chosen experts' plain scores.
    plain_TK = scores_TE.gather(1, ids_TK)
    expected_TK = 2.5 * plain_TK / plain_TK.sum(1, keepdim=True)
    torch.testing.assert_close(weights_TK, expected_TK)
    # Where the choice stayed the same, so did the weights; the same bias for all changes nothing.
    same = (ids_TK.sort(1).values == before_ids.sort(1).values).all(1)
    assert 0 < int(same.sum()) < len(same)
    dense_TE, before_dense_TE = (
        torch.zeros(len(x_TD), 8).scatter(1, ids, weights)
        for ids, weights in ((ids_TK, weights_TK), (before_ids, before_weights))
    )
    torch.testing.assert_close(dense_TE[same], before_dense_TE[same])
    with torch.no_grad():
        gate.e_score_correction_bias.fill_(0.25)
    assert torch.equal(gate(x_TD)[0].sort(1).values, before_ids.sort(1).values)


def test_small_differences_of_large_biases_count() -> None:
    """Released biases lie near 64 and differ by less than a bf16 ulp there."""
    gate = router()
    with torch.no_grad():
        gate.e_score_correction_bias.copy_(64 + torch.linspace(-0.12, 0.12, 8))
    model = torch.nn.ModuleList([gate]).bfloat16()
    assert model[0].e_score_correction_bias.dtype == torch.float32
    kept = gate(tokens().bfloat16())[0]
    gate.e_score_correction_bias.copy_(gate.e_score_correction_bias.bfloat16().float())
    rounded = gate(tokens().bfloat16())[0]
    assert not torch.equal(kept.sort(1).values, rounded.sort(1).values)


def test_bf16_routing_is_computed_in_fp32() -> None:
    gate = router().bfloat16()
    x_TD = tokens(200).bfloat16()
    _, weights_TK, scores_TE = gate(x_TD)
    assert scores_TE.dtype == weights_TK.dtype == torch.float32
    expected = torch.sigmoid(x_TD.double() @ gate.weight.double().t())
    allowed = band(torch.float32, terms=x_TD.shape[1])
    assert (scores_TE - expected).abs().max() < allowed
    in_bf16 = torch.sigmoid((x_TD @ gate.weight.t()).float())
    assert (in_bf16 - expected).abs().max() > SABOTAGE * allowed


def test_bias_gets_no_gradient_and_is_no_parameter() -> None:
    gate = router()
    assert [name for name, _ in gate.named_parameters()] == ["weight"]
    assert [name for name, _ in gate.named_buffers()] == ["e_score_correction_bias"]
    gate(tokens())[1].square().sum().backward()
    assert gate.weight.grad.abs().max() > 0


@pytest.mark.parametrize(
    ("load", "expected"),
    [
        ([5, 5, 5, 5], 0.0),
        ([20, 0, 0, 0], 3.0),
        ([6, 4, 5, 5], 0.2),
        ([0, 0, 0, 0], 0.0),
        ([1, 2, 3, 10], 1.5),
    ],
)
def test_max_violation(load: list[int], expected: float) -> None:
    assert max_violation(torch.tensor(load)) == pytest.approx(expected)


def test_bias_moves_towards_balance() -> None:
    model = loud_model(tiny_config("ME*E", mtp_num_depths=1))
    biases = {n: b for n, b in model.named_buffers() if n.endswith("e_score_correction_bias")}
    before = {name: bias.clone() for name, bias in biases.items()}
    counts = {
        "backbone.layers.1": torch.tensor([8, 0, 4, 4, 3, 5, 4, 4]),  # mean 4
        "mtp.layers.1": torch.tensor([1, 0, 0, 0, 0, 0, 0, 0]),
    }
    update_router_bias(model, counts, 1e-3)
    signs = {
        "backbone.layers.1": [-1, 1, 0, 0, 1, -1, 0, 0],
        "backbone.layers.3": [0] * 8,  # not counted, not moved
        "mtp.layers.1": [-1, 1, 1, 1, 1, 1, 1, 1],
    }
    for layer, sign in signs.items():
        name = f"{layer}.mixer.gate.e_score_correction_bias"
        moved = biases[name] - before[name]
        torch.testing.assert_close(moved, torch.tensor(sign) * 1e-3, rtol=1e-4, atol=1e-7)
    assert len(signs) == len(biases)


def test_bias_updates_balance_a_starved_expert() -> None:
    """The loop of counting and moving does what it is for."""
    model = loud_model(tiny_config("E"))
    gate = model.backbone.layers[0].mixer.gate
    with torch.no_grad():
        gate.e_score_correction_bias.zero_()[3] = -2.0  # nobody chooses expert 3
    x_TD = tokens(400)

    def load() -> Tensor:
        return torch.bincount(gate(x_TD)[0].flatten(), minlength=8)

    assert int(load()[3]) == 0
    start = max_violation(load())
    for _ in range(300):
        update_router_bias(model, {"backbone.layers.0": load()}, 1e-2)
    assert int(load()[3]) > 0
    assert max_violation(load()) < 0.1 < start
