"""Training, from a configuration to the last checkpoint. Reads top to bottom."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import torch

from nemo_hybrid.checkpoint.directory import (
    each,
    find_latest_together,
    on_rank_0,
    together,
    verify_together,
)
from nemo_hybrid.checkpoint.files import model_shape, step_name, step_of
from nemo_hybrid.checkpoint.state import check_resumable
from nemo_hybrid.config.finetune import FinetuneConfig
from nemo_hybrid.config.run import TrainingConfig
from nemo_hybrid.data.batch import Batch
from nemo_hybrid.data.loader import steps
from nemo_hybrid.errors import Stopped, TrainingError, UserError
from nemo_hybrid.model import lora
from nemo_hybrid.parallel.watch import Watch
from nemo_hybrid.parallel.world import World
from nemo_hybrid.precision import policy
from nemo_hybrid.terminal import print_table
from nemo_hybrid.train.build import (
    Run,
    build_run,
    check_precision,
    find_origin,
    identity_of,
    open_data,
    with_adapters,
)
from nemo_hybrid.train.evaluate import evaluate
from nemo_hybrid.train.finetune import describe, publish_model, warnings, with_steps
from nemo_hybrid.train.flops import peak_source
from nemo_hybrid.train.metrics import Meter, MetricsWriter, Timing
from nemo_hybrid.train.optim import learning_rate
from nemo_hybrid.train.plots import write_missing_plots, write_plots
from nemo_hybrid.train.progress import Progress
from nemo_hybrid.train.resume import Position, Saver, restore
from nemo_hybrid.train.run_dir import CHECKPOINTS, DIAGNOSIS, MODEL, RunLock, claim_run, open_run
from nemo_hybrid.train.step import Outcome, train_step
from nemo_kernels import backend


def train(config: TrainingConfig, launcher: int) -> None:
    """Pre-train or fine-tune as ``config`` says; every process of the run calls this.

    ``launcher``: see `Watch`.

    Raises UserError for mistakes, also for those that only one rank meets, on every rank;
    TrainingError when the guard's returns to a checkpoint do not help; and Stopped after a signal.
    What fails within the steps on one rank alone, such as writing a row of metrics to a full disk,
    ends that rank; the others wait in their next collective until torchrun, which watches all of
    them, ends them.
    """
    watch = Watch(config.train.hang_timeout_s, launcher)
    with RunLock(config) as lock:
        _train(config, lock, watch)


def _train(config: TrainingConfig, lock: RunLock, watch: Watch) -> None:
    hybrid = model_shape(config.model)
    config.validate(hybrid)
    check_precision(config, hybrid)
    accumulation = config.validate_world(int(os.environ.get("WORLD_SIZE", 1)))
    _set_determinism(config.train.deterministic)
    world = World.start()
    first = world.rank == 0
    together(world, lambda: _choose_kernels(config, world))
    checkpoint = on_rank_0(world, lambda: open_run(config, lock))
    if checkpoint:
        verify_together(world, checkpoint)
    else:
        checkpoint = find_latest_together(world, Path(config.run_dir) / CHECKPOINTS)
    origin = on_rank_0(world, lambda: find_origin(config, checkpoint))
    data = None
    if isinstance(config, FinetuneConfig) and not config.train.max_steps:
        data = open_data(config, hybrid, world, origin)
        config = with_steps(config, data)
    if checkpoint is not None and step_of(checkpoint) >= config.train.max_steps:
        on_rank_0(world, lambda: write_missing_plots(config.run_dir))
        if isinstance(config, FinetuneConfig):
            on_rank_0(world, lambda: publish_model(config, checkpoint))
        if first:
            print(_summary(config, f"already finished at step {step_of(checkpoint)}"))
        World.stop()
        return
    data = data or open_data(config, hybrid, world, origin)
    if checkpoint:  # `restore` checks it too, but after the model was built
        identity = asdict(identity_of(config, data, origin))
        on_rank_0(world, lambda: check_resumable(checkpoint, hybrid, identity))
    # The checkpoints of adapters do not hold the weights that these are for.
    load = checkpoint is None or with_adapters(config)
    run = build_run(config, hybrid, world, data, accumulation, origin, load)
    position = restore(checkpoint, run) if checkpoint else Position()
    on_rank_0(world, lambda: claim_run(config, lock))
    with ExitStack() as stack:
        display = each(world, lambda: Display(run, position) if first else None)
        if display:
            _announce(config, world, run, checkpoint)
            stack.enter_context(display)
        stack.enter_context(watch)
        Loop(run, position, display, watch, checkpoint).run_to_end()
    on_rank_0(world, lambda: write_plots(config.run_dir))
    if isinstance(config, FinetuneConfig):
        last = Path(config.run_dir) / CHECKPOINTS / step_name(config.train.max_steps)
        on_rank_0(world, lambda: publish_model(config, last))
    if first:
        print(_summary(config, "finished"))
    World.stop()


def _set_determinism(wanted: bool) -> None:
    if wanted:
        # cuBLAS reads it when CUDA starts; without it torch refuses its matrix products.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(wanted)


def _choose_kernels(config: TrainingConfig, world: World) -> None:
    """Set every operation's path and try it. Raises UserError for one that cannot be taken."""
    try:
        backend.choose(**vars(config.kernels))
        backend.report(world.device.type)
    except ValueError as error:
        raise UserError(f"kernels: {error}") from error


