"""The shape of the repository: imports run downwards, files stay short, nothing unsafe is used."""

import ast
import re
import sys
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From bottom to top. A room imports those below it and itself; of rooms on one line none another.
ROOMS = (
    {"errors", "chips"},
    {"files", "terminal", "globs", "meter", "agreement", "process"},
    {"config"},
    {"data", "model"},
    {"precision", "objectives", "environments"},
    {"generation"},
    {"checkpoint"},
    {"hub"},
    {"parallel"},
    {"train"},
    {"recipes"},
    {"export"},
    {"commands"},
    {"cli"},
    {"__main__"},
)
MODEL_MAY_IMPORT = {"config", "errors", "model"}
DISTRIBUTED = ("torch.distributed", "deepspeed")
OPTIONAL_LIBRARIES = (
    "mamba_ssm",
    "causal_conv1d",
    "flash_attn",
    "transformer_engine",
    "math_verify",
    "lm_eval",
)
FORBIDDEN_IMPORTS = ("pickle", "cPickle", "dill", "cloudpickle", "shelve", "joblib")
FORBIDDEN_CALLS = ("torch.load", "eval", "exec", "os.system")
FORBIDDEN_TRUE = ("trust_remote_code", "allow_pickle", "shell")
WRITING_MODES = {"w", "wb", "x", "xb", "w+b", "r+b"}  # a log may be appended to
WRITING_CALL = re.compile(r"os\.fsync|(?!writer\.).*\.write_(text|bytes)")
LONGEST_FILE = 500
READING_DATA = {
    "added_tokens", "alternating", "batch", "loader", "packing", "store", "template_files",
    "tokenizer",
}  # fmt: skip
"""Modules of nemo_hybrid/data that training reads with; the others make what it reads."""
MAKERS = {
    "commands/prepare": {"documents", "preview", "samples"},
    "recipes/pretrain": {"documents"},
    "recipes/finetune": {"samples", "template"},
    "recipes/curriculum": {"prompts"},
    "recipes/reinforce": {"prompts", "template"},
    "recipes/rollouts": {"prompts"},
    "commands/generate": {"chat", "prompts", "sources"},
    "commands/rollout": {"prompts"},
    "commands/exact_match": {"prompts"},
    "generation/harness": {"prompts"},
    "export/calibrate": {"sources"},
}
"""Who may make data, or asks what a file is, and by which modules."""

SOURCES = sorted(
    p.relative_to(ROOT).as_posix()
    for folder in ("nemo_hybrid", "kernels", "scripts")
    for p in (ROOT / folder).rglob("*.py")
)


@cache
def parsed(path: str) -> ast.Module:
    return ast.parse((ROOT / path).read_text(encoding="utf-8"))


def nodes(tree: ast.AST, lazy: bool = True) -> Iterator[ast.AST]:
    """All nodes of a tree but those under ``if TYPE_CHECKING``; ``lazy``: in functions too."""
    for child in ast.iter_child_nodes(tree):
        if isinstance(child, ast.If) and ast.unparse(child.test).endswith("TYPE_CHECKING"):
            for statement in child.orelse:
                yield statement
                yield from nodes(statement, lazy)
        elif lazy or not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            yield child
            yield from nodes(child, lazy)


@cache
def imported(tree: ast.Module, lazy: bool = True) -> set[str]:
    """Dotted names of everything a file imports; ``lazy``: in functions too."""
    names = set()
    for node in nodes(tree, lazy):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert not node.level, "relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Call) and ast.unparse(node.func).endswith("import_module"):
            names |= {a.value for a in node.args if isinstance(a, ast.Constant)}
        elif isinstance(node, ast.Attribute) and node.attr == "distributed":
            names.add(ast.unparse(node))
    return names


def starts(name: str, prefix: str) -> bool:
    return name == prefix or name.startswith(f"{prefix}.")


def height(room: str) -> int:
    found = [i for i, rooms in enumerate(ROOMS) if room in rooms]
    assert found, f"nemo_hybrid.{room} has no place: add it to ROOMS"
    return found[0]


def import_faults(path: str, tree: ast.Module) -> list[str]:
    """What a file imports against the rules, in words."""
    names = imported(tree)
    faults = []
    if path.startswith("kernels/nemo_kernels/"):
        own = {"torch", "triton", "nemo_kernels", *sys.stdlib_module_names}
        for name in names:
            if name.split(".")[0] not in own and not path.endswith("/external.py"):
                faults.append(f"{path} imports {name}")
        return faults
    if not path.startswith("nemo_hybrid/") or path == "nemo_hybrid/__init__.py":
        return faults
    room = path.removesuffix(".py").split("/")[1]
    rooms = {name.split(".")[1] for name in names if name.startswith("nemo_hybrid.")}
    for other in sorted(rooms - {"__version__", room}):
        if other in ("HybridConfig", "HybridLM", "UserError"):
            faults.append(f"{path} imports {other} from the package: name its module")
            continue
        if height(other) >= height(room):
            faults.append(f"{path} ({room}) imports nemo_hybrid.{other}, which is not below it")
        if room == "model" and other not in MODEL_MAY_IMPORT:
            faults.append(f"{path} imports nemo_hybrid.{other}; model knows only options")
    if room != "parallel":
        for name in names:
            faults += [f"{path} imports {name}" for m in DISTRIBUTED if starts(name, m)]
    return faults


