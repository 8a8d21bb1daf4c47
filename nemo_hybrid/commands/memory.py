"""Memory of a training process by kind and moment, from shapes alone. All sizes are bytes.

It follows what the engine, DeepSpeed's ZeRO optimizer, the layers' autograd functions and the loss
allocate; ``docs/planning.md`` says so in words and shows how well it was met.

Letters in formulas: T tokens of a micro-batch, S sequence, D hidden, I Mamba inner width, C conv
channels, H heads, P head dim, N state, G groups, E experts, K experts per token, L expert width,
F expert inner width, V vocabulary; b bytes of a weight, W processes.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import numpy as np
import torch

from nemo_hybrid.config.model import LAYER_LETTERS, ModelConfig
from nemo_hybrid.config.run import RunConfig, TrainOptions
from nemo_hybrid.parallel.engine import REDUCE_BUCKET
from nemo_hybrid.precision.policy import weight_dtype
from nemo_hybrid.train.flops import layer_parameters, without_storage
from nemo_hybrid.train.optim import parameter_groups

STATE_BYTES = 12
"""fp32 master and two fp32 moments of one parameter."""
_LOSS_CHUNK = {True: 4 << 20, False: 256 << 20}  # logits held at once: on CPU, elsewhere
_SCAN_BLOCK = {True: 1 << 19, False: 1 << 28}  # row-chunk elements of the reference scan


class Group(NamedTuple):
    """Parameters that DeepSpeed keeps in one flat tensor: their sizes in order."""

    sizes: list[int]
    width: int
    """Bytes of one weight."""
    experts: bool
    ranks: int
    """Processes that share its optimizer state."""

    @property
    def numel(self) -> int:
        return sum(self.sizes)

    @property
    def part(self) -> int:
        """Elements of one process's share, padded as DeepSpeed pads it."""
        return math.ceil(self.numel / (2 * self.ranks)) * 2

    def touched(self) -> int:
        """Whole sizes of the parameters that one share touches, at the process with most."""
        bounds = np.concatenate([[0], np.cumsum(self.sizes)])
        low = np.arange(self.ranks) * self.part
        first = np.searchsorted(bounds[1:], low, side="right")
        last = np.searchsorted(bounds[:-1], low + self.part)
        return int((bounds[last] - bounds[first]).max())


@dataclass(frozen=True)
class Layout:
    """What memory depends on."""

    cfg: ModelConfig
    processes: int
    ep: int
    zero: int
    width: int
    """Bytes of a weight or an activation: 2 for bf16, 4 for fp32."""
    rows: int
    length: int
    recompute: str
    accumulation: int
    cpu: bool
    """Buffers that are never touched take no memory there, and the reference paths are taken."""
    reference: tuple[str, ...]
    """Operations of ssd, conv1d and attention that take the reference path."""
    host_copy: bool
    """Checkpoints are copied to CPU memory before they are written."""

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @cached_property
    def layers(self) -> dict[str, dict[str, torch.Tensor]]:
        """A layer's parameters by pattern letter and name, without storage."""
        return {c: layer_parameters(self.cfg, c, self.ep) for c in LAYER_LETTERS}

    def sizes(self, letter: str) -> list[int]:
        """Elements of a layer's parameters, in the model's order."""
        return [parameter.numel() for parameter in self.layers[letter].values()]


def layout_of(config: RunConfig, cfg: ModelConfig, processes: int, cpu: bool) -> Layout:
    """The layout of a valid run. Raises UserError where it does not fit the number of processes."""
    kernels = vars(config.kernels)
    return Layout(
        cfg=cfg,
        processes=processes,
        ep=config.parallel.ep,
        zero=config.parallel.zero,
        width=weight_dtype(config.precision).itemsize,
        rows=config.train.micro_batch_size,
        length=config.data.sequence_length,
        recompute=config.train.recompute,
        accumulation=config.validate_world(processes),
        cpu=cpu,
        reference=tuple(op for op, path in kernels.items() if cpu or path == "reference"),
        host_copy=config.checkpoint.asynchronous,
    )


