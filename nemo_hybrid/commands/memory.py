"""Memory of a training process by kind, from shapes alone. All sizes are bytes.

What DeepSpeed's ZeRO optimizer and the layers' autograd functions hold is counted; temporaries are
estimated. ``docs/planning.md`` says so in words and shows how well it was met.

Letters in formulas: T tokens of a micro-batch, S sequence, D hidden, I Mamba inner width, C conv
channels, H heads, P head dim, N state, G groups, E experts, K experts per token, L expert width,
F expert inner width, V vocabulary; b bytes of a weight, W processes.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch

from nemo_hybrid.config.model import LAYER_LETTERS, ModelConfig
from nemo_hybrid.config.run import RunConfig, TrainOptions
from nemo_hybrid.parallel.engine import REDUCE_BUCKET
from nemo_hybrid.precision.policy import weight_dtype
from nemo_hybrid.train.flops import layer_parameters, without_storage
from nemo_hybrid.train.optim import parameter_groups

STATE_BYTES = 12
"""fp32 master and two fp32 moments of one parameter."""
_REDUCTION_BYTES = 8
"""Per element of ZeRO-2's buffer: the buffer itself, and flat copies of what is reduced."""
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
        """About the elements of all parameters that a share touches: that at its end may be the
        largest."""
        return min(self.numel, self.part + max(self.sizes))


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
    cfg, b, T, S, a = at.cfg, at.width, at.tokens, at.length, 4 if at.cpu else at.width
    q, kv = (n * cfg.head_dim for n in (cfg.num_attention_heads, cfg.num_key_value_heads))
    inner, conv, heads = cfg.mamba_inner_size, cfg.conv_channels, cfg.mamba_num_heads
    experts, k, cast = cfg.n_routed_experts, cfg.num_experts_per_tok, b != 4
    latent, library = b * (cfg.moe_latent_size or 0), "ssd" not in at.reference
    chunks = math.ceil(S / min(cfg.chunk_size, S))
    padded = T if library else at.rows * chunks * min(cfg.chunk_size, S)
    norm = T * (2 * b * cfg.hidden_size + 4)  # its input, output, and 1/rms
    terms = {
        "M": (
            T * (b * (inner + conv + heads) + 4 * heads),  # in_proj's output, softplus's input
            T * b * conv,  # of the convolution its result before SiLU, or a copy of its input
            T * (4 * cfg.n_groups + b * inner),  # of the gated norm; out_proj's input
            padded * (b * conv + 4 * heads + b * inner),  # of the scan
            T * 4 * heads if library else at.rows * (chunks + 1) * 4 * inner * cfg.ssm_state_size,
        ),
        "*": (
            T * (a * (2 * q + 2 * kv) + 4 * cfg.num_attention_heads),
            T * b * q * (a != b),
            T * a * S * ("attention" in at.reference),  # the documents' mask
        ),
        "-": (T * 2 * b * cfg.intermediate_size,),
        "E": (
            4 * cfg.hidden_size * (T + experts) * cast,  # the router's input and weight in fp32
            T * (4 * experts + 16 * k + 8),  # scores, choice, chosen scores, sums, weights
            T * b * k * cfg.moe_intermediate_size * ("e" not in at.recompute),  # pre-activation
            T * latent,  # fc2's input
            # The rows that came, and five permutations of them; or experts' inputs, and two.
            T * (b * k * cfg.expert_size + 40 * k if at.ep > 1 else latent + 16 * k),
            T * 2 * b * cfg.moe_shared_expert_intermediate_size,
        ),
    }
    return norm + sum(terms[letter])


