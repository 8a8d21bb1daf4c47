"""Quantization-aware distillation (arXiv 2601.20088): a model that computes in the formats of an
export learns the probabilities that it had before.

Shapes: T tokens, C tokens of one chunk, D hidden, V vocabulary.
"""

from __future__ import annotations

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from nemo_hybrid.checkpoint.load import tensors_by_name
from nemo_hybrid.checkpoint.weights import load_weights
from nemo_hybrid.config.finetune import FinetuneConfig
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.data.loader import Data
from nemo_hybrid.errors import UserError
from nemo_hybrid.export.assign import Assignment, assign
from nemo_hybrid.export.calibrate import watching
from nemo_hybrid.export.layout import with_inputs
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.latent_moe import Dispatcher
from nemo_hybrid.parallel.world import World

CALIBRATION_TOKENS = 32768
_CHUNK_BYTES = 64 << 20  # of one model's logits


def student_formats(config: FinetuneConfig, shape: HybridConfig) -> Assignment:
    """Raises UserError where formats, model and what is trained do not fit."""
    assignment = assign(shape, config.distill.preset, config.distill.formats)
    if not config.train.mtp_loss_weight:
        mtp = [p for p, f in assignment.items() if p.startswith("mtp.") and f != "bf16"]
        if mtp:
            raise UserError(
                f"distill.formats: {mtp[0]} does not run with train.mtp_loss_weight 0: leave it out"
            )
    if assignment["lm_head"] != "bf16":
        raise UserError("distill.formats: lm_head is one operation with the loss: leave it out")
    return assignment


@torch.no_grad()
def teacher_inputs(
    teacher: HybridLM, assignment: Assignment, data: Data, length: int, seed: int, world: World
) -> dict[str, Tensor]:
    """Place -> the largest magnitude, fp32 scalar, of its inputs, where the format rounds inputs:
    over the first rows of ``length`` tokens that are trained on, `CALIBRATION_TOKENS` or as many as
    there are. They are the same ones, however processes divide them and the experts. All processes
    call this together.

    Raises UserError on all of them where the teacher gives no finite numbers.
    """
    places = with_inputs(assignment)
    if not places:
        return {}
    rows = -(-min(CALIBRATION_TOKENS, data.tokens) // length)
    with watching(teacher, places) as seen:
        # As many passes everywhere, because experts of other processes take part in them.
        for i in range(world.rank, -(-rows // world.size) * world.size, world.size):
            batch = data.rows([i % rows], length, seed).to(teacher.lm_head.weight.device)
            h_BSD, _ = teacher.forward_hidden(batch.ids_BS, batch.packing)
            if any(place.startswith("mtp.") for place in places):
                teacher.forward_mtp(h_BSD, batch.ids_BS, batch.packing)
    of_ranks = world.gather([float(seen[place].amax_E.max()) for place in places])
    amax_P = torch.tensor(of_ranks).amax(0)
    if not amax_P.isfinite().all():
        raise UserError(f"the inputs of {places[int(amax_P.argmax())]} are not finite")
    return dict(zip(places, torch.where(amax_P == 0, 1.0, amax_P), strict=True))


def frozen_teacher(origin: Path, shape: HybridConfig, dispatcher: Dispatcher | None) -> HybridLM:
    """The weights that fine-tuning began with. Raises UserError."""
    with torch.device("meta"):
        teacher = HybridLM(shape, dispatcher=dispatcher)
    teacher.to_empty(device="cpu").requires_grad_(False)
    load_weights(
        origin,
        tensors_by_name(teacher),
        teacher.owned_experts,
        n_experts=shape.n_routed_experts,
    )
    return teacher


def linear_kl(
    h_TD: Tensor, head_VD: Tensor, teacher_TD: Tensor, teacher_VD: Tensor, weights_T: Tensor
) -> Tensor:
    """Sum over tokens of weight * KL(teacher || student), fp32 scalar, of the softmax of
    h head^T; gradients for h_TD and head_VD.

    Logits are fp32; those of a chunk of tokens are there at a time, once more in the backward
    pass. The head's gradient is summed in fp32.
    """
    chunk = max(1, _CHUNK_BYTES // (4 * len(head_VD)))
    heads = head_VD.float(), teacher_VD.detach().float()
    total = torch.zeros((), device=h_TD.device)
    rows = zip(*(t.split(chunk) for t in (h_TD, teacher_TD, weights_T)), strict=True)
    for part in rows:
        total = total + checkpoint(
            _chunk_kl, *part, *heads, use_reentrant=False, preserve_rng_state=False
        )
    return total


def _chunk_kl(
    h_CD: Tensor, teacher_CD: Tensor, weights_C: Tensor, head_VD: Tensor, teacher_VD: Tensor
) -> Tensor:
    q_CV, p_CV = (
        F.linear(h.float(), head).log_softmax(-1)
        for h, head in ((h_CD, head_VD), (teacher_CD, teacher_VD))
    )
    return F.kl_div(q_CV, p_CV, log_target=True, reduction="none").sum(-1) @ weights_C
