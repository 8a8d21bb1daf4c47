"""The random Hadamard transform: its matrix, its signs."""

import numpy as np
import pytest
import torch
from torch import Tensor

from helpers.nvfp4_formula import TE_SIGNS
from nemo_kernels.lowp import hadamard


def matrix() -> Tensor:
    """S H / 4 from the definition: entry [k, j] of H is -1 to the number of common bits."""
    k = np.arange(16)
    common = np.array([[bin(a & b).count("1") for b in k] for a in k])
    signs = np.array([1.0 if sign == "+" else -1.0 for sign in TE_SIGNS])
    return torch.from_numpy(signs[:, None] * (-1.0) ** common / 4)


def tensor(dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(48, 64, generator=torch.Generator().manual_seed(0)).to(dtype)


def test_the_matrix_is_orthogonal_and_the_transform_is_it() -> None:
    assert torch.equal(matrix() @ matrix().mT, torch.eye(16, dtype=torch.float64))
    assert torch.equal(hadamard.transform(torch.eye(16), 1).double(), matrix())
    # Products with these numbers are exact, whatever their order.
    x = (tensor() * 64).round()
    by_matrix = (x.double().view(48, 4, 16) @ matrix()).view(48, 64)
    assert torch.equal(hadamard.transform(x, -1).double(), by_matrix)
    assert torch.equal(hadamard.transform(x.mT, 0).double(), by_matrix.mT)
    assert torch.equal(hadamard.transform(x.view(3, 16, 64), 2).double().view(48, 64), by_matrix)
    assert torch.equal(hadamard.transform(x.bfloat16(), 1), by_matrix.bfloat16())


def test_both_operands_transformed_have_the_same_product() -> None:
    x, dy = tensor(), tensor().flip(1)
    plain = dy.mT @ x
    assert torch.allclose(hadamard.transform(dy, 0).mT @ hadamard.transform(x, 0), plain, atol=1e-4)
    assert not torch.allclose(hadamard.transform(dy, 0).mT @ x, plain, atol=1.0)


def test_signs_matter(monkeypatch: pytest.MonkeyPatch) -> None:
    with_signs = hadamard.transform(tensor(), -1)
    monkeypatch.setattr(hadamard, "_MINUS", 0)
    without = hadamard.transform(tensor(), -1)
    assert float((with_signs - without).norm() / without.norm()) > 0.5
    # Without them, a constant would become one outlier in each block.
    assert hadamard.transform(torch.ones(16), 0).tolist() == [4.0] + [0.0] * 15
    monkeypatch.undo()
    assert float(hadamard.transform(torch.ones(16), 0).abs().max()) < 3


def test_signs_are_transformer_engines() -> None:
    assert "".join("+" if sign > 0 else "-" for sign in hadamard.SIGNS) == TE_SIGNS


def test_a_dimension_that_is_no_multiple_of_16_is_refused() -> None:
    with pytest.raises(ValueError, match="dimension -2 divisible by 16, got 24"):
        hadamard.transform(torch.ones(2, 24, 8), -2)
