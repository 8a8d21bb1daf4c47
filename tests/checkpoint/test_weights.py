"""Weights against transformers and the safetensors library, and every way a directory can be
wrong."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from nemo_hybrid.agreement import OneProcess
from nemo_hybrid.checkpoint.names import from_hub, is_stacked, to_hub
from nemo_hybrid.checkpoint.tensors import TensorFile, safetensors_parts
from nemo_hybrid.checkpoint.weights import INDEX, Plan, load_weights
from nemo_hybrid.checkpoint.writing import save_weights
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.errors import UserError

TINY = HybridConfig(
    pattern="ME*-", vocab_size=64, hidden_size=32, num_attention_heads=2, num_key_value_heads=1,
    head_dim=16, mamba_num_heads=4, mamba_head_dim=8, ssm_state_size=8, n_groups=2, chunk_size=16,
    intermediate_size=48, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24,
    moe_latent_size=16, moe_shared_expert_intermediate_size=40,
)  # fmt: skip


@pytest.fixture(scope="module")
def theirs(tmp_path_factory) -> tuple[object, Path]:
    """A tiny random transformers model in bf16, and its directory as transformers writes it."""
    from transformers import NemotronHConfig, NemotronHForCausalLM

    torch.manual_seed(0)
    model = NemotronHForCausalLM(NemotronHConfig(**TINY.to_hf())).to(torch.bfloat16)
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.normal_()
    directory = tmp_path_factory.mktemp("theirs")
    model.save_pretrained(directory)
    return model, directory


def our_state(model) -> dict[str, torch.Tensor]:
    """The oracle: transformers' in-memory names differ from ours by one prefix."""
    return {k.replace("model.", "backbone.", 1): v for k, v in model.state_dict().items()}


def triples(state: dict[str, torch.Tensor]) -> list[tuple[str, torch.Tensor, int]]:
    return [(name, tensor, 0) for name, tensor in state.items()]


def empty_like(state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: torch.zeros_like(tensor) for name, tensor in state.items()}


def test_names_on_disk_are_those_that_transformers_writes(theirs) -> None:
    model, directory = theirs
    on_disk = load_file(directory / "model.safetensors")
    ours = {k: v for n, t in our_state(model).items() for k, v in to_hub(n, t)}
    assert ours.keys() == on_disk.keys()
    assert all(torch.equal(ours[k], on_disk[k]) for k in ours)
    assert {from_hub(k)[0] for k in on_disk} == our_state(model).keys()


def test_reading_what_transformers_wrote(theirs) -> None:
    model, directory = theirs
    expected = our_state(model)
    targets = empty_like(expected)
    report = load_weights(directory, targets, n_experts=4)
    assert all(torch.equal(targets[k], expected[k]) for k in expected)
    assert len(report.having("mapped")) == len(load_file(directory / "model.safetensors"))
    assert len(report.findings) == len(report.having("mapped"))


def test_transformers_reads_what_we_write(theirs, tmp_path) -> None:
    from transformers import NemotronHForCausalLM

    model, _ = theirs
    state = our_state(model) | {"mtp.layers.1.mixer.experts.up_proj": torch.ones(4, 24, 16)}
    save_weights(tmp_path / "out", TINY, triples(state), max_shard_bytes=9000)
    loaded, info = NemotronHForCausalLM.from_pretrained(
        tmp_path / "out", dtype=torch.bfloat16, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]  # transformers ignores mtp.* by itself
    assert not info["mismatched_keys"]
    for (name, a), b in zip(loaded.state_dict().items(), model.state_dict().values(), strict=True):
        assert torch.equal(a, b.to(a.dtype)), name


def test_files_are_those_of_the_reference_library(tmp_path) -> None:
    tensors = {
        "b": torch.randn(3, 4).bfloat16(), "a": torch.randn(5), "empty": torch.zeros(0, 3),
        "é": torch.tensor(2.0), "i": torch.arange(3), "h": torch.randn(2).half(),
        "u": torch.arange(3, dtype=torch.uint8), "t": torch.randn(4, 3).t(),
    }  # fmt: skip
    save_file({k: v.contiguous() for k, v in tensors.items()}, tmp_path / "x", {"format": "pt"})
    assert b"".join(safetensors_parts(tensors, {"format": "pt"})) == (tmp_path / "x").read_bytes()


