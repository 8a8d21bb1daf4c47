"""Options of `rl`, beside and instead of those of `pretrain`."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field
from pydantic.dataclasses import dataclass

from nemo_hybrid.config.base import (
    CHECKED,
    BelowOne,
    NotNegativeFloat,
    Options,
    PositiveFloat,
    PositiveInt,
)


@dataclass(config=CHECKED)
class PolicyOptions(Options):
    """How rewards become a weight per token; the defaults are those of Nemotron 3 Ultra."""

    section: ClassVar[str] = "rl."

    std: Literal["others", "group", "none"] = "others"
    """What divides a reward's distance from the mean of the prompt's other rewards: the standard
    deviation of those others (where it is 0, of all), of all, or nothing."""
    advantage_clip: NotNegativeFloat = 20.0
    """Advantages lie between minus this and this; 0: anywhere."""
    importance: Literal["tis", "icepop", "none"] = "tis"
    """What becomes of the ratio of a token's probability in training to that at sampling: clamped
    to [importance_low, importance_high], 0 outside of it, or 1."""
    importance_low: NotNegativeFloat = 0.2
    """Least importance weight."""
    importance_high: PositiveFloat = 5.0
    """Largest importance weight."""
    sequence_filter: NotNegativeFloat = 2.0
    """Samples whose mean of exp|difference of log-probabilities| between sampling and training
    exceeds this leave the loss; 0: none does."""
    updates: PositiveInt = 1
    """Optimizer steps on the samples of one rollout. With one the policy ratio is 1, and clip has
    no effect."""
    clip: Literal["ppo", "cispo", "none"] = "ppo"
    """What is done with the policy ratio, new over old probability of a token: ppo: beyond its
    bounds, in the direction of its advantage, a token has no gradient; cispo: it is clamped to
    them and not differentiated."""
    clip_low: BelowOne = 0.2
    """The ratio's lower bound is 1 minus this."""
    clip_high: NotNegativeFloat = 0.28
    """The ratio's upper bound is 1 plus this."""
    ratio: Literal["token", "sequence"] = "token"
    """sequence: the geometric mean of a sample's ratios stands for each of its tokens (GSPO)."""
    kl: NotNegativeFloat = 0.0
    """Weight of the KL divergence from model.from_hf, estimated from the sampled tokens."""
    overlong: Literal["keep", "mask"] = "keep"
    """mask: samples that were cut off at rollout.response_tokens leave the loss."""
    average: Literal["tokens", "samples"] = "tokens"
    """What is averaged over the global batch: all tokens, or every sample's own mean."""
    max_mismatch: Annotated[float, Field(ge=1)] = 1.05
    """Mean of exp|difference of log-probabilities| between sampling and training that stops the
    run, if three steps in a row exceed it."""