def scratch(at: Layout, letter: str) -> int:
    """Bytes of temporaries in a layer's backward pass, the largest that live together, with the
    gradient of its largest weight. An estimate from what each pass allocates."""
    cfg, b, T = at.cfg, at.width, at.tokens
    q, kv = (n * cfg.head_dim for n in (cfg.num_attention_heads, cfg.num_key_value_heads))
    inner, conv, heads = cfg.mamba_inner_size, cfg.conv_channels, cfg.mamba_num_heads
    state, chunk = cfg.ssm_state_size, min(cfg.chunk_size, at.length)
    states = 4 * 2 * inner * state // chunk
    if "ssd" not in at.reference:
        scan = T * (states + 8 * cfg.n_groups * chunk)
    else:
        rows = max(1, min(at.rows, _SCAN_BLOCK[at.cpu] // (at.length * heads * chunk)))
        block = 4 * heads * (4 * chunk + 5 * state + 3 * cfg.mamba_head_dim) + states
        scan = rows * at.length * block
    k, expert, width = cfg.num_experts_per_tok, cfg.expert_size, cfg.moe_intermediate_size
    # Gathered rows, their gradients in and out; what "e" recomputes; between grouped products.
    slot = expert * (2 * b + 4) + width * (b * ("e" in at.recompute) + 12 * (not at.cpu))
    stacks = 2 * cfg.n_routed_experts // at.ep * expert * width
    largest = max(p.numel() for name, p in at.layers[letter].items() if ".experts." not in name)
    stream = T * 2 * b * cfg.hidden_size
    return (
        stream
        + {
            "*": b * largest + T * (4 + b) * (2 * q + 2 * kv),
            "-": b * largest + T * 3 * b * cfg.intermediate_size,
            "M": b * largest + T * (b * (2 * inner + 2 * (inner + conv + heads)) + 4 * conv) + scan,
            # On CPU in fp32, then rounded.
            "E": T * k * slot + stacks * (4 + b * (b != 4) if at.cpu else b),
        }[letter]
    )


def moments(at: Layout) -> list[Memory]:
    """The moments of a step after the first that can be the largest: the loss and the beginning of
    the backward pass, when all activations are there, and the reduction and the optimizer's step,
    when all gradients are. In between the ones go as the others come."""
    cfg, b, groups = at.cfg, at.width, groups_of(at)
    numel, share = (
        sum(numbers) for numbers in zip(*((g.numel, g.part) for g in groups), strict=True)
    )
    base = Memory(
        weights=sum(g.width * g.part * g.ranks for g in groups),
        optimizer=STATE_BYTES * share,
        host_copy=at.host_copy * (STATE_BYTES * share + sum(g.width * g.numel for g in groups)),
    )
    # ZeRO-1 keeps all gradients until the last micro-batch; ZeRO-2 the share alone.
    own = 4 * (share if at.zero == 1 else sum(g.touched() for g in groups))
    before = (4 * numel if at.zero == 1 else own) if at.accumulation > 1 else 0
    bucket = max(REDUCE_BUCKET, *(max(g.sizes) for g in groups))
    early = at.zero == 2 and numel > bucket  # reductions begin with the backward pass
    if at.cpu:  # what is never touched takes no memory
        bucket = min(bucket, numel)

    layers = cfg.pattern + (cfg.mtp_pattern if cfg.mtp_num_depths else "")
    stream, head, depths = (
        b * at.tokens * cfg.hidden_size,
        cfg.vocab_size * cfg.hidden_size,
        cfg.mtp_num_depths,
    )
    # Activations: layers, final norms, inputs of every depth.
    kept = sum(saved(at, letter) for letter in cfg.pattern + depths * cfg.mtp_pattern)
    kept += (1 + 5 * depths) * stream
    held = (1 + depths) * stream  # gradients of the hidden states that the loss reads
    logits = 2 * max(_LOSS_CHUNK[at.cpu], 16 * 4 * cfg.vocab_size)
    again = {c: (_saved(at, c) - stream) * (c in at.recompute) for c in {*layers}}
    work = {c: scratch(at, c) + again[c] for c in {*layers}}
    worst = max(work, key=work.__getitem__)
    return [
        replace(
            base,
            moment="loss",
            gradients=before,
            activations=kept,
            buffers=2 * held + 4 * head + 4 * head * (b != 4) + logits,
        ),
        replace(
            base,
            moment=f"{worst} backward",
            gradients=before + own * early,
            activations=kept,
            buffers=held + work[worst] + 4 * bucket * (early or (at.zero == 2 and not at.cpu)),
        ),
        replace(
            base,
            moment="reduction",
            gradients=4 * numel + own if at.zero == 1 else before + own,
            activations=kept * early,
            buffers=bucket * (_REDUCTION_BYTES if at.zero == 2 else 4),
        ),
        replace(base, moment="optimizer", gradients=own, buffers=4 * max(g.part for g in groups)),
    ]


def peak(at: Layout) -> Memory:
    """The moment with most memory on the device; on CPU the checkpoint's copy lies there too."""
    return max(moments(at), key=lambda m: m.device)
