"""Routed slots sorted by expert, and the tiles of each expert's rows, in Triton.

A counting sort in three launches: how many slots of each block of slots go to each expert; the
running sum of these over the blocks; and each slot written to its place. Slots of one expert keep
their order. All numbers are integers, so results do not depend on
the order in which programs run. Nothing waits for the device.

Shapes: T tokens, K experts per token, E experts, R routed slots (T*K), B blocks of slots, M tiles.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from nemo_kernels.launch import launch
from nemo_kernels.moe.function import Slots

MAX_EXPERTS = 1024
_SLOTS, _COMPARED = 256, 16  # slots per block, and how many of them are compared with all at a time
_SCAN = (512, 8)  # blocks and experts at a time in the running sum
_TILES = (32, 128)  # tiles that a program writes, and experts that it reads at a time
_OPTIONS: dict[str, Any] = {"num_warps": 4, "num_stages": 3}


class Tiles(NamedTuple):
    """Rows sorted by expert, cut into tiles that hold rows of one expert each, expert by expert.

    All int32. Unused entries, at the end, have expert -1 and no rows.
    """

    expert_M: Tensor
    first_M: Tensor
    """First row."""
    end_M: Tensor
    """Row after the last one."""


def sort_slots(topk_ids_TK: Tensor, n_experts: int) -> Slots:
    """``nemo_kernels.moe.sort_slots``, bit-equal to the reference.

    Slots whose id is out of range are counted for no expert and stand behind all others, in their
    order, so that ``order_R`` and ``inverse_R`` are permutations whatever the ids. Places and
    counts are int32 inside.
    """
    ids_R = topk_ids_TK.reshape(-1)
    n_slots, device = ids_R.numel(), ids_R.device
    n_blocks = triton.cdiv(n_slots, _SLOTS)
    counts_E = torch.empty(n_experts, dtype=torch.int64, device=device)
    order_R, inverse_R = torch.empty_like(ids_R), torch.empty_like(ids_R)
    # Row b: the slots of each expert in all blocks before b.
    before_BE = torch.empty(n_blocks + 1, n_experts, dtype=torch.int32, device=device)
    counted = before_BE[1:].nbytes
    sizes = {"SLOTS": _SLOTS, "EXPERTS": padded(n_experts)}
    table = (ids_R, before_BE, n_slots, n_experts)
    moved = ids_R.nbytes + counted
    launch(_count_kernel, (n_blocks,), *table, moved=moved, **sizes, **_OPTIONS)
    blocks, columns = _SCAN
    scan = (before_BE, counts_E, n_blocks, n_experts, blocks, columns)
    grid, moved = (triton.cdiv(n_experts, columns),), counted + before_BE.nbytes + counts_E.nbytes
    launch(_scan_kernel, grid, *scan, moved=moved, **_OPTIONS)
    places = (ids_R, before_BE, order_R, inverse_R, n_slots, n_blocks, n_experts)
    launch(_place_kernel, (n_blocks,), *places, **sizes, COMPARED=_COMPARED, **_OPTIONS)
    return Slots(order_R, inverse_R, counts_E)


def tile_table(counts_E: Tensor, n_rows: int, rows_per_tile: int) -> Tiles:
    """Tiles of rows that are sorted by expert.

    Args:
        counts_E: int64 rows per expert; their sum is n_rows.
        n_rows: R, known to the host.
        rows_per_tile: rows of a full tile; an expert's last tile may have fewer.

    Returns:
        M = ceil(R / rows_per_tile) + E entries; no tile reaches behind row R, whatever the counts.
    """
    n_experts = counts_E.shape[0]
    n_tiles = triton.cdiv(n_rows, rows_per_tile) + n_experts
    tiles = Tiles(*(counts_E.new_empty(n_tiles, dtype=torch.int32) for _ in Tiles._fields))
    sizes, grid = (n_experts, n_rows, n_tiles, rows_per_tile), (triton.cdiv(n_tiles, _TILES[0]),)
    launch(_tile_kernel, grid, counts_E.contiguous(), *tiles, *sizes, *_TILES, **_OPTIONS)
    return tiles


def padded(n_experts: int) -> int:
    """The power of two that a kernel holds; few of them, so that few kernels are compiled."""
    return max(128, triton.next_power_of_2(n_experts))


@triton.jit
def _experts_of(ids_R, slot, n_slots, n_experts):
    """int32 expert of each slot; n_experts where the slot or its id is out of range."""
    id = tl.load(ids_R + slot, mask=slot < n_slots, other=-1).to(tl.int64)
    return tl.where((id >= 0) & (id < n_experts), id, n_experts).to(tl.int32)


@triton.jit(do_not_specialize=["n_slots"])
def _count_kernel(ids_R, before_BE, n_slots, n_experts, SLOTS: tl.constexpr, EXPERTS: tl.constexpr):
    """Row b+1 of the table: slots of each expert in block b."""
    block = tl.program_id(0).to(tl.int64)
    slot_expert = _experts_of(ids_R, block * SLOTS + tl.arange(0, SLOTS), n_slots, n_experts)
    valid = slot_expert < n_experts
    count = tl.histogram(tl.where(valid, slot_expert, 0), EXPERTS, mask=valid)
    expert = tl.arange(0, EXPERTS)
    row = before_BE + (block + 1) * n_experts
    tl.store(row + expert, count, mask=expert < n_experts)


@triton.jit(do_not_specialize=["n_blocks"])
def _scan_kernel(
    before_BE, counts_E, n_blocks, n_experts, BLOCKS: tl.constexpr, EXPERTS: tl.constexpr
):
    """Running sums of the table's columns, in place; the totals are the counts."""
    expert = tl.program_id(0) * EXPERTS + tl.arange(0, EXPERTS)
    is_expert = expert < n_experts
    total = tl.zeros([EXPERTS], tl.int32)
    tl.store(before_BE + expert, total, mask=is_expert)
    for start in range(0, n_blocks, BLOCKS):
        row = start + 1 + tl.arange(0, BLOCKS)
        at = row[:, None].to(tl.int64) * n_experts + expert[None, :]
        mask = (row[:, None] <= n_blocks) & is_expert[None, :]
        count = tl.load(before_BE + at, mask=mask, other=0).to(tl.int32)
        tl.store(before_BE + at, total[None, :] + tl.cumsum(count, 0), mask=mask)
        total += tl.sum(count, 0)
    tl.store(counts_E + expert, total.to(tl.int64), mask=is_expert)


