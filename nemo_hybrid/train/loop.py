"""Pre-training, from a configuration to the last checkpoint. Reads top to bottom."""

from __future__ import annotations

import hashlib
import json
import os
import resource
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from nemo_hybrid.checkpoint.directory import each, on_rank_0, together
from nemo_hybrid.checkpoint.files import resolve
from nemo_hybrid.checkpoint.load import tensors_by_name
from nemo_hybrid.checkpoint.shape import model_shape
from nemo_hybrid.checkpoint.weights import load_weights
from nemo_hybrid.config import HybridConfig, RunConfig
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.data.loader import Blend, open_blend, steps
from nemo_hybrid.data.prepare import prepare
from nemo_hybrid.data.store import TokenStore
from nemo_hybrid.errors import TrainingError, UserError
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.parallel.dispatch import AllToAllDispatcher
from nemo_hybrid.parallel.engine import Engine, prepare_deepspeed
from nemo_hybrid.parallel.world import World
from nemo_hybrid.train import resume
from nemo_hybrid.train.balance import LoadCounter, max_violation, update_router_bias
from nemo_hybrid.train.evaluate import evaluate
from nemo_hybrid.train.flops import peak_flops, peak_source, train_flops_per_token, utilization
from nemo_hybrid.train.losses import Normalizer, PretrainObjective, count_targets
from nemo_hybrid.train.metrics import MetricsWriter, StepMetrics
from nemo_hybrid.train.optim import parameter_groups
from nemo_hybrid.train.plots import write_missing_plots, write_plots
from nemo_hybrid.train.progress import Progress
from nemo_hybrid.train.run_dir import CHECKPOINTS, claim_run, open_run
from nemo_hybrid.train.schedule import learning_rate
from nemo_kernels import backend

DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


def pretrain(config: RunConfig) -> None:
    """Train as ``config`` says; every process of the run calls this.

    Raises UserError for mistakes, also for those that only one rank meets, on every rank, and
    TrainingError when the loss or the gradient stops being finite. What fails within the steps on
    one rank alone, such as writing a row of metrics to a full disk, ends that rank; the others wait
    in their next collective until torchrun, which watches all of them, ends them.
    """
    hybrid = model_shape(config.model)
    config.validate(hybrid)
    accumulation = config.validate_world(int(os.environ.get("WORLD_SIZE", 1)))
    _set_determinism(config.train.deterministic)
    world = World.start()
    first = world.rank == 0
    together(world, lambda: _choose_kernels(config, world))
    checkpoint = on_rank_0(world, lambda: open_run(config))
    if checkpoint is not None and resume.step_of(checkpoint) >= config.train.max_steps:
        on_rank_0(world, lambda: write_missing_plots(config.run_dir))
        if first:
            print(_summary(config, f"already finished at step {resume.step_of(checkpoint)}"))
        World.stop()
        return
    blend = _open_data(config, hybrid, world)
    run = _build(config, hybrid, world, blend, accumulation)
    start = resume.restore(checkpoint, run.engine, run.model, run.identity) if checkpoint else 0
    on_rank_0(world, lambda: claim_run(config))
    with ExitStack() as stack:
        writer = each(world, lambda: MetricsWriter(config.run_dir, start) if first else None)
        progress = None
        if writer:
            _announce(config, world, run, checkpoint)
            stack.enter_context(writer)
            progress = Progress(config.train.max_steps, start, config.train.log_every)
            stack.enter_context(progress)
        _train(run, start, writer, progress)
    on_rank_0(world, lambda: write_plots(config.run_dir))
    if first:
        print(_summary(config, "finished"))
    World.stop()


@dataclass
class Run:
    """What the loop works with."""

    config: RunConfig
    world: World
    blend: Blend
    model: HybridLM
    objective: PretrainObjective
    engine: Engine
    identity: resume.Identity
    peak: float | None  # matmul FLOP/s of one process's device


def _set_determinism(wanted: bool) -> None:
    if wanted:
        # cuBLAS reads it when CUDA starts; without it torch refuses its matrix products.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)


def _choose_kernels(config: RunConfig, world: World) -> None:
    """Set every operation's path and try it. Raises UserError for one that cannot be taken."""
    try:
        backend.choose(**vars(config.kernels))
        backend.report(world.device.type)
    except ValueError as error:
        raise UserError(f"kernels: {error}") from error


def _open_data(config: RunConfig, hybrid: HybridConfig, world: World) -> Blend:
    """Open the token stores; make the default corpus first where that is what is missing."""
    data = config.data

    def make_default() -> None:
        if data.path and data.path == data.default_corpus and not Path(data.path).exists():
            prepare([], data.path, vocab_size=hybrid.vocab_size)

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


