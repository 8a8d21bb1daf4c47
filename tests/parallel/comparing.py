"""What the processes left, put together again and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nemo_hybrid.checkpoint.names import is_stacked
from parallel.equal import Outcome, State


def read(directory: Path, name: str, size: int, ep: int) -> Outcome:
    """Numbers per step and global tensors; replicas of weights are compared on the way."""
    rows = json.loads((directory / f"{name}.json").read_text())
    ranks = [load_file(directory / f"{name}-{rank}.safetensors") for rank in range(size)]
    weights: State = {}
    for key in (key for key in ranks[0] if "|" not in key):
        for rank in range(ep, size):
            assert torch.equal(ranks[rank][key], ranks[rank % ep][key]), f"{key}: replicas differ"
        if is_stacked(key):
            weights[key] = torch.cat([ranks[rank][key] for rank in range(ep)])
        else:
            weights[key] = ranks[0][key]
            assert all(torch.equal(r[key], weights[key]) for r in ranks), f"{key}: replicas differ"
    kinds = {key.split("|")[0] for held in ranks for key in held if "|" in key}
    state = dict(weights)
    for kind in sorted(kinds):
        for key, whole in weights.items():
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
    """Distance of a from b over the size of b, in the Euclidean norm."""
    a, b = torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64)
    return float((a - b).norm() / b.norm()) if b.norm() else float(a.norm())


def distances(ours: Outcome, theirs: Outcome) -> dict[str, float]:
    """Largest relative differences: of losses and gradient norms over the steps, of weights over
    tensors, and, where there are any, of gradients over tensors in the first step and later."""
    steps, pairs = list(zip(ours[0], theirs[0], strict=True)), theirs[1]
    found = {
        "losses": max(
            relative(x, y) for a, b in steps for x, y in zip(a["losses"], b["losses"], strict=True)
        ),
        "norms": max(relative(a["grad_norm"], b["grad_norm"]) for a, b in steps),
        "weights": max(relative(ours[1][k], t) for k, t in pairs.items() if "|" not in k),
    }
    for key, tensor in pairs.items():
        if key.startswith("grad"):
            kind = "gradients" if key.startswith("grad0|") else "later gradients"
            found[kind] = max(found.get(kind, 0.0), relative(ours[1][key], tensor))
    return found
