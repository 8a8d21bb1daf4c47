"""Reading in pieces, taking tokens back and decoding, against the full forward pass.

The truth is the full forward pass in fp64. Reading sums in another order than the full pass in
fp32, so its error is another draw of the same size: FACTOR times the full pass's own error is
allowed, both in the Euclidean norm relative to the truth (found: up to 1.3 times). That error is a
few roundings, 1e-7 to 6e-7; every sabotage below is above 1e-2.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from contextlib import AbstractContextManager
from copy import deepcopy
from dataclasses import replace
from functools import cache
from typing import NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from helpers.generated import greedy
from helpers.tiny_models import CHUNK, CONV, decided_model, loud_model, random_ids, tiny_config
from nemo_hybrid.generation import batched
from nemo_hybrid.model import attention as attention_module
from nemo_hybrid.model import layer as layer_module
from nemo_hybrid.model.cache import After, AttentionCache, Caches, MambaCache, commit
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.mamba2 import CausalConv1d
from nemo_kernels import checks

PATTERNS = ["M", "*", "E", "-", "ME*-ME"]
ROWS, LENGTH = 3, 3 * CHUNK + 2
# None, one, around the convolution's width, around a chunk.
COUNTS = [0, 1, CONV - 2, CONV - 1, CONV, CONV + 1, CHUNK - 1, CHUNK, CHUNK + 1]
FACTOR = 4
NOTICED = 1e-2
DRAFT = 5
Pieces = list[list[int]]  # tokens of each row, piece by piece


def off(ours: Tensor, right: Tensor) -> float:
    return float((ours.double() - right.double()).norm() / right.double().norm())


class Case(NamedTuple):
    """A model with a text [B, S], the text's hidden states [B, S, D] in fp64, and how far others
    may be off."""

    model: HybridLM
    ids_BS: Tensor
    truth_BSD: Tensor
    allowed: float

    def right(self, h_BSD: Tensor) -> bool:
        return off(h_BSD, self.truth_BSD) <= self.allowed


@cache
def case_of(pattern: str) -> Case:
    config = tiny_config(pattern)
    ids_BS = random_ids(config, ROWS, LENGTH)
    # No router, which computes in fp32 always, decides closely.
    model = decided_model(config, ids_BS, 1e-4).requires_grad_(False)
    truth_BSD = whole(deepcopy(model).double(), ids_BS)
    return Case(model, ids_BS, truth_BSD, FACTOR * off(whole(model, ids_BS), truth_BSD))


def whole(model: HybridLM, ids_BS: Tensor) -> Tensor:
    return model.forward_hidden(ids_BS)[0]


def division(seed: int) -> Pieces:
    """Every row divided for itself."""
    draw, left, pieces = random.Random(seed), [LENGTH] * ROWS, []
    while any(left):
        pieces.append([min(rest, draw.choice(COUNTS)) for rest in left])
        left = [rest - count for rest, count in zip(left, pieces[-1], strict=True)]
    return pieces


def padded(ids_BS: Tensor, read: list[int], counts: list[int], fill: int = 0) -> Tensor:
    """The next tokens of each row, with at least one id behind them that is none of its text."""
    out = torch.full((len(counts), max(counts) + 1), fill)
    for row, (start, count) in enumerate(zip(read, counts, strict=True)):
        out[row, :count] = ids_BS[row, start : start + count]
    return out


def read_in_pieces(
    model: HybridLM, ids_BS: Tensor, pieces: Pieces, fill: int = 0, mtp: bool = False
) -> tuple[Tensor, Caches]:
    """Hidden states of the text [B, S, D], of MTP's depth 1 if asked for, and the caches."""
    caches = model.new_caches(len(ids_BS), 2 * LENGTH, mtp)
    next_BS = ids_BS.roll(-1, 1)
    out_BSD = model.lm_head.weight.new_zeros(*ids_BS.shape, model.config.hidden_size)
    read = [0] * len(ids_BS)
    for counts in pieces:
        counts_B = torch.tensor(counts)
        h_BSD, after = model.read(padded(ids_BS, read, counts, fill), counts_B, caches)
        commit(caches, after)
        if mtp:
            ahead_BS = padded(next_BS, read, counts, fill)
            h_BSD, after = model.read_mtp(h_BSD, ahead_BS, counts_B, caches)
            commit(caches.mtp, after)
        for row, count in enumerate(counts):
            out_BSD[row, read[row] : read[row] + count] = h_BSD[row, :count]
            read[row] += count
    return out_BSD, caches


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seed", range(6))
def test_any_division_of_a_text_gives_the_full_forward_pass(pattern: str, seed: int) -> None:
    case = case_of(pattern)
    h_BSD, caches = read_in_pieces(case.model, case.ids_BS, division(seed))
    assert case.right(h_BSD)
    assert caches.lengths_B.tolist() == [LENGTH] * ROWS


