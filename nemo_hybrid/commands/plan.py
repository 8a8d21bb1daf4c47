"""`plan`: does a run fit, what travels between the processes, and how long a step takes.

No memory is taken and no device is asked: everything follows from the shapes and the figures in
``PlanOptions``. ``docs/planning.md`` states the formulas.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, ClassVar, Literal, NamedTuple

from pydantic.dataclasses import dataclass as options

from nemo_hybrid.chips import DEVICES, Device
from nemo_hybrid.commands.command import Command
from nemo_hybrid.config.base import (
    CHECKED,
    POSITIVE,
    CommandOptions,
    NotNegativeFloat,
    PositiveFloat,
    PositiveInt,
)
from nemo_hybrid.config.finetune import FinetuneConfig
from nemo_hybrid.config.hf import HybridConfig
from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.config.rl import RlConfig
from nemo_hybrid.config.run import ModelOptions, RunConfig, TrainingConfig
from nemo_hybrid.errors import UserError

if TYPE_CHECKING:
    from nemo_hybrid.commands.memory import Layout, Memory
    from nemo_hybrid.config.run import KernelOptions


@options(config=CHECKED)
class PlanOptions(CommandOptions):
    """Say whether a run fits, and how long a step takes."""

    section: ClassVar[str] = "plan."

    processes: PositiveInt = 1
    """Processes of the run, one per device."""
    device: Literal["h100", "h200", "b200", "gb200", "gb300", "cpu"] = "h100"
    """Device of every process; `cpu`: one core. Its data sheet gives the figures below that are
    null."""
    memory_gb: Annotated[float | None, POSITIVE] = None
    """Memory of one device in 1e9 bytes."""
    reserve_gb: NotNegativeFloat = 4.0
    """Part of it that the driver, the communication library and fragmentation take: assumed."""
    matmul_tflops: Annotated[float | None, POSITIVE] = None
    """Dense matmul rate of one device in bf16, in 1e12 operations per second, by its data sheet."""
    memory_gb_s: Annotated[float | None, POSITIVE] = None
    """Bandwidth of the device's memory in 1e9 bytes per second, by its data sheet."""
    devices_per_node: Annotated[int | None, POSITIVE] = None
    """Devices that a fast link connects."""
    link_gb_s: Annotated[float | None, POSITIVE] = None
    """That link's bandwidth per device and direction, in 1e9 bytes per second."""
    network_gb_s: PositiveFloat = 50.0
    """Bandwidth per device and direction between nodes: 50 is 400 Gbit/s."""
    fit: bool = False
    """Look for the smallest parallel.cp that fits, whatever the configuration says of it, for
    several choices of train.recompute, and of train.tile and train.offload besides."""


_PUBLISHED = {
    123_611_012_096: "Super, Megatron-Bridge's performance summary: 2,789 tokens/s and 236 TFLOP/s "
    "per H100, bf16 on 64 of them",
    560_524_578_816: "Ultra, Megatron-Bridge's performance summary: 2,528 tokens/s per GB200 and "
    "3,552 per GB300, MXFP8 on 256 of them, TP 2, EP 64, expert activations offloaded",
}
"""By number of parameters."""


class Part(NamedTuple):
    """A part of one step of one process."""

    seconds: float
    sent: float | None = None
    """Bytes that the process sends."""


@dataclass(frozen=True)
class Plan:
    """What `plan` found for one layout."""

    at: Layout
    memory: Memory
    capacity: float
    """Bytes of the device that are left after the reserve."""
    flops: float
    """Useful operations per token; recomputation is not among them."""
    device: Device
    network_gb_s: float
    kernels: KernelOptions
    short: Plan | None = None
    """Of the steps on short rows, if there are any."""
    share: float = 0
    """How many of all steps these are."""

    @property
    def needed(self) -> float:
        """Bytes on the device; a CPU's memory holds the checkpoint's copy as well."""
        return self.memory.device + (self.memory.host_copy if self.at.cpu else 0)

    @property
    def fits(self) -> bool:
        return self.needed <= self.capacity

    @property
    def tokens(self) -> int:
        """Of a step on one process."""
        return self.at.tokens * self.at.accumulation

    @cached_property
    def parts(self) -> dict[str, Part]:
        """Of a step, modelled by what one layer of each kind does, which takes a moment."""
        from nemo_hybrid.commands.step_time import count, paths_of

        paths = paths_of("reference" if self.at.cpu else "gpu")
        for op, plain in paths_of("reference").items():  # libraries may be missing here
            if vars(self.kernels).get(op) == "reference":
                paths[op] = plain
        micro_batch, update = count(self.at, paths, whole=False).seconds(self.device)
        return {
            "compute": Part(micro_batch * self.at.accumulation),
            **_traffic(self.at, self.device, self.network_gb_s),
            "optimizer": Part(update),
        }

    def of(self, accumulation: int) -> Plan:
        """The same with another number of micro-batches per step."""
        if accumulation == self.at.accumulation:
            return self
        short = self.short and self.short.of(accumulation)
        return replace(self, at=replace(self.at, accumulation=accumulation), short=short)

    @property
    def step_s(self) -> float:
        """Nothing overlaps, as in the engine."""
        return sum(part.seconds for part in self.parts.values())

    @property
    def mean_s(self) -> float:
        """Of a step, those on short rows among them."""
        short_s = self.short.step_s if self.short else 0
        return (1 - self.share) * self.step_s + self.share * short_s


