"""Options of `finetune`, beside and instead of those of `pretrain` (nemo_hybrid.config)."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Annotated, Literal

from nemo_hybrid.config import (
    POSITIVE,
    BelowOne,
    NotNegativeInt,
    PositiveInt,
    check_bounds,
)
from nemo_hybrid.errors import UserError


@dataclass
class SampleOptions:
    """How records become samples: token ids, and which of them are learnt."""

    sequence_length: PositiveInt = 2048
    """Tokens per training sequence, into which samples are packed; no sample may be longer."""
    chat_template: str | None = None
    """Jinja file to render conversations with, instead of the tokenizer's own; it is saved with
    the model."""
    reasoning: Literal["keep", "mask", "strip"] = "keep"
    """Reasoning of assistant turns: keep: learnt like the answer; mask: seen, not learnt; strip:
    left out."""
    strip_reasoning: BelowOne = 0.0
    """Share of the conversations that lose their reasoning: the model learns to answer without."""
    truncate_reasoning: BelowOne = 0.0
    """Share of the conversations whose reasoning is cut at a random place; the end of thinking that
    follows there is not learnt."""
    text_field: str = "text"
    """Field or column that holds the text of records that are plain text."""
    packed_mask: Literal["labels", "tokens"] = "labels"
    """What loss_mask of pre-tokenized packs speaks of: the label that a token predicts (as NVIDIA's
    packing tools write it), or the token itself."""
    truncate: bool = False
    """Cut samples that are longer than sequence_length, instead of refusing them."""
    heldout: BelowOne = 0.03
    """Share of the records that is held out for evaluation."""
    skip_bad: bool = False
    """Skip (and count) records that cannot be learnt from, instead of stopping."""

    def validate(self, section: str = "") -> None:
        """Raise UserError for options that contradict each other."""
        check_bounds(self, section)
        if self.strip_reasoning + self.truncate_reasoning > 1:
            raise UserError(
                f"{section}strip_reasoning and {section}truncate_reasoning exceed 1 together"
            )
        if self.reasoning == "strip" and (self.strip_reasoning or self.truncate_reasoning):
            raise UserError(
                f"{section}reasoning strip leaves nothing for {section}strip_reasoning and "
                f"{section}truncate_reasoning"
            )


@dataclass
class LoraOptions:
    """Low-rank adapters (arXiv 2106.09685) beside frozen weights."""

    rank: NotNegativeInt = 0
    """Rank of the adapters; 0: none, the weights themselves are trained."""
    alpha: Annotated[float | None, POSITIVE] = None
    """Adapters count alpha / rank times; null: twice the rank."""
    target_modules: list[str] | None = None
    """Linear layers with an adapter: names, their endings, or globs (q_proj, *.shared_experts.*);
    null: every linear layer of the backbone but the router. MTP layers only if named."""
    target_parameters: list[str] = field(default_factory=list)
    """Stacked expert weights with an adapter per expert, such as experts.up_proj."""

    @property
    def scale(self) -> float:
        return (2.0 * self.rank if self.alpha is None else self.alpha) / max(1, self.rank)
