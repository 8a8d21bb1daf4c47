"""Memory of a training process by kind, from shapes alone. All sizes are bytes.

What DeepSpeed's ZeRO optimizer and the layers' autograd functions hold is counted; temporaries are
estimated. ``docs/planning.md`` says so in words and shows how well it was met.

Letters in formulas: T tokens of a micro-batch on a process, S those of a row (with context
parallelism the process has a part of each row, and in attention whole rows with a part of the
heads), D hidden, I Mamba inner width, C conv
channels, H heads, P head dim, N state, G groups, E experts, K experts per token, L expert width,
F expert inner width, V vocabulary; b bytes of a weight, W processes.
"""

from __future__ import annotations

import math
from copy import deepcopy
from dataclasses import dataclass, replace
from functools import cached_property
from typing import NamedTuple

import torch

from nemo_hybrid.config.finetune import FinetuneConfig
from nemo_hybrid.config.model import ModelConfig
from nemo_hybrid.config.parallel import REDUCE_BUCKET
from nemo_hybrid.config.rl import RlConfig
from nemo_hybrid.config.run import TrainingConfig, TrainOptions
from nemo_hybrid.model.hybrid import HybridLM
from nemo_hybrid.model.recompute import TILED, pieces
from nemo_hybrid.precision.policy import weight_dtype
from nemo_hybrid.train.flops import layer_parameters, without_storage
from nemo_hybrid.train.optim import parameter_groups
from nemo_kernels.documents import divided

STATE_BYTES = 12
"""fp32 master and two fp32 moments of one parameter."""
_REDUCTION_BYTES = 8
"""Per element of ZeRO-2's buffer: the buffer itself, and flat copies of what is reduced."""
_TEMPORARIES: dict[bool, dict[str, float]] = {
    True: dict.fromkeys("M*-E", 2),
    False: {"M": 1.5, "*": 2, "-": 4, "E": 4},
}
"""Times what a layer keeps, that its backward pass takes in between: on CPU as measured, elsewhere
as the grouped products of experts are expected to, and of M and * half more than `step_time` counts
(0.9 and 1.2 to 1.5 times)."""
# Logits held at once: by the reference on CPU and elsewhere, by the kernels.
_LOSS_CHUNK = {True: 4 << 20, False: 256 << 20}
_LOSS_CHUNK_KERNEL = 2 << 30


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
        """Elements of one process's share, padded as DeepSpeed pads it: each parameter begins at a
        multiple of 16 bytes."""
        step = 16 // self.width
        padded = sum(math.ceil(size / step) * step for size in self.sizes)
        return math.ceil(padded / (2 * self.ranks)) * 2

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
    """Operations that take the reference path; those whose memory depends on it."""
    host_copy: bool
    """Checkpoints are copied to CPU memory before they are written."""
    beginning: FinetuneConfig | RlConfig | None = None
    """Which weights stay frozen, and what is held beside them; None: all are trained."""
    cp: int = 1
    """Processes over which each row is divided."""
    tile: int = 0
    """Tokens that layers E and - take at a time; 0: all."""
    offload: bool = False
    """Inputs of recomputed layers wait in CPU memory."""

    @property
    def part(self) -> int:
        """Tokens of a row on one process, of which some have one less."""
        return math.ceil(self.length / self.cp)

    @property
    def tokens(self) -> int:
        return self.rows * self.part

    @property
    def recomputed(self) -> str:
        """Letters of layers that keep their input alone, and perhaps "e"."""
        return self.recompute + TILED * bool(self.tile)

    def at_a_time(self, letter: str) -> Layout:
        """With as many tokens as a layer takes at a time."""
        if not self.tile or letter not in TILED:
            return self
        count = pieces(self.rows, divided(self.length, self.cp), self.tile)
        return replace(self, tile=0, cp=1, length=math.ceil(self.part / count))

    @cached_property
    def model(self) -> HybridLM:
        """What one process trains, without storage; not to be changed."""
        dtype = torch.float32 if self.width == 4 else torch.bfloat16
        model = without_storage(self.cfg, self.ep, dtype)
        if self.beginning is None:
            return model
        from nemo_hybrid.model.lora import add_adapters
        from nemo_hybrid.recipes.finetune import freeze

        model = deepcopy(model)
        if self.beginning.lora.rank:
            add_adapters(model, self.beginning.lora, 0)
        freeze(model, self.beginning.train)
        return model

    @property
    def frozen(self) -> int:
        """Bytes of weights that are not trained, those of a teacher included."""
        held = sum(
            p.numel() * p.element_size() for p in self.model.parameters() if not p.requires_grad
        )
        other = (
            isinstance(self.beginning, FinetuneConfig) and self.beginning.distill.preset != "none"
        )
        if other or (isinstance(self.beginning, RlConfig) and self.beginning.rl.kl):
            held += sum(p.numel() * self.width for p in self.model.parameters())
        return held


