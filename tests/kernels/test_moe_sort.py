"""Triton's sort of routed slots, bit for bit against the reference, and its tiles against a loop.

Shapes: T tokens, K experts per token, E experts, R routed slots (T*K), M tiles.
"""

from unittest import mock

import pytest
import torch
from torch import Tensor

from helpers.drawn import drawn, st
from helpers.triton_env import DEVICE, guarded_memory
from nemo_kernels import checks
from nemo_kernels.moe import reference, sort_slots
from nemo_kernels.moe import sort_kernel as kernel

# Several blocks of slots, several steps of the running sum and several programs that write tiles,
# on inputs that the interpreter can do.
SMALL = {"_SLOTS": 32, "_COMPARED": 16, "_SCAN": (4, 8), "_TILES": (16, 16)}


def draw_ids(seed: int, n_tokens: int, n_experts: int, k: int, skew: float) -> Tensor:
    """Distinct experts per token; with skew, low-numbered experts get most tokens."""
    generator = torch.Generator().manual_seed(seed)
    popularity_E = torch.exp(-skew * torch.arange(n_experts)).clamp_min(1e-30)
    if not n_tokens:
        return torch.empty(0, k, dtype=torch.int64)
    return torch.multinomial(popularity_E.expand(n_tokens, -1), k, generator=generator)


def sort(ids_TK: Tensor, n_experts: int) -> tuple[Tensor, ...]:
    with guarded_memory():
        slots = kernel.sort_slots(ids_TK.to(DEVICE), n_experts)
    return tuple(t.cpu() for t in slots)


def assert_sorted(ids_TK: Tensor, n_experts: int) -> None:
    ours, expected = sort(ids_TK, n_experts), reference.sort_slots(ids_TK, n_experts)
    for tensor, wanted in zip(ours, expected, strict=True):
        assert tensor.dtype == wanted.dtype
        assert torch.equal(tensor, wanted)


@pytest.mark.slow
@drawn(
    25,
    seed=st.integers(0, 2**31),
    n_tokens=st.integers(0, 80),
    n_experts=st.integers(1, 40),
    k=st.integers(1, 5),
    skew=st.sampled_from([0.0, 0.3, 8.0]),
)
def test_sort_equals_the_reference(
    seed: int, n_tokens: int, n_experts: int, k: int, skew: float
) -> None:
    ids_TK = draw_ids(seed, n_tokens, n_experts, min(k, n_experts), skew)
    with mock.patch.multiple(kernel, **SMALL):
        assert_sorted(ids_TK, n_experts)


@pytest.mark.parametrize(
    ("n_tokens", "n_experts", "k"),
    [(9, 1024, 32), (30, 513, 10), (300, 1, 1), (1, 2, 2), (0, 7, 3)],
)
def test_as_shipped(n_tokens: int, n_experts: int, k: int) -> None:
    assert_sorted(draw_ids(1, n_tokens, n_experts, k, 0.01), n_experts)


@pytest.mark.parametrize("expert", [0, 4, 6])
def test_all_tokens_on_one_expert(expert: int) -> None:
    with mock.patch.multiple(kernel, **SMALL):
        assert_sorted(torch.full((150, 1), expert), 7)


def test_ids_may_be_strided() -> None:
    ids_TK = draw_ids(2, 30, 9, 4, 0.0)
    assert_sorted(ids_TK.t().contiguous().t(), 9)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE == "cpu", reason="too much for the interpreter; needs a CUDA device")
@pytest.mark.parametrize(("n_experts", "k", "skew"), [(512, 22, 0.0), (1024, 32, 0.05)])
def test_many_tokens_give_the_same_each_time(n_experts: int, k: int, skew: float) -> None:
    ids_TK = draw_ids(3, 16384, n_experts, k, skew)
    for _ in range(3):
        assert_sorted(ids_TK, n_experts)


@drawn(15, st.lists(st.sampled_from([0, 1, 2, 3, -1, 4, -(2**40), 2**40, 2**32]), max_size=70))
def test_ids_out_of_range_stand_at_the_end_and_are_written_nowhere_else(ids: list[int]) -> None:
    """As on a GPU, where values are not checked."""
    ids_TK = torch.tensor(ids, dtype=torch.int64).view(-1, 1)
    with mock.patch.multiple(kernel, **SMALL):
        order_R, inverse_R, counts_E = sort(ids_TK, 4)
    known = [e if 0 <= e < 4 else 4 for e in ids]
    assert order_R.tolist() == sorted(range(len(ids)), key=lambda slot: known[slot])
    assert order_R[inverse_R].tolist() == list(range(len(ids)))
    assert counts_E.tolist() == [ids.count(e) for e in range(4)]


