"""The modelled step: against formulas, the whole model, and computations that cost more."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from helpers.corpus import TINY_MODEL
from nemo_hybrid.chips import DEVICES, rates
from nemo_hybrid.commands.memory import Layout, peak
from nemo_hybrid.commands.step_time import OPS, Counted, count, paths_of, report
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.read import load_config
from nemo_hybrid.meter import Meter
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.objectives.next_token import NextToken
from nemo_hybrid.train.flops import train_flops_per_token
from nemo_kernels import backend
from nemo_kernels.attention import reference
from nemo_kernels.ssd import ssd_scan

MODELS = Path(__file__).parents[2] / "configs" / "model"
TINY = HybridConfig(**TINY_MODEL)
REFERENCE = paths_of("reference")
H200 = DEVICES["h200"]


def layout(cfg: Any = TINY, length: int = 64, **changed: Any) -> Layout:
    given = {
        "processes": 1, "ep": 1, "zero": 1, "width": 2, "rows": 1, "recompute": "",
        "accumulation": 16, "cpu": False, "reference": (), "host_copy": False,
    }  # fmt: skip
    return Layout(cfg=cfg, length=length, **given | changed)


def of_layer(counted: Counted, part: str, op: str | None = None) -> Counter[str]:
    """Bytes and launches of one layer of a kind."""
    found: Counter[str] = Counter()
    for (work, scope), n in counted.micro_batch.items():
        if scope.part == part and scope.op != "optimizer" and op in (None, scope.op):
            found += {"bytes": n * work.bytes, "launches": n * work.launches}
    layers = counted.at.cfg.pattern.count(part)
    return Counter({name: total // layers for name, total in found.items()})


@pytest.fixture(scope="module")
def nano_3b() -> Counted:
    """8192 tokens, by the paths that were there before this project had kernels for all of it."""
    cfg = load_config([], ["--model", str(MODELS / "nano_3b.yaml")]).model.hybrid()
    return count(layout(cfg, 8192), REFERENCE)


def test_nano_3b_takes_what_a_review_estimated(nano_3b: Counted) -> None:
    """Estimated by hand from traffic and FLOP: 70 to 72 us per token, of them 42 for the head in
    fp32; MFU 11 %; 27 % of FLOP in fp32. Traffic of SSD, convolution and gated norm in kB per token
    and layer, and launches of a Mamba layer, were counted then by another program."""
    found = report(nano_3b, H200)
    assert 70 * 0.9 < found["us_per_token"] < 72 * 1.1
    assert sum(of["us"] for of in found["ops"].values()) == pytest.approx(found["us_per_token"])
    assert set(found["ops"]) == set(OPS)
    assert found["mfu"] == pytest.approx(0.11, rel=0.05)
    assert found["fp32_matmul_flop_share"] == pytest.approx(0.27, abs=0.01)
    assert found["ops"]["loss"]["us"] == pytest.approx(42.3 + 1.05, rel=0.02)
    plain = of_layer(nano_3b, "E", "norm")["bytes"]
    for op, expected in (("ssd", 2718), ("conv1d", 1450), ("norm", 738)):
        size = of_layer(nano_3b, "M", op)["bytes"] - (plain if op == "norm" else 0)
        assert size / 8192 / 1e3 == pytest.approx(expected, rel=0.03)
    assert of_layer(nano_3b, "M")["launches"] == 427


@pytest.fixture(scope="module")
def on_gpu() -> Counted:
    """A layer of each kind, by the paths that a GPU takes."""
    pytest.importorskip("triton")
    cfg = load_config([], ["--model", str(MODELS / "nano_3b.yaml")]).model.hybrid()
    return count(layout(cfg, 8192), paths_of("gpu"), whole=False)


def test_the_head_multiplies_in_bf16_and_does_not_wait(on_gpu: Counted) -> None:
    """Three products of 2 V D FLOP; beside them little time, and no fp32."""
    found = [(work, n) for (work, scope), n in on_gpu.micro_batch.items() if scope.op == "loss"]
    assert {work.unit for work, _ in found} == {"", "library"}
    cfg, tokens = on_gpu.at.cfg, on_gpu.at.tokens
    flop = sum(n * work.flop for work, n in found) / tokens
    assert flop == 3 * 2 * cfg.vocab_size * cfg.hidden_size
    us = sum(n * work.seconds(rates(H200)) for work, n in found) * 1e6 / tokens
    assert us < 1.2 * flop / rates(H200).flop_per_s["library"] * 1e6


def test_the_step_as_a_whole(on_gpu: Counted) -> None:
    """A third of what it took before, and no product in fp32."""
    found = report(on_gpu, H200)
    assert found["us_per_token"] <= 22
    assert found["mfu"] > 0.36
    assert found["fp32_matmul_flop_share"] < 0.005


def test_no_micro_batch_waits_for_the_device(on_gpu: Counted) -> None:
    assert not +on_gpu.waits


def test_the_router_multiplies_in_bf16(on_gpu: Counted) -> None:
    """Forward once, backward each of two products as the sum of two."""
    works = [(w, n) for (w, s), n in on_gpu.micro_batch.items() if s.op == "moe" and w.flop]
    assert {work.unit for work, _ in works} == {"library", "grouped"}
    cfg, tokens = on_gpu.at.cfg, on_gpu.at.tokens
    flop = sum(n * work.flop for work, n in works if work.unit == "library") / tokens
    layers = cfg.pattern.count("E")
    assert flop == layers * 5 * 2 * cfg.n_routed_experts * cfg.hidden_size


@pytest.mark.parametrize("documents", [1, 80])
def test_a_mamba_layer_by_our_kernels(documents: int) -> None:
    """However many documents the row holds."""
    pytest.importorskip("triton")
    cfg = load_config([], ["--model", str(MODELS / "nano_3b.yaml")]).model.hybrid()
    found = count(layout(cfg, 8192), paths_of("gpu"), documents, whole=False)
    convolution = of_layer(found, "M", "conv1d")
    assert convolution["bytes"] / 8192 <= 100e3
    assert convolution["launches"] == 4
    # Twelve are the mixer's own: dt, A, and gradients put together.
    scan = of_layer(found, "M", "ssd")
    assert scan["bytes"] / 8192 <= 1000e3
    assert scan["launches"] == 28 + 12
    assert of_layer(found, "M")["launches"] <= 60


def test_the_gated_norm_passes_over_its_tensors_once_in_each_direction(on_gpu: Counted) -> None:
    """x, gate and output forward; these inputs, the gradient of the output and theirs backward."""
    found = {
        work.name: (n, work.bytes) for (work, scope), n in on_gpu.micro_batch.items()
        if work.name.startswith("gated_norm")
    }  # fmt: skip
    cfg, tokens = on_gpu.at.cfg, on_gpu.at.tokens
    assert {n for n, _ in found.values()} == {cfg.pattern.count("M")}
    size = sum(size for _, size in found.values()) / tokens
    assert size == pytest.approx(8 * 2 * cfg.mamba_inner_size, rel=0.03)
    assert size < 110e3


@pytest.mark.parametrize("deterministic", [False, True])
def test_attention_keeps_nothing_for_pairs_of_tokens(deterministic: bool) -> None:
    """Of a packed row of 8192 its operands and result, and a number per token and head."""
    cfg = load_config([], ["--model", str(MODELS / "nano_3b.yaml")]).model.hybrid()
    cfg = replace(cfg, pattern="*")
    torch.use_deterministic_algorithms(deterministic)
    try:
        found = count(layout(cfg, 8192), paths_of("gpu"), 4)
    finally:
        torch.use_deterministic_algorithms(False)
    heads = 2 * cfg.num_attention_heads + 2 * cfg.num_key_value_heads
    own = 2 * 8192 * heads * cfg.head_dim
    assert 0 < found.kept["*", "attention"] - own < 2e6


def test_flop_are_those_of_the_formula(nano_3b: Counted) -> None:
    """But that attention's backward pass multiplies once more, and a chunk's products are whole."""
    at = nano_3b.at
    flop = sum(n * work.flop for (work, _), n in nano_3b.micro_batch.items()) / at.tokens
    again = 2 * at.length * at.cfg.num_attention_heads * at.cfg.head_dim * at.cfg.pattern.count("*")
    assert (flop - again / 2) == pytest.approx(train_flops_per_token(at.cfg, at.length), rel=0.01)


def test_memory_is_that_of_the_plan(nano_3b: Counted) -> None:
    """Which is estimated from other formulas, and adds buffers for the reduction."""
    assert nano_3b.peak == pytest.approx(peak(nano_3b.at).device, rel=0.1)


@pytest.mark.parametrize(("path", "expected"), [("reference", 3.26e9), ("triton", 0.80e9)])
def test_what_one_row_of_a_scan_takes(path: str, expected: float) -> None:
    def leaf(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(1, *shape, dtype=dtype, device="meta", requires_grad=True)

    if path == "triton":
        pytest.importorskip("triton")
    fp32 = torch.float32
    with Meter() as meter, backend.choosing(ssd=path):
        x, *others = leaf(8192, 64, 64), leaf(8192, 8, 128), leaf(8192, 8, 128)
        A_H, D_H = leaf(64, dtype=fp32)[0], leaf(64, dtype=fp32)[0]
        y, _ = ssd_scan(x, leaf(8192, 64, dtype=fp32), A_H, *others, D_H, 128)
        y.backward(leaf(8192, 64, 64))
    assert meter.peak == pytest.approx(expected, rel=0.05)
    if path == "triton":
        assert meter.peak <= expected


def test_memory_of_a_scan_grows_with_its_tensors_alone() -> None:
    """What goes in and comes out, with gradients, some of it as parts and as a whole; what is kept.
    Of eight times the tokens all at once it were eight times as much."""
    pytest.importorskip("triton")
    above = []
    for tokens in (8192, 65536):
        x, B, C = (
            torch.empty(1, tokens, n, m, dtype=torch.bfloat16, device="meta", requires_grad=True)
            for n, m in ((64, 64), (8, 128), (8, 128))
        )
        dt = torch.empty(1, tokens, 64, device="meta", requires_grad=True)
        A_H, D_H = torch.empty(2, 64, device="meta", requires_grad=True)
        with Meter() as meter, backend.choosing(ssd="triton"):
            y, _ = ssd_scan(x, dt, A_H, B, C, D_H, 128)
            y.backward(torch.empty_like(y))
        tensors = 2 * sum(t.nbytes for t in (x, dt, B, C)) + 2 * x.nbytes
        above.append(meter.peak - tensors - sum(meter.kept.values()))
    assert above[1] < 1.5 * above[0]


def test_a_token_is_decoded_in_place_and_without_waiting() -> None:
    """So that a CUDA graph can hold it: no value is read or comes from the host, and of a token
    nothing stays but its hidden state."""
    pytest.importorskip("triton")
    with torch.device("meta"):
        model = HybridLM(TINY).bfloat16()
        caches, ids_B = model.new_caches(2, 32), torch.zeros(2, dtype=torch.int64)
    tensors = [t for cache in caches.layers if cache for t in vars(cache).values()]
    with Meter() as meter, backend.choosing(**paths_of("gpu")), torch.no_grad():
        states = [model.decode(ids_B, caches)]
        once = meter.live
        states.append(model.decode(ids_B, caches))
    assert meter.live == 2 * once == sum(h_BD.nbytes for h_BD in states)
    assert not +meter.waits
    after = [t for cache in caches.layers if cache for t in vars(cache).values()]
    assert all(a is b for a, b in zip(after, tensors, strict=True))


@pytest.mark.parametrize("changed", [{"recompute": "ME*-"}, {"ep": 4, "processes": 4}])
def test_one_layer_of_each_kind_stands_for_all(changed: dict[str, Any]) -> None:
    at = layout(**changed)
    sample, whole = (count(at, REFERENCE, 2, all_of_it) for all_of_it in (False, True))
    assert sum(sample.seconds(H200)) == pytest.approx(sum(whole.seconds(H200)), rel=0.01)
    for op in ("ssd", "conv1d", "moe", "attention", "optimizer"):
        found = [
            sum(n * work.bytes for (work, scope), n in c.micro_batch.items() if scope.op == op)
            for c in (sample, whole)
        ]
        assert found[0] == found[1] > 0
    # The first layer keeps the documents' numbers for all.
    assert sample.kept["M", "ssd"] == pytest.approx(whole.kept["M", "ssd"], rel=0.01)


def test_recomputation_is_a_second_forward_pass() -> None:
    def products(recompute: str) -> int:
        found = count(layout(recompute=recompute), REFERENCE).micro_batch
        return sum(n for (w, s), n in found.items() if s == ("M", "linear") and w.flop)

    assert products("") == 2 * 6  # two layers, two matrices, three products of each
    # The backward pass asks for nothing that the last product gives: torch stops before it.
    assert products("M") == 2 * 7


def test_experts_over_processes_move_rows_more_often() -> None:
    """Every process has as many rows as without, but sorts them twice and asks for their number."""
    alone, shared = count(layout(), REFERENCE), count(layout(ep=4, processes=4), REFERENCE)
    moved = [of_layer(c, "E", "moe")["bytes"] for c in (alone, shared)]
    assert moved[1] > 1.1 * moved[0]
    passes = TINY.pattern.count("E") + TINY.mtp_num_depths * TINY.mtp_pattern.count("E")
    assert shared.waits["values read"] - alone.waits["values read"] == passes
    found = [(w.name, n) for (w, s), n in shared.micro_batch.items() if s.op == "moe"]
    scattered = sum(n for name, n in found if "index_put" in name or "index_add" in name)
    assert scattered == passes  # the inverse of an order, forward


def test_an_update_is_shared_by_more_micro_batches() -> None:
    once, often = (count(layout(accumulation=n), REFERENCE, 1, False) for n in (1, 4))
    assert once.seconds(H200) == often.seconds(H200)
    us = [report(counted, H200)["us_per_token"] for counted in (once, often)]
    assert us[0] - us[1] == pytest.approx(once.seconds(H200)[1] * 0.75 / 64 * 1e6)


def test_a_head_in_fp32_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    learn = NextToken._learn

    def with_logits(self: NextToken, batch: Any, hidden: list[Tensor], targets: Any) -> Any:
        with torch.no_grad():
            hidden[0].flatten(0, 1).float() @ self.model.lm_head.weight.float().t()
        return learn(self, batch, hidden, targets)

    def fp32() -> float:
        units = report(count(layout(), REFERENCE), H200)["units"]
        return float(units["fp32, float32"]["flop_per_token"])

    before = fp32()
    monkeypatch.setattr(NextToken, "_learn", with_logits)
    assert fp32() - before == pytest.approx(2 * TINY.vocab_size * TINY.hidden_size)


def test_a_wait_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    learn = NextToken._learn

    def asks(self: NextToken, *given: Any) -> Any:
        loss, sums = learn(self, *given)
        loss.item()
        return loss, sums

    before = report(count(layout(), REFERENCE), H200)["host_syncs_per_micro_batch"]
    monkeypatch.setattr(NextToken, "_learn", asks)
    after = report(count(layout(), REFERENCE), H200)["host_syncs_per_micro_batch"]
    assert after == before + 1


def test_a_dense_mask_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two bytes for each pair of tokens, kept in every attention layer, also the MTP block's."""

    def masked(q: Tensor, k: Tensor, v: Tensor, documents: Any = None) -> Tensor:
        q, k, v = (t.transpose(1, 2) for t in (q, k, v))
        mask = torch.ones(1, 1, q.shape[2], q.shape[2], dtype=torch.bool, device=q.device)
        o = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=True)
        return o.transpose(1, 2)

    def kept() -> float:
        ops = report(count(layout(length=512), REFERENCE), H200)["ops"]
        return float(ops["attention"]["kept_bytes"])

    before = kept()
    monkeypatch.setattr(reference, "attention", masked)
    layers = TINY.pattern.count("*") + TINY.mtp_num_depths * TINY.mtp_pattern.count("*")
    assert kept() - before == pytest.approx(layers * 2 * 512**2, rel=0.01)


def test_paths() -> None:
    assert set(REFERENCE.values()) <= {"reference", "triton", "grouped_mm"}
    assert {op for op, path in REFERENCE.items() if path != "reference"} == {"moe"}
    assert paths_of("gpu")["moe"] == REFERENCE["moe"]


def test_libraries_that_are_installed_are_not_asked(monkeypatch) -> None:
    """Their kernels need data: on a machine that has them the same is counted as elsewhere."""
    before = paths_of("gpu")
    monkeypatch.setattr(backend, "_probe", lambda module: "")
    assert paths_of("gpu") == before
    assert backend.importable("attention", ["flash_attn"]) == ["flash_attn"]
