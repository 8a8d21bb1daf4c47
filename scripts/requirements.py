"""Print what pyproject.toml asks for, in its lowest or in the newest versions there are:

    python -m venv .venv-newest
    .venv-newest/bin/pip install $(.venv/bin/python scripts/requirements.py newest)

lowest: of every range the version that it begins with; newest: ranges and pins without their end.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import tomllib
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

EXTRAS = ("dev",)


def requirements(which: str) -> list[str]:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"]]
    for extra in EXTRAS:
        asked += project["optional-dependencies"][extra]
    return [changed(requirement, which) for requirement in asked]


def changed(requirement: str, which: str) -> str:
    """A requirement without blanks, so that a shell takes it for one word."""
    found = Requirement(requirement)
    begins = {part.version for part in found.specifier if part.operator in (">=", "==")}
    if which == "newest":
        found.specifier = SpecifierSet(",".join(f">={version}" for version in begins))
    elif begins:
        (version,) = begins
        found.specifier = SpecifierSet(f"=={version}" + ".*" * (version.count(".") < 2))
    extras = f"[{','.join(sorted(found.extras))}]" if found.extras else ""
    applies = found.marker is None or found.marker.evaluate()
    return f"{found.name}{extras}{found.specifier}" if applies else ""


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("which", choices=("lowest", "newest"))
    print(*filter(None, requirements(parser.parse_args().which)), sep="\n")