def circles(imports: Mapping[str, set[str]]) -> set[frozenset[str]]:
    """Modules that import each other, directly or by way of others (strongly connected)."""
    reached: dict[str, set[str]] = {}
    for module in imports:
        reached[module], waiting = set(), [module]
        while waiting:
            found = imports[waiting.pop()] - reached[module]
            reached[module] |= found
            waiting += found
    return {
        frozenset(other for other in imports if other in reached[m] and m in reached[other])
        for m in imports
        if m in reached[m]
    }


def top_level_imports() -> dict[str, set[str]]:
    """Modules of ours by those that import them when they are imported themselves."""
    modules = {
        path.removeprefix("kernels/")
        .removesuffix(".py")
        .removesuffix("/__init__")
        .replace("/", "."): path
        for path in SOURCES
        if path.startswith(("nemo_hybrid/", "kernels/nemo_kernels/"))
    }
    return {
        module: {
            known
            for name in imported(parsed(path), lazy=False)
            for known in (name, name.rpartition(".")[0])
            if known in modules and known != module
        }
        for module, path in modules.items()
    }


def write_faults(path: str, tree: ast.Module) -> list[str]:
    """Writing, syncing and renaming of files elsewhere than in nemo_hybrid/files.py."""
    faults = []
    if not path.startswith("nemo_hybrid/") or path == "nemo_hybrid/files.py":
        return faults
    for node in nodes(tree):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        modes = {a.value for a in node.args[:2] if isinstance(a, ast.Constant)} & WRITING_MODES
        writes = called.split(".")[-1] == "open" and modes
        if writes or WRITING_CALL.fullmatch(called):
            faults.append(f"{path}:{node.lineno} calls {called}: nemo_hybrid.files does that")
    return faults


def unsafe(path: str, tree: ast.Module) -> list[str]:
    """Pickle, code execution, remote code."""
    faults = [
        f"{path} imports {name}"
        for name in imported(tree)
        if name.split(".")[0] in FORBIDDEN_IMPORTS
    ]
    for node in nodes(tree):
        if isinstance(node, ast.Call):
            called = ast.unparse(node.func)
            if called in FORBIDDEN_CALLS:
                faults.append(f"{path}:{node.lineno} calls {called}")
            for keyword in node.keywords:
                # Absent and False are the safe values of all of them.
                value = ast.unparse(keyword.value)
                if keyword.arg in FORBIDDEN_TRUE and value != "False":
                    faults.append(f"{path}:{node.lineno} sets {keyword.arg}={value}")
    return faults


@pytest.mark.parametrize("path", SOURCES)
def test_source_file(path: str) -> None:
    tree = parsed(path)
    assert import_faults(path, tree) == []
    assert unsafe(path, tree) == []
    assert write_faults(path, tree) == []
    assert len((ROOT / path).read_text(encoding="utf-8").splitlines()) <= LONGEST_FILE


def test_no_circle_of_imports() -> None:
    assert circles(top_level_imports()) == set()


def test_circles_are_noticed() -> None:
    imports = {"a": {"b"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"e"}}
    assert circles(imports) == {frozenset("bc"), frozenset("e")}
    real = top_level_imports()
    assert "nemo_hybrid.config.model" in real["nemo_hybrid.config.hf"]
    assert "nemo_hybrid.train.loop" not in real["nemo_hybrid.commands.train"]  # in a function
    real["nemo_hybrid.config.model"].add("nemo_hybrid.config.run")
    assert any("nemo_hybrid.config.model" in circle for circle in circles(real))


def test_each_optional_library_is_imported_in_one_file() -> None:
    names = {path: [*imported(parsed(path))] for path in SOURCES}
    for library in OPTIONAL_LIBRARIES:
        users = [path for path in SOURCES if any(starts(name, library) for name in names[path])]
        assert len(users) <= 1, f"{library} is imported in {users}"


def making_faults(path: str, tree: ast.Module) -> list[str]:
    """Modules that make data imported by those that read it, or by others than MAKERS."""
    own = path.removeprefix("nemo_hybrid/").removesuffix(".py")
    reads = own.startswith("data/") and own.split("/")[1] in READING_DATA
    if not path.startswith("nemo_hybrid/") or (own.startswith("data/") and not reads):
        return []
    makers = {
        name.split(".")[2]
        for name in imported(tree)
        if name.startswith("nemo_hybrid.data.") and name.split(".")[2] not in READING_DATA
    }
    return [f"{path} imports data.{name}" for name in makers - MAKERS.get(own, set())]


