"""Greedy continuations from a directory that transformers saved: ours against transformers' own,
token for token, with caches and without.

Equality means something because every choice is clear: the best token leads the second one by far
more than the two implementations differ, no token comes close to another choice of experts, the
continuations hold many different tokens, and every sabotage of a layer changes them.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from helpers.generated import greedy
from helpers.nemotron_h_oracle import load_theirs, transformers_twin
from helpers.sabotage import sabotages
from helpers.tiny_models import (
    CHUNK,
    CONV,
    loud_model,
    random_ids,
    smallest_routing_margin,
    tiny_config,
)
from nemo_hybrid.hub import HybridLM

NEW = 24
PROMPTS = [1, CONV - 1, CHUNK + 1, 2 * CHUNK + 3]
ROWS = 2
LEAD = 1e-3  # of the best logit over the second; logits differ by about 1e-6, and are about 1
MARGIN = 1e-4
DISTINCT = 10  # different tokens in each continuation of NEW
# Pattern, other fields, and a seed of weights with which every choice is clear.
CASES: dict[str, tuple[str, dict[str, object], int]] = {
    "all-letters": ("ME*-ME", {}, 23),
    "attention-first-full-width": ("*EM-ME", {"moe_latent_size": None, "n_groups": 1}, 15),
    "deep": ("MEMEM*EM-ME*", {"n_groups": 4, "num_experts_per_tok": 2}, 5),
    "without-experts": ("M*-M", {}, 15),
}


def without_caches(model: HybridLM, prompt_BS: Tensor) -> tuple[Tensor, float]:
    """The continuation [B, NEW], and the smallest lead of a best logit."""
    ids_BS, leads = prompt_BS, []
    for _ in range(NEW):
        best_B2, index_B2 = model(ids_BS).logits[:, -1].topk(2)
        leads.append(float((best_B2[:, 0] - best_B2[:, 1]).min()))
        ids_BS = torch.cat([ids_BS, index_B2[:, :1]], dim=1)
    return ids_BS[:, prompt_BS.shape[1] :], min(leads)


@pytest.mark.parametrize(
    "case", [pytest.param(case, marks=pytest.mark.slow if case == "deep" else ()) for case in CASES]
)
@torch.no_grad()
def test_greedy_continuation_equals_that_of_transformers(case: str, tmp_path: Path) -> None:
    pattern, changes, seed = CASES[case]
    config = tiny_config(pattern, **changes)
    transformers_twin(loud_model(config, seed)).save_pretrained(tmp_path)
    ours = HybridLM.from_hf(str(tmp_path))
    theirs, _ = load_theirs(tmp_path, torch.float32)
    theirs.generation_config.eos_token_id = None  # continue to the full length

    found = {}
    for length in PROMPTS:
        prompt_BS = random_ids(config, ROWS, length, seed=length)
        reference_BS = theirs.generate(prompt_BS, do_sample=False, max_new_tokens=NEW)
        assert torch.equal(greedy(ours, prompt_BS, NEW), reference_BS[:, length:])
        alone_BN, lead = without_caches(ours, prompt_BS)
        assert torch.equal(alone_BN, reference_BS[:, length:])

        assert lead > LEAD
        assert smallest_routing_margin(ours, reference_BS) > MARGIN
        assert min(len(set(row)) for row in alone_BN.tolist()) >= DISTINCT
        found[length] = alone_BN
    starts = {tuple(row[:8]) for rows_BN in found.values() for row in rows_BN.tolist()}
    assert len(starts) == ROWS * len(PROMPTS)  # the prompt decides

    # A continuation is what the best tokens after each of its beginnings are.
    for name, sabotage in sabotages(pattern).items():
        with sabotage(ours):
            best_BS = ours(reference_BS).logits.argmax(-1)
        changed = best_BS[:, length - 1 : -1] != reference_BS[:, length:]
        assert changed.any(), f"the comparison would not notice: {name}"
    assert torch.equal(greedy(ours, prompt_BS, NEW), alone_BN)
