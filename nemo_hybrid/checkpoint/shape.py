"""The shape of a run's model."""

from __future__ import annotations

from dataclasses import fields

from nemo_hybrid.checkpoint.files import resolve
from nemo_hybrid.config import Architecture, HybridConfig, ModelOptions
from nemo_hybrid.errors import UserError


def model_shape(options: ModelOptions) -> HybridConfig:
    """The shape that model.from_hf holds, or without it the one that the options give.

    Raises UserError where from_hf cannot be read, and for options that were given (they are not
    the defaults) and say something else than it.
    """
    if not options.from_hf:
        return options.hybrid()
    shape, default = HybridConfig.from_hf(str(resolve(options.from_hf))), Architecture()
    contrary = []
    for f in fields(Architecture):
        given, there = getattr(options, f.name), getattr(shape, f.name)
        if given not in (there, getattr(default, f.name)):
            contrary.append(f"model.{f.name} is {given!r} here, {there!r} there")
    if contrary:
        raise UserError(
            f"model.from_hf gives the shape of the model, but {'; '.join(contrary)}: leave such "
            "options out"
        )
    return shape