@pytest.mark.parametrize("first", COUNTS)
def test_texts_are_divided_at_every_place_that_matters(first: int) -> None:
    """Rows at different places, read on by one, by decoding, and by the rest."""
    case = case_of("ME*-ME")
    starts = [first, LENGTH - 2, min(first + 1, LENGTH - 2)]
    rest = [LENGTH - 1 - start for start in starts]
    h_BSD, _ = read_in_pieces(case.model, case.ids_BS, [starts, [1, 1, 1], rest])
    assert case.right(h_BSD)

    _, caches = read_in_pieces(case.model, case.ids_BS, [starts])
    every_B = torch.arange(ROWS)
    for step in range(2):
        place_B = torch.tensor(starts) + step
        h_BD = case.model.decode(case.ids_BS[every_B, place_B], caches)
        assert off(h_BD, case.truth_BSD[every_B, place_B]) <= case.allowed
    assert caches.lengths_B.tolist() == [start + 2 for start in starts]


def test_logits_are_those_of_the_full_forward_pass() -> None:
    case = case_of("ME*-ME")
    h_BSD, _ = read_in_pieces(case.model, case.ids_BS, division(0))
    head = case.model.lm_head.weight.double()
    assert off(case.model.logits(h_BSD), case.truth_BSD @ head.t()) <= case.allowed
    assert off(case.model(case.ids_BS).logits, case.truth_BSD @ head.t()) <= case.allowed


# -- What must be noticed


def no_time_mask(*args: object) -> object:
    now = REAL_READING(*args)
    return replace(now, real_BS=torch.ones_like(now.real_BS))


def shifted_gather(self: CausalConv1d, x: Tensor, state: Tensor, counts_B: Tensor) -> object:
    return REAL_CONV_READ(self, x, state, (counts_B - 1).clamp(min=0))


def one_too_far(q: Tensor, k: Tensor, v: Tensor, before_B: Tensor) -> Tensor:
    return REAL_ATTENTION(q, k, v, before_B + 1)


def lengths_alone(caches: Caches, after: After) -> None:
    caches.lengths_B += after.counts_B


NAME = "attention_read"
REAL_READING, REAL_CONV_READ = layer_module.reading, CausalConv1d.read
REAL_ATTENTION = getattr(attention_module, NAME)
SABOTAGES: dict[str, tuple[str, Callable[[], AbstractContextManager[object]]]] = {
    "no mask of time": ("M", lambda: patch.object(layer_module, "reading", no_time_mask)),
    "gather shifted by one": ("M", lambda: patch.object(CausalConv1d, "read", shifted_gather)),
    "sees a token more": ("*", lambda: patch.object(attention_module, NAME, one_too_far)),
    "Mamba states not committed": ("M", lambda: patch(f"{__name__}.commit", lengths_alone)),
}


@pytest.mark.parametrize("name", SABOTAGES)
def test_the_comparison_notices(name: str) -> None:
    letter, sabotage = SABOTAGES[name]
    for pattern in (letter, "ME*-ME"):
        case = case_of(pattern)
        with sabotage():
            h_BSD, _ = read_in_pieces(case.model, case.ids_BS, division(0))
        assert off(h_BSD, case.truth_BSD) > NOTICED


