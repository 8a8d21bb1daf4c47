"""The meter on operations whose bytes, FLOP, memory and waits can be counted by hand."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.attention.varlen import varlen_attn
from torch.utils.checkpoint import checkpoint

from nemo_hybrid.chips import DEVICES, LAUNCH_S, REACHED, rates
from nemo_hybrid.meter import Meter, Scope, Work
from nemo_kernels.norm import rms_norm

BF16, FP32, INT64 = torch.bfloat16, torch.float32, torch.int64


def meta(*shape: int, dtype: torch.dtype = FP32, grad: bool = False) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta", requires_grad=grad)


def metered(call: Callable[[], Any]) -> Meter:
    with Meter() as meter:
        result = call()
    del result
    return meter


def works(call: Callable[[], Any]) -> list[Work]:
    return [work for (work, _), n in metered(call).works.items() for _ in range(n)]


X, Y, OUT, TABLE = meta(3, 4), meta(3, 4), meta(3, 4), meta(100, 4)  # 48, 48, 48 and 1600 bytes
IDS3 = meta(3, dtype=torch.int32)
IDS, ROWS = meta(2, dtype=INT64), meta(2, 4)  # 16 and 32 bytes


@pytest.mark.parametrize(
    ("call", "size"),
    [
        (lambda: X + Y, 48 + 48 + 48),
        (lambda: X + Y[:, :1].expand(3, 4), 48 + 12 + 48),
        (lambda: X.add_(Y), 48 + 48 + 48),
        (lambda: X.copy_(Y), 48 + 48),
        (lambda: X.zero_(), 48),
        (lambda: torch.mul(X, Y, out=OUT), 48 + 48 + 48),
        (lambda: X.sum(), 48 + 4),
        (lambda: X.to(BF16), 48 + 24),
        (lambda: torch.cat([X, Y]), 96 + 96),
        (lambda: TABLE.index_select(0, IDS), 32 + 16 + 32),
        (lambda: F.embedding(IDS, TABLE), 32 + 16 + 32),
        (lambda: TABLE[IDS], 32 + 16 + 32),
        (lambda: TABLE.index_add_(0, IDS, ROWS), 2 * 32 + 16 + 32),
        (lambda: TABLE.index_put_((IDS,), ROWS), 32 + 16 + 32),
        (lambda: torch.zeros(3, 4, device="meta"), 48),
    ],
)
def test_bytes(call: Callable[[], Any], size: int) -> None:
    (work,) = works(call)
    assert (work.bytes, work.flop, work.launches) == (size, 0, 1)


@pytest.mark.parametrize(
    "call", [lambda: X.t()[1:].unsqueeze(0), lambda: meta(5), lambda: torch.ones(3) + torch.ones(3)]
)
def test_views_allocations_and_the_host_cost_nothing(call: Callable[[], Any]) -> None:
    assert works(call) == []


A, B = meta(8, 16, dtype=BF16), meta(16, 4, dtype=BF16)
WIDE_A, WIDE_B = meta(8, 16), meta(16, 4)
OPERANDS, RESULT = 8 * 16 + 16 * 4, 8 * 4


@pytest.mark.parametrize(
    ("call", "unit", "size"),
    [
        (lambda: A @ B, "library", 2 * (OPERANDS + RESULT)),
        (lambda: torch.mm(A, B, out_dtype=FP32), "library", 2 * OPERANDS + 4 * RESULT),
        (lambda: WIDE_A @ WIDE_B, "fp32", 4 * (OPERANDS + RESULT)),
        (lambda: meta(8, 4).addmm_(WIDE_A, WIDE_B), "fp32", 4 * (OPERANDS + 2 * RESULT)),
        (lambda: WIDE_A[None] @ WIDE_B[None], "fp32 batched", 4 * (OPERANDS + RESULT)),
        (lambda: torch.bmm(A[None], B[None]), "library", 2 * (OPERANDS + RESULT)),
    ],
)
def test_products(call: Callable[[], Any], unit: str, size: int) -> None:
    (work,) = works(call)
    assert (work.flop, work.unit, work.bytes) == (2 * 8 * 16 * 4, unit, size)


@pytest.mark.parametrize(("dtype", "unit"), [(BF16, "grouped"), (FP32, "fp32")])
def test_grouped_products(dtype: torch.dtype, unit: str) -> None:
    """Of 8 rows with the matrices of 3 experts, and of the experts' columns."""
    rows, matrices, ends = meta(8, 16, dtype=dtype), meta(3, 16, 24, dtype=dtype), IDS3
    for call, result in (
        (partial(F.grouped_mm, rows, matrices, offs=ends), (8, 24)),
        (partial(F.grouped_mm, rows.t(), meta(8, 24, dtype=dtype), offs=ends), (3, 16, 24)),
    ):
        with Meter() as meter:
            assert call().shape == result
        ((work, _),) = meter.works
        assert (work.flop, work.unit) == (2 * 8 * 16 * 24, unit)


