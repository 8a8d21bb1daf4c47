from __future__ import annotations

import random
import threading
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nemo_hybrid.config.batches import BatchSizes
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.run import DataOptions
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.data.loader import (
    Blend,
    Phase,
    Sampler,
    Share,
    Stored,
    heldout_batches,
    open_blend,
)
from nemo_hybrid.data.store import Store
from nemo_hybrid.errors import UserError

S = 16
MODEL = HybridConfig(vocab_size=100)
MakeStore = Callable[..., Path]


def documents(seed: int, tokens: int) -> list[list[int]]:
    draw = random.Random(seed)
    out: list[list[int]] = []
    while sum(map(len, out)) < tokens:
        out.append([draw.randrange(3, 100) for _ in range(draw.randrange(1, 40))] + [2])
    return out


@pytest.fixture
def blend(make_store: MakeStore) -> Blend:
    for name, seed, tokens in (("a", 1, 2000), ("b", 2, 700)):
        make_store(f"{name}/train", documents(seed, tokens), shard_tokens=512)
        make_store(f"{name}/heldout", documents(seed + 10, 300), shard_tokens=512)
    root = make_store("c/train", documents(3, 50)).parent.parent
    weights = {str(root / "a"): 2.0, str(root / "b"): 1.0}
    return open_blend(DataOptions(blend=weights, sequence_length=S), MODEL)


def run(
    blend: Blend, rank: int, world: int, micro: int, start: int = 0, workers: int = 0, n: int = 4
) -> list[list[Batch]]:
    data = Stored(blend, sequence_length=S, seed=7, workers=workers)
    share = Share(rank, world, BatchSizes(8), micro_batch_size=micro)
    return [data.step(number, share) for number in range(start, start + n)]


def rows(step: list[Batch]) -> dict[int, tuple[list[int], ...]]:
    """sample number -> what its row holds."""
    out = {}
    for b in step:
        for i, n in enumerate(b.sample_ids):
            of_row = (b.ids_BS[i], b.labels_BS[i], b.documents.seq_idx_BS[i])
            out[n] = tuple(t.tolist() for t in of_row)
    return out


@pytest.mark.parametrize("micro", [1, 2])
@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("start", [0, 2])
def test_the_samples_of_a_step_do_not_depend_on_layout(
    blend: Blend, micro: int, world: int, workers: int, start: int
) -> None:
    expected = [rows(s) for s in run(blend, 0, 1, micro=8)]
    per_rank = [run(blend, r, world, micro, start, workers, 4 - start) for r in range(world)]
    for number in range(4 - start):
        got: dict[int, tuple[list[int], ...]] = {}
        for rank, its_steps in enumerate(per_rank):
            step = its_steps[number]
            assert len(step) == 8 // (micro * world)
            for m, batch in enumerate(step):
                first = (start + number) * 8 + (m * world + rank) * micro
                assert batch.sample_ids == tuple(range(first, first + micro))
            assert not got.keys() & rows(step).keys()
            got |= rows(step)
        assert got == expected[start + number]


def test_rows_hold_the_windows_that_the_sampler_names(blend: Blend) -> None:
    phases = tuple(Phase(int(n), weights) for n, weights in blend.phases)
    sampler = Sampler(tuple(s.windows(S) for s in blend.train), phases, seed=7)
    stores_seen = set()
    for step in run(blend, 0, 1, micro=4):
        for batch in step:
            for i, n in enumerate(batch.sample_ids):
                store, window = sampler(n)
                stores_seen.add(store)
                tokens = blend.train[store].read(window * S, window * S + S + 1).tolist()
                assert batch.ids_BS[i].tolist() == tokens[:-1]
                mask = batch.loss_mask_BS[i]
                assert batch.labels_BS[i][mask].tolist() == [
                    t for t, kept in zip(tokens[1:], mask.tolist(), strict=True) if kept
                ]
                # eos ends every document, so it and nothing else is a masked position here.
                assert (batch.ids_BS[i] == 2).tolist() == (~mask).tolist()
    assert stores_seen == {0, 1}


def test_phases_begin_with_the_token_that_they_name(make_store: MakeStore) -> None:
    root = make_store("a/train", documents(1, 2000)).parent.parent
    make_store("b/train", documents(2, 700))
    a, b = str(root / "a"), str(root / "b")
    options = DataOptions(path=a, phases={5.0 * S - 3: {b: 1.0}, 9.0 * S: {a: 1.0, b: 1.0}})
    options.sequence_length = S
    phased, one = open_blend(options, MODEL), open_blend(replace(options, phases={}), MODEL)
    assert phased.later_weights == [[5.0 * S - 3, 0, 1], [9.0 * S, 1, 1]]

    def texts(blend: Blend, first: int, stop: int) -> list[list[int]]:
        return blend.rows(range(first, stop), S, 7).ids_BS.tolist()

    assert texts(phased, 0, 5) == texts(one, 0, 5)
    second = Store.open(Path(b) / "train")
    of_b = [second.read(w * S, w * S + S).tolist() for w in range(second.windows(S))]
    assert all(row in of_b for row in texts(phased, 5, 9))
    assert not any(row in of_b for row in texts(phased, 0, 5))


def test_reading_ahead_follows_where_the_run_goes(blend: Blend) -> None:
    """Also where it begins again at another number than the next."""
    plain, ahead = (Stored(blend, sequence_length=S, seed=7, workers=w) for w in (0, 2))
    share = Share(0, 1, BatchSizes(4), micro_batch_size=4)
    for number in (3, 4, 9, 10, 2):
        assert [rows([b]) for b in ahead.step(number, share)] == [
            rows([b]) for b in plain.step(number, share)
        ]