def test_a_round_trip_is_byte_identical(theirs, tmp_path) -> None:
    model, directory = theirs
    targets = empty_like(our_state(model))
    load_weights(directory, targets)
    save_weights(tmp_path / "out", TINY, triples(targets))
    (shard,) = (tmp_path / "out").glob("*.safetensors")
    assert shard.read_bytes() == (directory / "model.safetensors").read_bytes()


def test_expert_parallel_reading(theirs) -> None:
    model, directory = theirs
    state = our_state(model)
    for owned in (range(0, 2), range(2, 4), range(3, 4), range(1, 3)):
        targets = {
            n: torch.zeros_like(t[owned.start : owned.stop] if is_stacked(n) else t)
            for n, t in state.items()
        }
        report = load_weights(directory, targets, owned, n_experts=4)
        for n, t in state.items():
            assert torch.equal(targets[n], t[owned.start : owned.stop] if is_stacked(n) else t)
        skipped = report.having("skipped")
        assert len(skipped) == 2 * (4 - len(owned))
        assert {f.note for f in skipped} == {"expert of another rank"}
    assert "4 skipped (expert of another rank)" in report.summary()


def test_prefixes_and_conversions_are_accepted_and_reported(theirs, tmp_path) -> None:
    model, directory = theirs
    shutil.copy(directory / "config.json", tmp_path)
    content = load_file(directory / "model.safetensors")
    renamed = {k.replace("backbone.", "model.", 1): v for k, v in content.items()}
    renamed["lm_head.weight"] = renamed["lm_head.weight"].float() + 2**-12
    save_file(renamed, tmp_path / "model.safetensors")
    targets = empty_like(our_state(model))
    wide = "backbone.layers.0.mixer.A_log"
    targets[wide] = targets[wide].float()
    report = load_weights(tmp_path, targets)
    notes = {from_hub(f.name)[0]: f.note for f in report.findings if f.note}
    assert notes == {
        wide: "widened from BF16 to F32",
        "lm_head.weight": "rounded from F32 to BF16",
    }
    assert torch.equal(targets[wide], our_state(model)[wide].float())
    assert torch.equal(targets["lm_head.weight"], renamed["lm_head.weight"].bfloat16())


# Each entry changes the tensors and the index of a two-shard directory.
def _rename(shards, index, old, new) -> None:
    shards[0][new] = shards[0].pop(old)
    index[new] = index.pop(old)