def test_a_product_with_a_vector_is_a_pass_over_memory() -> None:
    (work,) = works(lambda: WIDE_A @ WIDE_B[:, :1])
    assert (work.flop, work.bytes) == (0, 4 * (8 * 16 + 16 + 8))


@pytest.mark.parametrize("kind", ["causal", "mask", "documents"])
def test_attention(kind: str) -> None:
    """Two products forward, five backward: of all pairs of tokens, or of half of them. With a mask
    that is no less than all; of four equally long documents a quarter of the pairs is left."""
    heads, groups, tokens, width = 4, 2, 32, 16
    packed = kind == "documents"

    def leaf(n: int) -> Tensor:
        shape = (tokens, n, width) if packed else (1, n, tokens, width)
        return meta(*shape, dtype=BF16, grad=True)

    q, k, v, ends = leaf(heads), leaf(groups), leaf(groups), meta(5, dtype=torch.int32)
    mask = meta(1, 1, tokens, tokens, dtype=torch.bool) if kind == "mask" else None

    def run() -> None:
        if packed:
            gqa = {"enable_gqa": True} if "enable_gqa" in varlen_attn.__annotations__ else {}
            y = varlen_attn(q, k, v, ends, ends, 8, 8, window_size=(-1, 0), **gqa)
        else:
            y = F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True
            )
        y.sum().backward()

    meter = metered(run)
    product = 2 * heads * tokens**2 * width * {"causal": 0.5, "mask": 1, "documents": 1 / 8}[kind]
    found = sorted(work.flop for work, _ in meter.works if work.unit == "attention")
    assert found == [2 * product, 5 * product]
    if not packed:
        own = sum(t.nbytes for t in (q, k, v, q)) + 4 * heads * tokens  # and the result, and sums
        kept = sum(meter.kept.values())
        assert kept - own == pytest.approx(2 * tokens**2 if mask is not None else 0, abs=64)


def test_a_norm_is_one_kernel_and_two_backward() -> None:
    """It keeps its input and, with layer norm's in its place, a number per row."""
    x, weight = meta(4, 8, dtype=BF16, grad=True), meta(8, dtype=BF16, grad=True)
    with Meter() as meter:
        meter.owned("", [weight])
        F.rms_norm(x, weight.shape, weight, 1e-5).sum().backward()
    found = {work.name: work for work, _ in meter.works}
    back = found["_fused_rms_norm_backward"]
    assert back.launches == 2
    # dy, x, dx; 1 / rms; the weight and its gradient
    assert back.bytes == 2 + 64 + 64 + 4 * 4 + 16 + 16  # dy is a number
    assert found["native_layer_norm"].bytes == 64 + 64 + 16 + 2 * 4 * 4
    assert sum(meter.kept.values()) == x.nbytes + 4 * 4


def test_attention_is_recomputed_as_it_was() -> None:
    q = meta(1, 2, 32, 16, dtype=BF16, grad=True)

    def run() -> None:
        kinds = {"use_reentrant": False, "preserve_rng_state": False}
        attend = partial(F.scaled_dot_product_attention, is_causal=True)
        checkpoint(attend, q, q, q, **kinds).sum().backward()

    found = Counter(work.name for work in works(run) if work.unit)
    forward = "_scaled_dot_product_flash_attention"
    assert found == {forward: 2, f"{forward}_backward": 1}


