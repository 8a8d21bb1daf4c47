"""Training state: any layout in, any layout out, to the last bit; incomplete state is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

from nemo_hybrid.checkpoint import manifest
from nemo_hybrid.checkpoint.companions import read_tokenizer
from nemo_hybrid.checkpoint.directory import verify
from nemo_hybrid.checkpoint.manifest import CheckpointError
from nemo_hybrid.checkpoint.state import (
    KINDS,
    Fragment,
    check_masters,
    check_resumable,
    load_rank_state,
    load_state,
)
from nemo_hybrid.checkpoint.weights import load_weights
from nemo_hybrid.errors import UserError

LAYOUTS = [(1, 1), (2, 1), (2, 2), (4, 1), (4, 2), (4, 4)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_reads_what_any_layout_wrote(tmp_path, toy, layout) -> None:
    world, ep = layout
    (path, *others) = toy.save(tmp_path, 3, world, ep)
    assert others == [path] * (world - 1)
    verify(path)
    for new_world, new_ep in LAYOUTS:
        for rank in range(new_world):
            wanted = toy.fragments(rank, new_world, new_ep, filled=False)
            state = load_state(path, wanted)
            assert (state["step"], state["samples"]) == (3, 21)
            expected = toy.fragments(rank, new_world, new_ep)
            assert [f.name for f in wanted] == [f.name for f in expected]
            for got, want in zip(wanted, expected, strict=True):
                for kind in KINDS:
                    assert torch.equal(got.tensors[kind], want.tensors[kind])
            owned = toy.owned_experts(rank, new_ep)
            local = {n: torch.full_like(t, 9) for n, t, _ in toy.local_weights(rank, new_ep)}
            load_weights(path, local, owned, n_experts=4)
            for name, tensor, _ in toy.local_weights(rank, new_ep):
                assert torch.equal(local[name], tensor), name
            check_masters([(n, local[n], f) for n, _, f in toy.local_weights(rank, new_ep)], wanted)


def test_rank_state_and_preallocated_tensors(tmp_path, toy) -> None:
    path = toy.save(tmp_path, 1, 2, 2)[0]
    for rank in range(2):
        state = load_rank_state(path, rank)
        assert torch.equal(state.pop("torch"), torch.arange(5) + rank)
        assert state == {"python": [1, [2, 3], None]}
    assert load_rank_state(path, 2) is None
    buffer = torch.full((20,), 5.0)
    wanted = Fragment("lm_head.weight", 7, 10, (32, 12))
    wanted.tensors["exp_avg"] = buffer[5:15]
    load_state(path, [wanted])
    assert torch.equal(buffer[5:15], toy.state["lm_head.weight"]["exp_avg"].flatten()[7:17])
    assert (buffer[:5] == 5).all()
    assert (buffer[15:] == 5).all()


def test_only_the_files_that_are_needed_are_opened(tmp_path, toy) -> None:
    path = toy.save(tmp_path, 1, 4, 4)[0]
    for file in path.glob("optimizer-r*.safetensors"):
        if not file.name.startswith("optimizer-r00000"):
            file.unlink()
    load_state(path, toy.fragments(0, 4, 4, filled=False))
    with pytest.raises(UserError, match="optimizer-r00001"):
        load_state(path, toy.fragments(1, 4, 4, filled=False))


def test_the_directory_is_a_hugging_face_checkpoint(tmp_path, toy, config) -> None:
    from safetensors.torch import load_file

    path = toy.save(tmp_path, 1, 2, 2)[0]
    assert json.loads((path / "config.json").read_text())["torch_dtype"] == "bfloat16"
    assert json.loads((path / "generation_config.json").read_text())["eos_token_id"] == 2
    index = json.loads((path / "model.safetensors.index.json").read_text())
    shards = {name: load_file(path / name) for name in set(index["weight_map"].values())}
    assert len(shards) > 2  # the shard size limit was respected by cutting
    assert (
        sum(t.nbytes for s in shards.values() for t in s.values())
        == (index["metadata"]["total_size"])
    )
    bias = "backbone.layers.1.mixer.gate.e_score_correction_bias"
    assert torch.equal(shards[index["weight_map"][bias]][bias], toy.weights[bias])
    assert shards[index["weight_map"][bias]][bias].dtype == torch.float32
    for expert in range(4):
        name = f"mtp.layers.1.mixer.experts.{expert}.down_proj.weight"
        stacked = toy.weights["mtp.layers.1.mixer.experts.down_proj"]
        assert torch.equal(shards[index["weight_map"][name]][name], stacked[expert])


def test_tokenizer_files_travel(tmp_path, toy) -> None:
    store = tmp_path / "store"
    store.mkdir()
    (store / "tokenizer.json").write_text("{}")
    (store / "tokens.bin").write_text("not a tokenizer file")
    path = toy.save(tmp_path / "c", 1, companions=read_tokenizer(store))[0]
    assert (path / "tokenizer.json").read_text() == "{}"
    assert not (path / "tokens.bin").exists()
    with pytest.raises(UserError, match=r"holds no tokenizer\.json"):
        read_tokenizer(tmp_path)


@pytest.mark.parametrize("kind", KINDS)
def test_a_missing_moment_is_refused_on_every_rank(tmp_path, toy, in_ranks, kind) -> None:
    del toy.state["mtp.layers.1.mixer.experts.up_proj"][kind]
    results = toy.save(tmp_path, 1, 2, 2)
    assert all(isinstance(r, UserError) and kind in str(r) for r in results)
    assert list(tmp_path.iterdir()) == []


def test_incomplete_states_are_refused(tmp_path, toy) -> None:
    whole = toy.fragments(0, 1, 1)
    hole = Fragment("lm_head.weight", 1, 383, (32, 12))
    hole.tensors = {k: torch.zeros(383) for k in KINDS}
    without = [f for f in whole if f.name != "lm_head.weight"]
    for fragments in (without, [*without, hole]):
        (error,) = toy.save(tmp_path, 1, fragments=fragments)
        assert isinstance(error, UserError)
        assert "lm_head.weight" in str(error)
    (error,) = toy.save(tmp_path, 1, weights=toy.owned_weights(0, 2))
    assert "2 of 4 experts" in str(error)
    (error,) = toy.save(tmp_path, 1, weights=toy.owned_weights(0, 1)[1:])
    assert "backbone.embeddings.weight has no weights" in str(error)
    both = toy.save(tmp_path, 1, 2, 1, weights=toy.owned_weights(0, 1))
    assert all("two ranks" in str(error) for error in both)
    assert list(tmp_path.iterdir()) == []


def test_resuming_something_else_names_both_sides(tmp_path, toy, config) -> None:
    path = toy.save(tmp_path, 1, run_state={"tokenizer": "aaa", "data": "bbb"})[0]
    good = {"tokenizer": "aaa", "data": "bbb"}
    assert check_resumable(path, config, good)["step"] == 1
    assert check_resumable(path, replace(config, chunk_size=128), good)["step"] == 1
    with pytest.raises(UserError, match=r"hidden_size 12, this run has 16"):
        check_resumable(path, replace(config, hidden_size=16), good)
    with pytest.raises(UserError, match=r"mtp_num_depths 2, this run has 1"):
        check_resumable(path, replace(config, mtp_num_depths=1), good)
    for name in good:
        with pytest.raises(UserError, match=rf"{name} '{good[name]}', this run has 'ccc'"):
            check_resumable(path, config, good | {name: "ccc"})
    with pytest.raises(UserError, match="not a training checkpoint"):
        check_resumable(tmp_path, config, good)
    state = json.loads((path / "run_state.json").read_text())
    (path / "run_state.json").write_text(json.dumps(state | {"format_version": 99}))
    for read in (lambda: check_resumable(path, config, good), lambda: load_state(path, [])):
        with pytest.raises(UserError, match="format 99"):
            read()


def test_wanted_fragments_that_do_not_fit(tmp_path, toy) -> None:
    path = toy.save(tmp_path, 1, 2, 1)[0]
    with pytest.raises(UserError, match=r"\[32, 12\].*\[16, 24\]"):
        load_state(path, [Fragment("lm_head.weight", 0, 3, (16, 24))])
    with pytest.raises(CheckpointError, match="absent"):
        load_state(path, [Fragment("absent", 0, 3, (3,))])
    index = json.loads((path / "optimizer.index.json").read_text())
    index["lm_head.weight"]["fragments"].pop()
    (path / "optimizer.index.json").write_text(manifest.to_json(index))
    with pytest.raises(CheckpointError, match=r"no optimizer state of lm_head.weight\[\d+\]"):
        load_state(path, [Fragment("lm_head.weight", 0, 384, (32, 12))])


@pytest.mark.parametrize("piece", [[0, 384, "../x"], [0, 384, -1], [0, 384], [0, 3.5, 0], None])
def test_an_index_of_anything_else_is_refused(tmp_path, toy, piece) -> None:
    path = toy.save(tmp_path, 1, 1)[0]
    index = json.loads((path / "optimizer.index.json").read_text())
    index["lm_head.weight"]["fragments"] = [piece]
    (path / "optimizer.index.json").write_text(manifest.to_json(index))
    with pytest.raises(CheckpointError, match="is not an optimizer index"):
        load_state(path, [Fragment("lm_head.weight", 0, 3, (32, 12))])
    index["lm_head.weight"] = {"shape": ["a"], "fragments": []}
    (path / "optimizer.index.json").write_text(manifest.to_json(index))
    with pytest.raises(CheckpointError, match="is not an optimizer index"):
        load_state(path, [Fragment("lm_head.weight", 0, 3, (32, 12))])


def test_masters_that_are_not_the_weights_are_noticed(toy) -> None:
    for ep, rank in ((1, 0), (2, 1), (4, 3)):
        masters = toy.fragments(rank, 4, ep)
        check_masters(toy.local_weights(rank, ep), masters)
        expert = next(f for f in masters if f.name.endswith("experts.up_proj"))
        moved = expert.tensors["master"].clone()
        moved[-1] *= 1.01
        expert.tensors["master"] = moved
        with pytest.raises(CheckpointError, match=expert.name):
            check_masters(toy.local_weights(rank, ep), masters)
