"""Adapters in our models: what they compute, where they go, and that nothing else moves.

What they compute is compared with PEFT in ``tests/checkpoint/test_adapter.py``; here with the plain
weights that they amount to.
"""

from __future__ import annotations

import math
from dataclasses import replace
from unittest.mock import patch

import pytest
import torch
from torch import Tensor, nn

from helpers.bands import band
from helpers.sabotage import relative
from helpers.tiny_models import loud_model, random_ids, tiny_config
from nemo_hybrid.config.finetune import LoraOptions
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.run import PrecisionOptions
from nemo_hybrid.errors import UserError
from nemo_hybrid.model.cache import commit
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.latent_moe import LocalDispatcher
from nemo_hybrid.model.linear import Adapter
from nemo_hybrid.model.lora import (
    adapters,
    add_adapters,
    merge_adapters,
    parameter_count,
    table,
)
from nemo_hybrid.precision import policy
from nemo_hybrid.precision.operands import Products

PLAIN_WGRAD_INPUT = Products.wgrad_input
SHAPE = tiny_config("ME*-E", mtp_num_depths=2)
BOTH = ["experts.up_proj", "experts.down_proj"]
EVERYTHING = LoraOptions(4, 8, ["*", "mtp.*"], [*BOTH, "mtp.*"])
IDS = random_ids(SHAPE, 2, 19)


def adapted(
    options: LoraOptions,
    b_is_zero: bool = False,
    recompute: str = "",
    shape: HybridConfig = SHAPE,
) -> HybridLM:
    model = loud_model(shape, recompute=recompute)
    add_adapters(model, options, seed=1)
    if not b_is_zero:
        generator = torch.Generator().manual_seed(2)
        for _, adapter in adapters(model):
            adapter.B.data.copy_(torch.randn(adapter.B.shape, generator=generator) * 0.2)
    return model


def everything(model: HybridLM, ids_BS: Tensor = IDS) -> Tensor:
    out = model(ids_BS, mtp=True)
    return torch.cat([out.logits, *out.mtp_logits]).float()


def backward(model: HybridLM) -> None:
    (everything(model) * torch.linspace(-1, 1, SHAPE.vocab_size)).tanh().sum().backward()


