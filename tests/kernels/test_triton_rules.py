"""Rules that every Triton kernel keeps, read off its source: compute in fp32, cast at the store.

* A loaded float is widened by ``.to(tl.float32)``, or is an operand of ``tl.dot``, or is stored.
* A narrower float exists only as the value of a store or an operand of ``tl.dot`` or
  ``tl.dot_scaled``. It may be
  widened again where the rounded value is what counts.
* No atomic operation whose result depends on an order, and no tuning at run time.

What is loaded is an integer where all launches give the pointer a tensor of integers.
"""

import ast
import re
from functools import cache
from importlib import import_module
from pathlib import Path

import kernel_launches
import pytest
import torch

from nemo_kernels import launch

PACKAGE = Path(launch.__file__).parent
MODULES = (
    "nemo_kernels.ssd.chunk_kernel",
    "nemo_kernels.conv1d.tap_kernel",
    "nemo_kernels.moe.sort_kernel",
    "nemo_kernels.moe.router_kernel",
    "nemo_kernels.moe.expert_kernel",
    "nemo_kernels.lowp.gemm_kernel",
    "nemo_kernels.lowp.quantize_kernel",
    "nemo_kernels.loss.softmax_kernel",
    "nemo_kernels.norm.gated_kernel",
)
NARROW = ("bfloat16", "float16", "float8e4nv", "float8e5")
EXACT_CAST = {"tl.float32", "tl.int1", "tl.int32", "tl.int64"}
IN_ANY_ORDER = {"tl.atomic_max", "tl.atomic_min"}
NARROW_ARGUMENTS = {("tl.dot", 0), ("tl.dot", 1), ("tl.store", 1)} | {
    ("tl.dot_scaled", place) for place in (0, 1, 3, 4)
}
REARRANGING = {"tl.trans", "tl.permute", "tl.reshape"}
TUNING = ("autotune", "heuristics")


@cache
def launched() -> dict[str, dict[str, set[str]]]:
    """For each module the types under which tensors are given to its pointer arguments."""
    kinds: dict[str, dict[str, set[str]]] = {}
    for one, _ in kernel_launches.launches():
        of_module = kinds.setdefault(one.kernel.fn.__module__, {})
        for name, argument in zip(one.kernel.arg_names, one.arguments, strict=False):
            if isinstance(argument, torch.Tensor):
                kind = str(argument.dtype).replace("torch.", "*")
                of_module.setdefault(name, set()).add(kind)
    return kinds


