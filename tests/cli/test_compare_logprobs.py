"""compare-logprobs against probabilities computed by hand, and what it must notice."""

import json
import re
import shutil
from collections import Counter
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.tiny_models import loud_model, random_ids, tiny_config
from nemo_hybrid import cli
from nemo_hybrid.commands.compare import our_states, their_states
from nemo_hybrid.data.store import Store
from nemo_hybrid.data.tokenizer import train_tokenizer
from nemo_hybrid.export import divergence
from nemo_hybrid.export.divergence import per_token
from nemo_hybrid.hub import HybridLM
from nemo_hybrid.meter import Meter

CONFIG = tiny_config("MEM*E-", mtp_num_depths=1)
TEXT = "def add(a, b):\n    return a + b\n" * 3


def model_with(change: Callable[[HybridLM], object] | None = None) -> HybridLM:
    model = loud_model(CONFIG)
    if change is not None:
        with torch.no_grad():
            change(model)
    return model


def one_weight(model: HybridLM) -> None:
    """Of one expert of the first MoE layer."""
    model.backbone.layers[1].mixer.experts.up_proj[3, 0, 0] += 1.0


def not_a_number(model: HybridLM) -> None:
    model.backbone.layers[0].mixer.D[0] = float("nan")


def slow_steps(model: HybridLM) -> None:
    """Time steps far below time_step_min, in a scan that remembers all it has seen."""
    for layer in model.backbone.layers:
        if layer.letter == "M":
            layer.mixer.dt_bias.fill_(-12.0)
            layer.mixer.A_log.fill_(-9.0)
            layer.mixer.D.zero_()


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories a, and b that differs in one weight."""
    place = tmp_path_factory.mktemp("compare")
    for name, change in [("a", None), ("b", one_weight), ("nan", not_a_number)]:
        model_with(change).save_hf(str(place / name))
    return place


@pytest.fixture(scope="module")
def readers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories a, b that read text; other has another tokenizer of the same size."""
    place = tmp_path_factory.mktemp("readers")
    config = tiny_config("M", vocab_size=320)
    texts = {"a": [TEXT], "b": [TEXT], "other": ["one two three one two three " * 9]}
    for seed, (name, text) in enumerate(texts.items()):
        loud_model(config, seed).save_hf(str(place / name))
        for file, data in train_tokenizer(text, 270).files.items():
            (place / name / file).write_bytes(data)
    return place


def log_softmax_by_hand(logits_TV: Tensor) -> Tensor:
    logits_TV = logits_TV.detach().double()
    return logits_TV - logits_TV.exp().sum(1, keepdim=True).log()


def by_hand(a: HybridLM, b: HybridLM, ids: Tensor, length: int) -> dict[str, Tensor]:
    """Differences and KL of every token, from the models' own logits."""
    rows = []
    for start in range(0, len(ids) - 1, length):
        piece = ids[start : min(start + length, len(ids) - 1)][None]
        rows.append([log_softmax_by_hand(m(piece).logits[0]) for m in (a, b)])
    p_TV, q_TV = (torch.cat(part) for part in zip(*rows, strict=True))
    places = torch.arange(len(ids) - 1)
    return {
        "a": p_TV[places, ids[1:]],
        "b": q_TV[places, ids[1:]],
        "kl": (p_TV.exp() * (p_TV - q_TV)).sum(1),
        "same": p_TV.argmax(1) == q_TV.argmax(1),
    }


