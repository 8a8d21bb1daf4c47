"""Exported weights read back: by us, and by whichever other library is installed.

A module is the name of a weight on disk without ``.weight``; weights are [out, in].
"""

from __future__ import annotations

import os
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from importlib import import_module
from importlib.metadata import version
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor

from nemo_hybrid.checkpoint.names import from_hub
from nemo_hybrid.checkpoint.weights import Stored
from nemo_hybrid.export import assign
from nemo_hybrid.export.declared import Format
from nemo_hybrid.export.schema import Schema
from nemo_hybrid.files import naming
from nemo_kernels.lowp.reference import Quantized, dequantize

KV_SCALES = (".k_scale", ".v_scale")
# At most 1/3 comes of rounding scales to the nearest: the smallest one, for one 1.5 times as large.
_CLIPPED = 0.4
_ROWS = 4096
Parts = Mapping[str, Tensor]
"""A module's tensors by the last part of their names."""
Decoder = Callable[[Parts, Format], Tensor]
"""To fp32 [out, in]."""


class Opened:
    """The weight files of a directory that its schema describes, read by the reference library; a
    context manager."""

    def __init__(self, schema: Schema, stored: Stored) -> None:
        self.schema = schema
        self._directory = stored.directory
        self._stack = ExitStack()
        self._files: dict[str, Any] = {}
        self._file_of = {n: file for file, header in stored.headers.items() for n in header.entries}

    def __enter__(self) -> Opened:
        return self

    def __exit__(self, *error: object) -> None:
        self._stack.close()

    @property
    def names(self) -> set[str]:
        """Of all tensors."""
        return set(self._file_of)

    def read(self, name: str) -> Tensor:
        """A tensor as it is stored."""
        file = self._file_of[name]
        if file not in self._files:
            path = self._directory / file
            with naming("read", path):
                self._files[file] = self._stack.enter_context(safe_open(path, "pt"))
        tensor: Tensor = self._files[file].get_tensor(name)
        return tensor

    def parts(self, module: str) -> Parts:
        """The tensors of a quantized module."""
        return {part: self.read(f"{module}.{part}") for part in self.schema.parts(module)}


def decode(parts: Parts, format: Format) -> Tensor:
    """A quantized weight in fp32."""
    if format == "fp8":
        return parts["weight"].float() * parts["weight_scale"]
    packed = parts.get("weight_packed")
    if packed is None:
        return dequantize(
            Quantized(parts["weight"], parts["weight_scale"], parts["weight_scale_2"])
        )
    tensor_scale = 1 / parts["weight_global_scale"].view(())
    return dequantize(Quantized(packed, parts["weight_scale"], tensor_scale))


def misrounded(parts: Parts, format: Format, weight: Tensor, source: Tensor) -> Tensor:
    """Where a decoded weight is not the source, rounded by the stored scales: bool [out, in].

    Rounding errs by half a step at most, and clipping by the excess. Blocks that lose more than
    _CLIPPED of their size by clipping are wrong as a whole, unless the smallest scale covers them.
    """
    if len(source) > _ROWS:  # so that little memory is needed
        found = []
        for start in range(0, len(source), _ROWS):
            rows = slice(start, start + _ROWS)
            few = {name: t[rows] if t.dim() > 1 else t for name, t in parts.items()}
            found.append(misrounded(few, format, weight[rows], source[rows]))
        return torch.cat(found)
    size, error = source.abs(), (weight - source).abs()
    slack = size / 256  # half a step of bf16, to which some round first
    if format == "fp8":
        step = parts["weight_scale"]
        octave = torch.frexp((size / step).clamp_min(2.0**-6)).exponent
        return ~(error <= step * torch.exp2(octave - 5.0) + slack)
    second = parts.get("weight_scale_2")
    tensor_scale = 1 / parts["weight_global_scale"].view(()) if second is None else second
    scale = (parts["weight_scale"].float() * tensor_scale).repeat_interleave(16, 1)
    octave = torch.frexp((size / scale).nan_to_num(0.0).clamp(1, 4)).exponent
    bound = torch.maximum(scale * torch.exp2(octave - 3.0), size - 6 * scale)
    most = 6 * scale.clamp_min(2.0**-9 * tensor_scale) * (1 + 1 / 64)
    blocks = (len(source), -1, 16)
    lost = error.view(blocks).norm(dim=-1) > _CLIPPED * source.view(blocks).norm(dim=-1)
    clipped = lost & (size > most).view(blocks).any(-1)
    return ~(error <= bound + slack) | clipped.repeat_interleave(16, 1)


