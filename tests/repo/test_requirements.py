"""The lowest and the newest versions of what the project asks for."""

from __future__ import annotations

import pytest

requirements = pytest.importorskip("requirements", reason="needs tomllib, of Python 3.11")


@pytest.mark.parametrize(
    ("given", "lowest", "newest"),
    [
        ("torch>=2.11,<2.16", "torch==2.11.*", "torch>=2.11"),
        ("jinja2>=3.1.6", "jinja2==3.1.6", "jinja2>=3.1.6"),
        ("peft==0.21.2", "peft==0.21.2", "peft>=0.21.2"),
        ("pytest>=8", "pytest==8.*", "pytest>=8"),
        ("datasets", "datasets", "datasets"),
        ("a[x]>=1; python_version >= '3.10'", "a[x]==1.*", "a[x]>=1"),
        ("a>=1; python_version < '3'", "", ""),
    ],
)
def test_ranges_end_where_they_begin_or_nowhere(given: str, lowest: str, newest: str) -> None:
    assert requirements.changed(given, "lowest") == lowest
    assert requirements.changed(given, "newest") == newest


def test_everything_is_asked_for() -> None:
    lowest = requirements.requirements("lowest")
    assert any(one.startswith("torch==") for one in lowest)
    assert any(one.startswith("pytest==") for one in lowest)  # of the extra dev
