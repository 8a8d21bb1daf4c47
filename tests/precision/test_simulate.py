"""Simulated quantization against modelopt, formulas restated with tables, and loops over tokens."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.nvfp4_formula import E2M1, E4M3, nearest
from helpers.tiny_models import loud_model, random_ids, tiny_config
from nemo_hybrid.errors import UserError
from nemo_hybrid.export.calibrate import calibrate
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.precision.assign import Assignment, Format, places
from nemo_hybrid.precision.quantize import Search
from nemo_hybrid.precision.simulate import (
    quantization_aware,
    quantized_inputs,
    rounded_input,
    simulated,
    stored_values,
    weight_of,
)

CONFIG = tiny_config(
    "ME*-", moe_intermediate_size=32, moe_shared_expert_intermediate_size=48, mtp_num_depths=1
)
MOE = "backbone.layers.1.mixer"
EXPERTS = (f"{MOE}.experts.up_proj", f"{MOE}.experts.down_proj")
QKV = tuple(f"backbone.layers.2.mixer.{p}_proj" for p in "qkv")


def everything(format: Format) -> Assignment:
    return dict.fromkeys(places(CONFIG), format)


def modelopt_values(weight: Tensor, amax: Tensor | None = None) -> Tensor:
    """What modelopt stores of a matrix, decoded by modelopt."""
    module = pytest.importorskip("modelopt.torch.quantization.qtensor.nvfp4_tensor")
    double_scale = (weight.abs().amax() if amax is None else amax).float() / 2688
    q, scale, double_scale = module.NVFP4QTensor.quantize(
        weight, 16, weights_scaling_factor_2=double_scale
    )
    return q.dequantize(  # type: ignore[no-any-return]
        scale=scale, double_scale=double_scale, block_sizes={-1: 16}, dtype=torch.float32
    )


def engine_input(x: Tensor, format: Format, amax: float) -> Tensor:
    """x as an engine rounds it, restated with tables in float64: [.., K]."""
    rows = x.double().reshape(-1, x.shape[-1]).numpy()
    if format == "fp8":
        scale = amax / 448
        signed = np.sign(rows) * E4M3[nearest(np.minimum(abs(rows) / scale, 448), E4M3)] * scale
    else:
        blocks, scale = rows.reshape(len(rows), -1, 16), amax / 2688
        wanted = np.minimum(abs(blocks).max(-1, keepdims=True) / 6 / scale, 448)
        block = E4M3[nearest(wanted, E4M3)] * scale
        y = np.divide(blocks, block, out=np.zeros_like(blocks), where=block > 0)
        signed = np.sign(y) * E2M1[nearest(np.minimum(abs(y), 6), E2M1)] * block
    return torch.from_numpy(signed.reshape(x.shape)).float()


@pytest.mark.parametrize("format", ["nvfp4", "fp8"])
@pytest.mark.parametrize("share", [1.0, 0.4])
def test_inputs_have_the_values_of_the_formula(format: Format, share: float) -> None:
    x = torch.randn(50, 64, generator=torch.Generator().manual_seed(0)).exp()
    x[7], amax = 0, share * float(x.max())
    rounded = rounded_input(x, format, torch.tensor(amax))
    torch.testing.assert_close(rounded, engine_input(x, format, amax), rtol=1e-6, atol=0)
    assert (rounded.max() < 1.01 * amax) == (x.max() > amax) or share == 1.0


def test_weights_have_the_values_of_modelopt_and_come_back() -> None:
    model = loud_model(CONFIG)
    before = {name: p.clone() for name, p in model.named_parameters()}
    chosen: Assignment = {EXPERTS[0]: "nvfp4", f"{MOE}.shared_experts.up_proj": "fp8"}
    with simulated(model, chosen):
        up_EFL = weight_of(model, EXPERTS[0])
        for own, matrix in zip(up_EFL, before[EXPERTS[0]], strict=True):
            torch.testing.assert_close(own, modelopt_values(matrix), rtol=1e-6, atol=0)
        name = f"{MOE}.shared_experts.up_proj.weight"
        scale = before[name].abs().max() / 448
        fp8 = (before[name] / scale).to(torch.float8_e4m3fn).float() * scale
        torch.testing.assert_close(model.get_parameter(name), fp8)
        changed = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
        assert changed == {EXPERTS[0], name}
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    weight_of(model, EXPERTS[1]).data[3, 0, 0] = torch.nan
    with (
        pytest.raises(UserError, match=f"{EXPERTS[1]}: .*NaN"),
        simulated(model, everything("nvfp4")),
    ):
        pass
    model.load_state_dict(before, strict=False)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_query_key_and_value_have_one_scale() -> None:
    model = loud_model(CONFIG)
    with torch.no_grad():
        weight_of(model, QKV[0]).mul_(37.0)
    amax = weight_of(model, QKV[0]).abs().max()
    key = weight_of(model, QKV[1]).clone()
    with simulated(model, dict.fromkeys(QKV, "nvfp4")):
        own = weight_of(model, QKV[1]).clone()
    torch.testing.assert_close(own, modelopt_values(key, amax), rtol=1e-6, atol=0)
    assert not torch.allclose(own, modelopt_values(key), rtol=1e-6, atol=0)


def test_stored_values_of_bf16_and_of_a_stack() -> None:
    stack = torch.randn(3, 8, 32, generator=torch.Generator().manual_seed(1))
    assert torch.equal(stored_values(stack, "bf16"), stack.bfloat16().float())
    stack[1] = 0
    cases: list[tuple[Format, Search]] = [
        ("nvfp4", "amax"),
        ("fp8", "amax"),
        ("nvfp4", "four_over_six"),
    ]
    for format, search in cases:
        alone = [stored_values(matrix, format, search) for matrix in stack]
        assert torch.equal(stored_values(stack, format, search), torch.stack(alone))
    assert torch.equal(stored_values(stack, "nvfp4"), stored_values(stack, "nvfp4_w4a16"))
    assert stored_values(stack.bfloat16(), "nvfp4").dtype == torch.bfloat16


@pytest.mark.parametrize("format", ["nvfp4", "fp8"])
@pytest.mark.parametrize("before_weighting", [True, False])
@torch.no_grad()
def test_experts_round_their_inputs_in_front_of_the_routing_weight(
    format: Format, before_weighting: bool
) -> None:
    model = loud_model(CONFIG)
    moe = model.backbone.layers[1].mixer
    h_TL = torch.randn(30, CONFIG.expert_size, generator=torch.Generator().manual_seed(2))
    ids_TK, weights_TK, _ = moe.gate(torch.randn(30, CONFIG.hidden_size))
    amax = {place: torch.arange(1.0, CONFIG.n_routed_experts + 1) / 3 for place in EXPERTS}
    largest = float(amax[EXPERTS[0]].max())

    def rounded(x: Tensor) -> Tensor:
        return engine_input(x, format, largest)

    expected = torch.zeros_like(h_TL)
    for t, (chosen, weights) in enumerate(zip(ids_TK.tolist(), weights_TK, strict=True)):
        for expert, weight in zip(chosen, weights, strict=True):
            up, down = moe.experts.up_proj[expert], moe.experts.down_proj[expert]
            act = F.relu(up @ rounded(h_TL[t])).square()
            act = rounded(act) * weight if before_weighting else rounded(act * weight)
            expected[t] += down @ act
    with quantized_inputs(model, dict.fromkeys(EXPERTS, format), amax):
        found = moe.dispatcher(h_TL, ids_TK, weights_TK, moe.experts.adapted())
    close = torch.isclose(found, expected, rtol=1e-4, atol=1e-4).float().mean()
    # fp32 and float64 fall on different sides of a few ties.
    assert (close > 0.97) == before_weighting
    assert moe.experts.low_precision is None


@torch.no_grad()
def test_linear_layers_round_their_inputs() -> None:
    model, place = loud_model(CONFIG), "backbone.layers.3.mixer.down_proj"
    x = torch.randn(5, 48, generator=torch.Generator().manual_seed(3))
    layer, amax = model.get_submodule(place), torch.tensor(2.5)
    before = layer(x)
    for format in ("nvfp4", "fp8"):
        with quantized_inputs(model, {place: format}, {place: amax}):
            found = layer(x)
        expected = F.linear(engine_input(x, format, 2.5), layer.weight)
        torch.testing.assert_close(found, expected)
    with quantized_inputs(model, {place: "nvfp4_w4a16"}, {}):
        assert torch.equal(layer(x), before)
    assert torch.equal(layer(x), before)


def relative(found: Tensor, wanted: Tensor) -> float:
    return float(((found - wanted).norm() / wanted.norm()).detach())


@torch.no_grad()
def test_the_whole_model_quantized_differs_a_little_and_more_with_inputs() -> None:
    model, ids_BS = loud_model(CONFIG), random_ids(CONFIG, 2, 30)

    def run() -> list[Tensor]:
        output = model(ids_BS, mtp=True)
        return [output.logits, *output.mtp_logits]

    amax = calibrate(model, [ids_BS]).amax
    before = run()
    errors = []
    for format in ("fp8", "nvfp4"):
        for inputs in (None, amax):
            with simulated(model, everything(format), "amax", inputs):
                errors.append(
                    [float((a - b).norm() / b.norm()) for a, b in zip(run(), before, strict=False)]
                )
    assert all(map(torch.equal, run(), before))
    for depth in range(2):
        fp8, fp8_inputs, nvfp4, nvfp4_inputs = (error[depth] for error in errors)
        assert 0 < fp8 < fp8_inputs < nvfp4 < nvfp4_inputs < 1


def gradients(model: HybridLM, ids_BS: Tensor) -> dict[str, Tensor]:
    """Of some loss, by the parameters' names."""
    model.zero_grad()
    output = model(ids_BS, mtp=True)
    every = torch.stack([output.logits, *output.mtp_logits])
    every.log_softmax(-1)[..., 3].mean().backward()
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_weights_are_trained_with_the_gradients_of_a_model_that_has_the_stored_ones() -> None:
    model, plain, ids_BS = loud_model(CONFIG), loud_model(CONFIG), random_ids(CONFIG, 2, 20)
    assignment = {p: f for p, f in everything("nvfp4_w4a16").items() if p != "lm_head"}
    before = gradients(model, ids_BS)
    quantization_aware(model, assignment, {})
    with simulated(plain, assignment):
        expected, logits = gradients(plain, ids_BS), plain(ids_BS).logits
    torch.testing.assert_close(model(ids_BS).logits, logits, rtol=1e-4, atol=1e-5)
    found = gradients(model, ids_BS)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-3, atol=1e-5, msg=name)
    assert any(relative(before[n], g) > 0.05 for n, g in expected.items())
    # Trained are the weights themselves, which have not changed.
    assert torch.equal(weight_of(model, EXPERTS[0]), weight_of(loud_model(CONFIG), EXPERTS[0]))


