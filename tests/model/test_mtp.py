"""Multi-token prediction against a naive implementation written from its definition.

Depth k = 1, 2 ... at position t of a document reads the previous depth's hidden state at t and the
embedding of the document's token t + k, and predicts its token t + 1 + k. Positions from which
there is no such token have no prediction. The naive version walks over rows, documents and
positions one at a time, in float64, and computes nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from helpers.parts import ce_sums
from helpers.tiny_models import (
    loud_model,
    packed_batch,
    random_ids,
    smallest_routing_margin,
    tiny_config,
)
from nemo_hybrid.checkpoint.names import to_hub
from nemo_hybrid.commands.step_time import paths_of
from nemo_hybrid.config.run import TrainOptions
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.meter import Meter
from nemo_hybrid.model import mtp
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.mtp import MTPBlock, shift_left
from nemo_hybrid.objectives.base import Normalizer
from nemo_hybrid.objectives.next_token import NextToken, count_targets, labels_and_validity
from nemo_kernels import backend
from nemo_kernels.documents import Documents
from nemo_kernels.wide import widened

# Documents per row of the window of S + 1 tokens; a last document of length 1 means that the last
# target belongs to a document that has no input.
ROWS = {
    "one document per row": [[20], [20]],
    "packed": [[7, 1, 2, 3, 6, 1], [4, 16], [20], [1, 1, 1, 17]],
}
PATTERNS = ("*E", "E*")


@dataclass
class Prediction:
    """One depth at one position: hidden state [D], the id to predict and its cross-entropy."""

    hidden: Tensor
    target: int
    loss: Tensor


Place = tuple[int, int, int]  # depth (0: the main head), row, position


def weights_of(model: HybridLM) -> dict[str, Tensor]:
    """Copies in float64, for gradients of their own."""
    return {
        name: tensor.detach().double().requires_grad_()
        for name, tensor in model.state_dict().items()
    }


def naive_predictions(
    model: HybridLM,
    weights: dict[str, Tensor],
    rows: list[list[int]],
    batch: Batch,
    backbone: Tensor | None = None,
) -> dict[Place, Prediction]:
    """Every prediction there is, from the backbone's hidden states (None: the model's own)."""
    if backbone is None:
        with torch.no_grad():
            backbone = model.forward_hidden(batch.ids_BS, batch.documents)[0].double()
    out: dict[Place, Prediction] = {}
    for row, lengths in enumerate(rows):
        # The window has one token more than the row; it stands in the labels.
        window = [*batch.ids_BS[row].tolist(), int(batch.labels_BS[row, -1])]
        start = 0
        for length in lengths:
            document = window[start : start + length]
            hidden = list(backbone[row, start : start + length])
            for depth in range(model.config.mtp_num_depths + 1):
                predicting = range(length - 1 - depth)
                if depth:
                    table = weights["backbone.embeddings.weight"]
                    embedded = [table[document[t + depth]] for t in predicting]
                    hidden = naive_block(weights, model, hidden[: len(embedded)], embedded)
                for t in predicting:
                    target = document[t + 1 + depth]
                    logits = weights["lm_head.weight"] @ hidden[t]
                    loss = logits.logsumexp(0) - logits[target]
                    out[depth, row, start + t] = Prediction(hidden[t], target, loss)
            start += length
    return out


def naive_block(
    weights: dict[str, Tensor], model: HybridLM, hidden: list[Tensor], embedded: list[Tensor]
) -> list[Tensor]:
    """The MTP block over the first positions of one document."""

    def w(name: str) -> Tensor:
        return weights[f"mtp.layers.{name}"]

    def norm(x: Tensor, name: str) -> Tensor:
        return x / torch.sqrt((x * x).mean() + model.config.layer_norm_epsilon) * w(name)

    last = len(model.config.mtp_pattern) - 1
    xs = []
    for e, h in zip(embedded, hidden, strict=True):
        both = torch.cat([norm(e, "0.enorm.weight"), norm(h, "0.hnorm.weight")])
        xs.append(w("0.eh_proj.weight") @ both)
    for i, letter in enumerate(model.config.mtp_pattern):
        normed = [norm(x, f"{i}.norm.weight") for x in xs]
        mix = {"*": naive_attention, "E": naive_moe}[letter]
        mixed = mix(lambda name, i=i: w(f"{i}.mixer.{name}"), model, normed)
        xs = [x + y for x, y in zip(xs, mixed, strict=True)]
    return [norm(x, f"{last}.final_layernorm.weight") for x in xs]


def naive_attention(w: Callable[[str], Tensor], model: HybridLM, xs: list[Tensor]) -> list[Tensor]:
    cfg = model.config
    P, per_kv = cfg.head_dim, cfg.num_attention_heads // cfg.num_key_value_heads
    out = []
    for t, x in enumerate(xs):
        heads = []
        for head in range(cfg.num_attention_heads):
            of_q = slice(head * P, (head + 1) * P)
            of_kv = slice(head // per_kv * P, (head // per_kv + 1) * P)
            q = w("q_proj.weight")[of_q] @ x
            scores = [q @ (w("k_proj.weight")[of_kv] @ xs[s]) / math.sqrt(P) for s in range(t + 1)]
            shares = torch.stack(scores).softmax(0)
            values = [w("v_proj.weight")[of_kv] @ xs[s] for s in range(t + 1)]
            heads.append(sum(a * v for a, v in zip(shares, values, strict=True)))
        out.append(w("o_proj.weight") @ torch.cat(heads))
    return out


def naive_moe(w: Callable[[str], Tensor], model: HybridLM, xs: list[Tensor]) -> list[Tensor]:
    cfg = model.config
    out = []
    for x in xs:
        scores = torch.sigmoid(w("gate.weight") @ x)
        ranked = sorted(
            range(cfg.n_routed_experts),
            key=lambda e: float((scores[e] + w("gate.e_score_correction_bias")[e]).detach()),
        )
        chosen = ranked[-cfg.num_experts_per_tok :]
        total = sum(scores[e] for e in chosen)
        latent = w("fc1_latent_proj.weight") @ x
        mixed = torch.zeros_like(latent)
        for e in chosen:
            inner = F.relu(w("experts.up_proj")[e] @ latent) ** 2
            share = cfg.routed_scaling_factor * scores[e] / total
            mixed = mixed + share * (w("experts.down_proj")[e] @ inner)
        inner = F.relu(w("shared_experts.up_proj.weight") @ x) ** 2
        shared = w("shared_experts.down_proj.weight") @ inner
        out.append(w("fc2_latent_proj.weight") @ mixed + shared)
    return out


@dataclass
class Comparison:
    """How far the model is from the naive version."""

    validity: int  # positions where only one of the two has a prediction
    labels: int  # wrong labels among the others
    logits: float  # largest deviation there
    losses: float  # largest deviation of a summed loss, main and depths


@torch.no_grad()
def compare(model: HybridLM, batch: Batch, naive: dict[Place, Prediction]) -> Comparison:
    depths = model.config.mtp_num_depths
    h_BSD, _ = model.forward_hidden(batch.ids_BS, batch.documents)
    hidden, _ = model.forward_mtp(h_BSD, batch.ids_BS, batch.documents)
    logits_NBSV = torch.stack([model.lm_head(h) for h in (h_BSD, *hidden)])
    counts_N = count_targets(batch, depths)
    parts = NextToken(model, TrainOptions())(batch, Normalizer(counts_N, 1))
    labels_NBS, valid_NBS = labels_and_validity(batch, depths)
    assert torch.equal(counts_N, valid_NBS.sum((1, 2)))
    ours = {tuple(place) for place in valid_NBS.nonzero().tolist()}
    common = ours & naive.keys()
    head = model.lm_head.weight.detach().double()
    sums = torch.zeros(depths + 1)
    for (depth, _, _), prediction in naive.items():
        sums[depth] += float(prediction.loss)
    return Comparison(
        validity=len(ours ^ naive.keys()),
        labels=sum(int(labels_NBS[p]) != naive[p].target for p in common),
        logits=max(float((logits_NBSV[p] - head @ naive[p].hidden).abs().max()) for p in common),
        losses=float((ce_sums(parts) - sums).abs().max()),
    )


def build(rows: list[list[int]], pattern: str, depths: int) -> tuple[HybridLM, Batch]:
    """The first loud model in which rounding does not decide between experts."""
    config = tiny_config("M", mtp_pattern=pattern, mtp_num_depths=depths)
    batch = packed_batch(config, rows)
    for seed in range(3, 100):
        model = loud_model(config, seed)
        objective = NextToken(model, TrainOptions())
        unit = Normalizer(count_targets(batch, depths), 1)
        margin = smallest_routing_margin(model, batch.ids_BS, lambda: objective(batch, unit))  # noqa: B023
        if margin > 1e-4:
            return model, batch
    raise AssertionError("every model comes close to another choice of experts")


@pytest.mark.parametrize("depths", [1, 2])
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("rows", ROWS.values(), ids=ROWS.keys())
def test_hidden_states_targets_and_losses(rows: list[list[int]], pattern: str, depths: int) -> None:
    model, batch = build(rows, pattern, depths)
    found = compare(model, batch, naive_predictions(model, weights_of(model), rows, batch))
    assert (found.validity, found.labels) == (0, 0)
    # Rounding eight times as badly moves logits, which are around 1, by up to 4.3e-5.
    assert found.logits < 1e-4
    assert found.losses < 1e-3  # sums of about 50 values around 5


@pytest.mark.parametrize("pattern", PATTERNS)
def test_gradients(pattern: str) -> None:
    """Of all losses but the main one, to the block, embedding, head and the backbone's output."""
    rows = ROWS["packed"]
    model, batch = build(rows, pattern, 2)
    weights = weights_of(model)
    with torch.no_grad():
        h_BSD, _ = model.forward_hidden(batch.ids_BS, batch.documents)
    backbone = h_BSD.double().requires_grad_()
    naive = naive_predictions(model, weights, rows, batch, backbone)
    sum(p.loss for place, p in naive.items() if place[0]).backward()

    h_BSD.requires_grad_()
    hidden, _ = model.forward_mtp(h_BSD, batch.ids_BS, batch.documents)
    labels_NBS, valid_NBS = labels_and_validity(batch, 2)
    logits_NBSV = model.lm_head(torch.stack(hidden))
    F.cross_entropy(
        logits_NBSV[valid_NBS[1:]], labels_NBS[1:][valid_NBS[1:]], reduction="sum"
    ).backward()
    assert (h_BSD.grad - backbone.grad).norm() < 1e-5 * backbone.grad.norm()
    compared = 0
    for name, parameter in model.named_parameters():
        if parameter.grad is not None:
            expected = weights[name].grad
            assert (parameter.grad - expected).norm() < 1e-5 * expected.norm(), name
            compared += 1
    of_block = sum(1 for name, _ in model.named_parameters() if name.startswith("mtp."))
    assert compared == of_block + 2


