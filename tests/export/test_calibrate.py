"""Calibration against activations computed by hand, and reading what to calibrate on."""

import random
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from helpers.chats import write_base, write_chats
from helpers.corpus import EOS, TINY_MODEL, write_corpus
from helpers.tiny_models import loud_model, random_ids, tiny_config
from nemo_hybrid.config.finetune import SampleOptions
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.data.samples import prepare_samples
from nemo_hybrid.data.store import Store
from nemo_hybrid.data.tokenizer import SMALLEST_VOCABULARY, TextTokenizer, train_tokenizer
from nemo_hybrid.errors import UserError
from nemo_hybrid.export import calibrate as calibrate_module
from nemo_hybrid.export.calibrate import calibrate, read_pieces
from nemo_hybrid.model.hybrid import HybridLM

CONFIG = tiny_config("E*-M")
EXPERTS = "backbone.layers.0.mixer.experts"


def by_hand(model: HybridLM, ids_BS: Tensor) -> dict[str, Tensor]:
    """Inputs of the first three layers' products; those of an expert under its number."""
    seen = {}
    moe, attention, mlp, _ = model.backbone.layers
    x = model.backbone.embeddings(ids_BS)
    h = moe.norm(x).flatten(0, 1)
    chosen_TK, _, _ = moe.mixer.gate(h)
    latent = moe.mixer.fc1_latent_proj(h)
    for expert in range(CONFIG.n_routed_experts):
        rows = latent[(chosen_TK == expert).any(1)]
        inner = F.relu(rows @ moe.mixer.experts.up_proj[expert].t()).square()
        seen[f"{EXPERTS}.{expert}.up_proj"], seen[f"{EXPERTS}.{expert}.down_proj"] = rows, inner
    seen["backbone.layers.0.mixer.fc1_latent_proj"] = h
    x = moe(x, None)[0]
    seen["backbone.layers.1.mixer.q_proj"] = attention.norm(x)
    seen["k"] = attention.mixer.k_proj(attention.norm(x))
    seen["v"] = attention.mixer.v_proj(attention.norm(x))
    x = attention(x, None)[0]
    seen["backbone.layers.2.mixer.up_proj"] = h = mlp.norm(x)
    seen["backbone.layers.2.mixer.down_proj"] = F.relu(h @ mlp.mixer.up_proj.weight.t()).square()
    x = mlp(x, None)[0]
    seen["backbone.layers.3.mixer.in_proj"] = model.backbone.layers[3].norm(x)
    seen["lm_head"] = model.forward_hidden(ids_BS)[0]
    return seen


@torch.no_grad()
def test_largest_magnitudes_are_those_computed_by_hand() -> None:
    model, ids_BS = loud_model(CONFIG), random_ids(CONFIG, 3, 20)
    found = calibrate(model, ids_BS.split(1))
    for name, x in by_hand(model, ids_BS).items():
        if name in ("k", "v"):
            amax = torch.tensor(found.kv[f"backbone.layers.1.mixer.{name}_proj"])
        elif name.startswith(EXPERTS):
            expert, projection = name.removeprefix(f"{EXPERTS}.").split(".")
            amax = found.amax[f"{EXPERTS}.{projection}"][int(expert)]
        else:
            amax = found.amax[name]
            assert not amax.dim()
        torch.testing.assert_close(amax, x.abs().max(), msg=name)
    assert found.tokens == 60
    assert not found.unseen


@torch.no_grad()
def test_the_model_is_left_as_it_was() -> None:
    model, ids_BS = loud_model(CONFIG), random_ids(CONFIG, 1, 20)
    before = model(ids_BS).logits
    calibrate(model, [ids_BS], 99.0)
    torch.testing.assert_close(model(ids_BS).logits, before, rtol=0, atol=0)
    assert model.backbone.layers[0].mixer.experts.low_precision is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_only_what_is_watched_is_there_and_mtp_if_it_is() -> None:
    config = tiny_config("E", mtp_num_depths=2)
    model, ids_BS = loud_model(config), random_ids(config, 1, 12)
    up = f"{EXPERTS}.up_proj"
    found = calibrate(model, [ids_BS], places=[up])
    assert list(found.amax) == [up]
    assert not found.kv
    found = calibrate(model, [ids_BS], places=["mtp.layers.0.eh_proj"])
    assert list(found.kv) == ["mtp.layers.0.mixer.k_proj", "mtp.layers.0.mixer.v_proj"]
    assert found.amax["mtp.layers.0.eh_proj"] > 0