class Kernel:
    """One function below ``@triton.jit``."""

    def __init__(self, function: ast.FunctionDef, kinds: dict[str, set[str]]) -> None:
        self.function, self.kinds = function, kinds
        self.parent = {c: p for p in ast.walk(function) for c in ast.iter_child_nodes(p)}
        self.assigned: dict[str, list[ast.expr]] = {}
        for node in ast.walk(function):
            if isinstance(node, (ast.Assign, ast.AugAssign)):
                targets = node.targets if isinstance(node, ast.Assign) else [node.target]
                for name in (n.id for t in targets for n in ast.walk(t) if isinstance(n, ast.Name)):
                    self.assigned.setdefault(name, []).append(node.value)

    def pointers(self, address: ast.expr, seen: frozenset[str] = frozenset()) -> set[str]:
        """Declared pointers that an address is made of; not those that are only read for it."""
        if isinstance(address, ast.Call) and called(address) == "tl.load":
            return set()
        found = set()
        for node in [address, *ast.iter_child_nodes(address)]:
            if isinstance(node, ast.Name) and node.id in self.kinds:
                found.add(node.id)
            elif isinstance(node, ast.Name) and node.id not in seen:
                for value in self.assigned.get(node.id, []):
                    found |= self.pointers(value, seen | {node.id})
            elif node is not address and isinstance(node, ast.expr):
                found |= self.pointers(node, seen)
        return found

    def loads_integers(self, load: ast.Call) -> bool:
        pointers = self.pointers(load.args[0])
        kinds = {kind for name in pointers for kind in self.kinds[name]}
        return bool(kinds) and all(kind.startswith(("*i", "*u")) for kind in kinds)

    def stays_narrow(self, node: ast.expr) -> bool:
        """Whether a value of another type than fp32 is only stored, multiplied by ``tl.dot`` or
        widened, here and wherever it is under the name to which it is assigned."""
        parent = self.parent[node]
        if isinstance(parent, ast.Assign) and isinstance(parent.targets[0], ast.Name):
            name = parent.targets[0].id
            uses = [
                n
                for n in ast.walk(self.function)
                if isinstance(n, ast.Name) and n.id == name and isinstance(n.ctx, ast.Load)
            ]
            return all(self.stays_narrow(use) for use in uses)
        if isinstance(parent, ast.keyword):
            return parent.arg == "value" and called(self.parent[parent]).endswith("store")
        if isinstance(parent, ast.Attribute) and parent.attr in ("dtype", "shape"):
            return True
        if isinstance(parent, ast.Attribute) and parent.attr == "T":
            return self.stays_narrow(parent)
        if isinstance(parent, ast.Attribute) and parent.attr == "to":
            return ast.unparse(self.parent[parent].args[0]) in EXACT_CAST
        if not isinstance(parent, ast.Call) or node not in parent.args:
            return False
        place = parent.args.index(node)
        if called(parent) in REARRANGING and place == 0:
            return self.stays_narrow(parent)
        return (called(parent), place) in NARROW_ARGUMENTS or (
            called(parent).endswith(".store") and place == 1  # of a tensor descriptor
        )

    def faults(self) -> list[str]:
        decorators = " ".join(ast.unparse(d) for d in self.function.decorator_list)
        faults = [f"tuned by {t}" for t in TUNING if t in decorators]
        for node in ast.walk(self.function):
            if isinstance(node, ast.Attribute) and node.attr in NARROW and not self.in_cast(node):
                faults.append(f"line {node.lineno}: makes a value of {ast.unparse(node)}")
            if isinstance(node, ast.Call):
                fault = self.fault_of_call(node, called(node))
                faults += [f"line {node.lineno}: {fault}"] if fault else []
        return faults

    def fault_of_call(self, node: ast.Call, name: str) -> str:
        if name.startswith("tl.atomic") and name not in IN_ANY_ORDER:
            return f"{name} depends on an order"
        if name == "tl.cast":
            return f"write {ast.unparse(node)} as .to(...)"
        from_descriptor = name.endswith((".load", ".gather")) and not name.startswith("tl.")
        loads_floats = from_descriptor or (name == "tl.load" and not self.loads_integers(node))
        rounds = name.endswith(".to") and not self.widens(node)
        if (loads_floats or rounds) and not self.stays_narrow(node):
            return f"computes with {ast.unparse(node)}"
        return ""

    def in_cast(self, node: ast.Attribute) -> bool:
        parent = self.parent[node]
        return isinstance(parent, ast.Call) and called(parent).endswith(".to")

    @staticmethod
    def widens(cast: ast.Call) -> bool:
        bits = any(k.arg == "bitcast" for k in cast.keywords)
        return ast.unparse(cast.args[0]) in EXACT_CAST | ({"tl.uint32"} if bits else set())


def called(node: ast.AST) -> str:
    return ast.unparse(node.func) if isinstance(node, ast.Call) else ""


