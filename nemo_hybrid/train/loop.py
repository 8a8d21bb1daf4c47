"""Training, from a configuration to the last checkpoint. Reads top to bottom."""

from __future__ import annotations

import os
import time
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import cache
from pathlib import Path

import torch

from nemo_hybrid.checkpoint.directory import verify
from nemo_hybrid.checkpoint.state import check_resumable
from nemo_hybrid.checkpoint.steps import (
    find_latest,
    resolve,
    saying_if_removed,
    step_name,
    step_of,
)
from nemo_hybrid.config.run import TrainingConfig
from nemo_hybrid.errors import Stopped, TrainingError, Unavailable, UserError
from nemo_hybrid.model.operations import operations, sizes
from nemo_hybrid.parallel.watch import Watch
from nemo_hybrid.parallel.world import World
from nemo_hybrid.precision import policy
from nemo_hybrid.process import launched, uncollected
from nemo_hybrid.terminal import print_table, say_phase
from nemo_hybrid.train import track
from nemo_hybrid.train.build import build_run
from nemo_hybrid.train.flops import peak_source, train_flops_per_token
from nemo_hybrid.train.metrics import Meter, MetricsWriter, Timing, curves
from nemo_hybrid.train.optim import describe_schedule, learning_rate
from nemo_hybrid.train.plots import write_missing_plots, write_plots
from nemo_hybrid.train.profile import Profile
from nemo_hybrid.train.progress import Progress
from nemo_hybrid.train.resume import Saver, begin_phase, check_phase, restore
from nemo_hybrid.train.run import Outcome, Position, Recipe, Run
from nemo_hybrid.train.run_dir import CHECKPOINTS, DIAGNOSIS, MODEL, RunLock, claim_run, open_run
from nemo_hybrid.train.step import train_step
from nemo_kernels import backend


def train(recipe: Recipe, launcher: int) -> None:
    """Train as ``recipe`` says; every process of the run calls this.

    ``launcher``: see `Watch`.

    Raises UserError for mistakes, also for those that only one rank meets, on every rank;
    TrainingError when the guard's returns to a checkpoint do not help; and Stopped after a signal.
    What fails within the steps on one rank alone, such as writing a row of metrics to a full disk,
    ends that rank; the others wait in their next collective until torchrun, which watches all of
    them, ends them.
    """
    recipe.check()
    track.check(recipe.config.track)
    recipe.config.validate_world(launched()[1])
    watch = Watch(recipe.config.train.hang_timeout_s, launcher)
    with RunLock(recipe.config) as lock:
        _train(recipe, lock, watch)


def _train(recipe: Recipe, lock: RunLock, watch: Watch) -> None:
    world = _start(recipe)
    say_phase("looking for checkpoints, and opening the data")
    checkpoint = _find_checkpoint(world, recipe.config, lock)
    phase = None if checkpoint else _find_phase(world, recipe.config)
    data = None
    if not _finished(recipe, checkpoint):
        # Also counts the steps, if epochs were given.
        data = recipe.open_data(world, checkpoint or phase)
    if data is None or _finished(recipe, checkpoint):
        assert checkpoint is not None
        world.from_rank_0(write_missing_plots, recipe.config.run_dir)
        how = f"already finished at step {step_of(checkpoint)}"
        _end(recipe, world, checkpoint, how)
        return
    if checkpoint:  # `restore` checks it too, but after the model was built
        world.from_rank_0(check_resumable, checkpoint, recipe.shape, recipe.identity())
    if phase:
        world.from_rank_0(check_phase, phase, recipe)
    say_phase("building the model")
    with uncollected():  # DeepSpeed imports much as it starts
        run = build_run(recipe, world, data, checkpoint or phase)
    position = Position()
    if source := checkpoint or phase:
        say_phase(f"reading {source}")
        position = restore(source, run) if checkpoint else begin_phase(source, run)
    world.from_rank_0(claim_run, recipe.config, lock)
    with ExitStack() as stack:
        with world.agreed():
            display = Display(run, position) if world.rank == 0 else None
        if display:
            _announce(run)
            how = f"a new phase, from {phase}" if phase else "fresh start"
            print(f"going on from {checkpoint}" if checkpoint else how, flush=True)
            stack.enter_context(display)
        stack.enter_context(watch)
        Loop(run, position, display, watch, checkpoint).run_to_end()
    world.from_rank_0(write_plots, recipe.config.run_dir)
    last = Path(recipe.config.run_dir) / CHECKPOINTS / step_name(recipe.config.train.max_steps)
    _end(recipe, world, last, "finished")


