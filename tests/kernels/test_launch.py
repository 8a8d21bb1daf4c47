"""What launches declare that they move, against the loads and stores of Triton's interpreter."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from unittest import mock

import numpy as np
import pytest
import torch
from torch import Tensor
from triton.runtime.interpreter import InterpreterBuilder

import helpers.triton_env  # noqa: F401  repairs the interpreter
from helpers.moe_inputs import by_path, draw_inputs
from nemo_kernels.conv1d import kernel as conv1d_kernel
from nemo_kernels.documents import Documents
from nemo_kernels.launch import Launch, Tile, launch, noted, recorded
from nemo_kernels.loss import kernel as loss_kernel
from nemo_kernels.lowp import gemm_kernel, layout, quantize_kernel
from nemo_kernels.lowp.operand import Rounding
from nemo_kernels.moe import expert_kernel, function, kernel, sort_kernel
from nemo_kernels.norm import kernel as norm_kernel
from nemo_kernels.ssd import kernel as ssd_kernel
from nemo_kernels.ssd import passes

pytestmark = pytest.mark.skipif(torch.cuda.is_available(), reason="counts in Triton's interpreter")
TOKENS, EXPERTS, CHOICES, WIDTH, INNER = 15, 3, 2, 24, 20
IDS_TK = torch.stack([torch.arange(TOKENS) % EXPERTS, (torch.arange(TOKENS) + 1) % EXPERTS], 1)
"""Every expert has rows: what nobody needs is not read, but declared."""


class Counter:
    """Runs launches and counts the bytes that each reads and writes, every address once."""

    def __init__(self) -> None:
        self.read: dict[int, int] = {}
        self.written: dict[int, int] = {}
        self.found: list[tuple[str, int, int]] = []
        """Kernel, bytes declared and counted."""

    def run(self, one: Launch) -> None:
        self.read, self.written = {}, {}
        one.kernel[one.grid](*one.arguments, **one.options)
        counted = sum(self.read.values()) + sum(self.written.values())
        self.found.append((one.kernel.fn.__name__, one.moved, counted))

    @staticmethod
    def note(where: dict[int, int], pointers, mask) -> None:
        size = max(1, pointers.get_element_ty().primitive_bitwidth // 8)
        chosen = pointers.data[np.broadcast_to(mask.data, pointers.data.shape)]
        where.update(dict.fromkeys(chosen.ravel().tolist(), size))


@contextmanager
def counted() -> Iterator[list[tuple[str, int, int]]]:
    counter = Counter()
    load, store = InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    atomic = InterpreterBuilder.create_atomic_rmw

    def loads(self, pointers, mask, *others, **named):
        counter.note(counter.read, pointers, mask)
        return load(self, pointers, mask, *others, **named)

    def stores(self, pointers, value, mask, *others):
        counter.note(counter.written, pointers, mask)
        return store(self, pointers, value, mask, *others)

    def atomics(self, operation, pointers, value, mask, *others):
        counter.note(counter.written, pointers, mask)  # in the cache, once
        return atomic(self, operation, pointers, value, mask, *others)

    instead = {
        "create_masked_load": loads, "create_masked_store": stores, "create_atomic_rmw": atomics
    }  # fmt: skip
    with mock.patch.multiple(InterpreterBuilder, **instead), noted(counter.run):
        yield counter.found


def experts(dtype: torch.dtype, recompute: bool = False) -> None:
    generator = torch.Generator().manual_seed(0)
    inputs = draw_inputs(generator, TOKENS, CHOICES, EXPERTS, WIDTH, INNER, dtype)
    x, weights, up, down = (t.requires_grad_() for t in inputs)
    by = kernel.TritonExperts(expert_kernel.Plan(*[Tile(16, 16, 16, 4, 2)] * 3))
    with mock.patch.multiple(sort_kernel, _SLOTS=32, _SCAN=(4, 8), _TILES=(16, 16)):
        slots = sort_kernel.sort_slots(IDS_TK, EXPERTS)
        given = (x, weights, slots, slots.counts_E, up, down, recompute)
        function.mlp(by, *given).sum().backward()


def router() -> None:
    x_TD, weight_ED = (torch.randn(n, 16, requires_grad=True) for n in (TOKENS, EXPERTS))
    _, weights_TK, scores_TE = kernel.topk_router(x_TD, weight_ED, torch.zeros(EXPERTS), 2, 1.0)
    (weights_TK.sum() + scores_TE.sum()).backward()


def losses() -> None:
    """Every row counts."""
    h_RD, teacher_RD = (torch.randn(TOKENS, 8, requires_grad=True) for _ in range(2))
    weight_VD = torch.randn(40, 8, requires_grad=True)
    options = {**loss_kernel._OPTIONS, "BLOCK": 16}
    with mock.patch.multiple(loss_kernel, _COLUMNS=16, _OPTIONS=options):
        loss_kernel.linear_cross_entropy(h_RD, weight_VD, IDS_TK[:, 0], torch.ones(TOKENS), 10)
        loss_kernel.linear_kl(h_RD, weight_VD, teacher_RD, weight_VD, torch.ones(TOKENS), 10)


def norms() -> None:
    """With several steps of the backward pass."""
    x, gate, weight = (torch.randn(*n, requires_grad=True) for n in ((9, 36), (9, 36), (36,)))
    with mock.patch.multiple(norm_kernel, _TILE=32, _PROGRAMS=8):
        norm_kernel.gated_rms_norm(x, gate, weight, 1e-5, 12).sum().backward()


def quantizers(packed: bool, rows: Rounding | None, columns: Rounding | None) -> None:
    """Whole atoms of scales: what pads them is not written."""
    x_1MN = torch.randn(1, 128, 128)
    ends_E = torch.tensor([64, 128], dtype=torch.int32)
    quantize_kernel.quantize(x_1MN, rows, columns, ends_E, packed=packed)


def native_products() -> None:
    def packed(*shape: int, experts: tuple[int, ...] = (2,)) -> layout.Packed:
        *outer, rows, depth = shape
        scale = torch.zeros(*outer, *layout.atoms(rows, depth), layout.ATOM_BYTES)
        data = torch.zeros(*outer, rows, depth // 2, dtype=torch.uint8)
        return layout.Packed(data, scale.to(torch.float8_e4m3fn), torch.ones(experts))

    ends_E = torch.tensor([128, 256], dtype=torch.int32)
    gemm_kernel.gemm(packed(128, 256, experts=()), packed(256, 256, experts=()), torch.bfloat16)
    gemm_kernel.grouped_rows(packed(256, 128), packed(2, 128, 128), ends_E, torch.float32)
    gemm_kernel.grouped_wgrad(packed(128, 256), packed(128, 256), ends_E, torch.float32)


def convolution() -> None:
    """Whole tiles."""
    x_BSC = torch.randn(2, 16, 40)[..., 4:36].requires_grad_()
    given = torch.randn(32, 4, requires_grad=True), torch.randn(32, requires_grad=True)
    documents = Documents.from_numbers((torch.arange(16) // 5).expand(2, -1))
    with mock.patch.multiple(conv1d_kernel, _TOKENS=8, _CHANNELS=32):
        conv1d_kernel.causal_conv1d(x_BSC, *given, documents).square().sum().backward()
        conv1d_kernel.causal_conv1d_step(x_BSC[:, 0], torch.zeros(2, 32, 3), *given)


def scan() -> None:
    """Whole chunks and tiles, of several heads per group; of one document: pairs of others are not
    read, but declared."""
    x, B, C = (torch.randn(1, 32, n, 16, requires_grad=True) for n in (2, 1, 1))
    dt, A = torch.rand(1, 32, 2, requires_grad=True), -torch.rand(2).requires_grad_()
    D, state = torch.randn(2, requires_grad=True), torch.randn(1, 2, 16, 16, requires_grad=True)
    documents = Documents.from_numbers(torch.zeros(1, 32))
    with mock.patch.multiple(passes, _ROWS=8, _BLOCK=128):
        y, final = ssd_kernel.ssd_scan(x, dt, A, B, C, D, 16, documents, state)
        (y.square().sum() + final.square().sum()).backward()
    ssd_kernel.ssd_step(x[:, 0], dt[:, 0], A, B[:, 0], C[:, 0], D, state.detach())


CALLS: dict[str, Callable[[], None]] = {
    "experts": partial(experts, torch.bfloat16),
    "experts, recomputed": partial(experts, torch.float32, recompute=True),
    "router": router,
    "losses": losses,
    "norms": norms,
    "sort as shipped": partial(sort_kernel.sort_slots, IDS_TK, EXPERTS),
    "packed": partial(quantizers, True, Rounding(), Rounding(rht=True)),
    "decoded": partial(quantizers, False, Rounding((16, 16)), None),
    "products": native_products,
    "convolution": convolution,
    "scan": scan,
}


@pytest.mark.parametrize("name", CALLS)
def test_declared_bytes_are_those_of_loads_and_stores(name: str) -> None:
    with counted() as found:
        CALLS[name]()
    assert found
    assert [(kernel, declared) for kernel, declared, _ in found] == [
        (kernel, size) for kernel, _, size in found
    ]


def test_the_count_notices_what_is_not_touched() -> None:
    """The first row of the table belongs to the running sum."""
    ids_R, table_BE = IDS_TK.flatten(), torch.zeros(4, EXPERTS, dtype=torch.int32)
    with counted() as found:
        arguments = (ids_R, table_BE, len(ids_R), EXPERTS)
        launch(sort_kernel._count_kernel, (3,), *arguments, SLOTS=32, EXPERTS=128)
    ((_, declared, size),) = found
    assert declared - size == table_BE[0].nbytes


def meta_inputs() -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    x, *others = draw_inputs(generator, TOKENS, CHOICES, EXPERTS, WIDTH, INNER, torch.bfloat16)
    given = [t.detach().to("meta") for t in (x, IDS_TK, *others)]
    return [t.requires_grad_(t.is_floating_point()) for t in given]


def test_declared_flop_are_those_of_the_products() -> None:
    """Of six products of rows with matrices [F, L], forward and backward, and of native ones."""
    with recorded() as launches:
        by_path(kernel, *meta_inputs()).sum().backward()
    product = 2 * TOKENS * CHOICES * INNER * WIDTH
    assert [one.flop for one in launches if one.flop] == [product] * 6
    assert {one.dtype for one in launches if one.flop} == {torch.bfloat16}
    with recorded() as launches:
        native_products()
    assert [one.flop for one in launches] == [
        2 * 128 * 256 * 256, 2 * 256 * 128 * 128, 2 * 128 * 128 * 256
    ]  # fmt: skip
    assert {one.dtype for one in launches} == {torch.uint8}


def test_notes_of_notes() -> None:
    """The innermost gets the launch, and afterwards the one around it does again."""
    outer: list[Launch] = []
    x: Tensor = torch.zeros(3)
    with noted(outer.append):
        with recorded() as inner:
            launch(None, (1,), x, 5)
        launch(None, (1,), x, x, moved=7)
    assert [one.moved for one in inner] == [12]
    assert [one.moved for one in outer] == [7]