class Display:
    """Metrics and progress of a run; on rank 0 alone. A context manager."""

    def __init__(self, run: Run, position: Position) -> None:
        config = run.config
        self._run_dir = config.run_dir
        self._meter = Meter(run)
        self._writer = MetricsWriter(config.run_dir, position.step)
        self._progress = Progress(config.train.max_steps, position.step, config.train.log_every)

    def __enter__(self) -> Display:
        self._progress.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.__exit__(*exception)
        self._writer.close()

    def step(self, done: int, lr: float, outcome: Outcome, timing: Timing, logged: bool) -> None:
        """Record one finished step; its expert loads too where it is ``logged``."""
        metrics = self._meter.metrics(done, lr, outcome, timing)
        self._writer.write(metrics, outcome.loads() if logged else None)
        self._progress.update(metrics)

    def note(self, text: str) -> None:
        self._progress.note(text)

    def sync(self) -> None:
        """Force the metrics to the disk."""
        self._writer.sync()

    def back_to(self, step: int) -> None:
        """Forget the rows after ``step``."""
        self._writer.close()
        self._writer = MetricsWriter(self._run_dir, step)


class Loop:
    """The steps of a run. All ranks take the same way through it; ``display`` is rank 0's, and
    ``start`` the checkpoint that it went on from."""

    def __init__(
        self,
        run: Run,
        position: Position,
        display: Display | None,
        watch: Watch,
        start: Path | None,
    ) -> None:
        self.run, self.position, self.display, self.watch = run, position, display, watch
        self.start = start
        self.saver = Saver(run)
        self.saved: Position | None = None
        self.checkpoints = Path(run.config.run_dir) / CHECKPOINTS

    def run_to_end(self) -> None:
        """Until train.max_steps. Raises TrainingError, Stopped, or UserError from writing."""
        train, at = self.run.config.train, self.position
        before = self._heldout() if at.step == 0 and train.eval_sequences else None
        data = self._batches()
        while at.step < train.max_steps:
            self.watch.beat()
            began = time.monotonic()
            batches = next(data)
            waited = time.monotonic() - began
            lr = learning_rate(at.step, train)
            self.run.precision.start_step(at.step, at.batch)
            self.run.probe.start_step(at.step + 1)
            outcome = train_step(
                self.run,
                batches,
                lr,
                stop=self.watch.stop_requested or self.saver.failed,
                per_document=train.per_document(at.step),
            )
            self.watch.check_parent()
            at.batch += 1
            if outcome.objection:
                self._passed_over(outcome)
            else:
                at.step += 1
                seconds = time.monotonic() - began
                self._record(lr, outcome, Timing(seconds, waited, before, self._heldout_if_due()))
                before = None
                self._save_if_due()
            if outcome.stop:
                self._stop()
        self.saver.wait()

    def _batches(self) -> Iterator[list[Batch]]:
        config, world = self.run.config, self.run.world
        return steps(
            self.run.data,
            sequence_length=config.data.sequence_length,
            global_batch_size=config.train.global_batch_size,
            micro_batch_size=config.train.micro_batch_size,
            rank=world.rank,
            world_size=world.size,
            start_step=self.position.batch,
            workers=config.data.workers,
            seed=config.train.seed,
        )

    def _record(self, lr: float, outcome: Outcome, timing: Timing) -> None:
        train, done = self.run.config.train, self.position.step
        if self.display:
            logged = done == train.max_steps or done % train.log_every == 0
            self.display.step(done, lr, outcome, timing, logged)

    def _heldout_if_due(self) -> list[float] | None:
        train, done = self.run.config.train, self.position.step
        due = done == train.max_steps or (train.eval_every > 0 and done % train.eval_every == 0)
        return self._heldout() if train.eval_sequences and due else None

    def _heldout(self) -> list[float]:
        run, train = self.run, self.run.config.train
        return evaluate(
            run.objective,
            run.data,
            run.world,
            sequences=train.eval_sequences,
            sequence_length=run.config.data.sequence_length,
            micro_batch_size=train.micro_batch_size,
        )

    def _save_if_due(self) -> None:
        config, done = self.run.config, self.position.step
        every = config.checkpoint.every
        if done == config.train.max_steps or (every and done % every == 0):
            self.run.guard.counters.rollbacks_in_a_row = 0
            self._save()

    def _save(self, wait: bool = False) -> None:
        each(self.run.world, lambda: self.display.sync() if self.display else None)
        keep = self.run.config.checkpoint.keep
        self.saver.save(self.checkpoints, self.position, keep, wait)
        self.saved = replace(self.position)

    def _stop(self) -> None:
        self.saver.wait()  # raises if writing is why the run stops
        if self.saved != self.position:
            self._save(wait=True)
        raise Stopped(f"stopped by a signal after step {self.position.step}, checkpoint written")

    def _passed_over(self, outcome: Outcome) -> None:
        """Say so; after several in a row go back to the last checkpoint, or give up."""
        counters, options = self.run.guard.counters, self.run.config.guard
        self._note(
            f"batch {self.position.batch} passed over: {outcome.objection} "
            f"({counters.in_a_row} in a row, {counters.skipped} in all)"
        )
        if counters.in_a_row < options.rollback_after:
            return
        self.saver.wait()
        checkpoint = find_latest_together(self.run.world, self.checkpoints) or self.start
        if checkpoint is None or counters.rollbacks_in_a_row >= options.stop_after:
            self._give_up(outcome, checkpoint)
        else:
            self._roll_back(checkpoint)

    def _roll_back(self, checkpoint: Path) -> None:
        """Weights, moments and schedule of a checkpoint; the data goes on where it is."""
        guard, at = self.run.guard, self.position
        counters = guard.counters
        at.step = restore(checkpoint, self.run).step
        guard.counters = counters
        counters.in_a_row = 0
        counters.rollbacks += 1
        counters.rollbacks_in_a_row += 1
        each(self.run.world, lambda: self.display.back_to(at.step) if self.display else None)
        self._note(f"back to {checkpoint.name}; the data goes on behind batch {at.batch}")

    def _give_up(self, outcome: Outcome, checkpoint: Path | None) -> None:
        """Write what replays the last batch, and raise TrainingError."""
        at, run_dir = self.position, Path(self.run.config.run_dir)
        counters = self.run.guard.counters
        why = (
            "there is no checkpoint to go back to"
            if checkpoint is None
            else f"{counters.rollbacks_in_a_row} returns to a checkpoint did not help"
        )
        counters.in_a_row = counters.rollbacks_in_a_row = 0  # whoever replays it starts afresh
        before = Position(at.step, at.batch - 1)
        self.saver.save(run_dir / DIAGNOSIS, before, keep=1, wait=True)
        raise TrainingError(
            f"batch {at.batch} after step {at.step}: {outcome.objection}, and {why}. Lower "
            f"train.lr or look at the data. The state before that batch is in "
            f"{run_dir / DIAGNOSIS}; a new run_dir with --resume of it meets the batch first"
        )

    def _note(self, text: str) -> None:
        if self.display:
            self.display.note(text)