def layout_of(config: TrainingConfig, cfg: ModelConfig, processes: int, cpu: bool) -> Layout:
    """The layout of a valid run. Raises UserError where it does not fit the number of processes."""
    kernels = vars(config.kernels)
    return Layout(
        cfg=cfg,
        processes=processes,
        ep=config.parallel.ep,
        zero=config.parallel.stage(processes),
        width=weight_dtype(config.precision).itemsize,
        rows=config.train.micro_batch_size,
        length=config.data.sequence_length,
        recompute=config.train.recompute,
        accumulation=config.validate_world(processes),
        cpu=cpu,
        reference=tuple(
            op
            for op, path in kernels.items()
            if cpu or path in ("reference", "grouped_mm")  # whose router is the reference's
        ),
        host_copy=config.checkpoint.asynchronous,
        beginning=config if isinstance(config, FinetuneConfig | RlConfig) else None,
        cp=config.parallel.cp,
        tile=config.train.tile,
        offload=config.train.offload,
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
    offloaded: float = 0
    """Inputs of recomputed layers, in CPU memory."""
    checkpoint: float = 0
    """Weights and optimizer state of all processes, on disk."""

    @property
    def device(self) -> float:
        """Everything but what is in CPU memory."""
        return self.weights + self.optimizer + self.gradients + self.activations + self.buffers

    def at(self, moment: str, gradients: float, activations: float, buffers: float) -> Memory:
        """The same weights and optimizer state at a moment."""
        kinds = {"gradients": gradients, "activations": activations, "buffers": buffers}
        return replace(self, moment=moment, **kinds)


def groups_of(at: Layout) -> list[Group]:
    """The optimizer's parameter groups as one process holds them."""
    return [
        Group(
            sizes=[p.numel() for p in group["params"]],
            width=group["params"][0].element_size(),
            experts=group["experts"],
            ranks=at.processes // (at.ep if group["experts"] else 1),
        )
        for group in parameter_groups(at.model, TrainOptions())
    ]


def saved(at: Layout, letter: str) -> int:
    """Bytes that autograd keeps of one layer for one micro-batch, its input included.

    A recomputed layer keeps its input alone, or nothing on the device where inputs are offloaded;
    "e" leaves out the experts' pre-activation.
    """
    if letter not in at.recomputed:
        return _saved(at, letter)
    return 0 if at.offload and not at.cpu else _stream(at)


def _stream(at: Layout) -> int:
    return at.tokens * at.width * at.cfg.hidden_size


def _saved(at: Layout, letter: str) -> int:
    cfg, b, T, S, a = at.cfg, at.width, at.tokens, at.part, 4 if at.cpu else at.width
    q, kv = (n * cfg.head_dim for n in (cfg.num_attention_heads, own_pairs(at)))
    inner, conv, heads = cfg.mamba_inner_size, cfg.conv_channels, cfg.mamba_num_heads
    experts, k, cast = cfg.n_routed_experts, cfg.num_experts_per_tok, b != 4
    latent = b * (cfg.moe_latent_size or 0)
    state, of_router = inner * cfg.ssm_state_size, T * (4 * experts + 12 * k + 4)
    if "moe" in at.reference:  # also its input and weight in fp32
        of_router += T * (4 * k + 4) + 4 * cfg.hidden_size * (T + experts) * cast
    chunk = min(cfg.chunk_size, S)
    if "ssd" in at.reference:
        chunks = math.ceil(S / chunk)
        scan = at.rows * chunks * chunk * (b * conv + 4 * heads + b * inner)
        scan += at.rows * (chunks + 1) * 4 * state
    else:  # states in the model's dtype, and four decays of each token
        chunk = min(max(1 << (chunk - 1).bit_length(), 16), 128)
        chunks = at.rows * math.ceil(S / chunk)
        scan = T * (b * conv + 4 * heads + b * inner)
        scan += chunks * (b * state + 4 * heads * (4 * chunk + 1))
    norm = T * (2 * b * cfg.hidden_size + 4)  # its input, output, and 1/rms
    terms = {
        "M": (
            T * (b * (inner + conv + heads) + 4 * heads),  # in_proj's output, softplus's input
            T * b * conv * ("conv1d" in at.reference),  # its result before SiLU
            # Its input, behind the end of the part before; states that leave, travel and enter.
            (T * b * conv + at.rows * 12 * inner * cfg.ssm_state_size) * (at.cp > 1),
            T * (4 * cfg.n_groups + b * inner),  # of the gated norm; out_proj's input
            scan,
        ),
        "*": (
            T * (a * 2 * q + 4 * cfg.num_attention_heads),
            T * a * q * (at.cp > 1),  # the output for whole rows, and by tokens once more
            at.rows * at.length * a * 2 * kv,
            T * b * q * (a != b),
            at.rows * at.length**2 * a * ("attention" in at.reference),  # the documents' mask
        ),
        "-": (T * 2 * b * cfg.intermediate_size,),
        "E": (
            of_router,  # scores, choice, weights, sums
            T * b * k * cfg.moe_intermediate_size * ("e" not in at.recompute),  # pre-activation
            T * latent,  # fc2's input
            # The rows that came, and five permutations of them; or experts' inputs, one
            # permutation, and the slots' tokens.
            T * (b * k * cfg.expert_size + 32 * k if at.ep > 1 else latent + 12 * k),
            T * 2 * b * cfg.moe_shared_expert_intermediate_size,
        ),
    }
    return norm + sum(terms[letter])


def own_pairs(at: Layout) -> int:
    """Key/value heads of one process in attention, which repeats them where there are too few."""
    return max(1, at.cfg.num_key_value_heads // at.cp)


def moments(at: Layout) -> list[Memory]:
    """The moments of a step after the first that can be the largest: the loss and the beginning of
    the backward pass, when all activations are there, and the reduction and the optimizer's step,
    when all gradients are. In between the ones go as the others come."""
    cfg, b, groups, depths = at.cfg, at.width, groups_of(at), at.cfg.mtp_num_depths
    layers = cfg.pattern + depths * cfg.mtp_pattern
    numel, share = (
        sum(numbers) for numbers in zip(*((g.numel, g.part) for g in groups), strict=True)
    )
    base = Memory(
        weights=at.frozen + sum(g.width * g.part * g.ranks for g in groups),
        optimizer=STATE_BYTES * share,
        checkpoint=sum(
            (g.width + STATE_BYTES) * g.numel * (at.ep if g.experts else 1) for g in groups
        ),
        host_copy=at.host_copy * (STATE_BYTES * share + sum(g.width * g.numel for g in groups)),
        offloaded=sum(_stream(at) for c in layers if c in at.recomputed and not saved(at, c)),
    )
    # ZeRO-1 keeps all gradients until the last micro-batch; ZeRO-2 the share alone.
    own = 4 * (share if at.zero == 1 else sum(g.touched() for g in groups))
    before = (4 * numel if at.zero == 1 else own) if at.accumulation > 1 else 0
    bucket = max(REDUCE_BUCKET, *(max(g.sizes) for g in groups))
    early = at.zero == 2 and numel > bucket  # reductions begin with the backward pass
    if at.cpu:  # what is never touched takes no memory
        bucket = min(bucket, numel)

    head, stream = cfg.vocab_size * cfg.hidden_size, _stream(at)
    # Activations: layers, final norms, inputs of every depth.
    kept = sum(saved(at, letter) for letter in layers)
    kept += (1 + 5 * depths) * stream
    held = (1 + depths) * stream  # gradients of the hidden states that the loss reads
    if at.cpu or "loss" in at.reference:
        logits = 2 * max(_LOSS_CHUNK[at.cpu], 16 * 4 * cfg.vocab_size)
        logits += 4 * head * (b != 4)  # the head in fp32
    else:  # with their gradient, in the model's dtype
        rows = min((1 + depths) * at.tokens, _LOSS_CHUNK_KERNEL // (4 * cfg.vocab_size))
        logits = (4 + b) * rows * cfg.vocab_size
    work = {letter: _backward(at, letter) for letter in set(layers)}
    worst = max(work, key=work.__getitem__)
    return [
        base.at("loss", before, kept, 2 * held + 4 * head + logits),
        base.at(
            f"{worst} backward",
            before + own * early,
            kept,
            held + work[worst] + 4 * bucket * (early or (at.zero == 2 and not at.cpu)),
        ),
        base.at(
            "reduction",
            own + (4 * numel if at.zero == 1 else before),
            kept * early,
            bucket * (_REDUCTION_BYTES if at.zero == 2 else 4),
        ),
        base.at("optimizer", own, 0, 4 * max(g.part for g in groups)),
    ]


def _backward(at: Layout, letter: str) -> float:
    """One layer's backward pass: temporaries, gradients of its weights, what is made once more.

    A layer in tiles also has the input and its gradient; and gradients of its weights are sums in
    fp32, and besides the share of one tile.
    """
    one = at.at_a_time(letter)
    tiled = one is not at
    weights = sum(p.numel() for p in layer_parameters(at.cfg, letter, at.ep).values())
    again = _saved(one, letter) + 2 * tiled * _stream(at) - saved(at, letter)
    return (
        _TEMPORARIES[at.cpu][letter] * _saved(one, letter)
        + (8 if tiled else at.width) * weights
        + again
    )


def peak(at: Layout) -> Memory:
    """The moment with most memory on the device; on CPU the checkpoint's copy lies there too."""
    return max(moments(at), key=lambda m: m.device)


class SequenceMemory(NamedTuple):
    """Bytes that generating holds of one text between tokens: of Mamba-2 layers, however long it
    is, and of keys and values per token."""

    fixed: int
    token: int

    def at(self, tokens: int) -> int:
        """Of a text of so many tokens, the prompt included."""
        return self.fixed + self.token * tokens


def sequence_memory(
    cfg: ModelConfig, width: int, *, state: int = 4, cached: int | None = None, drafts: bool = False
) -> SequenceMemory:
    """Of a model whose weights have ``width`` bytes. ``state``: bytes of a number of Mamba states;
    ``cached``: of keys and values, None: ``width``; ``drafts``: the MTP block keeps some, too."""
    conv = width * (cfg.conv_kernel - 1) * cfg.conv_channels
    layer = conv + state * cfg.mamba_inner_size * cfg.ssm_state_size
    heads = cfg.pattern.count("*") + drafts * cfg.mtp_pattern.count("*")
    pair = 2 * (cached or width) * cfg.num_key_value_heads * cfg.head_dim
    return SequenceMemory(cfg.pattern.count("M") * layer, heads * pair)