@dataclass(frozen=True)
class Memory:
    """Bytes of one process by kind, at one moment."""

    moment: str = ""
    weights: float = 0
    optimizer: float = 0
    gradients: float = 0
    activations: float = 0
    buffers: float = 0
    """Reduction buffers, and temporaries of the operation that runs."""
    host_copy: float = 0
    """Copy of weights and optimizer state for the checkpoint, in CPU memory."""

    @property
    def device(self) -> float:
        """Everything but the copy in CPU memory."""
        return self.weights + self.optimizer + self.gradients + self.activations + self.buffers


def groups_of(at: Layout) -> list[Group]:
    """The optimizer's parameter groups as one process holds them."""
    dtype = torch.float32 if at.width == 4 else torch.bfloat16
    model = without_storage(at.cfg, at.ep, dtype)
    return [
        Group(
            sizes=[p.numel() for p in group["params"]],
            width=group["params"][0].element_size(),
            experts=group["experts"],
            ranks=at.processes // (at.ep if group["experts"] else 1),
        )
        for group in parameter_groups(model, TrainOptions())
    ]


def saved(at: Layout, letter: str) -> int:
    """Bytes that autograd keeps of one layer for one micro-batch, its input included.

    A recomputed layer keeps its input alone; "e" leaves out the experts' pre-activation.
    """
    if letter in at.recompute:
        return at.tokens * at.width * at.cfg.hidden_size
    return _saved(at, letter)


def _saved(at: Layout, letter: str) -> int:
    cfg, b, T, S = at.cfg, at.width, at.tokens, at.length
    cast = b != 4  # an fp32 copy of something bf16 is a tensor of its own
    token = 2 * b * cfg.hidden_size + 4  # the norm's input, output, and 1/rms
    if letter == "M":
        return T * token + _saved_mamba(at)
    if letter == "*":
        a = 4 if at.cpu else b
        q, kv = (n * cfg.head_dim for n in (cfg.num_attention_heads, cfg.num_key_value_heads))
        token += a * (2 * q + 2 * kv) + 4 * cfg.num_attention_heads
        token += b * q if a != b else 0
        if "attention" in at.reference:  # the documents' mask
            token += a * S
        return T * token
    if letter == "-":
        return T * (token + 2 * b * cfg.intermediate_size)
    experts, k, inner = cfg.n_routed_experts, cfg.num_experts_per_tok, cfg.moe_intermediate_size
    fixed = 4 * experts * cfg.hidden_size if cast else 0
    token += 4 * cfg.hidden_size if cast else 0
    token += 4 * experts + 12 * k + 8  # scores, choice, chosen scores, two sums
    token += 4 * k  # weights
    token += b * k * inner if "e" not in at.recompute else 0  # pre-activation
    if cfg.moe_latent_size:
        token += b * cfg.moe_latent_size  # fc2's input
    if at.ep > 1:
        token += b * k * cfg.expert_size + 8 * 5 * k  # rows that came, five permutations
    else:
        token += (b * cfg.moe_latent_size if cfg.moe_latent_size else 0) + 8 * 2 * k
    return fixed + T * (token + 2 * b * cfg.moe_shared_expert_intermediate_size)


def _saved_mamba(at: Layout) -> int:
    cfg, b, T, S = at.cfg, at.width, at.tokens, at.length
    inner, conv, heads = cfg.mamba_inner_size, cfg.conv_channels, cfg.mamba_num_heads
    token = b * (inner + conv + heads) + 4 * heads  # in_proj's output, softplus's input
    # Of the convolution its result before SiLU, or from the library a contiguous copy of its input.
    token += b * conv
    token += 4 * cfg.n_groups + b * inner  # of the gated norm; out_proj's input
    if "ssd" not in at.reference:
        return T * (token + b * conv + 8 * heads + b * inner)
    chunk = min(cfg.chunk_size, S)
    chunks = math.ceil(S / chunk)
    padded = at.rows * chunks * chunk
    states = at.rows * (chunks + 1) * 4 * inner * cfg.ssm_state_size
    return T * token + padded * (b * conv + 4 * heads + b * inner) + states