def test_experts_without_tokens_are_named_and_get_the_largest_of_the_others() -> None:
    model, ids_BS = loud_model(CONFIG), random_ids(CONFIG, 1, 40)
    model.backbone.layers[0].mixer.gate.e_score_correction_bias[[2, 5]] = -100.0
    found = calibrate(model, [ids_BS])
    assert found.unseen == {f"{EXPERTS}.{p}": [2, 5] for p in ("up_proj", "down_proj")}
    for place in found.unseen:
        amax_E = found.amax[place]
        others = [float(a) for e, a in enumerate(amax_E) if e not in (2, 5)]
        assert float(amax_E[2]) == float(amax_E[5]) == max(others)
        assert len(set(others)) > 1


@pytest.mark.parametrize("percentile", [75.0, 99.0, 99.9, 100.0])
@torch.no_grad()
def test_a_percentile_is_that_of_torch_within_a_bin(percentile: float) -> None:
    model, ids_BS = loud_model(CONFIG), random_ids(CONFIG, 4, 30)
    seen = by_hand(model, ids_BS)
    name = "backbone.layers.2.mixer.down_proj"
    everyone = torch.cat([x for n, x in seen.items() if n.endswith("up_proj") and EXPERTS in n])
    found = calibrate(model, ids_BS.split(2), percentile)
    for amax, x in ((found.amax[name], seen[name]), (found.amax[f"{EXPERTS}.up_proj"], everyone)):
        # relu leaves zeros, of which a low percentile would be one.
        sizes = x.abs()[x != 0]
        assert (len(sizes) < x.numel()) == (amax is found.amax[name])
        wanted = torch.quantile(sizes, percentile / 100, interpolation="higher")
        assert wanted <= amax.max() <= wanted * (1 + 2.0**-7)
    again = calibrate(model, ids_BS.split(2)[::-1], percentile)
    assert torch.equal(again.amax[name], found.amax[name])
    # Products of other sizes may round otherwise, which moves a value by one bin at most.
    alone = calibrate(model, ids_BS.split(1), percentile)
    assert torch.allclose(alone.amax[name], found.amax[name], rtol=2.0**-6, atol=0)


def test_zeros_give_a_scale_that_can_divide_and_nan_is_an_error() -> None:
    model, ids_BS = loud_model(CONFIG), random_ids(CONFIG, 1, 8)
    place = "backbone.layers.2.mixer.down_proj"
    mlp = model.backbone.layers[2].mixer
    with torch.no_grad():
        mlp.up_proj.weight.zero_()
    assert calibrate(model, [ids_BS], 99.0, [place]).amax[place] == 1
    with torch.no_grad():
        mlp.up_proj.weight[0, 0] = torch.nan
    with pytest.raises(UserError, match=f"{place} are not finite"):
        calibrate(model, [ids_BS], None, [place])
    later = "backbone.layers.3.mixer.in_proj"  # to blame is what comes first
    for places in ([place, later], [later, place]):
        with pytest.raises(UserError, match=f"{places[0]} are not finite"):
            calibrate(model, [ids_BS], None, places)
    with pytest.raises(UserError, match="no token"):
        calibrate(model, [])


def test_pieces_of_a_store_are_of_one_document(tmp_path: Path) -> None:
    store = write_corpus(tmp_path / "store")
    config = HybridConfig(**TINY_MODEL)
    for split in ("train", "heldout"):
        pieces = read_pieces(str(store), store, config, 300, split, 32)  # type: ignore[arg-type]
        assert 300 <= sum(p.numel() for p in pieces) < 332
        assert all(p.dim() == 2 and len(p) == 1 and p.shape[1] <= 32 for p in pieces)
        assert all(EOS not in p[0, :-1] for p in pieces)
        assert any(EOS in p for p in pieces)
        again = read_pieces(str(store), store, config, 300, split, 32)  # type: ignore[arg-type]
        assert all(map(torch.equal, pieces, again))


