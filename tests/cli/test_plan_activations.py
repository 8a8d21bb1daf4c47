"""What `plan` says that layers keep and send, against real layers."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import nn

from helpers.plans import CONFIG, family, layout, run
from nemo_hybrid.commands.memory import Layout, saved
from nemo_hybrid.commands.plan import PlanOptions, make_plan
from nemo_hybrid.commands.step_time import count, paths_of
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.latent_moe import LocalDispatcher
from nemo_hybrid.model.layer import Layers
from nemo_hybrid.model.recompute import recompute_layers
from nemo_hybrid.model.sequence import WholeSequences
from nemo_hybrid.parallel import dispatch
from nemo_kernels.documents import Documents

DTYPES = {2: torch.bfloat16, 4: torch.float32}


def counted(letter: str, at: Layout, dispatcher: Any) -> int:
    """Bytes that autograd keeps of one real layer, without the layer's own parameters."""
    layer = Layers(letter, at.cfg, dispatcher, WholeSequences()).to(DTYPES[at.width])
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.1)
    recompute_layers(layer, at.recompute)
    own = {t.untyped_storage().data_ptr() for t in [*layer.parameters(), *layer.buffers()]}
    starts_BS = torch.zeros(at.rows, at.length, dtype=torch.bool)
    starts_BS[:, 13] = True
    documents = Documents.from_starts(starts_BS)
    own |= {t.untyped_storage().data_ptr() for t in (documents.seq_idx_BS, documents.cu_seqlens)}
    kept: dict[int, torch.Tensor] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor
        return tensor

    x_BSD = torch.randn(at.rows, at.length, at.cfg.hidden_size, dtype=DTYPES[at.width])
    x_BSD = x_BSD.requires_grad_() * 1
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        y_BSD, _ = layer(x_BSD, documents)
    kept[x_BSD.untyped_storage().data_ptr()] = x_BSD
    del y_BSD
    return sum(t.untyped_storage().nbytes() for place, t in kept.items() if place not in own)


def in_place_of_a_group(monkeypatch: pytest.MonkeyPatch) -> tuple[Any, list[int]]:
    """A real all-to-all dispatcher of a world of one, and the bytes of rows that it sends."""
    sent: list[int] = []

    def exchange(out: torch.Tensor, x: torch.Tensor, receive: Any, send: Any, group: Any) -> None:
        if receive:  # not the counts
            sent.append(x.nbytes)
        out.copy_(x)

    monkeypatch.setattr(dispatch.dist, "all_to_all_single", exchange)
    dispatcher = dispatch.AllToAllDispatcher(CONFIG.n_routed_experts, 1, 0)
    monkeypatch.setattr(dispatcher, "group", object())
    return dispatcher, sent


@pytest.mark.parametrize("width", [2, 4])
@pytest.mark.parametrize("length", [40, 48])  # with and without padding to chunks of 16
@pytest.mark.parametrize("letter", ["M", "E", "E over processes", "*", "-"])
def test_saved_activations(
    letter: str, length: int, width: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    at = layout(width=width, length=length, ep=2 if "over" in letter else 1)
    local = LocalDispatcher(CONFIG.n_routed_experts)
    dispatcher = in_place_of_a_group(monkeypatch)[0] if at.ep > 1 else local
    letter = letter[0]
    real = counted(letter, at, dispatcher)
    assert saved(at, letter) == pytest.approx(real, rel=0.01)
    if letter == "E":
        inner = replace(at, recompute="e")
        assert saved(inner, letter) == pytest.approx(counted(letter, inner, dispatcher), rel=0.01)
        assert saved(inner, letter) < 0.9 * real
    again = replace(at, recompute=letter)
    assert saved(again, letter) == pytest.approx(counted(letter, again, dispatcher), rel=0.01)
    assert saved(again, letter) < real / 3


@pytest.mark.parametrize("length", [512, 200])  # with and without whole chunks
def test_saved_activations_on_a_gpu(length: int) -> None:
    """Against what the modelled step counts of our kernels, which run on no GPU for it."""
    shape = replace(CONFIG, chunk_size=48, mtp_num_depths=0)  # by our scan 64
    at = layout(cfg=shape, width=2, length=length, processes=1, cpu=False, reference=())
    counted = count(at, paths_of("gpu")).kept
    for letter in "ME*":
        kept = sum(size for scope, size in counted.items() if scope.part == letter)
        assert saved(at, letter) == pytest.approx(kept / shape.pattern.count(letter), rel=0.01)
        wrong = replace(at, reference=("ssd", "conv1d", "moe", "attention"))
        assert saved(wrong, letter) > 1.1 * saved(at, letter)


@pytest.mark.parametrize("recompute", ["", "E"])
def test_rows_sent(recompute: str, monkeypatch: pytest.MonkeyPatch) -> None:
    dispatcher, sent = in_place_of_a_group(monkeypatch)
    model = HybridLM(CONFIG, dispatcher=dispatcher).bfloat16()
    recompute_layers(model, recompute)
    ids_BS = torch.randint(0, CONFIG.vocab_size, (4, 32))
    h_BSD, _ = model.forward_hidden(ids_BS)
    depths, _ = model.forward_mtp(h_BSD, ids_BS)
    sum(t.float().square().mean() for t in (h_BSD, *depths)).backward()
    config = run(recompute=recompute, ep=4, micro_batch_size=4, global_batch_size=16)
    plan = make_plan(config, CONFIG, PlanOptions(processes=4))
    # Of evenly chosen experts three in four are elsewhere.
    assert plan.parts["all-to-all of routed slots"].sent == pytest.approx(sum(sent) * 3 / 4)


@pytest.mark.parametrize("letter", "M*E-")
def test_divided_rows_keep_what_the_counted_layer_keeps(letter: str) -> None:
    """And do as much on each of four processes as on one with a quarter of the row, but for
    attention, which sees whole rows."""
    shape = replace(family("nano"), pattern=letter * 2, mtp_num_depths=0, vocab_size=1024)
    common = {"cfg": shape, "processes": 4, "rows": 1, "cpu": False, "reference": ()}
    one, four = layout(**common, length=4096), layout(**common, length=16_384, cp=4)
    assert one.tokens == four.tokens
    kept, flop = {}, {}
    for at in (one, four):
        counted = count(at, paths_of("gpu"))
        kept[at.cp] = sum(n for (part, _), n in counted.kept.items() if part == letter) / 2
        flop[at.cp] = sum(n * work.flop for (work, _), n in counted.micro_batch.items())
    more = saved(four, letter) - saved(one, letter)
    assert kept[4] - kept[1] == pytest.approx(more, rel=0.1, abs=0.02 * kept[1])
    if letter == "*":
        assert flop[4] > 1.2 * flop[1]
    else:
        assert flop[4] == pytest.approx(flop[1], rel=0.05)
