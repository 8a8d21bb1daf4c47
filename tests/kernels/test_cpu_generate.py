"""The benchmark of generation times the same texts on both sides and can say that it does not."""

from pathlib import Path
from types import ModuleType

import pytest
import torch

from helpers.tiny_models import loud, loud_model, tiny_config
from nemo_hybrid import HybridLM
from nemo_hybrid.data.tokenizer import train_tokenizer

BENCHMARKS = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"


@pytest.fixture
def cpu_generate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # as for a script
    import cpu_generate

    monkeypatch.setattr(cpu_generate, "PEER_EXPERTS", ("eager",))
    monkeypatch.setattr(cpu_generate, "LONG", 2048)
    return cpu_generate


def test_both_sides_say_the_same_and_others_are_noticed(
    cpu_generate: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = cpu_generate.Source(loud(HybridLM(tiny_config("M*E"))))
    row = cpu_generate.compare(source, batch=3, length=5, new=4, rounds=1)
    assert (row["equal"], row["tokens"]) == (1.0, 12)
    assert {*row["seconds"]} == {"nemo_hybrid", "transformers (eager)"}
    cpu_s = {name: seconds["cpu_s"] for name, seconds in row["seconds"].items()}
    ratio = cpu_s["transformers (eager)"] / cpu_s["nemo_hybrid"]
    assert row["ratio"]["cpu_s"] == pytest.approx(ratio)
    machine = {"cpu": "some", "torch": "1", "transformers": "2"}
    work = {"length": 5, "new": 4, "threads": 1}
    length = cpu_generate.cost_of_length(3)
    assert {*length} == {"1024", "2048"}
    text = cpu_generate.table(
        {"environment": machine, "work": work, "batches": [row], "length": length}
    )
    assert f"| {ratio:.2f} x | 100% |" in text

    build_peer = cpu_generate.build_peer

    def with_other_head(*arguments: object) -> torch.nn.Module:
        peer = build_peer(*arguments)
        with torch.no_grad():
            peer.lm_head.weight.copy_(peer.lm_head.weight.roll(1, 0))
        return peer

    monkeypatch.setattr(cpu_generate, "build_peer", with_other_head)
    with pytest.raises(AssertionError, match="texts are not the same"):
        cpu_generate.compare(source, batch=3, length=5, new=4, rounds=1)


def test_drafts_of_a_trained_model_are_timed_too(cpu_generate: ModuleType, tmp_path: Path) -> None:
    tokenizer = train_tokenizer(["a b"], 259)
    config = tiny_config("M*E", vocab_size=260, mtp_num_depths=1, mtp_pattern="*E")
    loud_model(config).save_hf(str(tmp_path / "model"))
    for name, content in tokenizer.files.items():
        (tmp_path / "model" / name).write_bytes(content)
    (tmp_path / "text").write_text("def add(a, b): return a + b")
    source = cpu_generate.trained(tmp_path / "model", tmp_path / "text")
    pieces = source.prompts(2, 4)
    assert [len(ids) for ids in pieces] == [4, 4]
    assert tokenizer.decode(pieces[0]) == "def "
    assert tokenizer.decode(pieces[1]) in "(a, b): return a + b"
    with pytest.raises(AssertionError, match="too few for the prompts"):
        source.prompts(2, 20)
    row = cpu_generate.compare(source, batch=2, length=4, new=6, rounds=1, drafts=2)
    assert {*row["seconds"]} == {"nemo_hybrid", "nemo_hybrid, 2 drafts", "transformers (eager)"}
    assert row["equal"] == 1.0
    cpu_s = {name: seconds["cpu_s"] for name, seconds in row["seconds"].items()}
    ratio = cpu_s["transformers (eager)"] / cpu_s["nemo_hybrid"]
    assert row["ratio"]["cpu_s"] == pytest.approx(ratio)  # drafts are no peer
