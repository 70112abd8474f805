"""Rules that the source keeps: size, devices, environment, unfinished work."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path

import pytest

from headrace.config import EngineConfig
from headrace.methods import ROOMS, find_method, known_methods
from tests.house.source import PACKAGE, docstrings, parse, python_files, relative, room

FILE_LINES = 800
FUNCTION_LINES = 80
CORE_LINES = 12_000
METHOD_LINES = 150
CORE = ("config", "contracts", "engine", "errors", "exec", "kv", "models", "ops", "registry")
CONFIG_FIELDS = 60

DEVICE_MODULES = {"cuda", "mps", "xpu", "accelerator"}
DEVICE_ATTRIBUTES = {"is_cuda", "is_mps", "is_xpu", "pin_memory"}
DEVICE_NAME = re.compile(r"(cuda|mps|xpu|hip)(:\d+)?")


def count_lines(path: Path) -> int:
    """Lines of a file, blank ones and comments included."""
    return len(path.read_text(encoding="utf-8").splitlines())


def count_text(path: Path) -> int:
    """Lines of a file that are not blank."""
    return sum(bool(line.strip()) for line in path.read_text(encoding="utf-8").splitlines())


def is_core(path: Path) -> bool:
    """Whether a file is of the core: neither a method nor an architecture."""
    module = ".".join(path.relative_to(PACKAGE.parent).with_suffix("").parts)
    parent = module.rpartition(".")[0]
    architecture = parent == "headrace.models" and path.name != "base.py"
    return room(path) in CORE and parent not in ROOMS and not architecture


def long_functions(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, name) of every function over the limit, decorators not counted."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert node.end_lineno is not None
            if node.end_lineno - node.lineno + 1 > FUNCTION_LINES:
                yield node.lineno, node.name


def device_uses(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of everything that is written for one kind of device."""
    documentation = docstrings(tree)
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = node.value
            if node.attr in DEVICE_MODULES and isinstance(owner, ast.Name) and owner.id == "torch":
                yield node.lineno, f"torch.{node.attr}"
            elif node.attr in DEVICE_ATTRIBUTES:
                yield node.lineno, f".{node.attr}"
            elif node.attr == "type" and _is_device(owner):
                yield node.lineno, "device.type"
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            if node.func.attr in DEVICE_MODULES:
                yield node.lineno, f".{node.func.attr}()"
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            if id(node) not in documentation and DEVICE_NAME.fullmatch(node.value):
                yield node.lineno, repr(node.value)
        elif isinstance(node, ast.Import | ast.ImportFrom):
            names = {alias.name for alias in node.names} | {getattr(node, "module", "") or ""}
            if any(re.match(r"triton\b|torch\.(cuda|mps|xpu)\b", name) for name in names):
                yield node.lineno, "import for one device"


def _is_device(owner: ast.expr) -> bool:
    name = owner.attr if isinstance(owner, ast.Attribute) else getattr(owner, "id", "")
    return name == "device" or name.endswith("_device")


def environment_reads(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """(line, what) of every look at the environment's variables."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in ("environ", "getenv", "environb"):
            yield node.lineno, node.attr
        elif isinstance(node, ast.ImportFrom) and node.module == "os":
            names = [alias.name for alias in node.names]
            yield from ((node.lineno, name) for name in names if name in ("environ", "getenv"))
        elif isinstance(node, ast.keyword) and node.arg in ("envvar", "auto_envvar_prefix"):
            yield node.value.lineno, node.arg


def test_files_are_short() -> None:
    lengths = {relative(path): count_lines(path) for path in python_files()}
    assert lengths, "no Python file found"
    assert {path: n for path, n in lengths.items() if n > FILE_LINES} == {}


def test_functions_are_short() -> None:
    found = [
        f"{relative(path)}:{line} {name}"
        for path in python_files()
        for line, name in long_functions(parse(path))
    ]
    assert found == []


def test_the_core_stays_small() -> None:
    package = [path for path in python_files() if path.is_relative_to(PACKAGE)]
    core = [path for path in package if is_core(path)]
    assert PACKAGE / "config.py" in core
    assert PACKAGE / "models" / "llama.py" not in core
    assert sum(map(count_text, core)) < CORE_LINES


def test_methods_are_small_and_known_to_their_files_alone() -> None:
    sources = {path: path.read_text(encoding="utf-8").lower() for path in PACKAGE.rglob("*.py")}
    methods = known_methods()
    assert len(methods) > 10
    for name, module in methods.items():
        own = PACKAGE.parent / (module.replace(".", "/") + ".py")
        assert count_lines(own) <= METHOD_LINES, name
        words = {name, name.replace("-", "_"), find_method(name).__name__.lower()}
        found = [
            relative(path)
            for path, text in sources.items()
            if path != own and any(re.search(rf"\b{word}\b", text) for word in words)
        ]
        assert found == [], f"{name} is known elsewhere"


def test_configuration_stays_small() -> None:
    assert len(fields(EngineConfig)) <= CONFIG_FIELDS


def test_devices_are_known_only_in_ops() -> None:
    outside = [path for path in PACKAGE.rglob("*.py") if room(path) != "ops"]
    found = [
        f"{relative(path)}:{line} {what}"
        for path in outside
        for line, what in device_uses(parse(path))
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "torch.cuda.synchronize()",
        "free = torch.mps.current_allocated_memory",
        "x = x.cuda()",
        "fast = x.is_cuda",
        "if x.device.type == other: pass",
        "if self.kv_device.type in kinds: pass",
        "x.to('cuda:1')",
        "def f(device='cuda'): ...",
        "from torch.cuda import graphs",
        "import triton.language as tl",
        "x = x.pin_memory()",
    ],
)
def test_the_device_check_finds(source: str) -> None:
    assert list(device_uses(ast.parse(source)))


def test_the_device_check_lets_pass() -> None:
    source = (
        '"""Runs on cuda."""\nx = x.to(device)\ny = x.cpu()\nhelp = "cuda or cpu"\nz = a.type\n'
    )
    assert list(device_uses(ast.parse(source))) == []


def test_no_behaviour_hides_in_the_environment() -> None:
    found = [
        f"{relative(path)}:{line} {what}"
        for path in PACKAGE.rglob("*.py")
        for line, what in environment_reads(parse(path))
    ]
    assert found == []


@pytest.mark.parametrize(
    "source",
    ["os.environ['X']", "os.getenv('X')", "from os import environ", "Option(envvar='X')"],
)
def test_the_environment_check_finds(source: str) -> None:
    assert list(environment_reads(ast.parse(source)))


def test_nothing_is_left_for_later() -> None:
    words = ("TO_DO", "FIX_ME", "XX_X", "HA_CK")  # written so as not to find themselves
    mark = re.compile(rf"\b({'|'.join(words).replace('_', '')})\b")
    found = [
        f"{relative(path)}:{number}"
        for path in python_files()
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1)
        if mark.search(line)
    ]
    assert found == []