def test_data_is_made_in_one_place() -> None:
    assert [fault for path in SOURCES for fault in making_faults(path, parsed(path))] == []
    for path in ("nemo_hybrid/data/store.py", "nemo_hybrid/train/a.py"):
        tree = ast.parse("def f():\n    from nemo_hybrid.data.making import draw")
        assert making_faults(path, tree) == [f"{path} imports data.making"]
    assert not making_faults("nemo_hybrid/data/samples.py", tree)


@pytest.mark.parametrize("folder", ["kernels", "scripts", "configs", "tests"])
def test_plain_folders_are_not_packages(folder: str) -> None:
    """kernels/__init__.py would shadow the package ``kernels``; tests run in importlib mode."""
    assert not (ROOT / folder / "__init__.py").exists()
    if folder != "kernels":
        assert not list((ROOT / folder).rglob("__init__.py"))


def test_test_files_have_different_names() -> None:
    names = [p.name for p in (ROOT / "tests").rglob("test_*.py")]
    assert len(names) == len(set(names))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("nemo_hybrid/config/a.py", "import nemo_hybrid.data.store"),
        ("nemo_hybrid/files.py", "from nemo_hybrid.checkpoint.directory import Writer"),
        ("nemo_hybrid/data/a.py", "from nemo_hybrid.model.hybrid import HybridLM"),
        ("nemo_hybrid/model/a.py", "def f():\n    from nemo_hybrid.checkpoint import load"),
        ("nemo_hybrid/data/a.py", "from nemo_hybrid import HybridLM"),
        ("nemo_hybrid/data/a.py", "from nemo_hybrid import train"),
        ("nemo_hybrid/data/a.py", "def f():\n    import nemo_hybrid.train.loop"),
        ("nemo_hybrid/model/a.py", "from nemo_hybrid.files import x"),
        ("nemo_hybrid/model/a.py", "from nemo_hybrid.checkpoint import load"),
        ("nemo_hybrid/train/a.py", "from nemo_hybrid.export.layout import Target"),
        ("nemo_hybrid/precision/a.py", "from nemo_hybrid.checkpoint.names import is_stacked"),
        ("nemo_hybrid/train/a.py", "def f():\n    from nemo_hybrid.commands.prepare import x"),
        ("nemo_hybrid/checkpoint/a.py", "from nemo_hybrid.commands.export import ExportOptions"),
        ("nemo_hybrid/train/a.py", "import torch.distributed as dist"),
        ("nemo_hybrid/train/a.py", "from torch import distributed"),
        ("nemo_hybrid/train/a.py", "import torch\ntorch.distributed.barrier()"),
        ("nemo_hybrid/train/a.py", "import importlib\nimportlib.import_module('deepspeed')"),
        ("kernels/nemo_kernels/a.py", "from nemo_hybrid.errors import UserError"),
        ("kernels/nemo_kernels/ssd/kernel.py", "import mamba_ssm"),
    ],
)
def test_import_rules_notice(path: str, source: str) -> None:
    assert import_faults(path, ast.parse(source))


@pytest.mark.parametrize(
    ("path", "source"),
    [
        ("nemo_hybrid/train/a.py", "from nemo_hybrid.parallel.world import World"),
        ("nemo_hybrid/data/a.py", "from nemo_hybrid.files import write_file"),
        ("nemo_hybrid/data/a.py", "if TYPE_CHECKING:\n    from nemo_hybrid.train import loop"),
        ("nemo_hybrid/parallel/a.py", "import deepspeed"),
        ("nemo_hybrid/cli.py", "from nemo_hybrid import __version__"),
        ("kernels/nemo_kernels/ssd/external.py", "import mamba_ssm, torch"),
    ],
)
def test_import_rules_allow(path: str, source: str) -> None:
    assert import_faults(path, ast.parse(source)) == []


@pytest.mark.parametrize(
    "call", ["os.fsync(f)", "open(p, 'xb')", "p.open('wb')", "p.write_text('')"]
)
def test_writing_rule_notices(call: str) -> None:
    assert write_faults("nemo_hybrid/train/a.py", ast.parse(call))
    assert not write_faults("nemo_hybrid/files.py", ast.parse(call))
    reading = ast.parse("open(p, 'rb')\np.open('ab')\nopen(p)")
    assert not write_faults("nemo_hybrid/train/a.py", reading)


@pytest.mark.parametrize(
    "source",
    [
        "import pickle",
        "import torch\ntorch.load('x')",
        "f(trust_remote_code=True)",
        "np.load(p, allow_pickle=flag)",
        "subprocess.run(x, shell=True)",
        "eval('1')",
    ],
)
def test_safety_rules_notice(source: str) -> None:
    assert unsafe("a.py", ast.parse(source))
    safe = ast.parse("f(trust_remote_code=False)\nmodel.eval()\nyaml.load(x, Loader=L)")
    assert not unsafe("a.py", safe)