def _build(
    config: RunConfig, hybrid: HybridConfig, world: World, blend: Blend, accumulation: int
) -> Run:
    prepare_deepspeed(world)
    torch.manual_seed(config.train.seed)
    ep = config.parallel.ep
    dispatcher = AllToAllDispatcher(hybrid.n_routed_experts, ep, world.rank) if ep > 1 else None
    model = HybridLM(
        hybrid, dispatcher=dispatcher, seed=config.train.seed, recompute=config.train.recompute
    )
    if config.model.from_hf:
        together(world, lambda: _load_from_hf(config, model))
    model.to(world.device, DTYPES[config.precision.recipe])
    objective = PretrainObjective(model, config.train)
    groups = parameter_groups(model, config.train)
    engine = Engine(
        objective, model, torch.optim.AdamW, groups, config, world, accumulation, dispatcher
    )
    identity = _identity(config, blend)
    # Measured by all ranks at once where it has to be measured: they share the cores in training.
    peak = peak_flops(world.device.type, DTYPES[config.precision.recipe])
    return Run(config, world, blend, model, objective, engine, identity, peak)


def _identity(config: RunConfig, blend: Blend) -> resume.Identity:
    return resume.Identity(
        data=[_digest(store) for store in blend.train],
        weights=list(blend.weights),
        tokenizer=blend.train[0].info.tokenizer_sha256,
        sequence_length=config.data.sequence_length,
        global_batch_size=config.train.global_batch_size,
        seed=config.train.seed,
    )


def _load_from_hf(config: RunConfig, model: HybridLM) -> None:
    load_weights(
        resolve(str(config.model.from_hf)),
        tensors_by_name(model),
        model.owned_experts,
        n_experts=model.config.n_routed_experts,
    )


def _train(run: Run, start: int, writer: MetricsWriter | None, progress: Progress | None) -> None:
    """The loop. ``writer`` and ``progress`` exist on rank 0 alone."""
    config, world, train = run.config, run.world, run.config.train
    data = steps(
        run.blend,
        sequence_length=config.data.sequence_length,
        global_batch_size=train.global_batch_size,
        micro_batch_size=train.micro_batch_size,
        rank=world.rank,
        world_size=world.size,
        start_step=start,
        workers=config.data.workers,
        seed=train.seed,
    )
    meter = _Meter(run) if world.rank == 0 else None
    before = _heldout(run) if start == 0 and train.eval_sequences else None
    for step in range(start, train.max_steps):
        began = time.monotonic()
        batches = next(data)
        waited = time.monotonic() - began
        lr = learning_rate(step, train)
        outcome = _step(run, batches, lr)
        seconds = time.monotonic() - began
        done = step + 1
        last = done == train.max_steps
        due = last or (train.eval_every > 0 and done % train.eval_every == 0)
        heldout = _heldout(run) if train.eval_sequences and due else None
        if meter and writer and progress:
            metrics = meter.metrics(done, lr, outcome, seconds, waited, before, heldout)
            logged = last or done % train.log_every == 0
            writer.write(metrics, outcome.loads() if logged else None)
            progress.update(metrics)
        before = None
        every = config.checkpoint.every
        if last or (every and done % every == 0):
            each(world, lambda: writer.sync() if writer else None)
            resume.save(
                Path(config.run_dir) / CHECKPOINTS, done, run.engine, run.model, run.identity,
                config, run.blend.tokenizer_dir,
            )  # fmt: skip


@dataclass
class Outcome:
    """One optimizer step, over all ranks."""

    losses: list[float]  # cross-entropies: main, then each depth
    aux: float
    grad_norm: float
    counts: dict[str, Tensor]  # layer name -> routed slots per expert
    sample_hash: int

    def loads(self) -> dict[str, list[int]]:
        return {name: counts_E.tolist() for name, counts_E in self.counts.items()}


def _step(run: Run, batches: list[Batch], lr: float) -> Outcome:
    """One optimizer step on this rank's micro-batches, which are on the CPU as they were read."""
    world, engine, train = run.world, run.engine, run.config.train
    depths = run.objective.depths
    samples = torch.tensor([_hash(batches)])
    batches = [batch.to(world.device) for batch in batches]
    # Targets are counted over the whole global batch before the first backward pass, so that
    # every share of the loss has the right denominator.
    known = torch.stack([count_targets(batch, depths) for batch in batches]).sum(0)
    totals = world.sum(torch.cat([known, samples.to(world.device)]))
    normalizer = Normalizer(totals[:-1], train.global_batch_size)

    sums = torch.zeros(2 + depths, device=world.device)
    counter = LoadCounter()
    norm = None
    for batch in batches:
        parts = engine(batch, normalizer)
        engine.backward(parts.loss)
        sums += torch.cat([parts.ce_sums_N, parts.aux_sum[None]])
        counter.add(parts.counts)
        norm = engine.step(lr)
    assert norm is not None, "the last micro-batch ends the global batch"
    counts = counter.total(world)
    update_router_bias(run.model, counts, train.router_bias_rate)
    world.sum(sums)
    losses = (sums[:-1] / normalizer.targets_N.clamp(min=1)).tolist()
    aux = float(sums[-1]) / (train.global_batch_size * max(1, len(counts)))
    if not all(map(_finite, [*losses, norm])):
        raise TrainingError(
            f"the loss ({losses[0]}) or the gradient norm ({norm}) is not finite: start another "
            "run_dir with a lower train.lr, or resume from an earlier checkpoint"
        )
    return Outcome(losses, aux, norm, counts, int(totals[-1]))


