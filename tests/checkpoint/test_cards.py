"""Heads of model cards, as the hub's own library reads them."""

from __future__ import annotations

from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from nemo_hybrid.checkpoint.publish import card_head, origin_name


def read(text: str) -> dict[str, object]:
    return ModelCard(f"{text}\n# Title\n").data.to_dict()


def test_a_card_names_the_base_and_its_licence(tmp_path) -> None:
    base = tmp_path / 'my: "base" # 1'
    base.mkdir()
    assert read(card_head(["merge"], base)) == {
        "library_name": "transformers",
        "base_model": base.name,
        "tags": ["nemotron_h", "merge"],
    }
    head = "---\nlicense: other\nlicense_name: open: model\nlanguage: [en]\nlicense_link: 3\n---\n"
    (base / "README.md").write_text(head.replace("open: model", "'open: model'"))
    found = read(card_head([], base, "peft"))
    assert (found["library_name"], found["license"], found["license_name"]) == (
        "peft", "other", "open: model",
    )  # fmt: skip
    assert "language" not in found
    assert "license_link" not in found


@pytest.mark.parametrize(
    "card", ["", "# none", "---\n- a\n---\n", "---\n[\n---\n", "---\nlicense: 3", "---\n!!x 3\n---"]
)
def test_a_card_that_says_nothing_adds_nothing(tmp_path, card) -> None:
    before = card_head([], tmp_path)
    (tmp_path / "README.md").write_text(card)
    assert card_head([], tmp_path) == before


def test_names() -> None:
    cached = Path("/hub/models--nvidia--Nemotron-3-Nano/snapshots/0a1b")
    assert origin_name(cached) == "nvidia/Nemotron-3-Nano"
    assert origin_name(Path("runs/mine")) == "mine"
    assert "base_model" not in card_head([], Path("runs/mine/checkpoints/step_00000010"))
