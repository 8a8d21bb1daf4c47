"""Prove that a rebuilding changes no number: the same tiny runs by two revisions, to the last bit.

    python scripts/golden.py --base REV [--only NAME ...] [--allow NAME ...] [--keep DIR]

REV is checked out beside this checkout (which is taken as it lies there, uncommitted changes too).
Both make the same stores, runs, exports and text on this machine by the command line alone, so that
the inside may be rebuilt as one likes. Then all is compared: of every step every field of the
metrics but what tells of the machine, and every file of the stores, the last checkpoints, what
fine-tuning publishes, and the exports. Prints one line per product: equal, or the first difference
with both values, REV's first.

The logs, TensorBoard and plots are not compared, and the seconds that `prepare` took are taken out
of files first. --allow NAME passes over a field of metrics (and those below it) that one side alone
has, or a file of that name that differs or that one side alone has; where a file of a checkpoint
does, its manifest.json does too.

REV is run by the interpreter that runs this script if its pyproject.toml has the same dependencies;
else by a virtual environment on top of that one, with REV installed into it, made once per set of
dependencies in --venvs. So the versions of all that both need are the same.

Exit status: 0 everything is equal, 1 something differs or failed, 2 a mistake in options.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from golden_runs import STEPS, WORKS, with_needs, write_inputs

ROOT = Path(__file__).parents[1]
MEASURED = {"tokens_per_s", "step_seconds", "data_seconds", "mfu", "memory_gb"}
"""Fields of metrics that tell of the machine."""
SECONDS = re.compile(rb'"seconds": [\d.e-]+')


class Side(NamedTuple):
    """One revision at work in a directory of its own."""

    tree: Path
    python: Path
    directory: Path
    inputs: Path

    def work(self, names: Sequence[str]) -> dict[str, str]:
        """Why each work failed; empty where it did not. Raises SystemExit if the interpreter does
        not take the package from the tree."""
        found = self._run([str(self.python), "-c", "import nemo_hybrid as n; print(n.__file__)"])
        if not found.stdout.startswith(f"{self.tree}/"):
            raise SystemExit(f"{self.tree}: nemo_hybrid is {found.stdout or found.stderr}")
        failed: dict[str, str] = {}
        for name in names:
            lost = [need for need in WORKS[name].needs.split() if failed[need]]
            failed[name] = f"not run, for want of {lost[0]}" if lost else self.make(name)
        return failed

    def make(self, name: str) -> str:
        """Do one work. Why it failed; empty if it did not."""
        work, out = WORKS[name], self.directory / name
        if work.copies:
            shutil.copytree(self.directory / work.copies, out)
            shutil.rmtree(out / f"checkpoints/step_{STEPS:08d}")
        launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]
        words = work.words.format(inputs=self.inputs).split()
        begin = [str(self.python), *(launcher if work.processes == 2 else [])]
        done = self._run([*begin, "-m", "nemo_hybrid", *words])
        out.with_suffix(".log").write_text(done.stdout + done.stderr)
        if not out.exists():  # what the command printed is its product
            out.mkdir()
            (out / "said").write_text(done.stdout)
        said = [line for line in done.stderr.splitlines() if "error" in line.lower()]
        return f"status {done.returncode}: {' '.join(said[:1])}" if done.returncode else ""

    def _run(self, words: list[str]) -> subprocess.CompletedProcess[str]:
        path = os.pathsep.join([str(self.tree), str(self.tree / "kernels")])
        environment = {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
        return subprocess.run(
            words, cwd=self.directory, env=os.environ | environment, stdin=subprocess.DEVNULL,
            capture_output=True, text=True, check=False,
        )  # fmt: skip


def difference_of_rows(base: Path, now: Path, allow: Sequence[str] = ()) -> str:
    """The first difference of two files of JSON rows with steps, in words; empty: none."""
    theirs, ours = ({row["step"]: _flat(row) for row in _rows(path)} for path in (base, now))
    for step in sorted(theirs.keys() | ours.keys()):
        if step not in theirs or step not in ours:
            return f"step {step} is {_alone(step in theirs)}"
        before, after = theirs[step], ours[step]
        for field in [*before, *(after.keys() - before.keys())]:
            if field in MEASURED:
                continue
            if field not in before or field not in after:
                if not any(f"{field}.".startswith(f"{name}.") for name in allow):
                    return f"step {step} {field}: a field {_alone(field in before)}"
            elif json.dumps(before[field]) != json.dumps(after[field]):  # the shortest exact texts
                return f"step {step} {field}: {before[field]!r} != {after[field]!r}"
    return ""


def _alone(in_base: bool) -> str:
    return "of the base alone" if in_base else "of this checkout alone"


def _rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()] if path.is_file() else []


def _flat(record: dict[str, Any], before: str = "") -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for key, value in record.items():
        nested = isinstance(value, dict)
        flat |= _flat(value, f"{before}{key}.") if nested else {f"{before}{key}": value}
    return flat


def difference_of_files(base: Path, now: Path, allow: Sequence[str] = ()) -> str:
    """The first difference of the products in two directories, in words; empty: none."""
    theirs, ours = _hashes(base), _hashes(now)
    # A manifest differs where any other file does: the cause is to be named.
    for name in sorted(theirs.keys() | ours.keys(), key=lambda n: (n.endswith("manifest.json"), n)):
        if theirs.get(name) != ours.get(name) and Path(name).name not in allow:
            if name not in theirs or name not in ours:
                return f"{name}: a file {_alone(name in theirs)}"
            return f"{name}: sha256 {theirs[name]} != {ours[name]}"
    return "" if theirs else "there is no file"


def _hashes(directory: Path) -> dict[str, str]:
    """Of a run the last checkpoint and what it published; else all files."""
    steps = sorted(directory.glob("checkpoints/step_*"))
    roots = [steps[-1], directory / "model"] if steps else [directory]
    found = {}
    for path in (p for root in roots for p in root.rglob("*") if p.is_file()):
        content = SECONDS.sub(b'"seconds": 0', path.read_bytes())
        found[path.relative_to(directory).as_posix()] = hashlib.sha256(content).hexdigest()
    return found


def interpreter(tree: Path, venvs: Path) -> Path:
    """A Python that has the dependencies of the revision checked out at ``tree``."""
    wanted, present = (_dependencies(t) for t in (tree, ROOT))
    if wanted == present:
        return Path(sys.executable)
    key = hashlib.sha256(f"{sys.executable}{sys.version}{wanted}".encode()).hexdigest()[:16]
    python = venvs / key / "bin/python"
    if not (venvs / key / "complete").exists():
        venv.create(venvs / key, clear=True, with_pip=True)
        say = "import sysconfig; print(sysconfig.get_paths()['purelib'])"
        site = subprocess.run([python, "-c", say], check=True, capture_output=True, text=True)
        below = [p for p in sys.path if p.endswith("site-packages")]
        Path(site.stdout.strip(), "below.pth").write_text("\n".join(below) + "\n")
        subprocess.run([python, "-m", "pip", "install", "-q", "-e", tree], check=True)
        (venvs / key / "complete").touch()
    return python


def _dependencies(tree: Path) -> str:
    text = (tree / "pyproject.toml").read_text()
    found = re.search(r"^dependencies = \[.*?^\]", text, re.M | re.S)
    return found[0] if found else ""


def report(base: Side, now: Side, failed: list[dict[str, str]], allow: Sequence[str]) -> int:
    """Print a line per product; how many are not equal."""
    lines = []
    for name in failed[0]:
        sides = base.directory / name, now.directory / name
        if any(f[name] for f in failed):
            said = " | ".join(f[name] or "done" for f in failed)
            lines.append((name, "command", f"{said} (log: {sides[1]}.log)"))
            continue
        for file in ("metrics.jsonl", "expert_load.jsonl"):
            if any((side / file).exists() for side in sides):
                text = difference_of_rows(sides[0] / file, sides[1] / file, allow)
                lines.append((name, f"{len(_rows(sides[0] / file))} rows of {file}", text))
        text = difference_of_files(*sides, allow)
        lines.append((name, f"{len(_hashes(sides[0]))} files", text))
    for name, product, text in lines:
        print(f"{name:13} {product:28} {text or 'equal'}")
    return sum(bool(text) for _, _, text in lines)


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="The same tiny runs by two revisions, compared.")
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nemo_hybrid_golden"
    add = partial(parser.add_argument, metavar="NAME", nargs="+", action="extend")
    add("--only", choices=WORKS, help=f"these alone and what they need, of {', '.join(WORKS)}")
    add("--allow", default=[], help="fields that one side alone has, files that may differ")
    add = parser.add_argument
    add("--base", required=True, metavar="REV", help="the revision to compare with")
    add("--keep", type=Path, metavar="DIR", help="a new directory for all products")
    add("--venvs", type=Path, metavar="DIR", default=cache, help="where environments are cached")
    add("--jobs", type=int, choices=(1, 2), default=2, help="sides at work at a time")
    options = parser.parse_args(arguments)
    git = ["git", "-C", str(ROOT)]
    known = [*git, "rev-parse", "-q", "--verify", f"{options.base}^{{commit}}"]
    if subprocess.run(known, stdout=subprocess.DEVNULL, check=False).returncode:
        parser.error(f"there is no revision {options.base}")
    if options.keep:
        options.keep.mkdir(parents=True)
    with tempfile.TemporaryDirectory(prefix="golden_") as scratch:
        tree, out = Path(scratch).resolve() / "tree", (options.keep or Path(scratch)).resolve()
        subprocess.run([*git, "worktree", "add", "-q", "--detach", tree, options.base], check=True)
        try:
            pythons = interpreter(tree, options.venvs), Path(sys.executable)
            for name in ("inputs", "base", "now"):
                (out / name).mkdir()
            write_inputs(out / "inputs")
            base = Side(tree, pythons[0], out / "base", out / "inputs")
            now = Side(ROOT.resolve(), pythons[1], out / "now", out / "inputs")
            with ThreadPoolExecutor(options.jobs) as pool:
                names = with_needs(options.only or [*WORKS])
                failed = list(pool.map(lambda side: side.work(names), (base, now)))
            different = report(base, now, failed, options.allow)
        finally:
            subprocess.run([*git, "worktree", "remove", "--force", tree], check=True)
    print(f"{different} of these are not equal" if different else "everything is equal")
    return 1 if different else 0


if __name__ == "__main__":
    sys.exit(main())