def _start(recipe: Recipe) -> World:
    """Meet the other processes, and choose the operations' paths. Raises UserError."""
    config = recipe.config
    _set_determinism(config.train.deterministic)
    world = World.start(config.parallel.cp)
    with world.agreed():
        try:
            backend.choose(**vars(config.kernels))
            backend.check_at(sizes(recipe.shape))
            backend.report(world.device.type, operations(recipe.shape, config.precision.low))
        except ValueError as error:
            raise UserError(f"kernels: {error}") from error
    return world


def _set_determinism(wanted: bool) -> None:
    if wanted:
        # cuBLAS reads it when CUDA starts; without it torch refuses its matrix products.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    # As use_deterministic_algorithms, which imports torch's compiler: a second of every start.
    torch.set_deterministic_debug_mode("error" if wanted else "default")


def _find_checkpoint(world: World, config: TrainingConfig, lock: RunLock) -> Path | None:
    """The whole checkpoint to go on from: the one that is asked for, or the newest."""
    checkpoint = world.from_rank_0(open_run, config, lock)
    if checkpoint is None:
        return find_latest(Path(config.run_dir) / CHECKPOINTS, world=world)
    verify(checkpoint, world=world)
    return checkpoint


def _find_phase(world: World, config: TrainingConfig) -> Path | None:
    """The whole checkpoint whose weights and moments a new phase begins with, if it does."""
    if not config.continue_from:
        return None
    phase = world.from_rank_0(resolve, config.continue_from)
    with saying_if_removed(phase):
        verify(phase, world=world)
    return phase


def _finished(recipe: Recipe, checkpoint: Path | None) -> bool:
    steps = recipe.config.train.max_steps
    return checkpoint is not None and 0 < steps <= step_of(checkpoint)


def _end(recipe: Recipe, world: World, last: Path, how: str) -> None:
    world.from_rank_0(recipe.publish, last)
    if world.rank == 0:
        print(_summary(Path(recipe.config.run_dir), how))
    World.stop()


