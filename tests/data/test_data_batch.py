from __future__ import annotations

from itertools import pairwise

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from nemo_hybrid.data.batch import Batch


def naive(tokens: list[list[int]], starts: list[list[bool]]) -> dict[str, object]:
    """Token by token, as one would on paper."""
    out: dict[str, list] = {k: [] for k in ("ids", "labels", "mask", "seq", "pos")}
    bounds: list[int] = []
    flat = 0
    for row, begins in zip(tokens, starts, strict=True):
        columns: dict[str, list] = {k: [] for k in out}
        document, position = -1, 0
        for t in range(len(row) - 1):
            if t == 0 or begins[t]:
                document, position = document + 1, 0
                bounds.append(flat)
            columns["ids"].append(row[t])
            columns["mask"].append(not begins[t + 1])
            columns["labels"].append(0 if begins[t + 1] else row[t + 1])
            columns["seq"].append(document)
            columns["pos"].append(position)
            position += 1
            flat += 1
        for k, column in columns.items():
            out[k].append(column)
    bounds.append(flat)
    lengths = [b - a for a, b in pairwise(bounds)]
    return {**out, "bounds": bounds, "longest": max(lengths)}


@st.composite
def windows(draw: st.DrawFn) -> tuple[list[list[int]], list[list[bool]]]:
    rows, width = draw(st.integers(1, 4)), draw(st.integers(2, 9))
    of = lambda e: st.lists(st.lists(e, min_size=width, max_size=width), min_size=rows, max_size=rows)  # noqa: E731, E501  # fmt: skip
    return draw(of(st.integers(0, 70000))), draw(of(st.booleans()))


@settings(max_examples=150, deadline=None)
@given(windows())
def test_equals_a_token_by_token_construction(
    drawn: tuple[list[list[int]], list[list[bool]]],
) -> None:
    tokens, starts = drawn
    batch = Batch.from_windows(torch.tensor(tokens), torch.tensor(starts))
    expected = naive(tokens, starts)
    assert batch.ids_BS.tolist() == expected["ids"]
    assert batch.labels_BS.tolist() == expected["labels"]
    assert batch.loss_mask_BS.tolist() == expected["mask"]
    assert batch.documents.seq_idx_BS.tolist() == expected["seq"]
    assert batch.positions_BS.tolist() == expected["pos"]
    assert batch.documents.cu_seqlens.tolist() == expected["bounds"]
    assert batch.documents.max_seqlen == expected["longest"]
    assert (batch.packing is not None) == any(s > 0 for row in expected["seq"] for s in row)  # type: ignore[attr-defined]


def test_types_padding_rows_and_to() -> None:
    tokens = torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8]])
    starts = torch.zeros(2, 4, dtype=torch.bool)
    batch = Batch.from_windows(tokens.int(), starts, (3, -1), torch.tensor([True, False]))
    assert batch.loss_mask_BS.tolist() == [[True] * 3, [False] * 3]
    assert batch.labels_BS.tolist() == [[6, 7, 8], [0, 0, 0]]
    assert batch.packing is None
    fields = vars(batch) | vars(batch.documents)
    types = {k: v.dtype for k, v in fields.items() if isinstance(v, torch.Tensor)}
    assert types == {
        "ids_BS": torch.int64,
        "labels_BS": torch.int64,
        "loss_mask_BS": torch.bool,
        "seq_idx_BS": torch.int32,
        "cu_seqlens": torch.int32,
        "positions_BS": torch.int32,
    }
    moved = batch.to("meta")
    fields = vars(moved) | vars(moved.documents)
    assert all(v.is_meta for v in fields.values() if isinstance(v, torch.Tensor))
    assert (moved.documents.max_seqlen, moved.sample_ids, moved.packing) == (3, (3, -1), None)