@pytest.mark.parametrize("chunk_bytes", [1, 64 << 20])
@pytest.mark.parametrize("length", [7, 100])
def test_values_are_those_computed_by_hand(
    length: int, chunk_bytes: int, saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(divergence, "CHUNK_BYTES", chunk_bytes)
    ids = random_ids(CONFIG, 1, 41)[0]
    expected = by_hand(model_with(), model_with(one_weight), ids, length)
    a, b = (our_states(saved / name, ids, length, torch.float32) for name in "ab")
    found = per_token(a, b, ids[1:])
    close = {"rtol": 1e-4, "atol": 1e-5}
    torch.testing.assert_close(found.a_T, expected["a"], **close)
    torch.testing.assert_close(found.b_T, expected["b"], **close)
    torch.testing.assert_close(found.kl_T, expected["kl"], **close)
    assert torch.equal(found.same_top_T, expected["same"])
    assert expected["kl"].max() > 1e-2  # one weight is seen, a thousand times over the tolerance
    assert (expected["a"] - expected["b"]).abs().max() > 1e-2


def test_printed_values(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = [str(saved / "a"), str(saved / "b"), "--tokens", "40", "--sequence_length", "16"]
    assert cli.main(["compare-logprobs", *words, "--seed", "5"]) == 0
    shown = capsys.readouterr()
    ids = torch.randint(0, 61, (41,), generator=torch.Generator().manual_seed(5))
    expected = by_hand(model_with(), model_with(one_weight), ids, 16)
    difference_T = (expected["a"] - expected["b"]).abs()
    assert "40 tokens of random token ids (seed 5), in pieces of 16" in shown.out
    for name, values in (("|logprob B - logprob A|", difference_T), ("KL(A||B)", expected["kl"])):
        row = next(line for line in shown.out.splitlines() if name in line)
        mean, largest = (float(x) for x in re.findall(r"\d\.\d+e[-+]\d+", row))
        assert mean == pytest.approx(float(values.mean()), rel=1e-2)
        assert largest == pytest.approx(float(values.max()), rel=1e-2)
        place = int(values.argmax())
        assert f"token {place + 1} (id {ids[place + 1]})" in row
    losses = [f"{-expected[name].mean():.4f}" for name in "ab"]
    assert f"loss: A {losses[0]}, B {losses[1]}" in shown.out
    assert "computing" in shown.err


def test_heldout_data_of_the_run_is_taken(
    readers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    texts = tmp_path / "texts.jsonl"
    texts.write_text("".join(json.dumps({"text": f"{TEXT} {i}"}) + "\n" for i in range(9)))
    made = [str(texts), "--tokenizer", str(readers / "a"), "--heldout", "0.5"]
    assert cli.main(["prepare", *made, "--out", str(tmp_path / "store")]) == 0
    checkpoint = tmp_path / "step_00000001"
    shutil.copytree(readers / "a", checkpoint)
    (checkpoint / "run.yaml").write_text(f"data: {{path: {tmp_path / 'store'}}}\n")
    words = ["compare-logprobs", str(checkpoint), str(readers / "b"), "--tokens", "40"]
    words += ["--sequence_length", "16"]

    def said(*more: str) -> str:
        capsys.readouterr()
        assert cli.main([*words, *more]) == 0
        return capsys.readouterr().out

    shown = said()
    assert f"40 tokens of {tmp_path / 'store'}, in pieces of 16" in shown
    assert said("--data", str(tmp_path / "store")) == shown
    worst = re.findall(r"\(id (\d+) ", shown)
    heldout = Store.open(tmp_path / "store" / "heldout")
    tokens = heldout.read(0, len(heldout)).tolist()
    assert {int(token) for token in worst} <= set(tokens)  # not random ones
    shutil.rmtree(tmp_path / "store")
    assert "40 tokens of random token ids" in said()


@pytest.mark.parametrize(
    ("b", "tolerance", "status"),
    [("a", "0", 0), ("b", "10", 0), ("b", "1e-4", 3), ("nan", "10", 2), ("nan", None, 2)],
)
def test_tolerance(b: str, tolerance: str | None, status: int, saved: Path) -> None:
    """Weights that are not finite are no difference but a mistake, which names them."""
    words = ["compare-logprobs", str(saved / "a"), str(saved / b), "--tokens", "30"]
    assert cli.main([*words, *(["--tolerance", tolerance] if tolerance else [])]) == status


def test_low_precision_is_close(saved: Path) -> None:
    ids = random_ids(CONFIG, 1, 31)[0]
    a, b = (our_states(saved / "a", ids, 16, d) for d in (torch.float32, torch.bfloat16))
    assert b.h_TD.dtype == b.head_VD.dtype == torch.bfloat16
    found = per_token(a, b, ids[1:])
    assert 0 < found.kl_T.mean() < 0.1


@pytest.mark.slow
def test_transformers_agrees_but_for_its_limit(tmp_path: Path) -> None:
    """Where time steps are smaller than time_step_min, only the unlimited one agrees."""
    model_with(slow_steps).save_hf(str(tmp_path / "slow"))
    ids = random_ids(CONFIG, 1, 49)[0]
    ours, limited, unlimited = (
        compute(tmp_path / "slow", ids, 24, torch.float32)
        for compute in (our_states, their_states, partial(their_states, unclamped=True))
    )
    assert per_token(ours, unlimited, ids[1:]).kl_T.max() < 1e-6
    assert per_token(ours, limited, ids[1:]).kl_T.max() > 1e-2


def test_transformers_as_a_command(saved: Path, capsys: pytest.CaptureFixture[str]) -> None:
    common = ["--tokens", "30", "--backend", "transformers", "--tolerance", "1e-4"]
    assert cli.main(["compare-logprobs", str(saved / "a"), *common]) == 0
    assert "transformers_unclamped" in capsys.readouterr().out
    assert cli.main(["compare-logprobs", str(saved / "a"), str(saved / "b"), *common]) == 3


def test_text_is_read_with_the_tokenizer(
    readers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    words = ["compare-logprobs", str(readers / "a"), str(readers / "b")]
    outputs = []
    for given in (["--data", str(tmp_path / "text.txt")], ["--prompt", TEXT]):
        assert cli.main([*words, *given, "--tokens", "12"]) == 0
        outputs.append(capsys.readouterr().out)
    assert f"12 tokens of {tmp_path}/text.txt" in outputs[0]
    assert "12 tokens of the prompt" in outputs[1]
    assert outputs[0].splitlines()[3:] == outputs[1].splitlines()[3:]
    ids = train_tokenizer([TEXT], 270).encode([TEXT])[0][:13]
    expected = by_hand(
        loud_model(tiny_config("M", vocab_size=320), 0),
        loud_model(tiny_config("M", vocab_size=320), 1),
        torch.from_numpy(ids),
        512,
    )
    assert f"loss: A {-expected['a'].mean():.4f}, B {-expected['b'].mean():.4f}" in outputs[0]


def fails(capsys: pytest.CaptureFixture[str], *words: object) -> str:
    assert cli.main(["compare-logprobs", *map(str, words)]) == 2
    said = capsys.readouterr().err
    (line,) = [line for line in said.splitlines() if line.startswith("error: ")]
    return line


def test_other_tokens_are_a_mistake(
    saved: Path, readers: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    said = fails(capsys, saved / "a", readers / "a")
    assert "vocab_size differs: 61 in" in said
    assert "320 in" in said
    assert "the tokenizers of" in fails(capsys, readers / "a", readers / "other")
    assert "the tokenizers of" in fails(capsys, readers / "a", readers / "other", "--prompt", "a b")


def test_text_that_cannot_be_compared(
    saved: Path, readers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty").write_text("")
    a, b = readers / "a", readers / "b"
    assert "cannot read" in fails(capsys, a, b, "--data", tmp_path / "gone")
    assert "is not a token store" in fails(capsys, a, b, "--data", tmp_path)
    assert "not a UTF-8 text file" in fails(capsys, a, b, "--data", tmp_path / "binary")
    assert "fewer than two tokens" in fails(capsys, a, b, "--data", tmp_path / "empty")
    assert "fewer than two tokens" in fails(capsys, a, b, "--prompt", "a")
    said = fails(capsys, saved / "a", saved / "b", "--prompt", "a b")
    assert "tokenizer.json, so the prompt cannot be read" in said


def test_token_beyond_the_vocabulary(
    saved: Path, readers: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    small = Path(shutil.copytree(saved / "a", tmp_path / "small"))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(readers / "a" / name, small)
    assert "beyond the model's vocab_size 61" in fails(capsys, small, small, "--prompt", TEXT)


def test_weights_that_do_not_fit(
    saved: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Also where transformers would fill the place of a missing tensor at random."""
    bare = tmp_path / "bare"
    bare.mkdir()
    shutil.copy(saved / "a" / "config.json", bare)
    fails(capsys, saved / "a", bare)
    said = fails(capsys, saved / "a", bare, "--backend", "transformers")
    assert f"{bare} holds neither model.safetensors" in said
    torn = Path(shutil.copytree(saved / "a", tmp_path / "torn"))
    (file,) = torn.glob("*.safetensors")
    file.write_bytes(file.read_bytes()[:1000])
    fails(capsys, saved / "a", torn)
    fails(capsys, saved / "a", torn, "--backend", "transformers")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("", "compare-logprobs takes 2 paths, got none"),
        ("a", "compare-logprobs takes 2 paths, got a"),
        ("a b c", "compare-logprobs takes 2 paths, got a b c"),
        ("a b c --backend transformers", "takes 1 or 2 paths"),
        ("a b --backend theirs", "backend: expected one of nemo_hybrid, transformers"),
        ("a b --data x --prompt y", "give --data or --prompt, not both"),
        ("a b --data x --prompt=", "give --data or --prompt, not both"),
        ("a b --prompt=", "--prompt is empty"),
        ("a b --tokens 0", "tokens must be positive"),
        ("a b --sequence_length -1", "sequence_length must be positive"),
        ("a b --tolerance -1", "tolerance must be 0 or more"),
        ("a b --tolerance nan", "tolerance: expected a number"),
        ("a b --seed -1", "seed must lie in"),
        ("a b --toknes 1", "did you mean --tokens?"),
        ("gone gone", "gone does not exist"),
    ],
)
def test_wrong_options(words: str, expected: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert expected in fails(capsys, *words.split())


def test_distributions_are_compared_where_the_head_is() -> None:
    """Of a model on a GPU numbers per token come to the host, and no logits."""
    h_TD, head_VD = torch.empty(6, 8, device="meta"), torch.empty(32, 8, device="meta")
    of = divergence.States(h_TD, head_VD)
    with Meter() as meter:
        found = per_token(of, of, torch.zeros(6, dtype=torch.int64))
    names = Counter({work.name: n for (work, _), n in meter.works.items()})
    assert names["_log_softmax"] == 2
    assert meter.waits["values read"] == len(found) == 4
