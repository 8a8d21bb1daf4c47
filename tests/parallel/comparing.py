"""What the processes left, put together again and compared."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from nemo_hybrid.checkpoint.names import is_stacked
from parallel.equal import Outcome, State

TOLERANCES = {
    "losses": 2e-6,
    "norms": 1e-5,
    # Of A_log and dt_bias, whose terms cancel; those of matrices move a tenth as much.
    "gradients": 8e-5,
    "later gradients": 2.2e-4,
    "weights": 2e-6,
}
"""Of :func:`distances` in fp32: twice the most that was seen of plain PyTorch in six draws of
``helpers.bands.jittered``. A bug moves every one of them fifty times as far."""


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


def pooled_distances(ours: Outcome, theirs: Outcome) -> dict[str, float]:
    """As :func:`distances`, but for gradients, which are pooled over all experts and over all else,
    so that one token that takes another expert weighs little; and how far from 1 the share of
    theirs in ours is, which rounding in all directions hardly moves."""
    found = distances(ours, theirs)
    found = {kind: found[kind] for kind in ("losses", "norms", "weights")}
    pools: dict[tuple[str, bool], list[str]] = {}
    for key in theirs[1]:
        if key.startswith("grad"):
            pools.setdefault((key.split("|")[0], ".experts." in key), []).append(key)
    for keys in pools.values():
        a, b = (torch.cat([o[1][key].flatten() for key in keys]).double() for o in (ours, theirs))
        found["gradients"] = max(found.get("gradients", 0.0), relative(a, b))
        found["shares"] = max(found.get("shares", 0.0), abs(float(a @ b / (b @ b)) - 1))
    return found
