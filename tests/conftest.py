"""Without a CUDA device, Triton kernels run in Triton's interpreter, on CPU tensors.

Triton reads the variable while a kernel is defined, so it must stand before anything imports it.
Processes that tests start inherit it. ``helpers.triton_env`` repairs the interpreter's faults.
"""

import os

import pytest
import torch

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Slow tests first: at the end one would leave the other workers of pytest-xdist idle."""
    items.sort(key=lambda item: not {"slow", "sweep"} & {mark.name for mark in item.iter_markers()})