def plan_command(config: TrainingConfig, options: PlanOptions) -> int:
    """Print the plan; return the exit status, 0 whether it fits or not."""
    if options.fit:
        from nemo_hybrid.commands.fit import fit_lines, ready_divided

        config, shape = ready_divided(config, options)
        print(*fit_lines(config, options, shape), sep="\n")
        return 0
    config, shape = ready(config, options)
    print("\n".join(_lines(make_plan(config, shape, options), config, shape, options)))
    return 0


def ready(config: TrainingConfig, options: PlanOptions) -> tuple[TrainingConfig, HybridConfig]:
    """What is planned: a valid run, whatever of data and checkpoints is not on this disk, and the
    shape of its model. Raises UserError."""
    config = deepcopy(config)
    if not config.data.path and not getattr(config.data, "blend", None):
        config.data.path = "not needed"
    short = getattr(config.data, "short", None)
    if short and short.sequence_length and not (short.path or short.blend):
        short.path = "not needed"
    shape = shape_on_paper(config.model)
    if isinstance(config, FinetuneConfig | RlConfig) and not config.model.from_hf:
        config.model.from_hf = "not needed"
    if isinstance(config, RlConfig):
        config.data.heldout_path = "not needed"
    config.validate(shape)
    from nemo_hybrid.train.checks import check_precision  # which takes a second

    check_precision(config, shape)
    per_pass = config.train.micro_batch_size * max(1, options.processes // config.parallel.cp)
    batch = config.train.global_batch_size
    other = "global_batch_size" not in config.train.changed() and batch % per_pass > 0
    if other:
        config.train.global_batch_size = math.ceil(batch / per_pass) * per_pass
    config.validate_world(options.processes)
    if other:
        print(
            f"train.global_batch_size is its default, {batch}, which the {per_pass} sequences "
            "of a pass of all processes do not divide: planned with "
            f"{config.train.global_batch_size}"
        )
    return config, shape


def shape_on_paper(options: ModelOptions) -> HybridConfig:
    """The shape of the checkpoint to start from, or, where that is not on this disk, the one that
    the options give. Raises UserError where they give none."""
    from nemo_hybrid.checkpoint.steps import model_shape

    origin = options.from_hf
    if not origin or Path(origin).exists():
        return model_shape(options)
    shape = options.hybrid()
    if shape == HybridConfig():
        raise UserError(
            f"model.from_hf: {origin} does not exist; to plan without it, give the shape of the "
            "model: --model FILE, such as configs/model/nano.yaml"
        )
    return shape


def make_plan(config: TrainingConfig, shape: ModelConfig, options: PlanOptions) -> Plan:
    """Plan a valid run. Raises UserError where it does not fit the number of processes."""
    from nemo_hybrid.commands.memory import layout_of, peak
    from nemo_hybrid.train.flops import train_flops_per_token

    device = _device(options)
    at = layout_of(config, shape, options.processes, cpu=options.device == "cpu")

    def plan(at: Layout) -> Plan:
        return Plan(
            at=at,
            memory=peak(at),
            capacity=(device.memory_gb - options.reserve_gb) * 1e9,
            flops=train_flops_per_token(shape, at.length),
            device=device,
            network_gb_s=options.network_gb_s,
            kernels=config.kernels,
        )

    long, rows = plan(at), getattr(config.data, "short", None)
    if not (rows and rows.sequence_length):
        return long
    whole = rows.rows(at.rows, at.length, at.cp)
    short = plan(replace(at, rows=whole, length=rows.sequence_length, cp=1))
    memory = max(long.memory, short.memory, key=lambda m: m.device)
    return replace(long, memory=memory, short=short, share=rows.share)


def _device(options: PlanOptions) -> Device:
    given = {name: getattr(options, name, None) for name in Device._fields}
    return DEVICES[options.device]._replace(**{k: v for k, v in given.items() if v is not None})


def _layers(at: Layout, letter: str) -> int:
    return at.cfg.pattern.count(letter) + at.cfg.mtp_num_depths * at.cfg.mtp_pattern.count(letter)


def _of_parts(at: Layout) -> Iterator[tuple[str, str, float]]:
    """What layers exchange where rows are divided: their letter, what it is, and bytes of one layer
    in a micro-batch (forward, backward, and recomputed), those that stay here included.

    Mamba-2 layers send the state that they leave and get that with which they begin, in fp32, each
    process for its heads; and the last inputs of the convolution. Attention sends queries, keys and
    values by heads, and gets outputs by tokens.
    """
    if at.cp == 1:
        return
    cfg, b = at.cfg, at.width
    state = 8 * (cfg.mamba_inner_size * cfg.ssm_state_size + cfg.mamba_num_heads)
    halo = b * (cfg.conv_kernel - 1) * cfg.conv_channels
    pairs = max(cfg.num_key_value_heads, at.cp)
    tokens = b * at.tokens * cfg.head_dim * 2 * (cfg.num_attention_heads + pairs)
    sizes = {"M": at.rows * (state + halo), "*": tokens}
    for letter, what in (("M", "states"), ("*", "heads")):
        if _layers(at, letter):
            yield letter, what, (3 if letter in at.recompute else 2) * sizes[letter]


def _traffic(at: Layout, device: Device, network_gb_s: float) -> dict[str, Part]:
    """What travels in a step: routed slots (latent rows and weights, forward, backward and
    recomputed), what `_of_parts` says, fp32 gradients (every micro-batch with ZeRO-2, once with
    ZeRO-1), and the updated weights."""
    from nemo_hybrid.commands.memory import groups_of

    cfg, ep, node = at.cfg, at.ep, device.devices_per_node
    link, network = device.link_gb_s * 1e9, network_gb_s * 1e9
    passes = _layers(at, "E")
    # Rows go and come back; so do their gradients; recomputation sends the rows once more. The
    # fp32 weight of a row goes along, and its gradient comes back.
    again = "E" in at.recomputed
    slot = (6 if again else 4) * cfg.expert_size * at.width + (3 if again else 2) * 4
    slots = at.tokens * at.accumulation * passes * cfg.num_experts_per_tok

    def part(size: float, processes: int) -> Part:
        """Of an all-to-all of so many bytes: what stays here is not sent."""
        near, all_near = (min(processes, node) - 1) / processes, min(processes, node) / processes
        seconds = size * max(near / link, (1 - all_near) / network)
        return Part(seconds, size * (1 - 1 / processes))

    reduction = gather = reduction_s = gather_s = 0.0
    for group in groups_of(at):
        n, stride = group.ranks, at.processes // group.ranks
        # A ring enters and leaves each node through the network devices of all its members.
        rate = link if n * stride <= node else min(link, network * max(1, node // stride))
        share = (n - 1) / n
        reduced = 2 * share * 4 * group.numel * (at.accumulation if at.zero == 2 else 1)
        gathered = share * group.width * group.numel
        reduction, gather = reduction + reduced, gather + gathered
        reduction_s, gather_s = reduction_s + reduced / rate, gather_s + gathered / rate
    divided = {
        f"all-to-all of {what}": part(size * _layers(at, letter) * at.accumulation, at.cp)
        for letter, what, size in _of_parts(at)
    }
    return {
        "all-to-all of routed slots": part(slots * slot, ep),
        **divided,
        "all-reduce of gradients": Part(reduction_s, reduction),
        "all-gather of weights": Part(gather_s, gather),
    }


def _lines(
    found: Plan, config: TrainingConfig, shape: HybridConfig, options: PlanOptions
) -> Iterator[str]:
    from nemo_hybrid.commands.fit import changes
    from nemo_hybrid.train.flops import parameter_counts

    at, memory = found.at, found.memory
    counts = parameter_counts(shape)
    local = sum(p.numel() for p in at.model.parameters())
    trained = sum(p.numel() for p in at.model.parameters() if p.requires_grad)
    names: dict[type, str] = {FinetuneConfig: "finetune", RlConfig: "rl"}
    command = names.get(type(config), "pretrain")
    some = f" ({trained:,} of them trained)" if trained < local else ""
    yield (
        f"{command}: {counts.total:,} parameters, {counts.active:,} active, {local:,} in each "
        f"process{some}; "
        f"{at.processes} x {options.device}, EP {at.ep}, "
        f"{f'CP {at.cp}, ' if at.cp > 1 else ''}ZeRO-{at.zero}, "
        f"{config.precision.recipe}{' (planned as bf16)' if config.precision.low else ''}, "
        f"recompute {at.recompute or 'nothing'}{f', tiles of {at.tile} tokens' if at.tile else ''}"
    )
    yield (
        f"{at.rows} x {at.length} tokens per micro-batch"
        f"{f', of which a process has {at.tokens}' if at.cp > 1 else ''}, "
        f"{at.accumulation} micro-batches per step"
    )
    yield f"memory of one process, at its peak ({memory.moment}):"
    for kind in ("weights", "optimizer", "gradients", "activations", "buffers"):
        yield f"  {kind:12} {gb(getattr(memory, kind)):>12}"
    yield f"  {'together':12} {gb(memory.device):>12}"
    yield (
        f"  in CPU memory: checkpoint copy {gb(memory.host_copy)} (process 0), building the model "
        f"{gb(4 * local)}"
        f"{f', inputs of layers {gb(memory.offloaded)}' if at.offload else ''}"
    )
    room = f"{gb(found.capacity)} ({options.reserve_gb:g} GB reserved)"
    if found.fits:
        yield f"fits: {gb(found.needed)} of {room}"
    else:
        yield f"does not fit: {gb(found.needed)} of {room}. Change, one after the other:"
        yield from (f"  {line}" for line in changes(config, options, shape))
    limits = {
        "finetune": ", as if all weights were trained",
        "rl": ", answers and teachers left out",
    }
    limit = limits.get(command, "")
    yield f"one step of one process, modelled, not measured, nothing overlapping{limit}:"
    for name, (seconds, sent) in found.parts.items():
        yield f"  {name:26} {gb(sent) + ' sent' if sent is not None else '':>17} {seconds:10.3f} s"
    for letter, what, size in _of_parts(at):
        each = size * (1 - 1 / at.cp)
        yield f"  one {letter} layer exchanges {what} of {gb(each)} per micro-batch"
    rate = found.tokens / found.step_s
    yield (
        f"  together {found.step_s:.3f} s: {rate:,.0f} tokens/s and "
        f"{rate * found.flops / 1e12:.3g} TFLOP/s per process "
        f"({found.flops / 1e9:.4g} GFLOP per token), MFU "
        f"{rate * found.flops / (found.device.matmul_tflops * 1e12):.1%}"
    )
    if (short := found.short) is not None:
        yield (
            f"  a step on rows of {short.at.length} tokens {short.step_s:.3f} s; {found.share:g} "
            f"of the steps are such: {found.tokens / found.mean_s:,.0f} tokens/s per process"
        )
    if (steps := config.train.max_steps) and command != "rl":
        stages = config.train.batch_sizes(at.length).split(steps)
        per_pass = at.rows * at.processes // at.cp
        hours = sum(n * found.of(size // per_pass).mean_s for n, size in stages) / 3600
        kept = config.checkpoint.keep
        yield (
            "the whole run, "
            + ", then ".join(f"{n:,} steps of {size * at.length:,} tokens" for n, size in stages)
            + (f": {hours / 24:,.3g} days" if hours >= 48 else f": {hours:,.3g} hours")
            + f"; on disk {gb(memory.checkpoint)} per checkpoint, "
            + (f"{kept} of them, and one being written" if kept else "all of them")
        )
    yield _generating(at)
    if counts.total in _PUBLISHED:
        yield f"published: {_PUBLISHED[counts.total]}"


def _generating(at: Layout) -> str:
    from nemo_hybrid.commands.memory import sequence_memory

    wide = sequence_memory(at.cfg, at.width)
    narrow = sequence_memory(at.cfg, at.width, state=2, cached=1)
    return (
        f"generating holds {wide.fixed:,} bytes of each text ({narrow.fixed:,} with --ssm_cache "
        f"float16) and {wide.token:,} of each of its tokens ({narrow.token:,} with an export's FP8 "
        f"cache): {gb(wide.at(at.length))} at {at.length:,} tokens"
    )


def gb(size: float) -> str:
    if size < 1e6:
        return f"{size / 1e3:,.0f} kB"
    if size < 1e9:
        return f"{size / 1e6:,.0f} MB"
    return f"{size / 1e9:,.3g} GB" if size < 1e11 else f"{size / 1e9:,.0f} GB"


COMMANDS = {"plan": Command(plan_command, PlanOptions, RunConfig, (FinetuneConfig, RlConfig))}