def trained(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def test_new_adapters_compute_nothing_and_merged_ones_what_they_did() -> None:
    plain = everything(loud_model(SHAPE))
    assert torch.equal(everything(adapted(EVERYTHING, b_is_zero=True)), plain)
    model = adapted(EVERYTHING)
    before = everything(model).detach()
    assert relative(before, plain.detach()) > 0.1
    merge_adapters(model)
    assert not list(adapters(model))
    assert model.state_dict().keys() == loud_model(SHAPE).state_dict().keys()
    assert all(parameter.requires_grad for parameter in model.parameters())
    assert relative(everything(model), before) < 2e-5


def test_prompts_and_single_tokens_meet_the_adapters_too() -> None:
    model = adapted(EVERYTHING)
    caches = model.new_caches(*IDS.shape)
    h_BSD, after = model.read(IDS[:, :-1], torch.tensor([18, 18]), caches)
    commit(caches, after)
    with torch.no_grad():
        wanted = model(IDS).logits
    assert relative(model.logits(h_BSD), wanted[:, :-1]) < 2e-5
    assert relative(model.logits(model.decode(IDS[:, -1], caches)), wanted[:, -1]) < 2e-5


def test_a_is_drawn_as_peft_draws_it_and_b_is_zero() -> None:
    model = adapted(LoraOptions(64, 8, None, BOTH), b_is_zero=True)
    for name, adapter in adapters(model):
        bound = 1 / math.sqrt(adapter.A.shape[-1])
        assert adapter.B.count_nonzero() == 0
        assert 0.9 * bound < float(adapter.A.detach().abs().max()) <= bound, name
        assert abs(float(adapter.A.detach().std()) - bound / math.sqrt(3)) < 0.1 * bound, name
    draws = [adapter.A.flatten()[:16] for _, adapter in adapters(model)]
    draws += [a.A[e].flatten()[:16] for _, a in adapters(model) if a.A.dim() == 3 for e in (1, 2)]
    assert len({tuple((d / d.abs().max()).tolist()) for d in draws}) == len(draws)


@pytest.mark.parametrize("owned", [range(0, 4), range(4, 8)])
def test_draws_and_table_do_not_depend_on_the_layout(owned: range) -> None:
    options = LoraOptions(4, 8, None, BOTH)
    whole = loud_model(SHAPE)
    all_of_it = add_adapters(whole, options, seed=1)
    dispatcher = LocalDispatcher(len(owned))
    dispatcher.owned = owned
    part = HybridLM(SHAPE, dispatcher=dispatcher)
    part.bfloat16()
    assert add_adapters(part, options, seed=1) == all_of_it
    assert parameter_count(part) == parameter_count(whole)
    wanted = trained(whole)
    for name, parameter in trained(part).items():
        mine = wanted[name][owned.start : owned.stop] if ".experts." in name else wanted[name]
        assert torch.equal(parameter, mine.bfloat16()), name


@pytest.mark.parametrize("recompute", ["", "ME*-", "e"])
def test_every_adapter_has_a_gradient_and_nothing_else(recompute: str) -> None:
    fresh = adapted(EVERYTHING, b_is_zero=True, recompute=recompute)
    backward(fresh)
    for name, adapter in adapters(fresh):
        assert adapter.B.grad is not None, name
        assert adapter.B.grad.abs().max() > 1e-6, name
    model = adapted(EVERYTHING, recompute=recompute)
    backward(model)
    quiet = [name for name, p in trained(model).items() if not p.grad.abs().max() > 1e-6]  # type: ignore[union-attr]
    assert quiet == []
    assert {n for n, p in model.named_parameters() if p.grad is not None} == trained(model).keys()
    assert {n.rpartition(".")[0] for n in trained(model)} == {name for name, _ in adapters(model)}


def test_frozen_weights_stay_as_they_are_to_the_byte() -> None:
    model = adapted(LoraOptions(4, 8, None, BOTH))
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    optimizer = torch.optim.AdamW(trained(model).values(), lr=1e-2, weight_decay=0.1)
    for _ in range(3):
        optimizer.zero_grad()
        backward(model)
        optimizer.step()
    moved = {name for name, t in model.state_dict().items() if not torch.equal(t, before[name])}
    assert moved == trained(model).keys()
    assert not any(name.startswith(("mtp.", "lm_head")) or ".gate." in name for name in moved)


def test_bf16_gradients_are_those_of_fp32_up_to_rounding() -> None:
    """Those of the MTP block, which is used at two depths, are summed in fp32."""
    options = LoraOptions(4, 8, ["mtp.*", "q_proj"], ["mtp.*"])
    # Every token goes to all experts: rounding must not choose between them.
    shape = replace(SHAPE, num_experts_per_tok=SHAPE.n_routed_experts)
    exact, rounded = adapted(options, shape=shape), adapted(options, shape=shape).bfloat16()
    exact.load_state_dict({name: t.float() for name, t in rounded.state_dict().items()})
    with torch.no_grad():
        h_BSD = rounded.forward_hidden(IDS)[0]
    for model in (exact, rounded):
        hidden, _ = model.forward_mtp(h_BSD.to(model.lm_head.weight.dtype), IDS)
        (torch.cat(hidden).float() * torch.linspace(-1, 1, SHAPE.hidden_size)).sum().backward()
    for name, parameter in trained(rounded).items():
        if name.startswith("mtp."):
            assert parameter.grad is not None
            assert parameter.grad.dtype == torch.bfloat16
            apart = relative(parameter.grad.float(), exact.get_parameter(name).grad)
            assert apart < band(torch.bfloat16, terms=10), name  # two depths of some five roundings
    assert rounded.mtp.wide().keys() == {
        n.removeprefix("mtp.") for n in trained(rounded) if n[:4] == "mtp."
    }


def test_stacks_are_summed_exactly_and_rounded_once() -> None:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(3, 5, 7, generator=generator).bfloat16()
    adapter = Adapter(weight, 2, 1.5)
    for parameter in (adapter.A, adapter.B):
        parameter.data.copy_(torch.randn(parameter.shape, generator=generator))
    exact = weight.double() + 1.5 * adapter.B.double() @ adapter.A.double()
    assert torch.equal(adapter.added_to(weight), exact.bfloat16())
    twice = weight + (1.5 * adapter.B @ adapter.A)
    assert not torch.equal(twice, exact.bfloat16())


@pytest.mark.parametrize("low_precision", ["mxfp8", "nvfp4"])
def test_frozen_weights_in_low_precision_stand_beside_plain_adapters(low_precision: str) -> None:
    """Gradients of what lies before the layers are to the bit those of layers that are trained."""
    shape = tiny_config(
        "-E", hidden_size=64, moe_latent_size=32, moe_intermediate_size=64, intermediate_size=64,
        moe_shared_expert_intermediate_size=64,
    )  # fmt: skip
    options = PrecisionOptions(formats={"*": low_precision}, last_layers_bf16=0)
    found = []
    for frozen in (False, True):
        model = loud_model(shape).bfloat16()
        if frozen:
            add_adapters(model, LoraOptions(4, 8, ["mixer.up_proj"]), seed=1)
            model.backbone.embeddings.weight.requires_grad_()
        policy.Precision(model, options, shape, seed=1, rank=0, device_type="cpu")
        low = [m for m in model.modules() if getattr(m, "low_precision", None) is not None]
        assert len(low) == 7  # with the experts
        logits = model(random_ids(shape, 2, 32)).logits
        with patch.object(Products, "wgrad_input", autospec=True) as wgrad:
            wgrad.side_effect = PLAIN_WGRAD_INPUT
            logits.float().tanh().sum().backward()
        assert wgrad.call_count == (0 if frozen else 8)
        found.append((logits.detach(), model.backbone.embeddings.weight.grad))
        if frozen:
            lora = model.backbone.layers[0].mixer.up_proj.lora
            assert lora.B.grad.abs().max() > 0
            plain = logits
            lora.B.data.fill_(0.1)
            assert relative(model(random_ids(shape, 2, 32)).logits.float(), plain.float()) > 1e-2
            assert {n for n, p in model.named_parameters() if p.grad is not None} == {
                "backbone.embeddings.weight",
                *(name for name in trained(model) if "lora" in name),
            }
    assert torch.equal(found[0][0], found[1][0])
    assert torch.equal(found[0][1], found[1][1])


MODULES: dict[str, tuple[LoraOptions, set[str]]] = {
    "default": (
        LoraOptions(4),
        {
            "backbone.layers.0.mixer.in_proj",
            *(
                f"backbone.layers.{i}.mixer.{leaf}"
                for i in (1, 4)
                for leaf in (
                    "fc1_latent_proj",
                    "fc2_latent_proj",
                    "shared_experts.up_proj",
                    "shared_experts.down_proj",
                )
            ),
            *(f"backbone.layers.2.mixer.{leaf}_proj" for leaf in "qkvo"),
            "backbone.layers.3.mixer.up_proj",
            "backbone.layers.3.mixer.down_proj",
        },
    ),
    "name": (LoraOptions(4, None, ["q_proj"]), {"backbone.layers.2.mixer.q_proj"}),
    "ending": (LoraOptions(4, None, ["mixer.up_proj"]), {"backbone.layers.3.mixer.up_proj"}),
    "glob": (
        LoraOptions(4, None, ["backbone.layers.[12].*down_proj"]),
        {"backbone.layers.1.mixer.shared_experts.down_proj"},
    ),
    "several-for-one": (
        LoraOptions(4, None, ["q_proj", "*.q_proj", "backbone.layers.2.mixer.q_proj"]),
        {"backbone.layers.2.mixer.q_proj"},
    ),
    "mtp": (LoraOptions(4, None, ["mtp.*.eh_proj"]), {"mtp.layers.0.eh_proj"}),
    "stacks": (
        LoraOptions(4, None, [], ["experts.up_proj", "*.1.mixer.experts.*"]),
        {
            "backbone.layers.1.mixer.experts.up_proj",
            "backbone.layers.4.mixer.experts.up_proj",
            "backbone.layers.1.mixer.experts.down_proj",
        },
    ),
}


@pytest.mark.parametrize("case", MODULES)
def test_patterns_find(case: str) -> None:
    options, wanted = MODULES[case]
    model = loud_model(SHAPE)
    found = add_adapters(model, options, seed=1)
    assert {one.name for one in found} == wanted
    assert len(found) == len(wanted) == len(list(adapters(model)))
    assert sum(one.parameters for one in found) == sum(p.numel() for p in trained(model).values())


REFUSED = {
    "nothing": (LoraOptions(4, None, ["k_prj"]), r"'k_prj' matches nothing; perhaps k_proj\?"),
    "gate_proj": (LoraOptions(4, None, ["gate_proj"]), r"perhaps up_proj\?"),
    "one-of-two": (LoraOptions(4, None, ["q_proj", "qkv"]), "'qkv' matches nothing"),
    "router": (LoraOptions(4, None, ["gate"]), "router"),
    "routers-weight": (LoraOptions(4, None, [], ["gate.weight"]), "router"),
    "head": (LoraOptions(4, None, ["lm_head"]), "head"),
    "embedding": (LoraOptions(4, None, ["embeddings"]), "embedding"),
    "convolution": (LoraOptions(4, None, ["conv1d"]), "convolutions"),
    "norm": (LoraOptions(4, None, ["norm"]), "norms"),
    "mtp-alone": (LoraOptions(4, None, ["eh_proj"]), "MTP block alone.*mtp.layers.0.eh_proj"),
    "stack-as-module": (LoraOptions(4, None, ["experts.up_proj"]), "lora.target_parameters"),
    "stacks-as-module": (LoraOptions(4, None, ["*.mixer.experts"]), "lora.target_parameters"),
    "module-as-stack": (LoraOptions(4, None, [], ["q_proj.weight"]), "lora.target_modules"),
    "layer-as-stack": (LoraOptions(4, None, [], ["o_proj"]), "lora.target_modules"),
    "no-patterns": (LoraOptions(4, None, []), "are empty"),
    "no-rank": (LoraOptions(), "lora.rank"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_cannot_be_adapted_is_named_before_anything_changes(case: str) -> None:
    options, message = REFUSED[case]
    model = loud_model(SHAPE)
    with pytest.raises(UserError, match=message):
        add_adapters(model, options, seed=1)
    assert not list(adapters(model))
    assert len(trained(model)) == len(list(model.parameters()))


def test_no_weight_gets_a_second_adapter() -> None:
    model = adapted(LoraOptions(4, None, ["q_proj"]))
    with pytest.raises(UserError, match="already"):
        add_adapters(model, LoraOptions(4, None, ["k_proj"]), seed=1)


def test_the_table_counts_what_is_trained() -> None:
    model = loud_model(SHAPE)
    found = add_adapters(model, LoraOptions(4, 8, ["in_proj", "fc1_latent_proj"], BOTH), seed=1)
    total = parameter_count(model)
    assert total == sum(parameter.numel() for parameter in model.parameters())
    rows = {row[0]: row[1:] for row in table(found, total)}
    experts, rank, latent, inner = 8, 4, 16, 24
    per_stack = experts * rank * (latent + inner)
    assert rows["backbone.layers.*.mixer.experts.up_proj"] == ("2", "8x24x16", f"{2 * per_stack:,}")
    assert rows["backbone.layers.*.mixer.fc1_latent_proj"] == ("2", "16x32", f"{2 * 4 * 48:,}")
    trainable = sum(p.numel() for p in trained(model).values())
    assert rows["all"] == ("7", "", f"{trainable:,} ({trainable / total:.2%} of {total:,})")
