"""The benchmark of generation times the same texts on both sides and can say that it does not."""

from pathlib import Path
from types import ModuleType

import pytest
import torch

from helpers.tiny_models import loud, tiny_config
from nemo_hybrid import HybridLM

BENCHMARKS = Path(__file__).resolve().parents[2] / "kernels" / "benchmarks"


@pytest.fixture
def cpu_generate(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))  # as for a script
    import cpu_generate

    monkeypatch.setattr(cpu_generate, "build_ours", lambda: loud(HybridLM(tiny_config("M*E"))))
    monkeypatch.setattr(cpu_generate, "PEER_EXPERTS", ("eager",))
    monkeypatch.setattr(cpu_generate, "LONG", 2048)
    return cpu_generate


def test_both_sides_say_the_same_and_others_are_noticed(
    cpu_generate: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = cpu_generate.compare(batch=3, length=5, new=4, rounds=1)
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
        cpu_generate.compare(batch=3, length=5, new=4, rounds=1)