class Display:
    """Metrics and progress of a run; on rank 0 alone. A context manager."""

    def __init__(self, run: Run, position: Position) -> None:
        config = run.config
        shape, length = run.model.config, config.data.sequence_length
        self._run, self._run_dir = run, config.run_dir
        self._meter = Meter(
            flops=cache(lambda in_one: train_flops_per_token(shape, length // in_one)),
            peak=run.peak,
            processes=run.world.size,
            device=run.world.device,
        )
        self._writer = MetricsWriter(config.run_dir, position.step)
        self._tracker = track.Tracker(config.track, Path(config.run_dir), asdict(config))
        self._progress = Progress(config.train.max_steps, position.step, config.train.log_every)

    def __enter__(self) -> Display:
        self._progress.__enter__()
        return self

    def __exit__(self, *exception: object) -> None:
        self._progress.__exit__(*exception)
        self._tracker.close()
        self._writer.close()

    def step(self, at: Position, lr: float, outcome: Outcome, timing: Timing, logged: bool) -> None:
        """Record the step that led ``at``; its expert loads too where it is ``logged``."""
        counters, further = self._run.guard.counters, self._run.data.metrics()
        metrics = self._meter.metrics(at.step, at.tokens, lr, outcome, timing, counters, further)
        loads = {layer: counts_E.tolist() for layer, counts_E in outcome.loads.items() if logged}
        self._writer.write(metrics, loads if logged else None)
        self._tracker.log(curves(metrics))
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
        self.saved = replace(position)
        self.checkpoints = Path(run.config.run_dir) / CHECKPOINTS
        steps = run.config.profiled_steps() if display else range(0)
        self.profile = Profile(steps, Path(run.config.run_dir), run.world.device)
        if steps and steps.start <= position.step:
            self._note(f"profile: step {steps.start} lies behind this start, nothing is recorded")

    def run_to_end(self) -> None:
        """Until train.max_steps. Raises TrainingError, Stopped, or UserError from writing."""
        train, at = self.run.config.train, self.position
        before = self._heldout() if at.step == 0 else None
        while at.step < train.max_steps:
            self.watch.beat()
            began = time.monotonic()
            self.profile.start_step(at.step + 1)
            try:
                batches = self.run.data.step(at.batch, self.run.share)
            except Unavailable:
                self._save_last()
                raise
            waited = time.monotonic() - began
            lr = learning_rate(at.step, train)
            self.run.precision.start_step(at.step, at.batch)
            self.run.probe.start_step(at.step + 1)
            outcome = train_step(
                self.run,
                batches,
                lr,
                at.step,
                at.batch,
                stop=self.watch.stop_requested or self.saver.failed,
            )
            self.watch.check_parent()
            at.batch += 1
            if outcome.objection:
                self._passed_over(outcome)
            else:
                at.step += 1
                at.tokens += outcome.tokens
                seconds = time.monotonic() - began
                if recorded := self.profile.end_step(at.step):
                    self._note(recorded)
                heldout = self._heldout() if self._due(train.eval_every) else None
                if self.display:
                    timing = Timing(seconds, waited, before, heldout)
                    self.display.step(at, lr, outcome, timing, logged=self._due(train.log_every))
                before = None
                if self._due(self.run.config.checkpoint.every):
                    self.run.guard.counters.rollbacks_in_a_row = 0
                    self._save()
            if outcome.stop:
                self._save_last()
                raise Stopped(f"stopped by a signal after step {at.step}, checkpoint written")
        self.saver.wait()

    def _due(self, every: int) -> bool:
        """At the end, and each time that so many steps are done; 0: at the end alone."""
        done = self.position.step
        return done == self.run.config.train.max_steps or (every > 0 and done % every == 0)

    def _heldout(self) -> dict[str, float] | None:
        wanted = self.run.config.train.eval_sequences
        return self.run.recipe.evaluate(self.run) if wanted else None

    def _save(self, wait: bool = False) -> None:
        with self.run.world.agreed():
            if self.display:
                self.display.sync()
        keep = self.run.config.checkpoint.keep
        self.saver.save(self.checkpoints, self.position, keep, wait)
        self.saved = replace(self.position)

    def _save_last(self) -> None:
        self.saver.wait()  # raises if writing is why the run stops
        if self.saved != self.position:
            self._save(wait=True)

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
        checkpoint = find_latest(self.checkpoints, world=self.run.world) or self.start
        if checkpoint is None or counters.rollbacks_in_a_row >= options.stop_after:
            self._give_up(outcome, checkpoint)
        else:
            self._roll_back(checkpoint)

    def _roll_back(self, checkpoint: Path) -> None:
        """Weights, moments and schedule of a checkpoint; the data goes on where it is."""
        guard, at = self.run.guard, self.position
        counters = guard.counters
        before = restore(checkpoint, self.run, rolled_back=True)
        at.step, at.tokens = before.step, before.tokens
        guard.counters = counters
        counters.in_a_row = 0
        counters.rollbacks += 1
        counters.rollbacks_in_a_row += 1
        with self.run.world.agreed():
            if self.display:
                self.display.back_to(at.step)
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
        advice = "Lower train.lr or look at the data"
        if not at.step:  # which no rate has changed
            advice = "The weights are those that the run began with: look at them and at the data"
        raise TrainingError(
            f"batch {at.batch} after step {at.step}: {outcome.objection}, and {why}. {advice}. "
            f"The state before that batch is in "
            f"{run_dir / DIAGNOSIS}; a new run_dir with --resume of it meets the batch first"
        )

    def _note(self, text: str) -> None:
        if self.display:
            self.display.note(text)


def _announce(run: Run) -> None:
    config, world, model = run.config, run.world, run.model.config
    train = config.train
    rows = train.micro_batch_size * world.readers
    zero = config.parallel.stage(world.size)
    experts = f", {model.n_routed_experts} experts of which {model.num_experts_per_tok} per token"
    if "E" not in model.pattern + model.mtp_pattern * model.mtp_num_depths:
        experts = ""
    print(
        f"model {model.pattern}, hidden {model.hidden_size}{experts}, {model.mtp_num_depths} MTP "
        "depths"
    )
    print(*run.recipe.describe(run), *describe_schedule(train), sep="\n")
    parts = f"{rows} rows at a time, each over {world.cp} processes, " if world.cp > 1 else ""
    print(
        f"{world.size} processes on {world.device.type}, {parts}expert parallel "
        f"{config.parallel.ep}, ZeRO-{zero}, accumulation "
        f"{train.global_batch_size // rows}, {config.precision.recipe}"
    )
    _announce_precision(run)
    for op, name, reason in backend.report(
        world.device.type, operations(model, config.precision.low)
    ):
        print(f"kernel {op}: {name} ({reason})")
    frozen = "not given: its formula is for models that are trained as a whole"
    print(f"MFU {frozen if run.peak is None else f'relative to {peak_source(world.device.type)}'}")


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


def _summary(run_dir: Path, how: str) -> str:
    model = f"  model        {run_dir / MODEL}\n" if (run_dir / MODEL).exists() else ""
    return (
        f"{how}\n{model}"
        f"  checkpoints  {run_dir / CHECKPOINTS}\n"
        f"  metrics      {run_dir / 'metrics.jsonl'}\n"
        f"  TensorBoard  {run_dir / 'tensorboard'}\n"
        f"  plots        {run_dir / 'plots'}"
    )