def _heldout(run: Run) -> list[float]:
    config = run.config
    return evaluate(
        run.objective,
        run.blend,
        run.world,
        sequences=config.train.eval_sequences,
        sequence_length=config.data.sequence_length,
        micro_batch_size=config.train.micro_batch_size,
    )


class _Meter:
    """Turns outcomes into rows of metrics; for rank 0 alone."""

    def __init__(self, run: Run) -> None:
        self.run = run
        config = run.config
        self.tokens = config.train.global_batch_size * config.data.sequence_length
        self.flops = train_flops_per_token(run.model.config, config.data.sequence_length)

    def metrics(
        self,
        done: int,
        lr: float,
        outcome: Outcome,
        seconds: float,
        waited: float,
        before: list[float] | None,
        heldout: list[float] | None,
    ) -> StepMetrics:
        violations = {name: max_violation(c) for name, c in outcome.counts.items()}
        rate = self.tokens / seconds
        return StepMetrics(
            step=done,
            loss=outcome.losses[0],
            mtp_losses=outcome.losses[1:],
            aux_loss=outcome.aux,
            lr=lr,
            grad_norm=outcome.grad_norm,
            tokens=self.tokens,
            tokens_total=self.tokens * done,
            tokens_per_s=rate,
            step_seconds=seconds,
            data_seconds=waited,
            mfu=utilization(rate, self.flops, self.run.peak, self.run.world.size),
            memory_gb=_peak_memory(self.run.world.device) / 1e9,
            max_vio=max(violations.values(), default=0.0),
            max_vio_per_layer=violations,
            dead_experts=sum(int((c == 0).sum()) for c in outcome.counts.values()),
            heldout_loss=heldout[0] if heldout else None,
            heldout_mtp_losses=heldout[1:] if heldout else None,
            heldout_loss_before=before[0] if before else None,
            heldout_mtp_losses_before=before[1:] if before else None,
            sample_hash=f"{outcome.sample_hash & (2**64 - 1):016x}",
        )


def _hash(batches: list[Batch]) -> int:
    """Hash of this rank's sequences; summed over ranks it does not depend on the layout.

    ``batches`` are on the CPU still: reading them from a device would wait for it row by row.
    """
    total = 0
    for batch in batches:
        for row in batch.ids_BS.numpy():
            digest = hashlib.blake2b(row.tobytes(), digest_size=8).digest()
            total += int.from_bytes(digest, "little")
    total %= 2**64
    return total - 2**64 if total >= 2**63 else total


def _digest(store: TokenStore) -> str:
    """One checksum for all files of a token store."""
    return hashlib.sha256(json.dumps(store.info.files, sort_keys=True).encode()).hexdigest()


def _finite(value: float) -> bool:
    return abs(value) < float("inf")


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    kilo = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * kilo


def _announce(config: RunConfig, world: World, run: Run, checkpoint: Path | None) -> None:
    train, model = config.train, run.model.config
    accumulation = train.global_batch_size // (train.micro_batch_size * world.size)
    print(
        f"model {model.pattern}, hidden {model.hidden_size}, {model.n_routed_experts} experts of "
        f"which {model.num_experts_per_tok} per token, {model.mtp_num_depths} MTP depths\n"
        f"data {run.blend.tokens:,} training tokens; {train.max_steps} steps of "
        f"{train.global_batch_size} x {config.data.sequence_length} tokens\n"
        f"{world.size} processes on {world.device.type}, expert parallel {config.parallel.ep}, "
        f"ZeRO-{config.parallel.zero}, accumulation {accumulation}, {config.precision.recipe}"
    )
    for op, name, reason in backend.report(world.device.type):
        print(f"kernel {op}: {name} ({reason})")
    print(f"MFU relative to {peak_source(world.device.type)}")
    print(f"going on from {checkpoint}" if checkpoint else "fresh start", flush=True)


def _summary(config: RunConfig, how: str) -> str:
    run_dir = Path(config.run_dir)
    return (
        f"{how}\n"
        f"  checkpoints  {run_dir / CHECKPOINTS}\n"
        f"  metrics      {run_dir / 'metrics.jsonl'}\n"
        f"  TensorBoard  {run_dir / 'tensorboard'}\n"
        f"  plots        {run_dir / 'plots'}"
    )
