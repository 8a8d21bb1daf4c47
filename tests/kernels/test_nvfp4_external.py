"""How Transformer Engine's path calls the library: with a stand-in that computes as it documents.

The library itself needs an sm_100 GPU; there the self-check compares it with the reference.
"""

import sys
from contextlib import nullcontext
from importlib import import_module
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from nemo_kernels.backend import Sizes
from nemo_kernels.lowp import emulation, reference
from nemo_kernels.lowp.operand import Rounding, multiplier

SQUARE, RHT = Rounding((16, 16)), Rounding(rht=True)
ENDS = torch.tensor([0, 32, 48], dtype=torch.int32)


class Quantizer:
    """NVFP4Quantizer, whose tensors hold emulated operands."""

    def __init__(
        self, rowwise: bool, columnwise: bool, with_rht: bool, with_post_rht_amax: bool,
        with_2d_quantization: bool, stochastic_rounding: bool,
    ) -> None:  # fmt: skip
        assert with_rht == with_post_rht_amax
        how = Rounding((16, 16) if with_2d_quantization else (1, 16))
        how = how._replace(seed=1 if stochastic_rounding else None)
        self.rows = how if rowwise else None
        self.columns = how._replace(rht=with_rht) if columnwise else None

    def __call__(self, x: Tensor) -> SimpleNamespace:
        rows, columns = reference.operands(x, self.rows, self.columns)
        return SimpleNamespace(rows=rows, columns=columns)


def general_gemm(a: Any, b: Any, out_dtype: torch.dtype, layout: str) -> tuple[Tensor, None]:
    """B's rows times A's rows; T for a first operand, N for a second one: rowwise."""
    first = {"T": a.rows, "N": a.columns}[layout[0]]
    second = {"N": b.rows, "T": b.columns}[layout[1]]
    return emulation.product(second, first, out_dtype), None


@pytest.fixture
def external(monkeypatch: pytest.MonkeyPatch) -> Any:
    names = "transformer_engine", "transformer_engine.pytorch"
    modules = [ModuleType(name) for name in (*names, f"{names[1]}.cpp_extensions")]
    modules[1].NVFP4Quantizer = Quantizer  # type: ignore[attr-defined]
    modules[2].general_gemm = general_gemm  # type: ignore[attr-defined]
    for module in modules:
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.delitem(sys.modules, "nemo_kernels.lowp.external", raising=False)
    yield import_module("nemo_kernels.lowp.external")
    del sys.modules["nemo_kernels.lowp.external"]


def draw(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed)).bfloat16()


def test_products_of_a_linear_layer(external: Any) -> None:
    x, dy, w = draw(64, 32), draw(64, 48, seed=1), draw(48, 32, seed=2)
    results = []
    for path in (external, reference):
        x_rows, x_columns = path.operands(x, Rounding(), RHT)
        dy_rows, dy_columns = path.operands(dy, Rounding(), RHT)
        weight, transposed = path.operands(w, SQUARE, SQUARE)
        results.append(
            [
                path.product(x_rows, weight, torch.bfloat16),
                path.product(dy_rows, transposed, torch.bfloat16),
                path.product(dy_columns, x_columns, torch.float32),
            ]
        )
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found, wanted)
    rows, _ = external.operands(x, Rounding(), None)
    _, columns = external.operands(x.mT, None, RHT)
    with pytest.raises(ValueError, match="b: expected columnwise"):
        external.product(columns, rows, torch.float32)
    with pytest.raises(ValueError, match="rows: expected rht=False"):
        external.operands(x, RHT, None)


def test_products_of_experts(external: Any) -> None:
    x, dy, w = draw(64, 32), draw(64, 48, seed=1), draw(3, 48, 32, seed=2)
    x[48:], dy[48:] = 0, 0
    results = []
    for path in (external, reference):
        x_rows, x_columns = path.operands(x, Rounding(), RHT, ENDS)
        dy_rows, dy_columns = path.operands(dy, Rounding(), Rounding(), ENDS)
        weight, transposed = path.operands(w, SQUARE, SQUARE)
        results.append(
            [
                path.grouped_product(x_rows, weight, ENDS, torch.float32),
                path.grouped_product(dy_rows, transposed, ENDS, torch.float32),
                path.grouped_wgrad(dy_columns, x_columns, ENDS, torch.float32),
            ]
        )
    for found, wanted in zip(*results, strict=True):
        assert torch.equal(found, wanted)


def test_random_bits_are_seeded_for_each_operand(
    external: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seeds: list[int] = []
    monkeypatch.setattr(torch.random, "fork_rng", lambda **_: nullcontext())
    monkeypatch.setattr(torch.cuda, "manual_seed", seeds.append)
    rows, columns = external.operands(draw(32, 32), Rounding(seed=5), Rounding(rht=True, seed=6))
    assert rows.tensor is columns.tensor  # one read
    rows, columns = external.operands(draw(32, 32), Rounding(seed=7), RHT)
    assert rows.tensor.columns is columns.tensor.rows is None
    assert rows.tensor.rows is not None
    assert seeds == [5, 7]


def test_other_formats_are_emulated(external: Any) -> None:
    a, b = (reference.operands(draw(32, 32, seed=s), Rounding(), None)[0] for s in range(2))
    found = multiplier(external, a, b).product(a, b, torch.float32)
    assert torch.equal(found, reference.product(a, b, torch.float32))


@pytest.mark.parametrize("capability", [(9, 0), (8, 0)])
def test_older_gpus_are_refused(
    external: Any, capability: tuple[int, int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    with pytest.raises(RuntimeError, match=r"capability 10\.0"):
        external.self_check("cuda", Sizes())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert external.self_check("cpu", Sizes()) == 0
