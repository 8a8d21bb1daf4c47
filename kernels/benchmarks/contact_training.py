"""Steps of a tiny model on a device and on the CPU, for ``first_contact.py``. Every token goes to
all experts, so that rounding chooses none."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any, NamedTuple

import torch
from contact_problems import deviation
from torch import Tensor, nn
from train_step import TINY

from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.run import TrainOptions
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.objectives.base import Normalizer
from nemo_hybrid.objectives.next_token import NextToken
from nemo_kernels.attention import attention
from nemo_kernels.documents import Documents

SHAPE = TINY | {"num_experts_per_tok": TINY["n_routed_experts"], "pattern": "ME*-M",
                "mtp_pattern": "*E", "mtp_num_depths": 2}  # fmt: skip


def batch(length: int = 96) -> Batch:
    """Two rows of several documents, in which the next token follows from the one before."""
    tokens_BW = (torch.arange(length + 1) * 7 + torch.tensor([[0], [3]])) % 90
    starts_BW = torch.zeros(tokens_BW.shape, dtype=torch.bool)
    starts_BW[:, [0, 1, 4, 8, 13, length // 2]] = True
    return Batch.from_windows(tokens_BW, starts_BW)


def model(device: str, dtype: torch.dtype) -> HybridLM:
    return HybridLM(HybridConfig(**SHAPE), seed=0).to(device, dtype)  # type: ignore[arg-type]


def loss(objective: NextToken, given: Batch) -> Tensor:
    return objective(given, Normalizer(objective.count(given, 0), len(given.ids_BS))).loss


def after_backward(device: str, dtype: torch.dtype, given: Batch) -> nn.Module:
    """The model with its gradients."""
    made = model(device, dtype)
    loss(NextToken(made, TrainOptions()), given.to(device)).backward()
    return made


def gradients(device: str, dtype: torch.dtype) -> float:
    """How far those of all parameters together lie from the CPU's in fp32."""
    flat = []
    for at in ((device, dtype), ("cpu", torch.float32)):
        made = after_backward(*at, batch())
        flat.append(torch.cat([p.grad.float().cpu().flatten() for p in made.parameters()]))
    return deviation(*flat)


class AfterSteps(NamedTuple):
    losses: list[float]

    @staticmethod
    def of(device: str, dtype: torch.dtype, steps: int) -> AfterSteps:
        """By AdamW on fp32 weights, of which the model has the rounding."""
        made, given = model(device, dtype), batch().to(device)
        objective = NextToken(made, TrainOptions())
        masters = [p.detach().float().clone() for p in made.parameters()]
        optimizer = torch.optim.AdamW(masters, lr=5e-3, fused=True)
        found = []
        for _ in range(steps):
            made.zero_grad()
            value = loss(objective, given)
            value.backward()
            found.append(float(value.detach()))
            for master, p in zip(masters, made.parameters(), strict=True):
                master.grad = p.grad.float()
            optimizer.step()
            with torch.no_grad():
                for master, p in zip(masters, made.parameters(), strict=True):
                    p.copy_(master)
        return AfterSteps(found)


def stored(device: str, place: Path) -> dict[str, Any]:
    """A Hugging Face directory of a model on the device, read again."""
    from nemo_hybrid import HybridLM as Loadable

    shutil.rmtree(place, ignore_errors=True)
    made = Loadable(HybridConfig(**SHAPE), seed=0).to(device, torch.bfloat16)  # type: ignore[arg-type]
    made.save_hf(place)
    again = Loadable.from_hf(place, dtype=torch.bfloat16).to(device)
    shutil.rmtree(place)
    ids_BS = batch().ids_BS.to(device)
    assert torch.equal(made(ids_BS).logits, again(ids_BS).logits)
    return {}


def packed_attention(device: str, length: int, tiny: bool) -> float:
    """In bf16 on a row of three documents, against each for itself in fp32 on the same device."""
    heads, groups, width = (4, 2, 16) if tiny else (32, 2, 128)
    generator = torch.Generator().manual_seed(0)
    shapes = ((1, length, heads, width), *[(1, length, groups, width)] * 2)
    # Large scores: what cuDNN makes NaN of needs rows whose sum of exponentials is tiny.
    drawn = [torch.randn(s, generator=generator).mul(4).bfloat16() for s in shapes]
    lengths = [length // 3, 1, length - 1 - length // 3]
    numbers_S = torch.repeat_interleave(torch.arange(3), torch.tensor(lengths))
    documents = Documents.from_numbers(numbers_S[None]).to(device)
    weight = torch.linspace(-1, 1, width, device=device)

    def run(dtype: torch.dtype, *spans: tuple[int, int]) -> list[Tensor]:
        leaves = [t.to(device, dtype).requires_grad_() for t in drawn]
        parts = [attention(*(t[:, a:b] for t in leaves)) for a, b in spans]
        y = torch.cat(parts, 1) if parts else attention(*leaves, documents)
        return [
            y.float(),
            *(g.float() for g in torch.autograd.grad((y.float() * weight).sum(), leaves)),
        ]

    ends = torch.tensor(lengths).cumsum(0).tolist()
    apart = run(torch.float32, *zip([0, *ends[:-1]], ends, strict=True))
    return max(deviation(a, b) for a, b in zip(run(torch.bfloat16), apart, strict=True))


def packed_model(device: str, length: int) -> dict[str, Any]:
    """Finite gradients; and no token of a later document changes an earlier one, to the bit."""
    made = after_backward(device, torch.bfloat16, batch(length))
    broken = [
        n for n, p in made.named_parameters() if p.grad is None or not p.grad.isfinite().all()
    ]
    assert not broken, f"gradients that are not finite: {broken}"
    given = batch(length).to(device)
    ids_BS = given.ids_BS.clone()
    ids_BS[:, length // 2 :] = 5
    with torch.no_grad():
        both = [made.forward_hidden(ids, given.packing)[0] for ids in (given.ids_BS, ids_BS)]
    same = [
        torch.equal(*(h[:, part] for h in both))
        for part in (slice(length // 2), slice(length // 2, None))
    ]
    assert same == [True, False], "a document changes another, or nothing"
    return {}


def twice(device: str, dtype: torch.dtype) -> dict[str, Any]:
    """The same gradients to the bit, with deterministic algorithms."""
    import os

    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when CUDA starts
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        first, second = (after_backward(device, dtype, batch(256)) for _ in range(2))
    finally:
        torch.use_deterministic_algorithms(before)
    differ = [
        name
        for (name, a), b in zip(first.named_parameters(), second.parameters(), strict=True)
        if not torch.equal(a.grad, b.grad)
    ]
    assert not differ, f"gradients differ: {differ}"
    return {"parameters": sum(1 for _ in first.parameters())}
