"""The parts of a run, put together before its first step."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import TypeGuard

import torch
from torch import Tensor

from nemo_hybrid.checkpoint.adapter import CONFIG as ADAPTER
from nemo_hybrid.checkpoint.adapter import base_digest, is_adapter
from nemo_hybrid.checkpoint.directory import each, on_rank_0
from nemo_hybrid.checkpoint.files import resolve
from nemo_hybrid.checkpoint.load import tensors_by_name
from nemo_hybrid.checkpoint.weights import load_weights
from nemo_hybrid.config.finetune import FinetuneConfig
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.run import RunConfig, TrainingConfig
from nemo_hybrid.data.loader import Blend, Data, open_blend, require_tokenizer
from nemo_hybrid.data.packing import PackedSamples
from nemo_hybrid.data.prepare import prepare
from nemo_hybrid.errors import UserError
from nemo_hybrid.export.simulate import quantization_aware
from nemo_hybrid.files import read_json
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.lora import Adapted, add_adapters
from nemo_hybrid.parallel.dispatch import AllToAllDispatcher
from nemo_hybrid.parallel.engine import Engine, prepare_deepspeed
from nemo_hybrid.parallel.world import World
from nemo_hybrid.precision import policy
from nemo_hybrid.precision.health import Probe
from nemo_hybrid.train import finetune
from nemo_hybrid.train.distill import frozen_teacher, student_formats, teacher_inputs
from nemo_hybrid.train.flops import peak_flops, without_storage
from nemo_hybrid.train.guard import Guard
from nemo_hybrid.train.losses import PretrainObjective
from nemo_hybrid.train.optim import parameter_groups

PREPARING = timedelta(days=7)
"""Longest wait for rank 0 to make samples."""


@dataclass(frozen=True)
class Identity:
    """What must be equal for a checkpoint to continue the same sequence of samples, and to hold the
    rounding of its masters that this run makes."""

    data: list[str]  # digests of the token stores
    weights: list[float]  # with which they are drawn
    tokenizer: str  # digest
    sequence_length: int
    global_batch_size: int
    seed: int
    weight_dtype: str
    base: str | None = None  # digest of model.from_hf, of which adapters and distillation need more


@dataclass
class Run:
    """What the loop works with."""

    config: TrainingConfig
    world: World
    data: Data
    model: HybridLM
    objective: PretrainObjective
    engine: Engine
    guard: Guard
    precision: policy.Precision
    probe: Probe
    identity: Identity
    frozen: list[str]  # parameters that are not trained
    adapted: list[Adapted]  # weights with an adapter, which alone is trained then
    origin: Path | None  # directory of the weights that the run began with
    peak: float | None  # matmul FLOP/s of one process's device; None: unknown, or nothing like it


def find_origin(config: TrainingConfig, checkpoint: Path | None) -> Path | None:
    """The directory that model.from_hf means. To be asked once, because a run that it names may
    write a newer checkpoint meanwhile; for ``checkpoint`` of adapters it is the one that they name.

    Raises UserError where it is not there.
    """
    if not config.model.from_hf:
        return None
    if checkpoint is not None and is_adapter(checkpoint):
        named = Path(str(read_json(checkpoint / ADAPTER).get("base_model_name_or_path")))
        if named.is_dir():
            return named
    directory = resolve(config.model.from_hf)
    if is_adapter(directory):
        raise UserError(
            f"{directory} holds an adapter: add it to its weights first (nemo-hybrid merge --from "
            f"{directory} --out DIR) and name the result"
        )
    return directory


def open_data(
    config: TrainingConfig, hybrid: HybridConfig, world: World, origin: Path | None = None
) -> Data:
    """Open what the run reads, which is made first where it can be.

    Raises UserError on every rank.
    """
    if isinstance(config, FinetuneConfig):
        assert origin is not None
        return _open_samples(config, hybrid, world, origin)
    assert isinstance(config, RunConfig)
    return _open_blend(config, hybrid, world)


def _open_samples(
    config: FinetuneConfig, hybrid: HybridConfig, world: World, origin: Path
) -> PackedSamples:
    # With a channel of its own, on which the others may wait for hours.
    waiting = world.side(PREPARING)
    on_rank_0(waiting, lambda: finetune.make_samples(config, hybrid, origin))
    return each(world, lambda: finetune.open_samples(config, hybrid))


def _open_blend(config: RunConfig, hybrid: HybridConfig, world: World) -> Blend:
    data = config.data

    def make_default() -> None:
        if data.path and data.path == data.default_corpus and not Path(data.path).exists():
            prepare(data.path, vocab_size=hybrid.vocab_size)

    def open_stores() -> Blend:
        blend = open_blend(data, hybrid)
        if config.train.eval_sequences and not blend.heldout:
            raise UserError(
                "the data has no held-out part: prepare it with --heldout above 0, or set "
                "train.eval_sequences to 0"
            )
        return blend

    on_rank_0(world, make_default)
    return each(world, open_stores)


def check_precision(config: TrainingConfig, hybrid: HybridConfig) -> None:
    """Raise UserError where the formats do not fit the model; nothing is built for it."""
    if config.precision.low:
        tokens = config.train.micro_batch_size * config.data.sequence_length
        model = without_storage(hybrid, config.parallel.ep)
        policy.check(model, config.precision, hybrid, tokens)
    if distils(config):
        student_formats(config, hybrid)


def build_run(
    config: TrainingConfig,
    hybrid: HybridConfig,
    world: World,
    data: Data,
    accumulation: int,
    origin: Path | None = None,
    load: bool = False,
) -> Run:
    """Model, engine and all else, on every rank, with new weights or, to ``load``, ``origin``'s.

    Raises UserError on every rank.
    """
    prepare_deepspeed(world)
    torch.manual_seed(config.train.seed)
    ep = config.parallel.ep
    dispatcher = AllToAllDispatcher(hybrid.n_routed_experts, ep, world.rank) if ep > 1 else None
    model = HybridLM(
        hybrid, dispatcher=dispatcher, seed=config.train.seed, recompute=config.train.recompute
    )
    loaded: dict[str, Tensor] = {}
    if origin and load:
        loaded = each(world, lambda: _load(origin, model, data, world))
    adapted: list[Adapted] = []
    if isinstance(config, FinetuneConfig):
        if config.lora.rank:
            adapted = each(world, lambda: add_adapters(model, config.lora, config.train.seed))
            loaded = {}  # their weights keep no masters
        each(world, lambda: finetune.freeze(model, config.train))
    dtype = policy.weight_dtype(config.precision)
    model.to(world.device, dtype)
    products = [name for name, m in model.named_modules() if hasattr(m, "low_precision")]
    probe = Probe(products, config.precision.health_every, world.device)
    precision = policy.apply(
        model,
        config.precision,
        hybrid,
        seed=config.train.seed,
        rank=world.rank,
        device_type=world.device.type,
        probe=probe,
    )
    objective = PretrainObjective(model, config.train)
    teacher = None
    if distils(config) and origin:
        teacher = each(world, lambda: frozen_teacher(origin, hybrid, dispatcher))
        teacher.to(world.device, dtype)
        objective = PretrainObjective(model, config.train, teacher, config.distill.weight)
    groups = parameter_groups(model, config.train)
    engine = Engine(
        objective, model, torch.optim.AdamW, groups, config, world, accumulation, dispatcher
    )
    engine.seed_masters(loaded)
    if distils(config) and teacher:
        # Only now are experts' processes connected.
        formats, length = student_formats(config, hybrid), config.data.sequence_length
        seen = teacher_inputs(teacher, formats, data, length, config.train.seed, world)
        quantization_aware(model, formats, seen)
    frozen = [name for name, p in model.named_parameters() if not p.requires_grad]
    # Measured by all ranks at once where it has to be measured: they share the cores in training.
    # The formula of the work per token is that of training everything.
    all_trained = all(".gate." in name for name in frozen)
    peak = peak_flops(world.device.type, dtype) if all_trained else None
    guard, identity = Guard(config.guard), identity_of(config, data, origin)
    return Run(
        config,
        world,
        data,
        model,
        objective,
        engine,
        guard,
        precision,
        probe,
        identity,
        frozen,
        adapted,
        origin,
        peak,
    )


def with_adapters(config: TrainingConfig) -> bool:
    return isinstance(config, FinetuneConfig) and config.lora.rank > 0


def _needs_origin(config: TrainingConfig) -> bool:
    """Whether the weights that a run began with have a part in all of its steps."""
    return with_adapters(config) or distils(config)


def distils(config: TrainingConfig) -> TypeGuard[FinetuneConfig]:
    return isinstance(config, FinetuneConfig) and config.distill.preset != "none"


def identity_of(config: TrainingConfig, data: Data, origin: Path | None = None) -> Identity:
    return Identity(
        data=data.digests,
        weights=list(data.weights),
        tokenizer=data.tokenizer_sha256,
        sequence_length=config.data.sequence_length,
        global_batch_size=config.train.global_batch_size,
        seed=config.train.seed,
        weight_dtype=str(policy.weight_dtype(config.precision)).removeprefix("torch."),
        base=base_digest(origin) if origin and _needs_origin(config) else None,
    )


def _load(directory: Path, model: HybridLM, data: Data, world: World) -> dict[str, Tensor]:
    """Fill the model; return its parameters in fp32, before any cast rounds them."""
    require_tokenizer(data, directory)
    report = load_weights(
        directory,
        tensors_by_name(model),
        model.owned_experts,
        n_experts=model.config.n_routed_experts,
    )
    if world.rank == 0:
        print(report.summary(), flush=True)
    return {name: parameter.detach() for name, parameter in model.named_parameters()}
