"""How mamba-ssm and causal-conv1d are called: with stand-ins of the signatures that were released
(mamba-ssm 2.3.2.post1, causal-conv1d 1.6.1) and compute by definition.

The libraries themselves need a GPU; there a self-check compares them with the reference.
"""

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from types import ModuleType
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from nemo_kernels import backend
from nemo_kernels.conv1d import reference as convolution
from nemo_kernels.documents import Documents
from nemo_kernels.ssd import reference as scan

NUMBERS_BS = torch.tensor([[0, 0, 0, 1, 1], [0, 1, 1, 1, 2]])
DOCUMENTS = Documents.from_numbers(NUMBERS_BS)


def released(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None,
    cu_seqlens=None, dt_softplus=False, dt_limit=(0.0, float("inf")), return_final_states=False,
    return_varlen_states=False,
) -> Any:  # fmt: skip
    """mamba_chunk_scan_combined, a token at a time."""
    assert z is dt_bias is cu_seqlens is None
    assert not dt_softplus
    per_group = x.shape[2] // B.shape[2]
    B, C = (t.float().repeat_interleave(per_group, 2) for t in (B, C))
    state = x.new_zeros(*x.shape[:1], *x.shape[2:], B.shape[3], dtype=torch.float32)
    state = state if initial_states is None else initial_states
    outputs = []
    for i in range(x.shape[1]):
        if seq_idx is not None and i:
            assert seq_idx.dtype == torch.int32
            state = state * (seq_idx[:, i] == seq_idx[:, i - 1])[:, None, None, None]
        x_i, dt_i = x[:, i].float(), dt[:, i, :, None, None]
        state = torch.exp(dt_i * A[:, None, None]) * state
        state = state + dt_i * x_i[..., None] * B[:, i, :, None]
        outputs.append((state * C[:, i, :, None]).sum(-1) + D[:, None] * x_i)
    y = torch.stack(outputs, 1).to(x.dtype)
    return (y, state) if return_final_states else y


def later(*given: Any, state_dtype: torch.dtype | None = None, **named: Any) -> Any:
    """As on the library's main branch."""
    assert state_dtype == torch.float32
    return released(*given, **named)


def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
    final_states_out=None, activation=None,
) -> Tensor:  # fmt: skip
    """[B,C,S], channels last in memory; documents one by one."""
    assert activation == "silu"
    assert x.stride(1) == 1
    assert x.stride(0) % 8 == x.stride(2) % 8 == x.shape[1] % 8 == 0
    assert seq_idx is None or (seq_idx.is_contiguous() and seq_idx.dtype == torch.int32)
    k = weight.shape[1]
    y = torch.zeros_like(x)
    numbers = torch.zeros_like(x[:, 0]) if seq_idx is None else seq_idx
    for number in numbers.unique():
        here = (numbers == number)[:, None]
        z = F.conv1d(F.pad(x * here, (k - 1, 0)), weight[:, None], bias, groups=len(weight))
        y = y + F.silu(z) * here
    return y


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., Any]]:
    """The path's module, made with a library that has this function."""
    made: list[str] = []

    def install(path: str, library: str, **functions: Any) -> Any:
        names = [".".join(library.split(".")[: n + 1]) for n in range(library.count(".") + 1)]
        for name in names:
            monkeypatch.setitem(sys.modules, name, ModuleType(name))
        vars(sys.modules[library]).update(functions)
        monkeypatch.delitem(sys.modules, path, raising=False)
        made.append(path)
        return import_module(path)

    yield install
    for path in made:
        sys.modules.pop(path, None)


def mamba(stand_in: Callable[..., Any], function: Any = released) -> Any:
    library = "mamba_ssm.ops.triton.ssd_combined"
    return stand_in("nemo_kernels.ssd.external", library, mamba_chunk_scan_combined=function)


@pytest.mark.parametrize("function", [released, later])
def test_the_scan_is_called_as_released_and_as_on_main(
    stand_in: Callable[..., Any], function: Any
) -> None:
    external = mamba(stand_in, function)
    generator = torch.Generator().manual_seed(0)
    x, B, C, initial = (
        torch.randn(s, generator=generator)
        for s in ((2, 5, 4, 3), (2, 5, 2, 6), (2, 5, 2, 6), (2, 4, 3, 6))
    )
    dt, A, D = torch.rand(2, 5, 4), -torch.rand(4), torch.rand(4)
    for documents, state in ((None, None), (DOCUMENTS, initial)):
        given = (x, dt, A, B, C, D, 16, documents, state)
        for ours, expected in zip(external.ssd_scan(*given), scan.ssd_scan(*given), strict=True):
            torch.testing.assert_close(ours, expected)
            assert ours.dtype == torch.float32


def test_self_checks_pass_and_notice_mistakes(
    stand_in: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    library = {"causal_conv1d_fn": causal_conv1d_fn}
    external = stand_in("nemo_kernels.conv1d.external", "causal_conv1d", **library)
    assert external.self_check("cpu", backend.Sizes(2, 8, 1, 8, tokens=96)) < backend.TOLERANCE
    without = lambda *given, **named: causal_conv1d_fn(*given[:3], **named)  # noqa: E731
    monkeypatch.setattr(external, "causal_conv1d_fn", without)
    assert external.self_check("cpu", backend.Sizes(2, 8, 1, 8, tokens=96)) > backend.TOLERANCE


def test_the_convolution_is_called_as_released(stand_in: Callable[..., Any]) -> None:
    library = {"causal_conv1d_fn": causal_conv1d_fn}
    external = stand_in("nemo_kernels.conv1d.external", "causal_conv1d", **library)
    x, weight, bias = torch.randn(2, 5, 20)[..., 3:11], torch.randn(8, 4), torch.randn(8)
    for documents in (None, DOCUMENTS):
        y = external.causal_conv1d(x, weight, bias, documents)
        torch.testing.assert_close(y, convolution.causal_conv1d(x, weight, bias, documents))


def test_what_the_libraries_do_not_reach_is_named(stand_in: Callable[..., Any]) -> None:
    """Offsets of mamba-ssm's kernels are signed, those of causal-conv1d's not."""

    def meta(*shape: int, dtype: torch.dtype = torch.bfloat16) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    external = mamba(stand_in)
    x, B = meta(4, 2**17, 64, 64), meta(4, 2**17, 8, 128)
    assert not external.refusal(x, B, 128)
    assert external.refusal(meta(5, 2**17, 64, 64), B, 128)
    assert external.refusal(x, B, 32)  # states of more chunks
    wide = meta(4, 2**17, 64, 96)[..., :64]  # as many elements, further apart
    assert external.refusal(wide, B, 128)
    assert external.refusal(x.double(), B, 128)
    assert "offsets below 2147483648, got torch.bfloat16 and 3" in external.refusal(wide, B, 128)

    library = {"causal_conv1d_fn": causal_conv1d_fn}
    external = stand_in("nemo_kernels.conv1d.external", "causal_conv1d", **library)
    x, weight = meta(4, 2**17, 2**13), meta(2**13, 4)
    assert not external.refusal(x, weight)
    assert external.refusal(meta(5, 2**17, 2**13), weight)
    for channels, taps in ((12, 4), (16, 5), (16, 1)):
        why = external.refusal(meta(1, 3, channels), meta(channels, taps))
        assert why.endswith(f"got torch.bfloat16, [1, 3, {channels}] and [{channels}, {taps}]")
