"""Rows that are divided into parts: their documents, the scan and the convolution of the parts, one
after the other, against those of the whole rows."""

from __future__ import annotations

import pytest
import torch

from helpers.bands import SABOTAGE, band, jittered
from kernels.test_ssd import CHUNK, inputs
from nemo_kernels.conv1d import causal_conv1d
from nemo_kernels.documents import Documents, Shard, divided
from nemo_kernels.ssd import entering_states, ssd_scan, ssd_state

REACH, LENGTH = 3, 37
NAMES = ("x", "dt", "A", "B", "C", "D")
CUTS = [
    [1, 36], [36, 1], [3, 34], [CHUNK, LENGTH - CHUNK], [CHUNK + 1, LENGTH - CHUNK - 1],
    [CHUNK - 1, 2 * CHUNK, LENGTH - 3 * CHUNK + 1], [9, 9, 9, 10], [4] * 8 + [5],
]  # fmt: skip
DOCUMENTS = {
    "one": [[37], [37]],
    "at the cuts": [[9, 9, 9, 10], [8, 8, 21]],
    "beside them": [[1, 7, 1, 9, 19], [10, 8, 10, 9]],
    "short": [[1, 2, 3, 1, 1, 1, 28], [30, 1, 1, 5]],
    "one row of many": [[37], [1] * 37],
}
BAND = band(torch.float64, LENGTH) * 8  # sums of sums: of tokens in states, of states in outputs


def packed(lengths: list[list[int]], padding: bool = False) -> Documents:
    numbers_BS = torch.stack(
        [torch.arange(len(row)).repeat_interleave(torch.tensor(row)) for row in lengths]
    )
    starts_BS = torch.ones_like(numbers_BS, dtype=torch.bool)
    starts_BS[:, 1:] = numbers_BS[:, 1:] != numbers_BS[:, :-1]
    return Documents.from_starts(starts_BS, numbers_BS < numbers_BS[:, -1:] if padding else None)


def bounds(sizes: list[int]) -> list[tuple[int, int]]:
    return [(sum(sizes[:part]), sum(sizes[: part + 1])) for part in range(len(sizes))]


def scan_in_parts(t, documents, sizes, chained=True):
    """As processes do it, which then have all states."""
    shards = [Shard.cut(documents, sizes, part, 0) for part in range(len(sizes))]
    parts = [
        {n: v[:, low:high] if v.dim() > 1 else v for n, v in t.items()}
        for low, high in bounds(sizes)
    ]
    states, decays = [], []
    for part, shard in zip(parts, shards, strict=True):
        state, decay = ssd_state(*(part[n] for n in NAMES[:4]), shard.local)
        states.append(state)
        decays.append(decay.masked_fill(~shard.continues_B[:, None], 0))
    states, decays = torch.stack(states), torch.stack(decays)
    entering = entering_states(states, decays if chained else torch.zeros_like(decays))
    return torch.cat(
        [
            ssd_scan(
                *(part[n] for n in NAMES),
                CHUNK,
                shard.local,
                state.masked_fill(~shard.continues_B[:, None, None, None], 0),
            )[0]
            for part, shard, state in zip(parts, shards, entering, strict=True)
        ],
        1,
    )


def with_gradients(function, t):
    leaves = {n: v.clone().requires_grad_() for n, v in t.items()}
    y = function(leaves)
    gen = torch.Generator().manual_seed(9)
    (y * torch.randn(y.shape, generator=gen, dtype=y.dtype)).sum().backward()
    return {"y": y.detach(), **{n: v.grad for n, v in leaves.items()}}


def furthest(ours, theirs):
    return {n: float((ours[n] - t).norm() / t.norm()) for n, t in theirs.items()}


def lasting(decay):
    """Inputs whose states last over parts, or fade within one."""
    t = inputs()
    if decay == "slow":
        return t | {"dt": t["dt"] * 0 + 0.01, "A": t["A"] * 0 - 0.1}
    return t if decay == "middling" else t | {"A": t["A"] - 30}


@pytest.mark.parametrize("decay", ["slow", "middling", "fast"])
@pytest.mark.parametrize("sizes", CUTS, ids=str)
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_scans_of_parts_make_the_scan_of_the_row(documents, sizes, decay):
    t, documents = lasting(decay), packed(documents)

    def at_once():
        return with_gradients(lambda t: ssd_scan(*(t[n] for n in NAMES), CHUNK, documents)[0], t)

    expected = at_once()
    rounding = furthest(jittered(at_once), expected)
    found = furthest(with_gradients(lambda t: scan_in_parts(t, documents, sizes), t), expected)
    for name, distance in found.items():
        assert distance <= max(BAND, 2 * rounding[name]), name


def test_states_that_do_not_pass_through_a_part_are_missed():
    t, documents = lasting("slow"), packed(DOCUMENTS["one"])
    expected = with_gradients(lambda t: ssd_scan(*(t[n] for n in NAMES), CHUNK, documents)[0], t)
    found = with_gradients(lambda t: scan_in_parts(t, documents, CUTS[-2], chained=False), t)
    found = furthest(found, expected)
    del found["D"]
    assert min(found.values()) > 1e6 * BAND, found


def test_gradcheck_of_the_state_of_a_part():
    t = inputs(batch=2, length=5, heads=4, head_dim=2, state=3)
    documents = packed([[2, 3], [5]])

    def state(*values):
        return ssd_state(*values, documents)

    values = [t[n].requires_grad_() for n in NAMES[:4]]
    assert torch.autograd.gradcheck(state, values)
    decay_BH = state(*values)[1]
    assert decay_BH[0].eq(0).all()
    assert decay_BH[1].gt(0).all()