def test_reading_ahead_stops_with_the_data_and_passes_errors_on(blend: Blend) -> None:
    before = set(threading.enumerate())
    data = Stored(blend, sequence_length=S, seed=7, workers=2)
    data.step(0, Share(0, 1, BatchSizes(4), micro_batch_size=4))
    readers = set(threading.enumerate()) - before
    assert readers
    del data
    for reader in readers:
        reader.join(timeout=60)
    assert not any(reader.is_alive() for reader in readers)
    broken = Blend((_Broken(),), ((0.0, (1.0,)),), (), blend.tokenizer_dir)  # type: ignore[arg-type]
    with pytest.raises(RuntimeError, match="disk"):
        run(broken, 0, 1, 1, workers=2)


class _Broken:
    def windows(self, sequence_length: int) -> int:
        return 10

    def window(self, number: int, sequence_length: int) -> None:
        raise RuntimeError("disk")


@pytest.mark.parametrize("world", [1, 2, 4])
@pytest.mark.parametrize("limit", [1, 13, 1000])
def test_heldout_passes_cover_the_same_windows_at_every_layout(
    blend: Blend, world: int, limit: int
) -> None:
    total = sum(s.windows(S) for s in blend.heldout)
    used = min(limit, total)

    def passes(rank: int, world: int, micro: int) -> list[Batch]:
        return list(
            heldout_batches(
                blend,
                sequence_length=S,
                micro_batch_size=micro,
                rank=rank,
                world_size=world,
                limit=limit,
            )
        )

    every = [blend.heldout[0].window(w, S)[0] for w in range(blend.heldout[0].windows(S))]
    every += [blend.heldout[1].window(w, S)[0] for w in range(blend.heldout[1].windows(S))]
    assert len(every) == total
    ranks = [passes(r, world, 3) for r in range(world)]
    assert len({len(p) for p in ranks}) == 1
    seen: dict[int, list[int]] = {}
    targets = 0
    for batches in ranks:
        for batch in batches:
            assert batch.ids_BS.shape == (3, S)
            targets += int(batch.loss_mask_BS.sum())
            for i, n in enumerate(batch.sample_ids):
                if n < 0:
                    assert not batch.loss_mask_BS[i].any()
                else:
                    assert n not in seen
                    seen[n] = batch.ids_BS[i].tolist()
    assert seen == {i: every[i * total // used][:-1].tolist() for i in range(used)}
    alone = passes(0, 1, 1)
    assert targets == sum(int(b.loss_mask_BS.sum()) for b in alone)
    again = passes(0, 1, 1)
    assert all(torch.equal(a.ids_BS, b.ids_BS) for a, b in zip(alone, again, strict=True))


def test_heldout_data_shorter_than_a_window(make_store: MakeStore) -> None:
    store = Store.open(make_store("x/heldout", [[5, 2]]))
    options = {"micro_batch_size": 1, "rank": 0, "world_size": 1, "limit": 4}
    one, none = (Blend((store,), (1.0,), held, store.path) for held in ((store,), ()))
    for data in (one, none):
        with pytest.raises(UserError, match=r"too small .* smaller sequence_length"):
            next(heldout_batches(data, sequence_length=S, **options))
    batches = heldout_batches(one, sequence_length=1, **{**options, "limit": 0})
    assert list(batches) == []


def test_open_blend_checks(make_store: MakeStore, tmp_path: Path) -> None:
    a = make_store("a/train", documents(1, 100)).parent
    b = make_store("b/train", documents(1, 100), tokenizer=b"another").parent
    c = make_store("c/train", documents(1, 100), vocab_size=101).parent
    tiny = make_store("tiny/train", [[5] * 15 + [2]]).parent

    def opened(model: HybridConfig = MODEL, length: int = S, **data: object) -> Blend:
        return open_blend(DataOptions(sequence_length=length, **data), model)  # type: ignore[arg-type]

    blend = opened(path=str(a))
    assert blend.heldout == ()
    assert blend.weights == (1.0,)
    assert blend.tokenizer_dir == a
    assert blend.tokens == len(blend.train[0])
    with pytest.raises(UserError, match="different tokenizers"):
        opened(blend={str(a): 1.0, str(b): 1.0})
    with pytest.raises(UserError, match=r"set model.vocab_size \(100\) to at least 101"):
        opened(path=str(c))
    with pytest.raises(
        UserError, match=r"model of m knows 100: prepare the data with that model's"
    ):
        open_blend(DataOptions(path=str(c), sequence_length=S), MODEL, (), Path("m/config.json"))
    with pytest.raises(UserError, match=r"ends them with 5: set model\.eos_token_id, or"):
        opened(HybridConfig(vocab_size=100, eos_token_id=5), path=str(a))
    with pytest.raises(UserError, match="too few for one sequence"):
        opened(path=str(tiny))
    assert opened(path=str(tiny), length=15).train[0].windows(15) == 1
    with pytest.raises(UserError, match="less than 1/1000"):
        opened(blend={str(a): 1.0, str(tiny): 1e-6}, length=15)
    with pytest.raises(UserError, match="nemo-hybrid prepare"):
        opened(path=str(tmp_path / "nowhere"))
    shard = a / "train" / "tokens-00000.bin"
    shard.write_bytes(bytes(len(shard.read_bytes())))
    with pytest.raises(UserError, match="damaged"):
        opened(path=str(a))
    opened(path=str(a), verify="size")