def scratch(at: Layout, letter: str) -> int:
    """Bytes of temporaries in a layer's backward pass, the largest that live together.

    Estimated from what each pass allocates; the gradient of the layer's weights in the weights'
    dtype is part of it.
    """
    cfg, b, T, S = at.cfg, at.width, at.tokens, at.length
    stream = 2 * b * cfg.hidden_size
    largest = b * max(p.numel() for name, p in at.layers[letter].items() if ".experts." not in name)
    if letter == "*":
        q, kv = (n * cfg.head_dim for n in (cfg.num_attention_heads, cfg.num_key_value_heads))
        return largest + T * (stream + (4 + b) * (2 * q + 2 * kv))
    if letter == "-":
        return largest + T * (stream + 3 * b * cfg.intermediate_size)
    if letter == "M":
        inner, conv, heads = cfg.mamba_inner_size, cfg.conv_channels, cfg.mamba_num_heads
        token = stream + b * (2 * inner + 2 * (inner + conv + heads)) + 4 * conv
        chunk = min(cfg.chunk_size, S)
        state = 4 * 2 * inner * cfg.ssm_state_size // chunk
        if "ssd" not in at.reference:
            return largest + T * (token + state + 8 * cfg.n_groups * chunk)
        rows = max(1, min(at.rows, _SCAN_BLOCK[at.cpu] // (S * heads * chunk)))
        block = 4 * heads * (4 * chunk + 5 * cfg.ssm_state_size + 3 * cfg.mamba_head_dim) + state
        return largest + T * token + rows * S * block
    k, expert = cfg.num_experts_per_tok, cfg.expert_size
    weights = 2 * (cfg.n_routed_experts // at.ep) * expert * cfg.moe_intermediate_size
    token = stream + k * expert * (2 * b + 4)  # gathered rows, their gradients in and out
    token += b * k * cfg.moe_intermediate_size if "e" in at.recompute else 0
    if at.cpu:
        weights *= 4 + (b if b != 4 else 0)  # in fp32, then rounded
    else:
        weights *= b
        token += 12 * k * cfg.moe_intermediate_size  # passes between the grouped products
    return T * token + weights


def moments(at: Layout) -> Iterator[Memory]:
    """Memory through one step after the first, at every moment that can be the largest.

    The last micro-batch; earlier ones have left their gradients behind.
    """
    cfg, b, T = at.cfg, at.width, at.tokens
    groups = groups_of(at)
    base = Memory(
        weights=sum(g.width * g.part * g.ranks for g in groups),
        optimizer=STATE_BYTES * sum(g.part for g in groups),
    )
    if at.host_copy:
        copy = base.optimizer + sum(g.width * g.numel for g in groups)
        base = replace(base, host_copy=copy)
    reduction = Reduction(at, groups, base)
    d, vocab, depths = cfg.hidden_size, cfg.vocab_size, cfg.mtp_num_depths
    stream, head = b * T * d, vocab * d

    # Forward: layers, final norms, inputs of every depth, and the loss, which makes gradients.
    block = sum(saved(at, letter) for letter in cfg.mtp_pattern) + 5 * stream if depths else 0
    kept = sum(saved(at, letter) for letter in cfg.pattern) + stream + depths * block
    held = (1 + depths) * stream  # gradients of the hidden states that the loss reads
    chunk = 2 * max(_LOSS_CHUNK[at.cpu], 16 * 4 * vocab)
    cast = 4 * head if b != 4 else 0
    yield reduction.memory("loss", kept, 2 * held + 4 * head + cast + chunk)
    yield reduction.memory("loss, backward", kept, 2 * held + (4 + b) * head)
    yield from reduction.arrive("head", [head], kept, held)

    def backward(pattern: str, depth: int) -> Iterator[Memory]:
        """The layers of the MTP block at a depth, or with 0 those of the backbone."""
        nonlocal kept
        for letter in reversed(pattern):
            own = at.sizes(letter)
            # The block's gradients are summed over its depths before they arrive.
            waiting = b * sum(own) if 0 < depth < depths else 0
            again = _saved(at, letter) - stream if letter in at.recompute else 0
            work = held + scratch(at, letter) + again + waiting
            name = f"MTP {depth}, {letter}" if depth else letter
            yield reduction.memory(f"{name} backward", kept, work)
            if depth < 2:
                yield from reduction.arrive("MTP" if depth else letter, own, kept, held)
            kept -= saved(at, letter)

    for depth in range(depths, 0, -1):
        yield from backward(cfg.mtp_pattern, depth)
        kept -= 5 * stream
        held -= stream
        if depth == depths:
            held += b * head  # the embedding's gradient waits for the other uses of it
    if depths:
        yield from reduction.arrive("MTP", [2 * d * d], kept, held)
    yield from backward(cfg.pattern, 0)
    yield reduction.memory("embedding backward", kept, held + b * head)
    yield from reduction.arrive("embedding", [head], 0, 0)
    yield from reduction.finish()


class Reduction:
    """Gradients and reduction buffers while gradients arrive, as DeepSpeed's ZeRO holds them.

    ZeRO-1 keeps all gradients in fp32 until the last micro-batch and reduces them then. ZeRO-2
    collects them in a buffer of the engine's bucket size; a full one is reduced and the parts that
    belong here are copied out. Reduction flattens into a further copy.
    """

    def __init__(self, at: Layout, groups: list[Group], base: Memory) -> None:
        self.at, self.groups, self.base = at, groups, base
        widths = {g.width for g in groups}
        # The engine puts bf16 first for ZeRO-1 and fp32 for ZeRO-2; only bf16 in front makes
        # DeepSpeed add up in flat fp32 partitions.
        self.compact = 2 in widths and (at.zero == 1 or 4 not in widths)
        self.staging = 2 if at.zero == 2 and self.compact else 4
        parts = sum(g.part for g in groups)
        self.own = 4 * (parts if self.compact else sum(g.touched() for g in groups))
        self.numel = sum(g.numel for g in groups)
        self.bucket = max(REDUCE_BUCKET, *(max(g.sizes) for g in groups))
        self.before = 0  # left by earlier micro-batches
        if at.accumulation > 1:
            self.before = 4 * self.numel if at.zero == 1 else self.own
        self.arrived = self.pending = self.staged = self.reduced = 0

    def memory(self, moment: str, kept: float, work: float) -> Memory:
        """All kinds at a moment of the forward or backward pass."""
        at = self.at
        own = self.own if not at.cpu else self.own * self.reduced / self.numel
        gradients: float
        if at.zero == 1:
            gradients = max(self.before, 4 * self.arrived)
        elif self.compact:
            gradients = max(self.before, own if self.reduced else 0)
        else:
            gradients = self.before + (own if self.reduced else 0)
        buffer = self.bucket if not at.cpu and self.arrived else self.staged
        return replace(
            self.base,
            moment=moment,
            gradients=gradients,
            activations=kept,
            buffers=self.staging * buffer + work,
        )

    def arrive(self, moment: str, sizes: list[int], kept: float, work: float) -> Iterator[Memory]:
        """Gradients of ``sizes`` come; yields the moment of each reduction that they cause."""
        for size in reversed(sizes):
            self.arrived += size
            if self.at.zero == 1:
                continue
            if self.pending + size > self.bucket:
                yield self._reduce(moment, kept, work)
            self.pending += size
            self.staged = max(self.staged, self.pending)

    def _reduce(self, moment: str, kept: float, work: float) -> Memory:
        flat = (4 + 2 * (self.staging == 2)) * self.pending
        self.reduced += self.pending
        self.pending = 0
        return self.memory(f"reduction, {moment}", kept, work + flat)

    def finish(self) -> Iterator[Memory]:
        """The last reduction, the norm, and the optimizer's step."""
        at, base = self.at, self.base
        if at.zero == 2:
            yield self._reduce("all", 0, 0)
        else:
            largest = self.numel
            if at.ep > 1:  # experts and the others are reduced one after the other
                experts = sum(g.numel for g in self.groups if g.experts)
                largest = max(experts, self.numel - experts)
            bucket = min(self.bucket, self.numel)
            yield replace(
                base,
                moment="reduction",
                gradients=4 * self.numel + (self.own if self.compact else 0),
                buffers=4 * min(largest, bucket),
            )
            if not self.compact:
                yield replace(base, moment="reduced", gradients=4 * bucket + self.own, buffers=0)
        step = replace(base, gradients=self.own)
        slices = max(min(max(g.sizes), g.part) for g in self.groups)
        yield replace(step, moment="norm", buffers=8 * slices)
        if not self.compact:
            largest_part = max(g.part for g in self.groups)
            yield replace(step, moment="optimizer", buffers=4 * largest_part)
        gathered = max((g.width * g.numel for g in self.groups if g.ranks > 1), default=0)
        yield replace(base, moment="all-gather", buffers=gathered if at.cpu else 0)


def peak(at: Layout) -> Memory:
    """The moment with most memory on the device; on CPU the checkpoint's copy lies there too."""
    return max(moments(at), key=lambda m: m.device)
