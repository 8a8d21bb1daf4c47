"""What a model remembers of the texts that it reads, one text in each row.

Texts are read in pieces, of other lengths in every row, and nothing that is read counts before
``commit``: until then Mamba states stay what they were, and keys and values stand behind a row's
length, where they are scratch. So tokens are taken back by not committing, and by reading those
that are to stay once more, or by `HybridLM.revise`.

Every tensor has the rows as its first dimension and is written in place, so that addresses stay
until ``reserve`` has to make room; lengths stay on the device, so that nothing waits for it.

Shapes: B rows, T tokens that there is room for, S tokens read at once, R real ones among B*S, G
key/value heads, P head dim, C conv channels, J = conv kernel - 1, H Mamba heads, N state.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_kernels.lowp.rounding import fp16_stochastically, fp16_to_nearest, random_words

_MORE, _SHARE = 64, 32
"""Room grows by so many tokens at least, and by one part in so many of what there is. Attention
looks at all of it for every token, so that a copy after so many of them costs little."""


class LayerCache(Protocol):
    """What one layer remembers, in attributes that are tensors with the rows first."""

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens in every row."""

    def commit(self, state: Any) -> None:
        """Remember ``state``, which reading gave, in place of what was."""


class ByPosition:
    """Remembers tensors [B, T, ..] by position; what stands behind a row's length is scratch."""

    def reserve(self, tokens: int) -> None:
        for name, held_BT in vars(self).items():
            room = held_BT.shape[1]
            if tokens > room:
                more = max(tokens - room, _MORE, room // _SHARE)
                each = (0, 0) * (held_BT.dim() - 2)
                setattr(self, name, F.pad(held_BT, (*each, 0, more)))

    def commit(self, state: None) -> None:
        """Nothing: what counts of it, a row's length says."""


@dataclass
class AttentionCache(ByPosition):
    """Keys and values."""

    k_BTGP: Tensor
    v_BTGP: Tensor

    def write(self, k_BSGP: Tensor, v_BSGP: Tensor, before_B: Tensor) -> None:
        """Put those of S tokens behind the first ``before_B`` of each row."""
        places = _places(k_BSGP, before_B)
        self.k_BTGP[places] = k_BSGP
        self.v_BTGP[places] = v_BSGP


@dataclass
class ExpertsCache(ByPosition):
    """Experts that tokens went to: int16 [B, T, K]."""

    ids_BTK: Tensor

    def write(self, ids_BSK: Tensor, before_B: Tensor) -> None:
        self.ids_BTK[_places(ids_BSK, before_B)] = ids_BSK.to(self.ids_BTK.dtype)


def _places(new_BS: Tensor, before_B: Tensor) -> tuple[Tensor, Tensor]:
    """Where S tokens stand behind the first ``before_B`` of each row."""
    row_B1 = torch.arange(len(before_B), device=before_B.device)[:, None]
    return row_B1, before_B[:, None] + torch.arange(new_BS.shape[1], device=before_B.device)


class MambaState(NamedTuple):
    """What a `MambaCache` is to hold; ``inputs``: of the convolution and the scan [B, S, C], and
    time steps [B, S, H], if that may be revised."""

    conv_BCJ: Tensor
    ssm_BHPN: Tensor
    inputs: tuple[Tensor, Tensor, Tensor] | None


@dataclass
class MambaCache:
    """The last inputs of the convolution, and the state of the scan, in fp32."""

    conv_BCJ: Tensor
    ssm_BHPN: Tensor

    def reserve(self, tokens: int) -> None:
        """Nothing: a state has one size."""

    def commit(self, state: MambaState) -> None:
        self.conv_BCJ.copy_(state.conv_BCJ)
        self.ssm_BHPN.copy_(state.ssm_BHPN)

    def state(self) -> Tensor:
        """What is calculated with, and may be changed if it is given to `store` then."""
        return self.ssm_BHPN

    def store(self, ssm_BHPN: Tensor, before_B: Tensor) -> None:
        """Remember the state after one token more than ``before_B``: here it is there already."""

    def stored(self, ssm_BHPN: Tensor, read_B: Tensor) -> Tensor:
        """A state after so many tokens of each row as `commit` wants it."""
        return ssm_BHPN


@dataclass
class Fp16MambaCache(MambaCache):
    """Has the state of the scan in fp16; it is calculated with in fp32, and rounded when it is
    stored. ``keys_BR``, int64: what a row's random bits come from in this layer, R = 1; or R = 0:
    rounded to the nearest."""

    keys_BR: Tensor

    def state(self) -> Tensor:
        return self.ssm_BHPN.to(torch.promote_types(self.conv_BCJ.dtype, torch.float32))

    def store(self, ssm_BHPN: Tensor, before_B: Tensor) -> None:
        self.ssm_BHPN.copy_(self.stored(ssm_BHPN, before_B + 1))

    def stored(self, ssm_BHPN: Tensor, read_B: Tensor) -> Tensor:
        return _in_fp16(ssm_BHPN, read_B, self.keys_BR)


def _in_fp16(ssm_BHPN: Tensor, read_B: Tensor, keys_BR: Tensor) -> Tensor:
    """Rounded with random bits that are a function of key, number of tokens read, and place."""
    ssm_BHPN = ssm_BHPN.float()
    if not keys_BR.shape[1]:
        return fp16_to_nearest(ssm_BHPN)
    size = math.prod(ssm_BHPN.shape[1:])
    words = torch.arange(-(-size // 4), device=keys_BR.device)
    bits = random_words(words, random_words(read_B[:, None], keys_BR)).view(torch.int16)
    return fp16_stochastically(ssm_BHPN, bits[:, :size].contiguous())


@dataclass
class Caches:
    """Of a stack of layers: ``lengths_B`` (int64) tokens of each row count as read. ``mtp``: the
    cache of the MTP block, which has lengths of its own."""

    lengths_B: Tensor
    layers: list[LayerCache | None]
    mtp: Caches | None = None

    def reserve(self, tokens: int) -> None:
        """Make room for so many tokens in every row, padding that is read included. Where there is
        less, there is then some more than that, so that this is seldom; tensors are then others.

        Attention looks at all the room there is."""
        for cache in [*self.layers, *(self.mtp.layers if self.mtp else ())]:
            if cache is not None:
                cache.reserve(tokens)


StateFormat = Literal["float32", "nearest", "stochastic"]
"""How Mamba states are kept: in fp32, or in fp16, rounded in one of these ways."""


def keep_states(caches: Caches, format: StateFormat) -> None:
    """Have Mamba states that nothing was read into be kept so; stochastically, by random numbers of
    a text that `draw_from` names. (In fp32 they are kept anyway.)"""
    if format == "float32":
        return
    rows = len(caches.lengths_B)
    for number, cache in enumerate(caches.layers):
        if isinstance(cache, MambaCache):
            keys_BR = caches.lengths_B.new_zeros(rows, int(format == "stochastic"))
            half_BHPN = cache.ssm_BHPN.half()
            caches.layers[number] = Fp16MambaCache(cache.conv_BCJ, half_BHPN, keys_BR)


def keep_experts(caches: Caches, moe_layers: Sequence[int], top_k: int, tokens: int) -> None:
    """Have these layers remember the experts that tokens went to, with room for so many."""
    lengths_B = caches.lengths_B
    for number in moe_layers:
        ids_BTK = lengths_B.new_zeros(len(lengths_B), tokens, top_k, dtype=torch.int16)
        caches.layers[number] = ExpertsCache(ids_BTK)


def experts_of(caches: Caches, row: int, tokens: int) -> Tensor:
    """Those that the first tokens of a row went to, int16 [tokens, MoE layers, K] on the CPU."""
    kept = [cache.ids_BTK for cache in caches.layers if isinstance(cache, ExpertsCache)]
    return torch.stack([ids_BTK[row, :tokens] for ids_BTK in kept], 1).cpu()


def draw_from(caches: Caches, streams_N: Tensor, to_N: Tensor) -> None:
    """Have the rounding of rows use the random numbers of these streams (see
    `generation.sampling`), of which it takes words in front of the first: one per layer."""
    for number, cache in enumerate(caches.layers):
        if isinstance(cache, Fp16MambaCache) and cache.keys_BR.shape[1]:
            word_N = torch.full_like(streams_N, -2 - number)
            cache.keys_BR[to_N, 0] = random_words(word_N, streams_N)


@dataclass(frozen=True)
class Reading:
    """What is being read; made once for all layers."""

    before_B: Tensor  # tokens of each row that were read before
    counts_B: Tensor  # tokens of the row's S that are real: the first ones
    real_BS: Tensor  # bool: which these are
    revisable: bool = False  # whether states are to keep what `revise` of a mixer needs
    whole: bool = False  # whether all are real

    @cached_property
    def real_R(self) -> Tensor | slice:
        """Places of real tokens among B*S. Their number decides how many the experts see; so this
        waits for a GPU, once, unless all are real."""
        return slice(None) if self.whole else self.real_BS.flatten().nonzero()[:, 0]


def reading(
    counts_B: Tensor | None, tokens: int, caches: Caches, revisable: bool = False
) -> Reading:
    """``counts_B``: None: all tokens of every row."""
    real_B = torch.full_like(caches.lengths_B, tokens) if counts_B is None else counts_B
    real_BS = torch.arange(tokens, device=real_B.device) < real_B[:, None]
    return Reading(caches.lengths_B, real_B, real_BS, revisable, whole=counts_B is None)


class After(NamedTuple):
    """What `commit` makes count: tokens per row, of so many that were read, and states after
    them."""

    counts_B: Tensor
    tokens: int
    states: list[Any]


def commit(caches: Caches, after: After) -> None:
    """Have tokens count that were read; ``after`` is of the last reading with these caches."""
    caches.lengths_B += after.counts_B
    for cache, state in zip(caches.layers, after.states, strict=True):
        if cache is not None:
            cache.commit(state)


def copy_rows(source: Caches, from_N: Tensor, target: Caches, to_N: Tensor) -> None:
    """Have rows of ``target``, which has room for them, remember what rows of ``source`` do. States
    of fp32 may become such of fp16."""
    target.lengths_B[to_N] = source.lengths_B[from_N]
    for theirs, ours in zip(source.layers, target.layers, strict=True):
        for name, held in vars(theirs).items() if theirs else ():
            place = getattr(ours, name)
            both = min(held.shape[1], place.shape[1])  # of room; elsewhere they are the same
            rows = held[from_N, :both]
            if isinstance(ours, Fp16MambaCache) and rows.dtype != place.dtype:
                rows = _in_fp16(rows, source.lengths_B[from_N], ours.keys_BR[to_N])
            place[to_N, :both] = rows
    if source.mtp and target.mtp:
        copy_rows(source.mtp, from_N, target.mtp, to_N)
