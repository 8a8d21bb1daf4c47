"""Triton's scan: against float64, its isolation of documents, its steps, what it refuses.

Shapes: B batch, S sequence, H heads, P head dim, G groups, N state.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import NamedTuple
from unittest import mock

import pytest
import torch
from torch import Tensor

from helpers.bands import SABOTAGE, band, jittered
from helpers.triton_env import DEVICE, guarded_memory
from nemo_kernels import backend
from nemo_kernels.documents import Documents
from nemo_kernels.launch import recorded
from nemo_kernels.ssd import chunk_kernel, kernel, passes, reference, ssd_scan

CHUNK = 16
BF16, FP32, FP64 = torch.bfloat16, torch.float32, torch.float64
NAMES = ("x", "dt", "A", "B", "C", "D", "initial")


class Case(NamedTuple):
    rows: int
    length: int
    heads: int
    groups: int
    head_dim: int
    state: int
    documents: tuple[int, ...] | None = None
    initial: bool = False


CASES = {
    "aligned": Case(1, 2 * CHUNK, 2, 2, 16, 16),
    "ragged": Case(2, 21, 2, 1, 3, 5, (1, CHUNK - 1, 5), True),
    "shorter than a chunk": Case(1, 3, 1, 1, 2, 3),
    "no rows": Case(0, 5, 2, 1, 2, 3, None, True),
}


def inputs(case: Case, dtype: torch.dtype = FP32) -> list[Tensor]:
    """x, B and C are slices of something wider, as the convolution gives them."""
    generator = torch.Generator().manual_seed(0)
    rows, length, heads, groups, head_dim, state = case[:6]
    widths = [heads * head_dim, groups * state, groups * state]
    parts = torch.randn(rows, length, sum(widths), generator=generator).to(dtype).split(widths, -1)
    x, B, C = (
        t.unflatten(-1, (n, -1)) for t, n in zip(parts, (heads, groups, groups), strict=True)
    )
    dt = torch.rand(rows, length, heads, generator=generator) + 0.01
    A, D = -torch.rand(heads, generator=generator) - 0.1, torch.randn(heads, generator=generator)
    initial = torch.randn(rows, heads, head_dim, state, generator=generator)
    tensors = [x, dt, A, B, C, D, *([initial] if case.initial else [])]
    return [t.to(DEVICE) for t in tensors]


def packed(lengths: tuple[int, ...] | None, rows: int = 2) -> Documents | None:
    """In the first row, and in others the other way round."""
    if lengths is None:
        return None
    first = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    return Documents.from_numbers(torch.stack([first, first.flip(0).neg()])[:rows]).to(DEVICE)


def run(scan, tensors: list[Tensor], documents: Documents | None) -> dict[str, Tensor]:
    """Outputs and gradients, of a loss in which every element counts differently."""
    leaves = [t.detach().clone().requires_grad_() for t in tensors]
    initial = leaves[6] if len(leaves) > 6 else None
    y, state = scan(*leaves[:6], CHUNK, documents, initial)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(t.shape, generator=generator).to(BF16).to(t) for t in (y, state)]
    torch.autograd.backward([y, state], weights)
    gradients = {n: leaf.grad for n, leaf in zip(NAMES, leaves, strict=False)}
    return {"y": y.detach(), "state": state.detach()} | gradients


def distances(ours: dict[str, Tensor], truth: dict[str, Tensor]) -> dict[str, float]:
    """Relative, in the norm."""
    return {
        name: float((ours[name].double() - t.double()).norm() / t.double().norm())
        if t.numel()
        else 0.0
        for name, t in truth.items()
    }


@contextmanager
def small_tiles() -> Iterator[None]:
    """Several of a chunk, and of a state."""
    with mock.patch.multiple(passes, _ROWS=8, _BLOCK=8):
        yield


def fp32_bands(tensors: list[Tensor], documents: Documents | None) -> dict[str, float]:
    """Twice what the reference, on a CPU, moves by when each of its operations rounds badly."""
    tensors, documents = [t.cpu() for t in tensors], documents and documents.to("cpu")
    exact = run(reference.ssd_scan, tensors, documents)
    moved = jittered(lambda: run(reference.ssd_scan, tensors, documents))
    return {name: 2 * distance for name, distance in distances(moved, exact).items()}


@pytest.mark.parametrize("case", CASES)
def test_values_and_gradients(case: str) -> None:
    tensors, documents = inputs(CASES[case]), packed(CASES[case].documents)
    with guarded_memory(), small_tiles() if case == "ragged" else nullcontext():
        ours = run(kernel.ssd_scan, tensors, documents)
    truth = run(reference.ssd_scan, [t.double() for t in tensors], documents)
    assert all(ours[name].shape == t.shape for name, t in truth.items())
    bands = fp32_bands(tensors, documents)
    assert {n: d for n, d in distances(ours, truth).items() if d > bands[n]} == {}


def test_bf16() -> None:
    """Gradients of B and C have most roundings to bf16: of scores and states, of what is written to
    or read from these, and of the result."""
    tensors = inputs(CASES["aligned"], BF16)
    with guarded_memory():
        ours = run(kernel.ssd_scan, tensors, None)
    truth = run(reference.ssd_scan, [t.double() for t in tensors], None)
    narrow = {"y", "x", "B", "C"}
    assert all(ours[n].dtype == (BF16 if n in narrow else FP32) for n in truth)
    assert max(distances(ours, truth).values()) <= band(BF16, 4)


def test_the_comparison_notices_mistakes() -> None:
    """Documents that begin a token late; and reading from states without a gradient of decays,
    which only dt and A can tell."""
    case = Case(1, 18, 1, 1, 2, 3, (5, 13), True)
    tensors, documents = inputs(case), packed((5, 13), 1)
    truth = run(reference.ssd_scan, [t.double() for t in tensors], documents)
    bands = fp32_bands(tensors, documents)
    read = passes.Passes.read

    def silent(self, *given):
        read_UGLhP, dread_UHL = read(self, *given)
        return read_UGLhP, torch.zeros_like(dread_UHL)

    with mock.patch.object(passes.Passes, "read", silent):
        of_decays = distances(run(kernel.ssd_scan, tensors, documents), truth)
    late = distances(run(kernel.ssd_scan, tensors, packed((6, 12), 1)), truth)
    assert all(late[n] > SABOTAGE * bands[n] for n in ("y", "x", "dt", "A", "B", "C"))
    assert all(of_decays[n] > SABOTAGE * bands[n] for n in ("dt", "A"))
    assert of_decays["x"] <= bands["x"]


def test_documents_are_isolated_bit_for_bit() -> None:
    """Every other document changes, and what stays gives the same, forward and backward."""
    lengths = (1, CHUNK - 1, CHUNK, CHUNK + 1, 1, 2)
    tensors = inputs(Case(1, sum(lengths), 1, 1, 2, 3))
    documents = packed(lengths, 1)
    numbers = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    odd_S = (numbers % 2 == 1).to(DEVICE)
    by_token = ("y", "x", "dt", "B", "C")
    before = run(kernel.ssd_scan, tensors, documents)
    for kept_S in (odd_S, ~odd_S):
        changed = [t.clone() for t in tensors]
        for t in (changed[i] for i in (0, 1, 3, 4)):
            t[:, ~kept_S] = 3 * t[:, ~kept_S] + 1
        after = run(kernel.ssd_scan, changed, documents)
        assert all(torch.equal(before[n][:, kept_S], after[n][:, kept_S]) for n in by_token)
    # The comparison notices states that cross.
    crossing, _ = kernel.ssd_scan(*changed, CHUNK)
    assert not torch.equal(before["y"][:, ~odd_S], crossing[:, ~odd_S])


def test_long_rows_are_taken_block_by_block() -> None:
    """Three blocks of a chunk each: in the first row a document ends with one, in the second one
    goes on."""
    case = Case(2, 2 * CHUNK + 5, 2, 1, 2, 3, (CHUNK, CHUNK + 5), True)
    tensors, documents = inputs(case), packed(case.documents)
    truth = run(reference.ssd_scan, [t.double() for t in tensors], documents)
    bands = fp32_bands(tensors, documents)
    with mock.patch.object(kernel, "_BLOCK", 2 * CHUNK):
        with mock.patch.object(kernel._Scan, "apply", wraps=kernel._Scan.apply) as scans:
            found = distances(run(kernel.ssd_scan, tensors, documents), truth)
        with mock.patch.object(Tensor, "masked_fill", lambda state, *_: state):
            crossing = distances(run(kernel.ssd_scan, tensors, documents), truth)
    assert [call.args[0].shape[1] for call in scans.call_args_list] == [CHUNK, CHUNK, 5]
    assert {n: d for n, d in found.items() if d > bands[n]} == {}
    assert all(crossing[n] > SABOTAGE * bands[n] for n in ("y", "state", "dt", "C"))


def test_strong_decay_and_no_time() -> None:
    """Decays down to exp(-300), and tokens that take no time, of which the gradient is that of the
    recurrence; the reference's is 0."""
    tensors = inputs(Case(1, 10, 1, 1, 2, 3))
    tensors[1][:, 5:9] = 0
    tensors[2] = torch.full_like(tensors[2], -300)
    ours, slightly = (
        run(kernel.ssd_scan, [tensors[0], tensors[1] + more, *tensors[2:]], None)["dt"]
        for more in (0.0, 1e-7)
    )
    assert ours.isfinite().all()
    torch.testing.assert_close(ours[:, 5:9], slightly[:, 5:9], rtol=1e-3, atol=1e-3)
    assert (ours[:, 5:9] != 0).all()


