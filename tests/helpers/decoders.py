"""Other libraries' decoders of stored weights; a test without the library is skipped."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib import import_module

import pytest
import torch
from torch import Tensor

Parts = Mapping[str, Tensor]
Decoder = Callable[[Parts], Tensor]
"""A module's tensors, by the last part of their names, to fp32 [out, in]."""


def decoder(library: str) -> Decoder:
    pytest.importorskip(library, reason=f"{library} is not installed; the dev extra has it")
    return {"compressed_tensors": _compressed_tensors, "modelopt": _modelopt}[library]()


def _compressed_tensors() -> Decoder:
    helpers = import_module("compressed_tensors.compressors.nvfp4.helpers")
    theirs = import_module("compressed_tensors.quantization.lifecycle.forward").dequantize
    args = import_module("compressed_tensors.quantization").QuantizationArgs
    fp8 = args(num_bits=8, type="float", strategy="tensor")
    fp4 = args(num_bits=4, type="float", strategy="tensor_group", group_size=16)

    def decode(parts: Parts) -> Tensor:
        if "weight" in parts and parts["weight"].dtype == torch.float8_e4m3fn:
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

    return decode


def _modelopt() -> Decoder:
    theirs = import_module("modelopt.torch.quantization.qtensor")

    def decode(parts: Parts) -> Tensor:
        packed = parts["weight_packed" if "weight_packed" in parts else "weight"]
        if "weight" in parts and parts["weight"].dtype == torch.float8_e4m3fn:
            tensor = theirs.FP8QTensor(packed.shape, torch.float32, packed)
            return tensor.dequantize(torch.float32, scale=parts["weight_scale"], block_sizes=None)
        factor = parts.get("weight_scale_2")
        if factor is None:
            factor = 1 / parts["weight_global_scale"].view(())
        shape = (len(packed), 2 * packed.shape[1])
        return theirs.NVFP4QTensor(shape, torch.float32, packed).dequantize(
            torch.float32, scale=parts["weight_scale"], double_scale=factor, block_sizes={-1: 16}
        )

    return decode