@torch.no_grad()
def test_every_weight_of_the_block_is_noticed() -> None:
    rows = ROWS["packed"]
    model, batch = build(rows, "*E", 2)
    naive = naive_predictions(model, weights_of(model), rows, batch)
    tensors = {k: t for k, t in model.state_dict().items() if k.startswith("mtp.")}
    assert len(tensors) == 18
    for name, tensor in tensors.items():
        right = tensor.clone()
        tensor.copy_(right.roll(1, 0) * 1.5)
        assert compare(model, batch, naive).logits > 1e-2, name
        tensor.copy_(right)
    # eh_proj reads the embedding first.
    weight = model.get_parameter("mtp.layers.0.eh_proj.weight")
    weight.copy_(weight.roll(weight.shape[1] // 2, 1))
    assert compare(model, batch, naive).logits > 1


def test_names_on_disk_are_the_released_ones() -> None:
    """The sixteen mtp.* tensors of the released checkpoints that are no expert's, and two of each
    expert (nemotron_h on the Hugging Face hub)."""
    attention = ("norm", "mixer.q_proj", "mixer.k_proj", "mixer.v_proj", "mixer.o_proj")
    moe = (
        "norm", "mixer.gate", "mixer.fc1_latent_proj", "mixer.fc2_latent_proj",
        "mixer.shared_experts.up_proj", "mixer.shared_experts.down_proj", "final_layernorm",
    )  # fmt: skip
    released = {f"mtp.layers.0.{name}.weight" for name in ("enorm", "hnorm", "eh_proj", *attention)}
    released |= {f"mtp.layers.1.{name}.weight" for name in moe}
    released.add("mtp.layers.1.mixer.gate.e_score_correction_bias")
    assert len(released) == 16
    model, _ = build(ROWS["packed"], "*E", 2)
    released |= {
        f"mtp.layers.1.mixer.experts.{expert}.{matrix}_proj.weight"
        for expert in range(model.config.n_routed_experts)
        for matrix in ("up", "down")
    }
    state = model.state_dict()
    ours = {key for name, tensor in state.items() for key, _ in to_hub(name, tensor, 0)}
    assert {key for key in ours if key.startswith("mtp.")} == released


def one_too_far(x_BS: Tensor, k: int, seq_idx_BS: Tensor | None, fill: int = 0) -> Tensor:
    return shift_left(x_BS, k + 1, seq_idx_BS, fill)


def one_too_near(x_BS: Tensor, k: int, seq_idx_BS: Tensor | None, fill: int = 0) -> Tensor:
    return shift_left(x_BS, k - 1, seq_idx_BS, fill) if k > 1 else x_BS


def across_documents(x_BS: Tensor, k: int, _: Tensor | None, fill: int = 0) -> Tensor:
    return shift_left(x_BS, k, None, fill)


def test_a_wrong_shift_is_noticed() -> None:
    rows = ROWS["packed"]
    model, batch = build(rows, "*E", 2)
    naive = naive_predictions(model, weights_of(model), rows, batch)
    for wrong in (one_too_far, one_too_near):
        with patch("nemo_hybrid.model.hybrid.shift_left", wrong):
            found = compare(model, batch, naive)
        assert found.logits > 0.1, wrong
        assert found.losses > 1, wrong
        with patch("nemo_hybrid.objectives.next_token.shift_left", wrong):
            found = compare(model, batch, naive)
        assert found.labels > 10, wrong
        assert found.losses > 1, wrong


def test_crossing_a_document_boundary_is_noticed() -> None:
    rows = ROWS["packed"]
    model, batch = build(rows, "*E", 2)
    naive = naive_predictions(model, weights_of(model), rows, batch)
    with patch("nemo_hybrid.objectives.next_token.shift_left", across_documents):
        found = compare(model, batch, naive)
    assert found.validity > 5
    assert found.losses > 1
    # Attention of the MTP block over all of a row. (Its embeddings matter beyond the boundary only
    # where there is no prediction; test_packing looks at those positions.)
    one_document = Documents.from_numbers(torch.zeros_like(batch.documents.seq_idx_BS))
    with torch.no_grad():
        h_BSD, _ = model.forward_hidden(batch.ids_BS, batch.documents)
        right, _ = model.forward_mtp(h_BSD, batch.ids_BS, batch.documents)
        wrong, _ = model.forward_mtp(h_BSD, batch.ids_BS, one_document)
    later = batch.documents.seq_idx_BS > 0
    assert (right[0] - wrong[0])[later].abs().max() > 0.1


def test_the_block_is_applied_to_its_own_normalised_output() -> None:
    """Depth 2 continues depth 1; two depths from the same backbone state would be noticed."""
    model, batch = build(ROWS["packed"], "*E", 2)
    with torch.no_grad():
        h_BSD, _ = model.forward_hidden(batch.ids_BS, batch.documents)
        first, second = model.forward_mtp(h_BSD, batch.ids_BS, batch.documents)[0]
        e_BSD = model.backbone.embeddings(shift_left(batch.ids_BS, 2, batch.documents.seq_idx_BS))
        restarted, _ = model.mtp(h_BSD, e_BSD, batch.documents)
        continued, _ = model.mtp(first, e_BSD, batch.documents)
    assert torch.equal(continued, second)
    assert (restarted - second).abs().max() > 0.1


def test_forward_returns_logits_of_all_depths() -> None:
    model, batch = build(ROWS["one document per row"], "*E", 2)
    with torch.no_grad():
        output = model(batch.ids_BS, mtp=True)
        h_BSD, _ = model.forward_hidden(batch.ids_BS)
        hidden, stats = model.forward_mtp(h_BSD, batch.ids_BS)
    assert torch.equal(output.logits, model.lm_head(h_BSD))
    assert len(output.mtp_logits) == 2
    for logits_BSV, hidden_BSD in zip(output.mtp_logits, hidden, strict=True):
        assert torch.equal(logits_BSV, model.lm_head(hidden_BSD))
    assert model(batch.ids_BS).mtp_logits == []
    # One router serves both depths: its load is that of both.
    slots = batch.ids_BS.numel() * model.config.num_experts_per_tok
    assert [int(s.counts_BE.sum()) for s in stats["mtp.layers.1"]] == [slots] * 2


def block_gradients(
    model: HybridLM, ids_BS: Tensor, shares: tuple[float, float], wide: bool
) -> dict[str, Tensor]:
    """Of two uses of the block on different inputs, whose losses count with these shares."""
    model.zero_grad()
    with torch.no_grad():
        e_BSD = model.backbone.embeddings(ids_BS)
        h_BSD, _ = model.forward_hidden(ids_BS)
    parameters = model.mtp.wide() if wide else {}
    probe_BSD = torch.randn(h_BSD.shape, generator=torch.Generator().manual_seed(1))
    loss = torch.zeros(())
    for use, share in enumerate(shares):
        inputs = h_BSD.roll(use, 1), e_BSD.roll(2 * use, 1), None
        out_BSD, _ = functional_call(model.mtp, parameters, inputs)
        loss = loss + share * (out_BSD.float() * probe_BSD.roll(3 * use, 1)).sum()
    loss.backward()
    return {n: p.grad.float() for n, p in model.mtp.named_parameters() if p.grad is not None}


def share_kept(model: HybridLM, ids_BS: Tensor, small: float, wide: bool) -> float:
    """How much of a second use's small share arrives in the bf16 gradient, on average over the
    elements where it is smaller than a rounding step. 1: all; single elements are rounded."""
    both = block_gradients(model, ids_BS, (1.0, small), wide)
    alone = block_gradients(model, ids_BS, (1.0, 0.0), wide)
    second = block_gradients(model.float(), ids_BS, (0.0, 1.0), False)
    model.bfloat16()
    kept, counted = 0.0, 0
    for name, gradient in second.items():
        share = gradient * small
        tiny = (share.abs() < 2.0**-10 * alone[name].abs()) & (share != 0)
        arrived = (both[name] - alone[name])[tiny]
        if count := int(tiny.sum()):
            kept += count * float((arrived * share[tiny]).sum() / share[tiny].square().sum())
            counted += count
    assert counted > 3000
    return kept / counted


def test_gradients_of_the_depths_are_summed_in_fp32_and_rounded_once() -> None:
    """A share of 2^-10 vanishes when gradients are rounded before they are added."""
    model = loud_model(tiny_config("M", mtp_num_depths=2)).bfloat16()
    ids_BS = random_ids(model.config, 4, 33)
    assert 0.7 < share_kept(model, ids_BS, 2.0**-10, wide=True) < 1.5
    assert share_kept(model, ids_BS, 2.0**-10, wide=False) < 0.05


@pytest.mark.parametrize("recompute", ["", "*E"])
def test_the_model_sums_its_depths_so(recompute: str) -> None:
    """The same outputs as with the block's own parameters, and other gradients than theirs."""
    model = loud_model(tiny_config("M", mtp_num_depths=2), recompute=recompute).bfloat16()
    ids_BS = random_ids(model.config, 2, 33)
    with torch.no_grad():
        h_BSD, _ = model.forward_hidden(ids_BS)

    def run() -> tuple[list[Tensor], list[Tensor]]:
        model.zero_grad()
        hidden, _ = model.forward_mtp(h_BSD, ids_BS)
        sum(h.float().square().sum() for h in hidden).backward()
        return hidden, [p.grad.clone() for p in model.mtp.parameters()]

    hidden, gradients = run()
    with patch.object(MTPBlock, "wide", lambda _: {}):
        plain_hidden, plain_gradients = run()
    assert all(torch.equal(a, b) for a, b in zip(hidden, plain_hidden, strict=True))
    assert not any(torch.equal(a, b) for a, b in zip(gradients, plain_gradients, strict=True))
    for ours, plain in zip(gradients, plain_gradients, strict=True):
        assert (ours.float() - plain.float()).norm() < 1e-2 * plain.float().norm()


def test_sums_in_fp32_keep_no_copies_of_weights() -> None:
    """Counted on tensors without data: as much as without such sums; copies would be noticed."""
    with torch.device("meta"):
        model = HybridLM(tiny_config("M", mtp_num_depths=2)).bfloat16()
    ids_BS = torch.zeros(1, 8, dtype=torch.int64, device="meta")
    kept = []
    for wide in (widened, lambda p: p, lambda p: p.float()):
        by_path = backend.choosing(**paths_of("gpu"))
        with patch.object(mtp, "widened", wide), by_path, Meter() as meter:
            meter.owned("", model.parameters())
            held = model.forward_mtp(model.forward_hidden(ids_BS)[0], ids_BS)
            kept.append(meter.live)
            del held
    small = sum(p.numel() for p in model.mtp.parameters() if p.dim() < 2)
    assert 0 <= kept[0] - kept[1] <= 4 * small
    copies = 2 * sum(p.numel() for p in model.mtp.parameters())
    assert kept[2] - kept[1] > copies > 8 * small