@dataclass(frozen=True)
class Scales:
    """Formats, and largest magnitudes that scales cover, by our name without ``.weight``: of
    inputs, for all experts of a layer together; and of keys and values."""

    formats: Mapping[str, assign.Format]
    amax: Mapping[str, Tensor]
    kv: Mapping[str, float] = field(default_factory=dict)


def read_scales(opened: Opened) -> Scales:
    """Scales are magnitudes over 448 in FP8, which keys and values are in, too, over 2688 in NVFP4;
    compressed-tensors has the reciprocals."""
    formats: dict[str, assign.Format] = {}
    amax: dict[str, Tensor] = {}
    for module, format in opened.schema.formats.items():
        for part in opened.schema.parts(module):
            if part.startswith("input_"):
                scale = opened.read(f"{module}.{part}").view(())
                place = from_hub(f"{module}.weight")[0].removesuffix(".weight")
                formats[place] = format
                largest = 448.0 if format == "fp8" else 2688.0
                amax[place] = largest * (1 / scale if "global" in part else scale)
    caches = (name for name in opened.names if name.endswith(KV_SCALES))
    kv = {name.rpartition(".")[0]: 448.0 * float(opened.read(name)) for name in caches}
    return Scales(formats, amax, kv)


def other_decoder() -> tuple[str, Decoder] | None:
    """Name and version of another library that decodes the formats, and how; None: there is none.

    Either library takes seconds to import.
    """
    for package, decoder in (
        ("compressed-tensors", _compressed_tensors),
        ("nvidia-modelopt", _modelopt),
    ):
        try:
            with _quiet():
                return f"{package} {version(package)}", decoder()
        except (ImportError, RuntimeError, OSError):
            continue
    return None


def _compressed_tensors() -> Decoder:
    helpers = import_module("compressed_tensors.compressors.nvfp4.helpers")
    theirs = import_module("compressed_tensors.quantization.lifecycle.forward").dequantize
    args = import_module("compressed_tensors.quantization").QuantizationArgs
    fp8 = args(num_bits=8, type="float", strategy="tensor")
    fp4 = args(num_bits=4, type="float", strategy="tensor_group", group_size=16)

    def decoder(parts: Parts, format: Format) -> Tensor:
        if format == "fp8":
            scale = parts["weight_scale"].view(1)
            return theirs(parts["weight"].float(), scale, args=fp8, dtype=torch.float32)
        packed = parts["weight_packed" if "weight_packed" in parts else "weight"]
        divisor = parts.get("weight_global_scale")
        if divisor is None:
            divisor = 1 / parts["weight_scale_2"].view(1)
        values = helpers.unpack_fp4_from_uint8(
            packed, len(packed), 2 * packed.shape[1], torch.float32
        )
        scale = parts["weight_scale"].float()
        return theirs(values, scale, args=fp4, dtype=torch.float32, global_scale=divisor)

    return decoder


def _modelopt() -> Decoder:
    theirs = import_module("modelopt.torch.quantization.qtensor")

    def decoder(parts: Parts, format: Format) -> Tensor:
        packed = parts["weight_packed" if "weight_packed" in parts else "weight"]
        if format == "fp8":
            tensor = theirs.FP8QTensor(packed.shape, torch.float32, packed)
            return tensor.dequantize(torch.float32, scale=parts["weight_scale"], block_sizes=None)
        factor = parts.get("weight_scale_2")
        if factor is None:
            factor = 1 / parts["weight_global_scale"].view(())
        shape = (len(packed), 2 * packed.shape[1])
        return theirs.NVFP4QTensor(shape, torch.float32, packed).dequantize(
            torch.float32, scale=parts["weight_scale"], double_scale=factor, block_sizes={-1: 16}
        )

    return decoder


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what libraries print on import, whichever way they do."""
    sys.stdout.flush()
    kept = {descriptor: os.dup(descriptor) for descriptor in (1, 2)}
    nowhere = os.open(os.devnull, os.O_WRONLY)
    try:
        for descriptor in kept:
            os.dup2(nowhere, descriptor)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for descriptor, copy in kept.items():
            os.dup2(copy, descriptor)
            os.close(copy)
        os.close(nowhere)
