"""The chunked scan against the recurrence, its gradients, and its isolation of documents."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from nemo_kernels.documents import Documents
from nemo_kernels.ssd import reference, ssd_scan, ssd_step

CHUNK = 8
NAMES = ("x", "dt", "A", "B", "C", "D")


def inputs(batch=2, length=37, heads=4, head_dim=3, groups=2, state=5, dtype=torch.float64, seed=0):
    gen = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=gen, dtype=torch.float64).to(dtype)

    scalars = torch.float64 if dtype == torch.float64 else torch.float32
    return {
        "x": normal(batch, length, heads, head_dim),
        "dt": torch.rand(batch, length, heads, generator=gen, dtype=scalars) + 0.01,
        "A": -torch.rand(heads, generator=gen, dtype=scalars) - 0.1,
        "B": normal(batch, length, groups, state),
        "C": normal(batch, length, groups, state),
        "D": normal(heads).to(scalars),
    }


def packed(lengths, batch=2):
    return torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths)).expand(
        batch, -1
    )


def scan(t, chunk=CHUNK, seq=None, initial=None):
    documents = None if seq is None else Documents.from_numbers(seq)
    return ssd_scan(*(t[n] for n in NAMES), chunk, documents, initial)


def recurrence(t, seq_idx=None, initial=None):
    """The definition, one token and one head at a time."""
    batch, length, heads, head_dim = t["x"].shape
    per_group = heads // t["B"].shape[2]
    ys, states = [], []
    for h in range(heads):
        B, C = t["B"][:, :, h // per_group], t["C"][:, :, h // per_group]
        s = t["x"].new_zeros(batch, head_dim, B.shape[-1]) if initial is None else initial[:, h]
        y = []
        for i in range(length):
            if seq_idx is not None and i:
                s = s * (seq_idx[:, i] == seq_idx[:, i - 1])[:, None, None]
            x, dt = t["x"][:, i, h], t["dt"][:, i, h, None, None]
            s = torch.exp(dt * t["A"][h]) * s + dt * x[:, :, None] * B[:, i, None, :]
            y.append((s * C[:, i, None, :]).sum(-1) + t["D"][h] * x)
        ys.append(torch.stack(y, 1))
        states.append(s)
    return torch.stack(ys, 2), torch.stack(states, 1)


def with_gradients(function, t, initial):
    leaves = {n: v.clone().requires_grad_() for n, v in t.items()}
    initial = None if initial is None else initial.clone().requires_grad_()
    y, state = function(leaves, initial)
    gen = torch.Generator().manual_seed(9)
    wy, ws = (torch.randn(v.shape, generator=gen, dtype=v.dtype) for v in (y, state))
    ((y * wy).sum() + (state * ws).sum()).backward()
    grads = {n: v.grad for n, v in leaves.items()}
    return {"y": y, "state": state, **grads} | ({} if initial is None else {"s0": initial.grad})


@pytest.mark.parametrize("documents", [None, [37], [1, 7, 8, 9, 12], [20, 17]])
@pytest.mark.parametrize("initial", [False, True])
@pytest.mark.parametrize("length_of_chunk", [8, 64])
def test_values_and_gradients_equal_the_recurrence(documents, initial, length_of_chunk):
    t = inputs()
    seq = None if documents is None else packed(documents)
    s0 = torch.randn(2, 4, 3, 5, dtype=torch.float64) if initial else None
    ours = with_gradients(lambda v, s: scan(v, length_of_chunk, seq, s), t, s0)
    truth = with_gradients(lambda v, s: recurrence(v, seq, s), t, s0)
    for name, value in truth.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-10, msg=name)


class CountDenormals(TorchDispatchMode):
    """Denormal numbers in the results of all arithmetic (not in views of memory yet unwritten)."""

    ARITHMETIC = ("add", "mul", "mm", "exp", "sub", "div", "sum")

    def __init__(self):
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **kwargs or {})
        if any(name in str(function) for name in self.ARITHMETIC):
            self.count += int(((out != 0) & (out.abs() < torch.finfo(out.dtype).tiny)).sum())
        return out


def strong_decay(dtype):
    return inputs(dtype=dtype) | {"A": torch.linspace(-300, -20, 4, dtype=dtype)}


def test_strong_decay_equals_the_recurrence():
    """Decays down to exp(-300), where the scan cuts them off."""
    t = strong_decay(torch.float64)
    ours = with_gradients(lambda v, s: scan(v), t, None)
    truth = with_gradients(lambda v, s: recurrence(v), t, None)
    for name, value in truth.items():
        torch.testing.assert_close(ours[name], value, rtol=1e-9, atol=1e-10, msg=name)


def test_strong_decay_makes_hardly_any_denormals(monkeypatch):
    def denormals():
        with CountDenormals() as mode:
            with_gradients(lambda v, s: scan(v), strong_decay(torch.float32), None)
        return mode.count

    with_cut = denormals()
    monkeypatch.setattr(reference, "_MIN_LOG", -torch.inf)
    assert denormals() > 100 * with_cut


def test_gradcheck():
    t = {n: v.requires_grad_() for n, v in inputs(1, 7, 2, 2, 1, 2).items()}
    s0 = torch.randn(1, 2, 2, 2, dtype=torch.float64, requires_grad=True)
    seq = packed([2, 5], batch=1)
    assert torch.autograd.gradcheck(
        lambda *a: ssd_scan(*a[:6], 3, Documents.from_numbers(seq), a[6]),
        (*(t[n] for n in NAMES), s0),
    )


def test_blocks_of_rows_give_the_same_result(monkeypatch):
    t = inputs(batch=5)
    seq = packed([10, 27], batch=5)
    run = lambda v, s: scan(v, seq=seq, initial=s)  # noqa: E731
    whole = with_gradients(run, t, None)
    monkeypatch.setitem(reference._BLOCK, "cpu", 2 * 40 * 4 * CHUNK)
    assert len(reference._row_blocks(torch.empty(5, 40, 4, 1), CHUNK)) == 3
    blocks = with_gradients(run, t, None)
    for name, value in whole.items():
        torch.testing.assert_close(blocks[name], value, rtol=1e-12, atol=1e-12, msg=name)


def test_step_continues_the_scan():
    t = inputs(dtype=torch.float32)
    y, final = scan(t)
    state = torch.zeros_like(final)
    for i in range(37):
        x, dt, B, C = (t[n][:, i] for n in ("x", "dt", "B", "C"))
        y_i = ssd_step(x, dt, t["A"], B, C, t["D"], state)
        torch.testing.assert_close(y_i, y[:, i], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, final, rtol=1e-5, atol=1e-5)


def test_bf16_inputs_are_computed_in_fp32():
    t = inputs(dtype=torch.bfloat16)
    y, state = scan(t)
    assert y.dtype == torch.bfloat16
    assert state.dtype == torch.float32
    exact, _ = scan({n: v.double() for n, v in t.items()})
    torch.testing.assert_close(y, exact.bfloat16(), rtol=1e-2, atol=1e-3)
    grads = with_gradients(lambda v, s: scan(v), t, None)
    assert all(grads[n].dtype == t[n].dtype for n in NAMES)


def test_long_strongly_decaying_chunks_stay_finite():
    t = inputs(length=256, dtype=torch.float32)
    t["dt"], t["A"] = t["dt"] * 50, t["A"] * 16
    result = with_gradients(lambda v, s: scan(v, 256), t, None)
    assert all(v.isfinite().all() for v in result.values())


def test_zero_time_step_has_finite_gradients():
    t = inputs(dtype=torch.float32)
    t["dt"][:, 5:9] = 0
    result = with_gradients(lambda v, s: scan(v), t, None)
    assert all(v.isfinite().all() for v in result.values())


def run_document(t, seq, where, chunk=CHUNK):
    """Output and gradients at `where` of a loss that reads only the tokens there."""
    leaves = {n: v.clone().requires_grad_() for n, v in t.items()}
    y = scan(leaves, chunk, seq=seq)[0][:, where]
    (y * torch.linspace(-1, 1, y.numel()).view(y.shape)).sum().backward()
    return [y, *(leaves[n].grad[:, where] for n in ("x", "dt", "B", "C")), leaves["A"].grad]


@pytest.mark.parametrize("first", [1, CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK + 3])
@pytest.mark.parametrize("second", [1, CHUNK - 1, CHUNK, CHUNK + 1])
@pytest.mark.parametrize("changed", [0, 2])
def test_documents_are_isolated_bit_for_bit(first, second, changed):
    lengths = [first, second, 5]
    seq = packed(lengths)
    t = inputs(length=sum(lengths), dtype=torch.float32)
    where = slice(first, first + second)
    before = run_document(t, seq, where)
    other = inputs(length=sum(lengths), dtype=torch.float32, seed=1)
    at = slice(0, first) if changed == 0 else slice(first + second, None)
    for n in ("x", "dt", "B", "C"):
        t[n][:, at] = 100 * other[n][:, at]
    after = run_document(t, seq, where)
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    alone = run_document(
        {n: v[:, where] if v.ndim > 1 else v for n, v in t.items()}, None, slice(None)
    )
    for a, b in zip(after, alone, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    if changed == 0:  # the comparison notices a state that crosses
        crossing = run_document(t, None, where)
        assert not torch.allclose(crossing[0], before[0], rtol=1e-2)