def naive_tiles(counts: list[int], n_rows: int, rows_per_tile: int) -> list[tuple[int, int, int]]:
    tiles, row = [], 0
    for expert, count in enumerate(counts):
        for first in range(row, row + count, rows_per_tile):
            tiles.append((expert, first, min(first + rows_per_tile, row + count)))
        row += count
    unused = -(-n_rows // rows_per_tile) + len(counts) - len(tiles)
    return tiles + [(-1, 0, 0)] * unused


def tile_table(counts: list[int], n_rows: int, rows_per_tile: int) -> list[tuple[int, ...]]:
    counts_E = torch.tensor(counts, device=DEVICE)
    with guarded_memory():
        tiles = kernel.tile_table(counts_E, n_rows, rows_per_tile)
    assert {t.dtype for t in tiles} == {torch.int32}
    return list(zip(*(t.tolist() for t in tiles), strict=True))


@drawn(
    25,
    counts=st.lists(st.sampled_from([0, 0, 1, 2, 3, 8, 9, 50]), min_size=1, max_size=40),
    rows_per_tile=st.sampled_from([1, 2, 3, 8, 64]),
)
def test_tiles_equal_a_loop(counts: list[int], rows_per_tile: int) -> None:
    n_rows = sum(counts)
    with mock.patch.multiple(kernel, **SMALL):
        tiles = tile_table(counts, n_rows, rows_per_tile)
    assert tiles == naive_tiles(counts, n_rows, rows_per_tile)


def test_tiles_of_many_rows_and_experts() -> None:
    counts = [0] * 20 + [2**30, 0, 5, 2**29 + 1]
    n_rows = sum(counts)
    with mock.patch.object(kernel, "_TILES", (512, 16)):
        tiles = tile_table(counts, n_rows, 2**15)
    assert tiles == naive_tiles(counts, n_rows, 2**15)


@drawn(
    15,
    st.lists(st.sampled_from([0, 3, 11, -5, 2**31, 2**40, -(2**40)]), min_size=1, max_size=20),
    st.integers(0, 40),
)
def test_tiles_of_wrong_counts_stay_within_the_rows(counts: list[int], n_rows: int) -> None:
    with mock.patch.multiple(kernel, **SMALL):
        for expert, first, end in tile_table(counts, n_rows, 4):
            assert -1 <= expert < len(counts)
            assert 0 <= first <= n_rows
            assert 0 <= end <= min(n_rows, first + 4)


def test_the_comparisons_notice_mistakes() -> None:
    ids_TK = draw_ids(4, 30, 5, 2, 0.0)
    no_launch = mock.MagicMock()
    with mock.patch.object(kernel, "_place_kernel", no_launch), pytest.raises(AssertionError):
        assert_sorted(ids_TK, 5)
    with mock.patch.object(kernel, "_tile_kernel", no_launch):
        assert tile_table([3, 5], 8, 4) != naive_tiles([3, 5], 8, 4)
    # Not stable: ids in descending order of slots.
    backwards = 59 - sort(ids_TK.flatten().flip(0).view(30, 2), 5)[0]
    assert torch.equal(ids_TK.flatten()[backwards].sort().values, ids_TK.flatten()[backwards])
    assert not torch.equal(backwards, reference.sort_slots(ids_TK, 5).order_R)
    beyond = pytest.raises(AssertionError, match="written beyond a tensor of 4 elements")
    with beyond, guarded_memory():
        torch.empty(4).as_strided((1,), (1,), 68).fill_(0)


def test_the_host_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    ids_TK = draw_ids(5, 20, 6, 2, 0.0).to(DEVICE)
    kernel.sort_slots(ids_TK, 6)  # compiled, and its constants copied

    def fail(*_):
        raise AssertionError("reads a tensor's value")

    for name in ("item", "tolist", "__bool__", "__int__", "__index__", "cpu", "nonzero"):
        if DEVICE == "cuda" or name != "cpu":  # the interpreter calls cpu()
            monkeypatch.setattr(Tensor, name, fail)
    slots = kernel.sort_slots(ids_TK, 6)
    kernel.tile_table(slots.counts_E, 40, 16)


def test_debug_mode_checks_values_anywhere(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        device = torch.device("cuda")

        def numel(self):
            return 2

        def aminmax(self):
            return torch.tensor(0), torch.tensor(7)

    ids: Tensor = OnGpu()  # type: ignore[assignment]
    checks.expect_range("topk_ids_TK", "ids", ids, 7)
    monkeypatch.setenv("NEMO_KERNELS_DEBUG", "1")
    with pytest.raises(ValueError, match=r"topk_ids_TK: expected ids in \[0, 7\), got 0 to 7"):
        checks.expect_range("topk_ids_TK", "ids", ids, 7)
    checks.expect_range("topk_ids_TK", "ids", ids, 8)
    on_device = torch.tensor([[0, 3]], device=DEVICE)
    with pytest.raises(ValueError, match=r"topk_ids_TK: expected ids in \[0, 3\), got 0 to 3"):
        sort_slots(on_device, 3)


def test_bad_input_is_named() -> None:
    ids_TK = torch.zeros(4, 2, dtype=torch.int64, device=DEVICE)
    with pytest.raises(ValueError, match=r"topk_ids_TK: expected torch.int64, got torch.int32"):
        sort_slots(ids_TK.int(), 3)
    with pytest.raises(ValueError, match=r"topk_ids_TK: expected shape \[any, any\], got \[8\]"):
        sort_slots(ids_TK.flatten(), 3)