def faults(source: str, kinds: dict[str, set[str]]) -> list[str]:
    """What the kernels of a module do against the rules, in words."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.FunctionDef) and any(
            "triton." in ast.unparse(d) for d in node.decorator_list
        ):
            found += [f"{node.name}: {fault}" for fault in Kernel(node, kinds).faults()]
    return found


def source_of(module: str) -> str:
    return Path(str(import_module(module).__file__)).read_text("utf-8")


def test_every_kernel_module_is_known() -> None:
    files = {p.relative_to(PACKAGE.parent).as_posix() for p in PACKAGE.rglob("*.py")}
    with_kernels = {f for f in files if "\n@triton.jit" in (PACKAGE.parent / f).read_text("utf-8")}
    assert with_kernels == {f"{m.replace('.', '/')}.py" for m in MODULES}
    assert set(launched()) == set(MODULES)


def test_every_kernel_is_launched_by_launch_and_recorded() -> None:
    recorded = {launch.kernel.__name__ for launch, _ in kernel_launches.launches()}
    for module in MODULES:
        functions = [n for n in ast.parse(source_of(module)).body if isinstance(n, ast.FunctionDef)]
        kernels = {
            f.name
            for f in functions
            if f.name.endswith("_kernel") and any("jit" in ast.unparse(d) for d in f.decorator_list)
        }
        assert kernels
        assert kernels <= recorded
    for file in PACKAGE.rglob("*.py"):
        calls = (n for n in ast.walk(ast.parse(file.read_text("utf-8"))) if isinstance(n, ast.Call))
        direct = [ast.unparse(c) for c in calls if re.search(r"kernel\[.*\]$", ast.unparse(c.func))]
        assert bool(direct) == (file.name == "launch.py"), direct


@pytest.mark.parametrize("name", MODULES)
def test_kernels_keep_the_rules(name: str) -> None:
    source = source_of(name)
    assert "@triton.jit" in source
    assert faults(source, launched()[name]) == []


def test_forgotten_widening_is_found() -> None:
    widened = re.compile(r"(other=[\d.]+\))\.to\(tl\.float32\)")
    found = 0
    for name in MODULES:
        source, kinds = source_of(name), launched()[name]
        for match in widened.finditer(source):
            changed = source[: match.start()] + match[1] + source[match.end() :]
            assert faults(changed, kinds), match.string[match.start() - 60 : match.end()]
            found += 1
    assert found > 8


KINDS = {"x": {"*bf16"}, "y": {"*bf16", "*fp32"}, "ids": {"*i32"}}
GOOD = {
    "widened": "a = tl.load(x + at, mask=m).to(tl.float32)\ntl.store(y + at, a * 2, mask=m)",
    "cast at the store": "tl.store(y + at, (a * 2).to(y.dtype.element_ty), mask=m)",
    "cast for a store": "b = a.to(y.dtype.element_ty)\ntl.store(y, b)\nc = b.to(tl.float32) * 2",
    "copied": "tl.store(y + at, tl.load(x + at))",
    "operands": "a = tl.load(x)\nb = tl.load(x)\nacc = tl.dot(tl.trans(a), b, acc)\nb.dtype",
    "cast operand": "acc = tl.dot(p.to(x.dtype.element_ty), tl.load(x).T, acc)",
    "scaled": "a = tl.load(x)\nacc = tl.dot_scaled(a, tl.load(x), f, a.T, tl.load(x), f, acc)",
    "integers": "row = ids + 3\ni = tl.load(row + at) + 1\na = tl.load(x + i).to(tl.float32)",
    "index within an address": "a = tl.load(x + tl.load(ids) * 2).to(tl.float32)",
    "bits": "b = a.to(tl.int32, bitcast=True) >> 1",
    "maximum in any order": "tl.atomic_max(ids, b)",
}
BAD = {
    "bf16 arithmetic": "a = tl.load(x + at)\nb = a * 2",
    "bf16 argument": "a = tl.exp(tl.load(x + at))",
    "one use too many": "a = tl.load(x)\nacc = tl.dot(a, a, acc)\nb = tl.sum(a, 0)",
    "unknown pointer": "a = tl.load(z + at) * 2",
    "bf16 compared": "a = tl.load(x + at)\nm = a > 0",
    "float beside an integer": "row = x + ids\na = tl.load(row) + 1",
    "cast too early": "a = a.to(tl.bfloat16)\nb = a + 1\ntl.store(y, b)",
    "cast to the output's type": "b = a.to(y.dtype.element_ty) * 2\ntl.store(y, b)",
    "cast within a store's value": "tl.store(y, a.to(tl.bfloat16) + b.to(tl.bfloat16))",
    "cast as a mask": "tl.store(y, a, mask=b.to(tl.bfloat16))",
    "narrow sum": "acc = tl.zeros([8], dtype=tl.bfloat16)",
    "cast function": "a = tl.cast(b, tl.float32)",
    "returned": "return tl.load(x)",
    "descriptor": "a = desc.load([0, 0]) * 2",
    "atomic sum": "tl.atomic_add(y + at, a)",
    "narrow accumulator of scaled": "acc = tl.dot_scaled(a, s, f, b, s, f, acc.to(tl.float16))",
    "narrow accumulator": "acc = tl.dot(a, b, acc.to(tl.float16))",
}


def snippet(body: str, decorator: str = "@triton.jit") -> str:
    lines = "\n    ".join(body.splitlines())
    return f"{decorator}\ndef kernel(x, y, ids, at, m):\n    {lines}\n"


@pytest.mark.parametrize("name", GOOD)
def test_good_kernels_pass(name: str) -> None:
    assert faults(snippet(GOOD[name]), KINDS) == []


@pytest.mark.parametrize("name", BAD)
def test_bad_kernels_are_found(name: str) -> None:
    assert faults(snippet(BAD[name]), KINDS)


def test_tuning_is_found() -> None:
    decorator = "@triton.autotune(configs=[], key=[])\n@triton.jit"
    assert faults(snippet("tl.store(y, 0.0)", decorator), KINDS) == ["kernel: tuned by autotune"]
    assert faults(snippet("tl.store(y, 0.0)"), KINDS) == []