@pytest.mark.parametrize("part", ["conv_BCJ", "ssm_BHPN", "k_BTGP", "v_BTGP"])
def test_every_part_of_a_cache_matters(part: str) -> None:
    case = case_of("M" if part in ("conv_BCJ", "ssm_BHPN") else "*")
    _, caches = read_in_pieces(case.model, case.ids_BS, [[LENGTH - 1] * ROWS])
    getattr(caches.layers[0], part).zero_()
    h_BD = case.model.decode(case.ids_BS[:, -1], caches)
    assert off(h_BD, case.truth_BSD[:, -1]) > NOTICED


# -- What must not matter


@pytest.mark.parametrize("pattern", PATTERNS)
def test_ids_that_pad_change_no_bit(pattern: str) -> None:
    case = case_of(pattern)
    read = [read_in_pieces(case.model, case.ids_BS, division(1), fill)[0] for fill in (0, 1, 60)]
    assert torch.equal(read[0], read[1])
    assert torch.equal(read[0], read[2])


@pytest.mark.parametrize("pattern", ["M", "*", "-", "E", "M*-M", "ME*-ME"])
def test_other_rows_change_no_bit(pattern: str) -> None:
    """Other texts in the other rows, and other numbers of their tokens; experts then work on other
    tokens together, whose sums may be ordered otherwise: both results are draws of the same error,
    that of one MoE layer 2e-7, which FACTOR keeps below 1e-6 (found between them: 8e-8)."""
    case, pieces = case_of(pattern), division(2)
    other_BS = random_ids(case.model.config, ROWS, LENGTH, seed=1)
    other_BS[1] = case.ids_BS[1]
    elsewhere = [[counts[2], counts[1], counts[0]] for counts in pieces]
    ours_BSD, _ = read_in_pieces(case.model, case.ids_BS, pieces)
    theirs_BSD, _ = read_in_pieces(case.model, other_BS, elsewhere)
    assert off(theirs_BSD[1], case.truth_BSD[1]) <= case.allowed
    assert off(theirs_BSD[1], ours_BSD[1]) <= case.allowed <= (1e-6 if pattern == "E" else 1e-5)
    assert "E" in pattern or torch.equal(theirs_BSD[1], ours_BSD[1])
    assert off(theirs_BSD[0], ours_BSD[0]) > NOTICED


def clear_scratch(caches: Caches, fill: float = 0.0) -> None:
    """Set what stands behind the rows' lengths."""
    for held in caches.layers:
        if isinstance(held, AttentionCache):
            behind_BT = torch.arange(held.k_BTGP.shape[1]) >= caches.lengths_B[:, None]
            held.k_BTGP[behind_BT] = fill
            held.v_BTGP[behind_BT] = fill


def test_what_stands_behind_a_length_changes_no_bit() -> None:
    model, ids_BS, *_ = case_of("M*-M")
    states = []
    for scratch in (0.0, 1e30, -1e30):
        _, caches = read_in_pieces(model, ids_BS, [[5, 9, 20]])
        clear_scratch(caches, scratch)
        states.append(model.decode(ids_BS[:, 20], caches))
    assert torch.equal(states[0], states[1])
    assert torch.equal(states[0], states[2])


def test_rows_without_tokens_stay_to_the_bit() -> None:
    model, ids_BS, *_ = case_of("ME*-ME")
    _, caches = read_in_pieces(model, ids_BS, [[5, 9, 20]])
    clear_scratch(caches)
    before = [x.clone() for x in tensors(caches)]
    _, after = model.read(ids_BS[:, :4], torch.zeros(ROWS, dtype=torch.int64), caches)
    commit(caches, after)
    clear_scratch(caches)
    assert all(map(torch.equal, tensors(caches), before))
    _, after = model.read(ids_BS[:, :4], torch.tensor([0, 0, 1]), caches)
    commit(caches, after)
    clear_scratch(caches)
    same = [[torch.equal(a, b) for a, b in zip(x, y, strict=True)] for x, y in
            zip(tensors(caches), before, strict=True)]  # fmt: skip
    assert same == [[True, True, False]] * len(before)