@pytest.mark.parametrize("format", ["nvfp4", "fp8"])
def test_gradients_of_experts_are_those_of_a_loop_over_tokens(format: Format) -> None:
    model = loud_model(CONFIG)
    moe = model.backbone.layers[1].mixer
    x_TL = torch.randn(24, CONFIG.expert_size, generator=torch.Generator().manual_seed(5))
    x_TL.requires_grad_()
    ids_TK, weights_TK, _ = moe.gate(torch.randn(24, CONFIG.hidden_size))
    weights_TK = weights_TK.detach().requires_grad_()
    leaves = [x_TL, weights_TK, moe.experts.up_proj, moe.experts.down_proj]
    amax = dict(zip(EXPERTS, torch.tensor([2.5, 6.0]), strict=True))  # a few inputs exceed it
    quantization_aware(model, dict.fromkeys(EXPERTS, format), amax)
    found_TL = moe.dispatcher(x_TL, ids_TK, weights_TK, moe.experts.adapted())
    dy_TL = torch.randn(found_TL.shape, generator=torch.Generator().manual_seed(6))
    found = torch.autograd.grad(found_TL, leaves, dy_TL)

    up_EFL, down_ELF = (w + (stored_values(w.detach(), format) - w).detach() for w in leaves[2:])
    x = x_TL + (rounded_input(x_TL.detach(), format, amax[EXPERTS[0]]) - x_TL).detach()
    act_TKF = torch.einsum("tl,tkfl->tkf", x, up_EFL[ids_TK]).relu().square()
    assert (x_TL.abs() > amax[EXPERTS[0]]).any()
    assert (act_TKF > amax[EXPERTS[1]]).any()
    act_TKF = (
        act_TKF + (rounded_input(act_TKF.detach(), format, amax[EXPERTS[1]]) - act_TKF).detach()
    )
    expected_TL = torch.einsum("tk,tkf,tklf->tl", weights_TK, act_TKF, down_ELF[ids_TK])
    expected = torch.autograd.grad(expected_TL, leaves, dy_TL)
    assert relative(found_TL, expected_TL) < 1e-2  # some values lie between two codes
    for ours, theirs in zip(found, expected, strict=True):
        assert relative(ours, theirs) < 2e-2


def test_the_head_and_what_is_not_named_stay_as_they_are() -> None:
    model = loud_model(CONFIG)
    place = "backbone.layers.3.mixer.up_proj"
    quantization_aware(model, {place: "nvfp4", QKV[0]: "bf16"}, {place: torch.tensor(1.0)})
    changed = [n for n, m in model.named_modules() if getattr(m, "low_precision", None)]
    assert changed == [place]
    with pytest.raises(UserError, match="lm_head cannot be trained quantized"):
        quantization_aware(model, {"lm_head": "fp8"}, {})
