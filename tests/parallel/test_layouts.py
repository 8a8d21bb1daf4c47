"""Every layout trains the same: losses, gradients and weights equal those of plain PyTorch."""

from __future__ import annotations

import json
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from helpers.runs import (
    ALL_OF_RANK_1,
    EQUAL_STEPS,
    EQUAL_TRAIN,
    UNCHOSEN,
    masked,
    read_steps,
    starve,
    tiny_run,
)
from nemo_hybrid.checkpoint.names import is_stacked
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.data.loader import open_blend
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.router import Router
from nemo_hybrid.parallel.dispatch import AllToAllDispatcher
from nemo_hybrid.train.balance import update_router_bias
from nemo_hybrid.train.losses import Normalizer, PretrainObjective, count_targets
from nemo_hybrid.train.optim import parameter_groups

Results = Callable[[int], Path]
State = dict[str, Tensor]
Outcome = tuple[list[dict[str, Any]], State]
TOLERANCES = {
    "losses": 1e-6,
    "norms": 1e-6,
    "weights": 1e-6,
    # Gradients of A_log and dt_bias are small sums of large terms.
    "moments": 1e-5,
}


def reference(store: Path, starved: tuple[int, ...]) -> Outcome:
    """The same steps without DeepSpeed and without processes, the whole batch at once."""
    config = tiny_run(store, train=EQUAL_TRAIN | {"micro_batch_size": 8})
    hybrid = config.model.hybrid()
    model = HybridLM(hybrid, seed=config.train.seed)
    starve(model, starved)
    objective = PretrainObjective(model, config.train)
    optimizer = torch.optim.AdamW(parameter_groups(model, config.train))
    data = read_steps(config, open_blend(config.data, hybrid))
    rows = []
    for _ in range(EQUAL_STEPS):
        batch: Batch = masked(next(data)[0])
        parts = objective(batch, Normalizer(count_targets(batch, objective.depths), 8))
        optimizer.zero_grad()
        parts.loss.backward()
        norm = torch.stack([p.grad.norm() for p in model.parameters() if p.grad is not None]).norm()
        scale = min(1.0, float(config.train.clip_grad_norm / norm))
        for parameter in model.parameters():
            assert parameter.grad is not None
            parameter.grad *= scale
        optimizer.step()
        update_router_bias(model, parts.counts, config.train.router_bias_rate)
        mean_N = parts.ce_sums_N / count_targets(batch, objective.depths)
        rows.append(
            {
                "losses": mean_N.tolist(),
                "grad_norm": float(norm),
                "targets": int(count_targets(batch, 0)),
                "loads": {name: c.tolist() for name, c in parts.counts.items()},
            }
        )
    tensors = {name: p.detach() for name, p in model.named_parameters()}
    for name, parameter in model.named_parameters():
        tensors[f"exp_avg|{name}"] = optimizer.state[parameter]["exp_avg"]
    return rows, tensors


@pytest.fixture(scope="module")
def plain(store: Path) -> Outcome:
    return reference(store, (UNCHOSEN,))


def read(directory: Path, name: str, size: int, ep: int) -> Outcome:
    """Numbers per step, and global tensors: weights (replicas compared on the way) and moments."""
    rows = json.loads((directory / f"{name}.json").read_text())
    ranks = [load_file(directory / f"{name}-{rank}.safetensors") for rank in range(size)]
    state: State = {}
    for key in (key for key in ranks[0] if "|" not in key):
        for rank in range(ep, size):
            assert torch.equal(ranks[rank][key], ranks[rank % ep][key]), f"{key}: replicas differ"
        if is_stacked(key):
            state[key] = torch.cat([ranks[rank][key] for rank in range(ep)])
        else:
            state[key] = ranks[0][key]
            assert all(torch.equal(r[key], state[key]) for r in ranks), f"{key}: replicas differ"
    for kind in ("master", "exp_avg", "exp_avg_sq"):
        for key, whole in [(key, t) for key, t in state.items() if "|" not in key]:
            flat = torch.full((whole.numel(),), torch.nan)
            for held in ranks:
                for address, piece in held.items():
                    if address.startswith(f"{kind}|{key}|"):
                        start = int(address.rsplit("|", 1)[1])
                        flat[start : start + len(piece)] = piece
            assert not flat.isnan().any(), f"{key}: a part of {kind} is on no rank"
            state[f"{kind}|{key}"] = flat.view_as(whole)
    return rows, state


def relative(a: Any, b: Any) -> float:
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    return float((a - b).norm() / b.norm()) if b.norm() else float(a.norm())


