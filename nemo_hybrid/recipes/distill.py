"""Quantization-aware distillation (arXiv 2601.20088): a model that computes in the formats of an
export learns the probabilities that it had before."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import torch
from torch import Tensor

from nemo_hybrid.checkpoint.load import tensors_by_name
from nemo_hybrid.checkpoint.weights import load_weights
from nemo_hybrid.config.finetune import FinetuneConfig
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.data.loader import Rows
from nemo_hybrid.errors import UserError
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.init import with_memory
from nemo_hybrid.model.latent_moe import Dispatcher, LatentMoE
from nemo_hybrid.model.recompute import recompute_layers
from nemo_hybrid.model.sequence import Sequences
from nemo_hybrid.objectives.base import Objective
from nemo_hybrid.objectives.kl import Distilled
from nemo_hybrid.parallel.world import World
from nemo_hybrid.precision.assign import Assignment, assign, with_inputs
from nemo_hybrid.precision.magnitudes import watching
from nemo_hybrid.precision.simulate import quantization_aware
from nemo_hybrid.recipes.finetune import Finetune
from nemo_hybrid.train.run import Run, Trained

CALIBRATION_TOKENS = 32768


class Distill(Finetune):
    """model.from_hf is the teacher of itself in the formats of an export."""

    needs_origin = True

    def check(self) -> None:
        super().check()
        student_formats(self.config, self.shape)

    def prepare(self, model: HybridLM, world: World, resumed: bool) -> Trained:
        trained = super().prepare(model, world, resumed)
        assert self.origin is not None
        layers = (m for m in model.modules() if isinstance(m, LatentMoE))
        dispatcher = next((layer.dispatcher for layer in layers), None)
        with world.agreed():
            self.teacher = frozen_teacher(self.origin, self.shape, dispatcher, model.sequence)
        recompute_layers(self.teacher, "", self.config.train.tile)
        return trained

    def objective(self, model: HybridLM) -> Objective:
        train, head = self.config.train, model.lm_head.weight
        self.teacher.to(head.device, head.dtype)
        weight = self.config.distill.weight
        return Distilled(model, train, train.per_document, self.teacher, weight)

    def begin(self, run: Run) -> None:
        super().begin(run)
        config, formats = self.config, student_formats(self.config, self.shape)
        seen = teacher_inputs(
            self.teacher,
            formats,
            self.rows,
            config.data.sequence_length,
            config.train.seed,
            run.world,
            run.objective,
        )
        quantization_aware(run.model, formats, seen)

    def describe(self, run: Run) -> list[str]:
        config = self.config
        counts = Counter(student_formats(config, self.shape).values())
        formats = ", ".join(f"{count} weights in {f}" for f, count in counts.items() if f != "bf16")
        weight = config.distill.weight
        share = f"{weight:g} of the loss" if weight < 1 else "the loss"
        return [
            *super().describe(run),
            f"distilled from {config.model.from_hf} for {config.distill.preset} ({formats}): "
            f"{share} is the KL divergence from it; held-out losses are cross-entropies",
        ]

    def _further_card(self, base: str) -> list[str]:
        distill = self.config.distill
        return [
            "",
            f"Quantization-aware distillation: it learnt the probabilities of {base} while it "
            f"computed in the formats of `nemo-hybrid export --preset {distill.preset}`"
            f"{' and further ones' if distill.formats else ''}. Use it exported in these.",
        ]


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
    teacher: HybridLM,
    assignment: Assignment,
    rows: Rows,
    length: int,
    seed: int,
    world: World,
    objective: Objective,
) -> dict[str, Tensor]:
    """Place -> the largest magnitude, fp32 scalar, of its inputs, where the format rounds inputs:
    over the first rows of ``length`` tokens that are trained on, `CALIBRATION_TOKENS` or as many as
    there are. They are the same ones, however processes divide them and the experts. Rows are
    divided as ``objective`` divides them. All processes call this together.

    Raises UserError on all of them where the teacher gives no finite numbers.
    """
    places = with_inputs(assignment)
    if not places:
        return {}
    count = -(-min(CALIBRATION_TOKENS, rows.tokens) // length)
    with watching(teacher, places) as seen:
        # As many passes everywhere, because experts of other processes take part in them.
        for i in range(world.reader, -(-count // world.readers) * world.readers, world.readers):
            batch = rows.rows([i % count], length, seed)
            if world.cp > 1:
                batch = objective.cut(batch, world.part, world.cp, 0)
            batch = batch.to(teacher.lm_head.weight.device)
            h_BSD, _ = teacher.forward_hidden(batch.ids_BS, batch.packing)
            if any(place.startswith("mtp.") for place in places):
                ahead_DBS = None if batch.ahead is None else batch.ahead.ids_DBS
                teacher.forward_mtp(h_BSD, batch.ids_BS, batch.packing, ahead_DBS=ahead_DBS)
    of_ranks = world.gather([float(seen[place].amax_E.max()) for place in places])
    amax_P = torch.tensor(of_ranks).amax(0)
    if not amax_P.isfinite().all():
        raise UserError(f"the inputs of {places[int(amax_P.argmax())]} are not finite")
    return dict(zip(places, torch.where(amax_P == 0, 1.0, amax_P), strict=True))


def frozen_teacher(
    origin: Path,
    shape: HybridConfig,
    dispatcher: Dispatcher | None,
    sequence: Sequences | None = None,
) -> HybridLM:
    """The weights that fine-tuning began with. Raises UserError."""
    with torch.device("meta"):
        teacher = HybridLM(shape, dispatcher=dispatcher, sequence=sequence)
    with_memory(teacher).requires_grad_(False)
    load_weights(
        origin,
        tensors_by_name(teacher),
        teacher.owned_experts,
        n_experts=shape.n_routed_experts,
    )
    return teacher