def test_a_batch_may_be_empty() -> None:
    """As that of a process which takes part in expert parallelism without texts of its own."""
    model = case_of("ME*-ME").model
    none_B = torch.zeros(0, dtype=torch.int64)
    caches = model.new_caches(0, 5)
    h_BSD, after = model.read(none_B[:, None].expand(0, 3), none_B, caches)
    commit(caches, after)
    assert h_BSD.shape == (0, 3, model.config.hidden_size)
    assert model.logits(model.decode(none_B, caches)).shape == (0, model.config.vocab_size)


# -- Taking tokens back


def tensors(caches: Caches) -> list[Tensor]:
    return [caches.lengths_B, *(x for held in caches.layers if held for x in vars(held).values())]


@pytest.mark.parametrize("pattern", PATTERNS)
def test_tokens_that_are_not_committed_leave_no_bit(pattern: str) -> None:
    model, ids_BS, *_ = case_of(pattern)
    wrong_BS = random_ids(model.config, ROWS, 9, seed=3)
    accepted = [0, 3, 8]

    def then(drafts: bool) -> list[Tensor]:
        _, caches = read_in_pieces(model, ids_BS, [[5, 9, 12]])
        if drafts:
            model.read(wrong_BS, torch.tensor([9, 8, 9]), caches)
        right_BS = padded(ids_BS, [5, 9, 12], accepted)
        h_BSD, after = model.read(right_BS, torch.tensor(accepted), caches)
        commit(caches, after)
        kept = [h_BSD[row, :count] for row, count in enumerate(accepted)]
        return [*kept, model.decode(ids_BS[:, 20], caches)]

    assert all(map(torch.equal, then(drafts=True), then(drafts=False)))


@pytest.mark.parametrize("pattern", PATTERNS)
def test_a_reading_that_is_revised_is_one_of_fewer_tokens(pattern: str) -> None:
    """Bit for bit, but up to rounding behind experts."""
    model, ids_BS, *_ = case_of(pattern)
    drafts_BS, fewer_B = ids_BS[:, 12:20], torch.tensor([0, 3, 8])

    def then(revised: bool, counts_B: Tensor = fewer_B) -> list[Tensor]:
        _, caches = read_in_pieces(model, ids_BS, [[5, 9, 12]])
        if revised:
            _, after = model.read(drafts_BS, torch.full((ROWS,), 8), caches, revisable=True)
            after = model.revise(after, counts_B, caches)
        else:
            _, after = model.read(drafts_BS, counts_B, caches)
        commit(caches, after)
        clear_scratch(caches)
        return tensors(caches)

    for ours, theirs in zip(then(True), then(False), strict=True):
        assert off(ours, theirs) < 1e-5 if "E" in pattern else torch.equal(ours, theirs)
    others = then(True, fewer_B + torch.tensor([1, -1, 0]))
    assert off(others[0], then(False)[0]) > 0.01
    assert all(off(a, b) > 1e-3 for a, b in zip(others[1:], then(False)[1:], strict=True))


def speculated(
    model: HybridLM, ids_BS: Tensor, right_BN: Tensor, taken_back: bool = True
) -> Tensor:
    """A greedy text of N tokens, from drafts that are partly right; every row accepts of a draft
    what its own text is."""
    rows, new = right_BN.shape
    draw = random.Random(0)
    caches = model.new_caches(rows, ids_BS.shape[1] + new + DRAFT)
    h_BSD, after = model.read(ids_BS, torch.full((rows,), ids_BS.shape[1]), caches)
    commit(caches, after)
    texts = [[int(token)] for token in model.logits(h_BSD[:, -1]).argmax(-1)]
    accepted = set()
    while min(map(len, texts)) < new:
        drafts_BS = torch.zeros(rows, 1 + DRAFT, dtype=torch.int64)
        for row, tokens in enumerate(texts):
            ahead = right_BN[row, len(tokens) : len(tokens) + DRAFT].tolist()
            guess = [token if draw.random() < 0.7 else draw.randrange(1, 60) for token in ahead]
            drafts_BS[row, : 1 + len(guess)] = torch.tensor([tokens[-1], *guess])
        h_BSD, after = model.read(drafts_BS, torch.full((rows,), 1 + DRAFT), caches)
        best_BS = model.logits(h_BSD).argmax(-1)
        right_BS = (drafts_BS[:, 1:] == best_BS[:, :-1]).cumprod(1)
        left_B = torch.tensor([new - len(tokens) for tokens in texts])
        counts_B = torch.minimum(1 + right_BS.sum(1), left_B)
        if taken_back:
            _, after = model.read(drafts_BS, counts_B, caches)
        commit(caches, after._replace(counts_B=counts_B))
        for row, count in enumerate(counts_B.tolist()):
            texts[row] += best_BS[row, :count].tolist()
            accepted.add(count)
    assert not taken_back or {1, 2, 1 + DRAFT} <= accepted
    return torch.tensor(texts)