A_LOG, UP = "backbone.layers.0.mixer.A_log", "backbone.layers.1.mixer.experts.3.up_proj.weight"
STACK = "backbone.layers.1.mixer.experts.up_proj"
EXPERT = re.compile(r"backbone\.layers\.1\.mixer\.experts\.\d\.up_proj\.weight")
WRONG = {
    "missing": (lambda s, i: (s[0].pop(A_LOG), i.pop(A_LOG)), f"{A_LOG}: missing"),
    "missing expert": (lambda s, i: (s[0].pop(UP), i.pop(UP)), f"{UP}: missing"),
    "unexpected": (lambda s, i: _rename(s, i, A_LOG, "x.y"), "x.y: unexpected"),
    "one expert too many": (
        lambda s, i: _rename(s, i, UP, UP.replace(".3.", ".4.")),
        "experts.4.up_proj.weight: unexpected",
    ),
    "padded expert number": (
        lambda s, i: _rename(s, i, UP, UP.replace(".3.", ".03.")),
        "experts.03.up_proj.weight: unexpected",
    ),
    "shape": (lambda s, i: s[0].update({A_LOG: torch.zeros(5).bfloat16()}), "has shape [5]"),
    "transposed expert": (
        lambda s, i: s[0].update({UP: s[0][UP].t().contiguous()}),
        "has shape [16, 24], the model expects [24, 16]",
    ),
    "integers": (lambda s, i: s[0].update({A_LOG: torch.zeros(4).to(torch.int32)}), "dtype I32"),
    "float8": (
        lambda s, i: s[0].update({A_LOG: torch.zeros(4).to(torch.float8_e4m3fn)}),
        "dtype F8_E4M3",
    ),
    "two prefixes": (
        lambda s, i: (
            s[1].update({A_LOG.replace("backbone", "model"): s[0][A_LOG].clone()}),
            i.update({A_LOG.replace("backbone", "model"): "b.safetensors"}),
        ),
        "is the same tensor as",
    ),
    "stacked before single": (
        lambda s, i: (
            s[1].update({UP: s[0].pop(UP)}),
            i.update({UP: "b.safetensors", STACK: "a.safetensors"}),
            [(s[0].pop(n), i.pop(n)) for n in list(s[0]) if EXPERT.fullmatch(n)],
            s[0].update({STACK: torch.zeros(4, 24, 16).bfloat16()}),
        ),
        f"{UP}: is the same tensor as {STACK}",
    ),
    "stacked after single": (
        lambda s, i: (
            s[1].update({STACK: torch.zeros(4, 24, 16).bfloat16()}),
            i.update({STACK: "b.safetensors"}),
        ),
        f"{STACK}: is the same tensor as",
    ),
    "in two files": (
        lambda s, i: s[1].update({A_LOG: s[0][A_LOG].clone()}),
        f"{A_LOG}: b.safetensors holds it, but the index places it in a.safetensors",
    ),
    "not indexed": (lambda s, i: i.pop(A_LOG), "the index does not list it"),
    "indexed, not there": (lambda s, i: s[0].pop(A_LOG), "does not hold it"),
    "absent file": (lambda s, i: i.update({A_LOG: "c.safetensors"}), "names 'c.safetensors'"),
    "parent": (lambda s, i: i.update({A_LOG: "../a.safetensors"}), "not a .safetensors file of"),
    "absolute": (lambda s, i: i.update({A_LOG: "/a.safetensors"}), "not a .safetensors file of"),
    "pickle": (lambda s, i: i.update({A_LOG: "a.bin"}), "not a .safetensors file of"),
    "number": (lambda s, i: i.update({A_LOG: 7}), "not a .safetensors file of"),
    "empty index": (lambda s, i: i.clear(), "weight_map is missing or empty"),
}  # fmt: skip


