"""A name that is kept for :mod:`nemo_kernels.lowp.reference`."""

from nemo_kernels.lowp.reference import quantize

__all__ = ["quantize"]