def test_a_state_alone() -> None:
    """Of no tokens it is what there was; and only its gradient is asked for."""
    case = Case(1, 5, 1, 1, 2, 3, None, True)
    tensors = inputs(case)
    nothing = [t[:, :0] if t.dim() in (3, 4) and i < 5 else t for i, t in enumerate(tensors)]
    y, state = kernel.ssd_scan(*nothing[:6], CHUNK, None, nothing[6])
    assert y.shape == (1, 0, 1, 2)
    assert torch.equal(state, tensors[6])
    gradients = []
    for scan in (kernel.ssd_scan, reference.ssd_scan):
        leaves = [t.detach().clone().requires_grad_() for t in tensors]
        scan(*leaves[:6], CHUNK, None, leaves[6])[1].square().sum().backward()
        gradients.append({n: t.grad for n, t in zip(NAMES, leaves, strict=True) if n not in "CD"})
    assert max(distances(*gradients).values()) <= band(FP32, 100)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_a_step_moves_the_state_on_in_place(dtype: torch.dtype) -> None:
    tensors = inputs(Case(2, 2, 4, 2, 20, 5, None, True), dtype)
    x, dt, A, B, C, D, state = tensors
    token = [x[:, 1], dt[:, 1], A, B[:, 1], C[:, 1], D]
    exact = state.double()
    y_BHP = reference.ssd_step(*(t.double() for t in token), exact)
    with guarded_memory():
        ours = kernel.ssd_step(*token, state)
    found = distances({"y": ours, "state": state}, {"y": y_BHP, "state": exact})
    assert found["y"] <= band(dtype, 5)
    assert found["state"] <= band(FP32, 3)
    assert kernel.ssd_step(*(t[:0] if t.dim() > 1 else t for t in token), state[:0]).shape[0] == 0