def split_directory(source: Path, out: Path, change) -> None:
    content = load_file(source / "model.safetensors")
    names = sorted(content)
    first = {n: content[n] for n in names if n in (A_LOG, UP) or n < "backbone.layers.2"}
    second = {n: content[n] for n in names if n not in first}
    index = dict.fromkeys(first, "a.safetensors") | dict.fromkeys(second, "b.safetensors")
    change((first, second), index)
    save_file(first, out / "a.safetensors")
    save_file(second, out / "b.safetensors")
    (out / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def test_the_split_directory_of_the_next_test_is_good(theirs, tmp_path) -> None:
    model, directory = theirs
    split_directory(directory, tmp_path, lambda shards, index: None)
    targets = empty_like(our_state(model))
    load_weights(tmp_path, targets)
    assert all(torch.equal(targets[k], v) for k, v in our_state(model).items())


@pytest.mark.parametrize("name", WRONG)
def test_wrong_directories_change_nothing(theirs, tmp_path, name) -> None:
    model, directory = theirs
    change, says = WRONG[name]
    split_directory(directory, tmp_path, change)
    targets = empty_like(our_state(model))
    with pytest.raises(UserError) as caught:
        load_weights(tmp_path, targets)
    assert says in str(caught.value)
    assert not any(t.any() for t in targets.values())


@pytest.mark.parametrize("size", [0, 4, 8, 100, -1])
def test_truncated_files_and_headers(theirs, tmp_path, size) -> None:
    model, directory = theirs
    content = (directory / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(content[:size])
    targets = empty_like(our_state(model))
    for damaged in (content[:size], b"\xff" * 7 + b"\x7f" + content[8:]):
        (tmp_path / "model.safetensors").write_bytes(damaged)
        with pytest.raises(UserError, match=r"model\.safetensors is not a valid"):
            load_weights(tmp_path, targets)
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(UserError, match="holds neither"):
        load_weights(tmp_path, targets)
    (tmp_path / "pytorch_model.bin").write_text("")
    with pytest.raises(UserError, match=r"convert pytorch_model\.bin to safetensors"):
        load_weights(tmp_path, targets)
    assert not any(t.any() for t in targets.values())


def test_weight_files_outside_of_the_index(theirs, tmp_path, caplog) -> None:
    model, directory = theirs
    split_directory(directory, tmp_path, lambda shards, index: None)
    targets = empty_like(our_state(model))
    # What our checkpoints hold beside the weights.
    for name in ("rank-00000.safetensors", "optimizer-r00000-exp_avg.safetensors"):
        (tmp_path / name).write_text("")
    assert not load_weights(tmp_path, targets).having("skipped")
    assert not caplog.records
    (tmp_path / "rank-00000-more.safetensors").write_text("")
    (stray,) = load_weights(tmp_path, targets).having("skipped")
    assert stray.name == "rank-00000-more.safetensors"
    assert "1 skipped (a whole file, which the index does not list)" in caplog.text

    (tmp_path / "model.safetensors").symlink_to(directory / "model.safetensors")
    with pytest.raises(UserError, match=r"holds model\.safetensors, and model\.safetensors\.index"):
        load_weights(tmp_path, targets)
    index = dict.fromkeys(load_file(directory / "model.safetensors"), "model.safetensors")
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": index}))
    names = {finding.name for finding in load_weights(tmp_path, targets).having("skipped")}
    assert names == {"a.safetensors", "b.safetensors", stray.name}


def test_an_index_of_absurd_size(theirs, tmp_path) -> None:
    model, _ = theirs
    with open(tmp_path / INDEX, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(UserError, match="is larger than"):
        load_weights(tmp_path, empty_like(our_state(model)))


def test_a_file_replaced_after_its_header_was_read(theirs, tmp_path, monkeypatch) -> None:
    """By one of the same size and tensors, in another order."""
    model, directory = theirs
    split_directory(directory, tmp_path, lambda shards, index: None)
    targets, path = empty_like(our_state(model)), tmp_path / "b.safetensors"

    def replace_it(plan) -> None:
        content = path.read_bytes()
        end = 8 + int.from_bytes(content[:8], "little")
        swapped = content[:end].replace(b".k_proj.", b".X_proj.").replace(b".v_proj.", b".k_proj.")
        path.write_bytes(swapped.replace(b".X_proj.", b".v_proj.") + content[end:])
        with TensorFile(path) as file:
            assert any(".k_proj." in name for name in file.entries)

    monkeypatch.setattr(Plan, "raise_errors", replace_it)
    with pytest.raises(UserError, match=r"b\.safetensors changed while it was being read"):
        load_weights(tmp_path, targets)


def test_our_model_in_transformers_and_back(tmp_path) -> None:
    from transformers import NemotronHForCausalLM

    from nemo_hybrid.model.hybrid import HybridLM

    ours = HybridLM(TINY, seed=3).state_dict()
    save_weights(tmp_path / "ours", TINY, triples(ours))
    model, info = NemotronHForCausalLM.from_pretrained(
        tmp_path / "ours", dtype=torch.float32, output_loading_info=True
    )
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert not info["mismatched_keys"]
    model.save_pretrained(tmp_path / "theirs")
    back = HybridLM(TINY, seed=4).state_dict()
    with pytest.raises(UserError, match=r"mtp\.layers\.0\.\S+: missing"):
        load_weights(tmp_path / "theirs", back)
    outside = {name: tensor for name, tensor in back.items() if not name.startswith("mtp.")}
    load_weights(tmp_path / "theirs", outside)
    for name, tensor in ours.items():
        assert torch.equal(back[name], tensor) != name.startswith("mtp.") or tensor.std() == 0, name


def test_a_killed_writer_is_forgotten(tmp_path) -> None:
    stale = tmp_path / ".tmp-out"
    stale.mkdir()
    (stale / "model-r00000-00001.safetensors").write_text("half")
    (tmp_path / ".tmp-another").mkdir()
    save_weights(tmp_path / "out", TINY, [("lm_head.weight", torch.ones(64, 32), 0)])
    assert sorted(p.name for p in tmp_path.iterdir()) == [".tmp-another", "out"]


def test_saving_over_something_is_refused(theirs, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "precious").write_text("")
    with pytest.raises(UserError, match="not empty"):
        save_weights(tmp_path / "out", TINY, [], world=OneProcess())
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["precious"]