@pytest.mark.parametrize("pattern", ["M", "*", "ME*-ME"])
def test_a_text_from_drafts_is_the_greedy_text(pattern: str) -> None:
    model, ids_BS, *_ = case_of(pattern)
    prompt_BS = ids_BS[:, : CHUNK + 1]
    plain_BN = greedy(model, prompt_BS, 32)
    assert torch.equal(speculated(model, prompt_BS, plain_BN), plain_BN)
    if "M" in pattern:  # of keys and values lengths alone decide
        wrong_BN = speculated(model, prompt_BS, plain_BN, taken_back=False)
        assert (wrong_BN != plain_BN).any(1).all()


# -- Multi-token prediction


@pytest.mark.parametrize("mtp_pattern", ["*", "*E"])
@pytest.mark.parametrize("seed", range(3))
def test_the_mtp_block_reads_on_like_its_first_depth(mtp_pattern: str, seed: int) -> None:
    config = tiny_config("M*", mtp_num_depths=2, mtp_pattern=mtp_pattern)
    ids_BS = random_ids(config, ROWS, LENGTH)
    model = decided_model(config, ids_BS, 1e-4).requires_grad_(False)

    def depths(model: HybridLM) -> list[Tensor]:
        found, _ = model.forward_mtp(whole(model, ids_BS), ids_BS)
        return [h_BSD[:, :-1] for h_BSD in found]  # the last token's successor is not known

    (full_BSD, _), (truth_BSD, second_BSD) = depths(model), depths(deepcopy(model).double())
    h_BSD, caches = read_in_pieces(model, ids_BS, division(seed), mtp=True)
    assert off(h_BSD[:, :-1], truth_BSD) <= FACTOR * off(full_BSD, truth_BSD)
    assert off(h_BSD[:, :-1], second_BSD) > NOTICED
    assert caches.mtp.lengths_B.tolist() == [LENGTH] * ROWS

    one_B1 = torch.ones(ROWS, 1, dtype=torch.int64)
    with_it, _ = model.read_mtp(h_BSD[:, :1], one_B1, one_B1[:, 0], caches)
    caches.mtp.layers[0].v_BTGP.zero_()
    without, _ = model.read_mtp(h_BSD[:, :1], one_B1, one_B1[:, 0], caches)
    assert off(without, with_it) > NOTICED


# -- Decoding