def _announce(config: TrainingConfig, world: World, run: Run, checkpoint: Path | None) -> None:
    train, model = config.train, run.model.config
    accumulation = train.global_batch_size // (train.micro_batch_size * world.size)
    print(
        f"model {model.pattern}, hidden {model.hidden_size}, {model.n_routed_experts} experts of "
        f"which {model.num_experts_per_tok} per token, {model.mtp_num_depths} MTP depths\n"
        f"{_data_in_words(run)}\n"
        f"{world.size} processes on {world.device.type}, expert parallel {config.parallel.ep}, "
        f"ZeRO-{config.parallel.zero}, accumulation {accumulation}, {config.precision.recipe}"
    )
    if run.adapted:
        print_table(lora.HEADER, lora.table(run.adapted), right=lora.HEADER[1::2])
    _announce_precision(run)
    for op, name, reason in backend.report(world.device.type):
        print(f"kernel {op}: {name} ({reason})")
    frozen = "not given: its formula is for models that are trained as a whole"
    print(f"MFU {frozen if run.peak is None else f'relative to {peak_source(world.device.type)}'}")
    print(f"going on from {checkpoint}" if checkpoint else "fresh start", flush=True)


def _data_in_words(run: Run) -> str:
    config, data = run.config, run.data
    if isinstance(config, FinetuneConfig):
        return "\n".join([*warnings(run), describe(config, data, run.model)])
    return (
        f"data {data.tokens:,} training tokens; {config.train.max_steps} steps of "
        f"{config.train.global_batch_size} x {config.data.sequence_length} tokens"
    )


def _announce_precision(run: Run) -> None:
    """Which products run in which format, where not all run in the weights' own."""
    options, rows = run.config.precision, run.precision.table
    if not rows:
        return
    print_table(policy.HEADER, rows, right=policy.HEADER[1:4:2])
    if any(row[-1] == "emulated" for row in rows):
        print(policy.EMULATED)
    if options.switch_step is not None:
        passes = "forward passes" if options.switch_passes == "forward" else "all passes"
        print(f"after step {options.switch_step}: {passes} in bf16")


def _summary(config: TrainingConfig, how: str) -> str:
    run_dir = Path(config.run_dir)
    model = f"  model        {run_dir / MODEL}\n" if isinstance(config, FinetuneConfig) else ""
    return (
        f"{how}\n{model}"
        f"  checkpoints  {run_dir / CHECKPOINTS}\n"
        f"  metrics      {run_dir / 'metrics.jsonl'}\n"
        f"  TensorBoard  {run_dir / 'tensorboard'}\n"
        f"  plots        {run_dir / 'plots'}"
    )