def test_pieces_of_samples_are_whole_ones(tmp_path: Path) -> None:
    base, chats = write_base(tmp_path / "base"), write_chats(tmp_path / "chats.jsonl", 40)
    shape = HybridConfig.from_hf(str(base))
    with pytest.raises(UserError, match=r"chats\.jsonl is no plain text: make a token store"):
        read_pieces(str(chats), base, shape, 500)
    prepare_samples(SampleOptions(heldout=0.2), [chats], base, tmp_path / "samples", seed=0)
    for split in ("train", "heldout"):
        store = Store.open(tmp_path / "samples" / split, samples=True)
        pieces = read_pieces(str(tmp_path / "samples"), base, shape, 100, split, 48)  # type: ignore[arg-type]
        assert 100 <= sum(p.numel() for p in pieces) < 148
        for number, piece in enumerate(pieces):
            assert piece[0].tolist() == store.sample(number)[0][:48].tolist()
    with pytest.raises(UserError, match="beyond the model's vocab_size 61"):
        read_pieces(str(tmp_path / "samples"), tmp_path, CONFIG, 5)


def test_pieces_of_a_text_are_the_first_tokens(tmp_path: Path) -> None:
    store, text = tmp_path / "tokenizer", tmp_path / "text.txt"
    store.mkdir()
    text.write_bytes("\ufeffseven\r\nby\rday".encode())
    tokenizer = train_tokenizer([], SMALLEST_VOCABULARY)
    for name, content in tokenizer.files.items():
        (store / name).write_bytes(content)
    config = tiny_config("E", vocab_size=SMALLEST_VOCABULARY)
    pieces = read_pieces(str(text), store, config, 10, length=3)
    assert [tokenizer.decode(p[0].tolist()) for p in pieces] == ["sev", "en\r", "\nby", "\r"]
    with pytest.raises(UserError, match="beyond the model's vocab_size 61"):
        read_pieces(str(text), store, CONFIG, 5)
    for content, why in ((b"\xff\xfe", "UTF-16"), (b'{"text": "x"}\n', "no plain text: make a")):
        text.with_suffix(".json").write_bytes(content)
        with pytest.raises(UserError, match=rf"\.json is {why}"):
            read_pieces(str(text.with_suffix(".json")), store, config, 5)
    text.write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match="is not a UTF-8 text file"):
        read_pieces(str(text), store, config, 5)
    text.write_text("")
    with pytest.raises(UserError, match="fewer than two tokens"):
        read_pieces(str(text), store, config, 5)
    with pytest.raises(UserError, match="absent does not exist"):
        read_pieces(str(tmp_path / "absent"), store, config, 5)


def words(count: int, seed: int = 0) -> str:
    draw = random.Random(seed)
    some = ["".join(draw.choices("abcdefgh", k=draw.randint(1, 12))) for _ in range(60)]
    return "".join(draw.choice(some) + draw.choice([" ", "  ", "\n", ", "]) for _ in range(count))


@pytest.mark.parametrize("tokens", [1, 3, 40, 500, 4000])
@pytest.mark.parametrize("per_token", [1, 6])
def test_a_text_is_read_no_further_than_its_tokens_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tokens: int, per_token: int
) -> None:
    """Whatever the place where reading ended, the ids are those of the whole text."""
    whole = words(20_000)
    tokenizer = train_tokenizer([whole[:3000]], 400)
    for name, content in tokenizer.files.items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "text").write_text(whole)
    config = tiny_config("E", vocab_size=tokenizer.vocab_size)
    encoded: list[int] = []
    encode = TextTokenizer.encode

    def counted(self: TextTokenizer, texts: list[str]) -> list[NDArray[np.int64]]:
        encoded.append(sum(map(len, texts)))
        return encode(self, texts)

    monkeypatch.setattr(TextTokenizer, "encode", counted)
    monkeypatch.setattr(calibrate_module, "_CHARACTERS", per_token)
    pieces = read_pieces(str(tmp_path / "text"), tmp_path, config, tokens, length=100)
    ids = torch.cat(pieces, 1)[0]
    assert len(ids) == tokens
    assert max(encoded) < 20 * (tokens + 64)
    assert (len(encoded) > 1) == (per_token == 1)
    assert ids.tolist() == encode(tokenizer, [whole])[0][:tokens].tolist()


def test_one_token_is_nothing_to_predict(tmp_path: Path) -> None:
    store, config = write_corpus(tmp_path / "store"), HybridConfig(**TINY_MODEL)
    pieces = read_pieces(str(store), store, config, 300, "heldout", 3)
    assert min(p.shape[1] for p in pieces) == 2
    with pytest.raises(UserError, match="fewer than two tokens; there is nothing to predict"):
        read_pieces(str(store), store, config, 300, "heldout", 1)
