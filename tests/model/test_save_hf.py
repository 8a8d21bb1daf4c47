"""HybridLM.save_hf: what it writes comes back whole, here and in transformers."""

from pathlib import Path

import pytest
import torch

from helpers.tiny_models import loud_model, random_ids, tiny_config
from nemo_hybrid import HybridLM, UserError
from nemo_hybrid.checkpoint.load import tensors_by_name


def test_round_trip_and_transformers(tmp_path: Path) -> None:
    from transformers import NemotronHForCausalLM

    model = loud_model(tiny_config("ME*-", mtp_num_depths=1), seed=3)
    model.save_hf(str(tmp_path / "out"))
    again = HybridLM.from_hf(str(tmp_path / "out"))
    assert again.config == model.config
    before, after = tensors_by_name(model), tensors_by_name(again)
    assert before.keys() == after.keys()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert any("e_score_correction_bias" in name for name in before)

    ids_BS = random_ids(model.config, 2, 11)
    theirs = NemotronHForCausalLM.from_pretrained(tmp_path / "out", local_files_only=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(
            theirs(ids_BS, use_cache=False).logits, model(ids_BS).logits, rtol=1e-4, atol=1e-4
        )
    with pytest.raises(UserError, match="not empty"):
        model.save_hf(str(tmp_path / "out"))