def test_earlier_documents_change_no_bit_of_a_state():
    t, documents = inputs(), packed([[20, 17], [36, 1]])
    names = NAMES[:4]
    before = ssd_state(*(t[n] for n in names), documents)[0]
    for row, end in ((0, 20), (1, 36)):
        for name in ("x", "dt", "B"):
            t[name][row, :end] *= 3
    after = ssd_state(*(t[n] for n in names), documents)[0]
    assert torch.equal(before, after)
    assert not torch.equal(before, ssd_state(*(t[n] for n in names))[0])


def test_bf16_states_are_as_exact_as_their_operands():
    exact, rounded = inputs(dtype=torch.float32), inputs(dtype=torch.bfloat16)
    names = NAMES[:4]
    for name in ("x", "B"):
        exact[name] = rounded[name].float()
    expected = ssd_state(*(exact[n] for n in names))[0]
    found = ssd_state(*(rounded[n] for n in names))[0]
    assert found.dtype == torch.float32
    distance = float((found - expected).norm() / expected.norm())
    assert 0 < distance < band(torch.bfloat16)  # of weighted x


@pytest.mark.parametrize("parts", [1, 2, 3, 5])
def test_entering_states_are_those_of_a_loop(parts):
    gen = torch.Generator().manual_seed(parts)
    states = torch.randn(parts, 2, 4, 3, 5, generator=gen, dtype=torch.float64)
    decays = torch.rand(parts, 2, 4, generator=gen, dtype=torch.float64)
    decays[-1, 0] = 0  # a document begins there, which no state passes
    found = entering_states(states, decays)
    for part in range(parts):
        expected = torch.zeros_like(states[0])
        for before in range(part):
            passed = torch.ones_like(decays[0])
            for between in range(before + 1, part):
                passed = passed * decays[between]
            expected = expected + passed[..., None, None] * states[before]
        assert (found[part] - expected).norm() <= band(torch.float64, parts) * states.norm()


@pytest.mark.parametrize("sizes", [cut for cut in CUTS if min(cut) >= REACH], ids=str)
@pytest.mark.parametrize("documents", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_convolutions_of_parts_with_their_halo_make_that_of_the_row(documents, sizes):
    gen = torch.Generator().manual_seed(0)
    documents = packed(documents)
    t = {
        "x": torch.randn(2, LENGTH, 8, generator=gen, dtype=torch.float64),
        "weight": torch.randn(8, REACH + 1, generator=gen, dtype=torch.float64),
        "bias": torch.randn(8, generator=gen, dtype=torch.float64),
    }

    def in_parts(t, reach=REACH):
        parts = []
        for part, (low, high) in enumerate(bounds(sizes)):
            # Before the first part comes what is no token of the row.
            before = t["x"][:, low - reach : low] if part else t["x"][:, LENGTH - reach :]
            x = torch.cat([before, t["x"][:, low:high]], 1)
            halo = Shard.cut(documents, sizes, part, reach).halo
            parts.append(causal_conv1d(x, t["weight"], t["bias"], halo)[:, reach:])
        return torch.cat(parts, 1)

    expected = with_gradients(lambda t: causal_conv1d(*t.values(), documents), t)
    found = furthest(with_gradients(in_parts, t), expected)
    assert max(found.values()) < BAND, found
    if documents.max_seqlen == LENGTH:
        assert furthest({"y": in_parts(t, 0)}, {"y": expected["y"]})["y"] > SABOTAGE * BAND


@pytest.mark.parametrize("padding", [False, True])
@pytest.mark.parametrize("sizes", CUTS, ids=str)
@pytest.mark.parametrize("lengths", DOCUMENTS.values(), ids=DOCUMENTS.keys())
def test_documents_of_a_part_are_those_of_its_tokens(lengths, sizes, padding):
    documents = packed(lengths, padding)
    numbers_BS, reach = documents.seq_idx_BS, min(REACH, *sizes)
    for part, (low, high) in enumerate(bounds(sizes)):
        shard = Shard.cut(documents, sizes, part, reach)
        continued = [part > 0 and bool(row[low] == row[low - 1]) for row in numbers_BS]
        assert shard.continues_B.tolist() == continued
        own_BS = numbers_BS[:, low:high]
        assert same(shard.local, own_BS)
        before_BS = numbers_BS[:, low - reach : low] if part else torch.full((2, reach), -1)
        assert same(shard.halo, torch.cat([before_BS, own_BS], 1))
        assert same(shard.whole, numbers_BS)
        assert shard.sizes == tuple(sizes)
        if padding:
            assert torch.equal(shard.real_BS, documents.real_BS[:, low:high])
            assert shard.local is None or torch.equal(shard.local.real_BS, shard.real_BS)


def same(documents, numbers_BS):
    """Whether they divide rows as the numbers do."""
    expected = Documents.from_numbers(numbers_BS)
    if documents is None:
        return len(expected.spans) == len(numbers_BS)
    return documents.spans == expected.spans and len(expected.spans) > len(numbers_BS)


def test_parts_are_as_equal_as_can_be():
    assert divided(19, 4) == [5, 5, 5, 4]
    assert divided(3, 4) == [1, 1, 1, 0]
    assert divided(16, 4) == [4] * 4