class Watch(TorchDispatchMode):
    """Counts elements that operations read and write, and refuses what waits for a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        assert func.__name__.partition(".")[0] not in ("_local_scalar_dense", "nonzero"), func
        out = func(*args, **(kwargs or {}))
        tensors = (x for x in tree_leaves((args, kwargs, out)) if isinstance(x, Tensor))
        self.elements += sum(x.numel() for x in tensors)
        return out


def test_decoding_writes_in_place_and_waits_for_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "may_read", lambda x: False)  # as on a GPU
    model, ids_BS, *_ = case_of("ME*-ME")
    _, caches = read_in_pieces(model, ids_BS, [[5, 9, 20]])
    places = [x.data_ptr() for x in tensors(caches)]
    with Watch():
        for step in range(3):
            model.decode(ids_BS[:, step], caches)
    assert [x.data_ptr() for x in tensors(caches)] == places
    assert caches.lengths_B.tolist() == [8, 12, 23]
    with pytest.raises(AssertionError, match="nonzero"), Watch():  # the watch notices
        model.read(ids_BS[:, :2], torch.tensor([2, 1, 2]), caches)


def decode_work(pattern: str, prompt: int, room: int) -> tuple[int, int]:
    """Elements touched by one decoding step after a prompt, and elements held by the caches."""
    model = loud_model(tiny_config(pattern))
    caches = model.new_caches(1, room)
    _, after = model.read(random_ids(model.config, 1, prompt), torch.tensor([prompt]), caches)
    commit(caches, after)
    with Watch() as work:
        model.decode(torch.tensor([1]), caches)
    return work.elements, sum(x.numel() for x in tensors(caches))


def test_the_cost_of_a_token_does_not_grow_with_what_mamba_layers_have_seen() -> None:
    assert decode_work("MM-", 3, 4) == decode_work("MM-", 50, 64) == decode_work("MM-", 200, 256)
    few, many = decode_work("M*", 3, 4), decode_work("M*", 200, 256)
    assert many[0] > few[0] + 200  # a key/value cache is seen to grow
    assert many[1] > few[1] + 200


def test_room_is_made_seldom_and_nothing_is_lost() -> None:
    model, ids_BS, *_ = case = case_of("M*-M")
    caches = model.new_caches(ROWS, 1)
    places, states = set(), []
    for step in range(LENGTH):
        caches.reserve(step + 1)
        places.add(caches.layers[1].k_BTGP.data_ptr())
        states.append(model.decode(ids_BS[:, step], caches))
    assert case.right(torch.stack(states, 1))
    assert len(places) <= 6
    with pytest.raises((IndexError, RuntimeError)):  # where there is no room
        model.decode(ids_BS[:, 0], model.new_caches(ROWS, 0))


def test_in_bf16() -> None:
    model = loud_model(tiny_config("M*-M")).bfloat16().requires_grad_(False)
    ids_BS = random_ids(model.config, ROWS, LENGTH)
    truth_BSD = whole(deepcopy(model).float(), ids_BS)
    h_BSD, caches = read_in_pieces(model, ids_BS, division(0))
    assert h_BSD.dtype == torch.bfloat16
    assert off(h_BSD, truth_BSD) <= FACTOR * off(whole(model, ids_BS), truth_BSD)
    assert {c.ssm_BHPN.dtype for c in caches.layers if isinstance(c, MambaCache)} == {torch.float32}
    logits_BSV, head = model.logits(h_BSD), model.lm_head.weight.double()
    assert logits_BSV.dtype == torch.float32
    assert off(logits_BSV, h_BSD.double() @ head.t()) < 1e-6
    assert off(model.lm_head(h_BSD), h_BSD.double() @ head.t()) > 1e-3


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("prompt", [1, CONV - 1, CHUNK + 1])
def test_greedy_continuation_equals_that_without_caches(
    pattern: str, prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = loud_model(tiny_config(pattern)).requires_grad_(False)
    prompt_BS = random_ids(model.config, 2, prompt)
    monkeypatch.setattr(batched, "_PIECE", 4)
    cached_BN = greedy(model, prompt_BS, 20)
    ids_BS = prompt_BS
    for _ in range(20):
        next_B = model(ids_BS).logits[:, -1].argmax(-1)
        ids_BS = torch.cat([ids_BS, next_B[:, None]], dim=1)
    assert torch.equal(cached_BN, ids_BS[:, prompt:])


def test_greedy_continuations_are_not_trivial() -> None:
    """Else the comparison above would compare little: long runs of one token, or no memory."""
    model = loud_model(tiny_config("ME*-ME"))
    tokens = greedy(model, random_ids(model.config, 1, 9), 20)[0].tolist()
    other = greedy(model, random_ids(model.config, 1, 9, seed=1), 20)[0].tolist()
    assert len(set(tokens)) > 5
    assert tokens != other
