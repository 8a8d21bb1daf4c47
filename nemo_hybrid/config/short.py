"""Options of steps on short rows."""

from __future__ import annotations

from dataclasses import field
from typing import Annotated, ClassVar

from pydantic import Field
from pydantic.dataclasses import dataclass

from nemo_hybrid.config.base import CHECKED, NotNegativeInt, Options, refuse


@dataclass(config=CHECKED)
class ShortOptions(Options):
    """Steps on short rows between those on rows of data.sequence_length."""

    section: ClassVar[str] = "data.short."

    sequence_length: NotNegativeInt = 0
    """Tokens per short row; 0: all steps are on rows of data.sequence_length."""
    share: Annotated[float, Field(ge=0.001, le=0.999)] = 0.5
    """Share of the steps, which are spread evenly. Each has as many tokens as the others."""
    path: str | None = None
    """Token store of the short rows."""
    blend: dict[str, float] = field(default_factory=dict)
    """Several stores and their weights, instead of path."""

    def rows(self, rows: int, length: int, cp: int) -> int:
        """Short rows of a micro-batch: as many tokens as parts of so many long ones have."""
        return rows * (length // (cp * self.sequence_length))

    def validate(self, length: int, cp: int) -> None:
        """Raise UserError where they do not fit rows of ``length`` tokens over ``cp`` processes."""
        if not self.sequence_length:
            refuse((self.changed(), "data.short has no effect without data.short.sequence_length"))
            return
        refuse(
            (
                bool(self.path) == bool(self.blend),
                "give data.short.path or data.short.blend: the stores of the short rows",
            ),
            (
                self.sequence_length >= length or length % (cp * self.sequence_length),
                f"data.sequence_length ({length}) must be a multiple of "
                f"{f'parallel.cp ({cp}) x ' if cp > 1 else ''}data.short.sequence_length "
                f"({self.sequence_length}), so that short steps hold the same tokens",
            ),
        )