def distances(ours: Outcome, theirs: Outcome) -> dict[str, float]:
    """Largest relative differences: of losses and gradient norms over the steps, and of weights
    and first moments over the tensors."""
    steps_, pairs = list(zip(ours[0], theirs[0], strict=True)), theirs[1]
    return {
        "losses": max(
            relative(x, y) for a, b in steps_ for x, y in zip(a["losses"], b["losses"], strict=True)
        ),
        "norms": max(relative(a["grad_norm"], b["grad_norm"]) for a, b in steps_),
        "weights": max(relative(ours[1][k], t) for k, t in pairs.items() if "|" not in k),
        "moments": max(relative(ours[1][k], t) for k, t in pairs.items() if "exp_avg|" in k),
    }


@pytest.mark.parametrize(
    ("size", "ep", "name"),
    [
        *((1, 1, f"w1-zero{zero}-acc{acc}") for zero, acc in product((1, 2), (1, 2))),
        *(
            (2, ep, f"w2-ep{ep}-zero{zero}-acc{acc}")
            for ep, zero, acc in product((1, 2), (1, 2), (1, 2))
        ),
        pytest.param(4, 2, "w4-ep2-zero1", marks=pytest.mark.slow),
        pytest.param(4, 2, "w4-ep2-zero2-acc2", marks=pytest.mark.slow),
    ],
)
def test_every_layout_equals_plain_pytorch(
    results: Results, plain: Outcome, size: int, ep: int, name: str
) -> None:
    found = read(results(size), name, size, ep)
    differences = distances(found, plain)
    assert all(differences[kind] < TOLERANCES[kind] for kind in TOLERANCES), differences
    for ours, theirs in zip(found[0], plain[0], strict=True):
        assert ours["loads"] == theirs["loads"]
        assert sum(ours["targets"]) == theirs["targets"]
        assert all(load[UNCHOSEN] == 0 for load in ours["loads"].values())
    for name, weight in found[1].items():
        if "|" not in name:
            assert torch.equal(weight, found[1][f"master|{name}"]), f"{name} is not its master"


def test_ranks_hold_unequal_numbers_of_targets(results: Results) -> None:
    """A condition of the test above: else local means could not be told from the global one."""
    rows = json.loads((results(2) / "w2-ep2-zero2-acc1.json").read_text())
    assert all(max(row["targets"]) > 1.4 * min(row["targets"]) for row in rows)


def test_routing_has_no_close_ties(store: Path) -> None:
    """Another condition: rounding must not change which experts are chosen."""
    gaps: list[float] = []

    def look(module: Router, inputs: tuple[Tensor], output: tuple[Tensor, ...]) -> None:
        ranked_TE = (
            (output[2].detach() + module.e_score_correction_bias).sort(-1, descending=True).values
        )
        gaps.append(float((ranked_TE[:, module.top_k - 1] - ranked_TE[:, module.top_k]).min()))

    hook = torch.nn.modules.module.register_module_forward_hook(
        lambda m, i, o: look(m, i, o) if isinstance(m, Router) else None
    )
    try:
        reference(store, (UNCHOSEN,))
    finally:
        hook.remove()
    assert min(gaps) > 1e-5


@pytest.mark.parametrize("fault", ["local-means", "expert-scale"])
def test_a_wrong_scale_is_noticed(results: Results, plain: Outcome, fault: str) -> None:
    """Averages of local means, and expert gradients divided by the expert-parallel size."""
    found = distances(read(results(2), f"w2-{fault}", 2, 2), plain)
    assert all(found[kind] > 50 * TOLERANCES[kind] for kind in TOLERANCES), found


def test_a_rank_whose_experts_get_no_token_works_on(results: Results, store: Path) -> None:
    found = read(results(2), "w2-starved-rank", 2, 2)
    differences = distances(found, reference(store, tuple(ALL_OF_RANK_1)))
    assert all(differences[kind] < TOLERANCES[kind] for kind in TOLERANCES), differences
    for row in found[0]:
        assert all(load[i] == 0 for load in row["loads"].values() for i in ALL_OF_RANK_1)


def test_bf16_layouts_agree_within_its_rounding(results: Results, plain: Outcome) -> None:
    """Band of bf16, three steps: 0.1 % of the losses, 1 % of the norms and of the weights. bf16
    against fp32 at the same layout is as far apart."""
    alone = read(results(1), "w1-bf16", 1, 1)
    for zero in (1, 2):
        differences = distances(read(results(2), f"w2-bf16-zero{zero}", 2, 2), alone)
        assert differences["losses"] < 1e-3, differences
        assert differences["norms"] < 1e-2, differences
        assert differences["weights"] < 1e-2, differences
    assert distances(alone, plain)["losses"] < 1e-3


def test_experts_that_cannot_be_divided() -> None:
    with pytest.raises(ValueError, match="6 experts cannot be divided over 4 processes"):
        AllToAllDispatcher(6, 4, 0)