@triton.jit(do_not_specialize=["n_slots", "n_blocks"])
def _place_kernel(
    ids_R, before_BE, order_R, inverse_R, n_slots, n_blocks, n_experts,
    SLOTS: tl.constexpr, COMPARED: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """Write each slot of a block to its place: its expert's first place, plus the expert's slots in
    earlier blocks, plus those before it in this block, which are found by comparing all pairs."""
    block = tl.program_id(0).to(tl.int64)
    position = tl.arange(0, SLOTS)
    slot = block * SLOTS + position
    slot_expert = _experts_of(ids_R, slot, n_slots, n_experts)
    earlier = tl.zeros([SLOTS, COMPARED], tl.int32)
    for start in range(0, SLOTS, COMPARED):
        other = start + tl.arange(0, COMPARED)
        other_expert = _experts_of(ids_R, block * SLOTS + other, n_slots, n_experts)
        same = other_expert[None, :] == slot_expert[:, None]
        earlier += (same & (other[None, :] < position[:, None])).to(tl.int32)

    expert = tl.arange(0, EXPERTS)
    is_expert = expert < n_experts
    row = before_BE + block * n_experts + expert
    before = tl.load(row, mask=is_expert, other=0).to(tl.int32)
    last_row = before_BE + n_blocks.to(tl.int64) * n_experts + expert
    count = tl.load(last_row, mask=is_expert, other=0).to(tl.int32)
    first = tl.cumsum(count, 0) - count + before
    # Slots without an expert stand behind all others.
    first_other = tl.sum(count, 0) + block * SLOTS - tl.sum(before, 0)

    valid = slot_expert < n_experts
    place = tl.gather(first, tl.where(valid, slot_expert, 0), 0)
    place = tl.where(valid, place, first_other) + tl.sum(earlier, 1)
    tl.store(order_R + place, slot, mask=slot < n_slots)
    tl.store(inverse_R + slot, place.to(tl.int64), mask=slot < n_slots)


@triton.jit(do_not_specialize=["n_rows", "n_tiles"])
def _tile_kernel(
    counts_E, expert_M, first_M, end_M, n_experts, n_rows, n_tiles, rows_per_tile,
    TILES: tl.constexpr, EXPERTS: tl.constexpr,
):  # fmt: skip
    """The expert of a tile follows those whose tiles all lie before it, which are added up."""
    tile = tl.program_id(0) * TILES + tl.arange(0, TILES)
    tile_expert = tl.zeros([TILES], tl.int32)
    row, begin = tile_expert, tile_expert  # the expert's first row and first tile
    n_used = tl.zeros([1], tl.int32)
    for start in range(0, n_experts, EXPERTS):
        expert = start + tl.arange(0, EXPERTS)
        count = _rows_of(counts_E, expert, expert < n_experts, n_rows)
        tiles = tl.cdiv(count, rows_per_tile)
        end_tile = n_used + tl.cumsum(tiles, 0)
        before = (end_tile[None, :] <= tile[:, None]) & (expert < n_experts)[None, :]
        tile_expert += tl.sum(before.to(tl.int32), 1)
        row += tl.sum(tl.where(before, count[None, :], 0), 1)
        begin += tl.sum(tl.where(before, tiles[None, :], 0), 1)
        n_used += tl.sum(tiles, 0)

    used = tile_expert < n_experts
    end = row + _rows_of(counts_E, tile_expert, used, n_rows)
    first = row + (tile - begin) * rows_per_tile
    end = tl.maximum(tl.minimum(tl.minimum(first + rows_per_tile, end), n_rows), 0)
    first = tl.maximum(tl.minimum(first, n_rows), 0)
    mask = tile < n_tiles
    tl.store(expert_M + tile, tl.where(used, tile_expert, -1), mask=mask)
    tl.store(first_M + tile, tl.where(used, first, 0), mask=mask)
    tl.store(end_M + tile, tl.where(used, end, 0), mask=mask)


@triton.jit
def _rows_of(counts_E, expert, mask, n_rows):
    """int32 rows of experts, within [0, n_rows] whatever the counts."""
    count = tl.load(counts_E + expert, mask=mask, other=0).to(tl.int64)
    return tl.maximum(tl.minimum(count, n_rows), 0).to(tl.int32)
