"""Tests on inputs that hypothesis draws. Where it is missing they are skipped, and only they.

Take ``drawn`` and ``st``, the strategies, from here. A test states how many examples it needs in
Triton's interpreter; on a GPU it gets fewer, because there a new shape may mean another
compilation.
"""

from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

try:
    from hypothesis import given, settings
    from hypothesis import strategies as st
except ImportError:
    given, st = None, mock.MagicMock()

MOST_ON_GPU = 5


def drawn(examples: int, *strategies: Any, **named: Any) -> Callable[..., Any]:
    """``hypothesis.given`` without a deadline; the test is skipped where there is no hypothesis."""
    if given is None:
        return pytest.mark.skip(reason="needs hypothesis")
    if torch.cuda.is_available():
        examples = min(examples, MOST_ON_GPU)

    def decorate(test: Callable[..., Any]) -> Any:
        return settings(max_examples=examples, deadline=None)(given(*strategies, **named)(test))

    return decorate
