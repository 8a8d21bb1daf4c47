"""Where kernel tests run: on the GPU if there is one, else in Triton's interpreter, repaired.

Every test module that runs a Triton kernel takes its device from here: ``DEVICE``. Importing this
repairs four faults of the interpreter (seen in Triton 3.6 to 3.9): it truncates fp32 to bf16 and
rounds it to fp8 in its own way, it multiplies the bits of bf16 operands in ``tl.dot``, it lacks
``tl.dot_scaled`` or takes E4M3 scales for powers of two, and it passes over arguments that a kernel
does not have, which the compiler refuses.
Arithmetic on bf16 values stays wrong, which is why kernels compute in fp32 only.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import numpy as np
import torch
import triton.language as tl
from triton.runtime import interpreter
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# Triton 3.6 aborts where it is to compile ``tl.dot_scaled`` with E4M3 scales for sm_90.
MULTIPLIES_FP4 = DEVICE == "cpu" or torch.cuda.get_device_capability()[0] == 10

DTYPES = {
    tl.float64: torch.float64,
    tl.float32: torch.float32,
    tl.float16: torch.float16,
    tl.bfloat16: torch.bfloat16,
    tl.float8e4nv: torch.float8_e4m3fn,
    tl.float8e5: torch.float8_e5m2,
}
NARROW = {tl.bfloat16, tl.float8e4nv, tl.float8e5}  # stored as integers by the interpreter

stock_convert_float = interpreter._convert_float
stock_create_dot = InterpreterBuilder.create_dot
stock_launch = interpreter.GridExecutor.__call__
stock_create_dot_scaled = getattr(InterpreterBuilder, "create_dot_scaled", None)


def convert_float(data, source, target, rounding_mode):
    """Bits of ``data`` rounded from one format to another as GPUs do: to nearest, ties to even, and
    fp8 saturated at its largest finite value."""
    towards_zero = rounding_mode == interpreter._ir.ROUNDING_MODE.RTZ
    if towards_zero or not {source, target} <= set(DTYPES):
        return stock_convert_float(data, source, target, rounding_mode)
    bits = torch.from_numpy(np.array(data).view(f"int{source.primitive_bitwidth}"))
    values = bits.view(DTYPES[source])
    if target.primitive_bitwidth == 8:
        largest = torch.finfo(DTYPES[target]).max
        values = values.float().clamp(-largest, largest)
    if DTYPES[target] != values.dtype:
        values = values.to(DTYPES[target])
    rounded = values.view(getattr(torch, f"int{target.primitive_bitwidth}")).numpy()
    return rounded.view(f"uint{target.primitive_bitwidth}").reshape(data.shape)


def create_dot(self, a, b, d, input_precision, max_num_imprecise_acc):
    """``tl.dot`` on exact fp32 copies of bf16 and fp8 operands, accumulated in fp32."""
    a, b = (
        TensorHandle(convert_float(t.data, t.dtype, tl.float32, None).view(np.float32), tl.float32)
        if t.dtype in NARROW
        else t
        for t in (a, b)
    )
    return stock_create_dot(self, a, b, d, input_precision, max_num_imprecise_acc)


def create_dot_scaled(
    self, a, a_scale, a_format, b, b_scale, b_format, fast_math, a_packs_k, b_packs_k, d
):
    """``tl.dot_scaled`` of E2M1 codes, packed along K, with E4M3 scales, accumulated in fp32."""
    e2m1 = interpreter._ir.ScaleDotElemTypeTY.E2M1
    if not (a_format == b_format == e2m1 and a_packs_k and b_packs_k):
        raise NotImplementedError("tl.dot_scaled of other operands than packed E2M1")
    product = e2m1_values(a.data, a_scale) @ e2m1_values(b.data.T, b_scale).T
    return TensorHandle(product + d.data, tl.float32)


def e2m1_values(bytes_MK, scale):
    """fp32 [M, K]: two codes in each byte of [M, K/2], the first in the low nibble, times the E4M3
    scales of equally long groups along K."""
    assert scale.dtype == tl.float8e4nv, scale.dtype
    codes = np.stack((bytes_MK & 15, bytes_MK >> 4), axis=-1)
    values = np.float32([0, 0.5, 1, 1.5, 2, 3, 4, 6])[codes & 7] * np.where(codes > 7, -1, 1)
    scales = convert_float(scale.data, scale.dtype, tl.float32, None).view(np.float32)
    grouped = values.reshape(*scales.shape, -1).astype(np.float32) * scales[..., None]
    return grouped.reshape(len(bytes_MK), -1)


def launch(self, *args, **kwargs):
    unknown = kwargs.keys() - {*self.arg_names, "num_warps", "num_stages", "warmup"}
    if unknown:
        raise KeyError(f"Keyword argument {min(unknown)} was specified but unrecognised")
    return stock_launch(self, *args, **kwargs)


interpreter.GridExecutor.__call__ = launch
interpreter._convert_float = convert_float
InterpreterBuilder.create_dot = create_dot
InterpreterBuilder.create_dot_scaled = create_dot_scaled


GUARD = 64  # elements, so that the tensor between two guards stays aligned
SENTINEL = -99_991  # in integers, where there is no NaN; its last byte in bytes


def sentinel(dtype: torch.dtype) -> int:
    return SENTINEL & 0xFF if dtype == torch.uint8 else SENTINEL


@contextmanager
def guarded_memory() -> Iterator[None]:
    """Here ``torch.empty``, ``empty_like`` and ``new_empty`` give NaN (integers: SENTINEL) between
    guards, so that what a kernel leaves unwritten is seen; writing into a guard fails at the end.
    """
    real_empty, buffers = torch.empty, []

    def empty(*size, dtype=torch.float32, device="cpu"):
        shape = torch.Size(size[0] if len(size) == 1 and not isinstance(size[0], int) else size)
        buffer = real_empty(shape.numel() + 2 * GUARD, dtype=dtype, device=device)
        buffer.fill_(float("nan") if dtype.is_floating_point else sentinel(dtype))
        buffers.append(buffer)
        return buffer[GUARD : GUARD + shape.numel()].view(shape)

    def empty_like(x, dtype=None):
        return empty(x.shape, dtype=dtype or x.dtype, device=x.device)

    def new_empty(x, *size, dtype=None, device=None):
        return empty(*size, dtype=dtype or x.dtype, device=device or x.device)

    with ExitStack() as stack:
        stack.enter_context(mock.patch.object(torch, "empty", empty))
        stack.enter_context(mock.patch.object(torch, "empty_like", empty_like))
        stack.enter_context(mock.patch.object(torch.Tensor, "new_empty", new_empty))
        yield
    for buffer in buffers:
        for guard in (buffer[:GUARD], buffer[-GUARD:]):
            whole = (
                guard.isnan() if buffer.dtype.is_floating_point else guard == sentinel(buffer.dtype)
            )
            assert whole.all(), f"written beyond a tensor of {buffer.numel() - 2 * GUARD} elements"