def launches(lengths: tuple[int, ...] | None) -> list[str]:
    tensors = [t.detach().to("meta").requires_grad_() for t in inputs(Case(1, 64, 4, 2, 8, 16))]
    documents = packed(lengths, 1)
    with recorded() as found:
        scan = kernel.ssd_scan(*tensors, CHUNK, documents and documents.to("meta"))
        scan[0].sum().backward()
    return [one.kernel.__name__ for one in found]


def test_as_many_launches_for_a_document_as_for_many() -> None:
    alone = launches(None)
    assert len(alone) == 14
    assert launches((1,) * 64) == launches((64,)) == alone


def test_what_is_kept() -> None:
    """Inputs, states that enter chunks, and four numbers per token and head."""
    case = CASES["aligned"]
    tensors = [t.requires_grad_() for t in inputs(case, BF16)]
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        kernel.ssd_scan(*tensors, CHUNK)
    given = {t.data_ptr() for t in tensors}
    made = sum(t.nbytes for t in kept if t.data_ptr() not in given)
    states = case.length // CHUNK * case.heads * case.head_dim * case.state * 2
    assert made == states + 4 * case.heads * (4 * case.length + case.length // CHUNK)


def test_self_check_notices_mistakes() -> None:
    if DEVICE == "cuda":
        assert kernel.self_check(DEVICE, backend.Sizes()) < backend.TOLERANCE
        return
    small = backend.Sizes(1, 4, 1, 4, 128, tokens=20)
    assert kernel.self_check(DEVICE, small) < backend.TOLERANCE
    with mock.patch.object(chunk_kernel, "state_gradient_kernel", mock.MagicMock()):
        assert not kernel.self_check(DEVICE, small) < backend.TOLERANCE


def test_what_is_not_taken_is_the_references() -> None:
    tensors = [t.double() for t in inputs(Case(1, 3, 1, 1, 2, 3))]
    for dtype in (FP64, torch.float16):
        assert kernel.refusal(tensors[0].to(dtype)).endswith(f"got {dtype}")
    assert not kernel.refusal(tensors[0].to(BF16))
    assert ssd_scan(*tensors, CHUNK)[0].dtype == FP64


def test_bad_input_is_named() -> None:
    x, dt, A, B, C, D = inputs(Case(1, 3, 4, 2, 2, 3))
    for message, call in {
        r"x: expected shape \[any, any, any, any\], got \[1, 3, 4\]": (x[..., 0], dt, A, B, C, D),
        r"dt: expected shape \[1, 3, 4\], got \[1, 3, 3\]": (x, dt[..., 1:], A, B, C, D),
        r"A_H: expected shape \[4\], got \[3\]": (x, dt, A[1:], B, C, D),
        r"D_H: expected a tensor on .*, got meta": (x, dt, A, B, C, D.to("meta")),
        r"C: expected shape \[1, 3, 2, 3\], got \[1, 3, 2, 2\]": (x, dt, A, B, C[..., 1:], D),
        r"B: expected a number of groups that divides 4, got 3": (
            x, dt, A, B.repeat(1, 1, 2, 1)[:, :, :3], C.repeat(1, 1, 2, 1)[:, :, :3], D,
        ),
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=message):
            kernel.ssd_scan(*call, CHUNK)
    with pytest.raises(ValueError, match=r"seq_idx_BS: expected shape \[1, 3\], got \[1, 4\]"):
        kernel.ssd_scan(x, dt, A, B, C, D, CHUNK, packed((4,), 1))
    state = torch.zeros(1, 4, 2, 3, device=DEVICE)
    with pytest.raises(ValueError, match=r"initial_state_BHPN: expected shape \[1, 4, 2, 3\], got"):
        kernel.ssd_scan(x, dt, A, B, C, D, CHUNK, None, state[:, 1:])
    token = [t[:, 0] if t.dim() > 1 else t for t in (x, dt, A, B, C, D)]
    with pytest.raises(ValueError, match=r"state_BHPN: expected torch.float32, got torch.float16"):
        kernel.ssd_step(*token, state.half())
    with pytest.raises(ValueError, match="state_BHPN: expected a contiguous tensor, got"):
        kernel.ssd_step(*token, state.mT.contiguous().mT)