def test_attention_in_fp32_is_taken_apart_where_heads_are_in_groups() -> None:
    """Else a kernel takes it, also with half of the pairs, and keeps none of them."""
    q = meta(1, 2, 32, 16, grad=True)
    product = 4 * 2 * 32 * 32 * 16
    for k, flop in ((q[:, :1], product), (q, product // 2)):
        attend = partial(F.scaled_dot_product_attention, q, k, k, is_causal=True, enable_gqa=True)
        found = works(attend)
        assert sum(work.flop for work in found if work.unit == "fp32 batched") == flop
        assert (len(found) == 1) == (flop < product)


class Recomputed(nn.Sequential):
    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(super().forward, x, use_reentrant=False, preserve_rng_state=False)


@pytest.mark.parametrize("kind", [nn.Sequential, Recomputed])
def test_scopes_of_forward_and_backward(kind: type[nn.Sequential]) -> None:
    """Of a layer within another one, of the one around it, and of neither."""
    with torch.device("meta"):
        outer = kind(nn.Linear(4, 4, bias=False), nn.ReLU())
        x = torch.empty(2, 4, requires_grad=True)
    names: dict[type[nn.Module], tuple[str | None, str | None]] = {
        kind: ("outer", "own"), nn.Linear: (None, "linear")
    }  # fmt: skip
    with Meter("rest") as meter, meter.following(outer, lambda m: names.get(type(m))):
        (outer(x) * 2).sum().backward()
    found: dict[Scope, Counter[str]] = {}
    for (work, scope), n in meter.works.items():
        found.setdefault(scope, Counter())[work.name] += n
    again = 1 if kind is Recomputed else 0
    assert found[Scope("outer", "linear")]["mm"] == 3 + again
    own = {"relu": 1 + again, "threshold_backward": 1}
    assert found[Scope("outer", "own")] == own
    assert set(found) == {Scope("outer", "linear"), Scope("outer", "own"), Scope("", "rest")}


def test_scopes_of_what_adds_to_gradients() -> None:
    """A second gradient of a parameter is added to the first."""
    weight = meta(4, 4, grad=True)
    with Meter("adding") as meter:
        meter.owned("mine", [weight])
        for _ in range(2):
            with meter.scope("part", "op"):
                y = (weight * 2).sum()
            y.backward()
    found = [work.name for work, scope in meter.works if scope == Scope("mine", "adding")]
    assert found == ["add_"]


def test_following_ends() -> None:
    layer = nn.Linear(2, 2)
    with Meter() as meter, meter.following(layer, lambda module: ("", "linear")):
        pass
    assert not layer._forward_hooks
    assert not layer._forward_pre_hooks


def test_what_the_backward_pass_keeps() -> None:
    """Of the norm its input and a number per row, but not the weight."""
    x, weight = meta(4, 8, dtype=BF16, grad=True), meta(8, dtype=BF16, grad=True)
    with Meter() as meter:
        meter.owned("", [weight])
        y = rms_norm(x, weight, 1e-5)
        z = y.exp()  # keeps its result
    assert sum(meter.kept.values()) == x.nbytes + 4 * 4 + z.nbytes


def test_memory() -> None:
    with Meter() as meter:
        a = torch.zeros(100, device="meta")
        b = a + 1
        assert (meter.live, meter.peak) == (800, 800)
        view = a[10:]
        del a
        assert meter.live == 800
        del view
        assert meter.live == 400
        b += b * 2
        assert (meter.live, meter.peak) == (400, 800)
        torch.zeros(50)  # on the host
        assert meter.live == 400


@pytest.mark.parametrize(
    "call",
    [
        lambda: X.sum().item(),
        lambda: bool(X.sum() > 0),
        lambda: int(IDS.sum()),
        lambda: IDS.tolist(),
        lambda: X.cpu(),
        lambda: X.nonzero(),
        lambda: torch.zeros(3, 4).copy_(X),
        lambda: X.copy_(torch.zeros(3, 4)),
        lambda: torch.zeros(3).to("meta"),
        lambda: torch.zeros(3).to("meta", non_blocking=True),
        lambda: torch.tensor([1.0, 2.0], device="meta"),
    ],
)
def test_waits(call: Callable[[], Any]) -> None:
    assert sum(metered(call).waits.values()) == 1


@pytest.mark.parametrize(
    "call", [lambda: X.to(BF16), lambda: X.clamp(min=0), lambda: torch.zeros(3).sum().item()]
)
def test_what_does_not_wait(call: Callable[[], Any]) -> None:
    assert not metered(call).waits


def test_time_is_the_longest_of_three() -> None:
    at = rates(DEVICES["h200"])
    assert at.bytes_per_s == pytest.approx(4e12)
    assert at.flop_per_s["fp32"] == pytest.approx(50e12)
    assert at.flop_per_s["library"] == pytest.approx(600e12)
    assert Work("", 2, 8).seconds(at) == 2 * LAUNCH_S
    assert Work("", 1, 4 * 10**9).seconds(at) == pytest.approx(1e-3)
    assert Work("", 1, 8, 10**12, "", "fp32").seconds(at) == pytest.approx(1 / 50)


def test_every_device_reaches_the_same_shares() -> None:
    for device in DEVICES.values():
        for kind, share in REACHED.items():
            sheet = device.fp32_tflops if kind.startswith("fp32") else device.matmul_tflops
            assert rates(device).flop_per_s[kind] == pytest.approx(share * sheet * 1e12)
    assert all(0 < share < 1 for share in REACHED.values())
