"""What loads what: the package under test, light imports, and the packages each room may use."""

from __future__ import annotations

import subprocess
import sys
import sysconfig
from importlib.metadata import packages_distributions, requires
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import headrace
from tests.house.source import PACKAGE, imported_modules, parse, relative, room

COMPUTING_ROOMS = ("engine", "exec", "kv", "models", "ops", "weights")
HUB = PACKAGE / "weights" / "hub.py"
COMPUTING_PACKAGES = {"torch", "numpy", "safetensors", "tokenizers", "jinja2"}
BEYOND_COMPUTING = (
    "fastapi httpx huggingface_hub msgspec openai prometheus_client pydantic rich starlette "
    "transformers typer uvicorn"
)
COMPANIONS = {"pydantic-core": "pydantic", "starlette": "fastapi"}
"""Packages that are one with a declared one, which pins them."""


def run_python(code: str, cwd: Path) -> str:
    """Run code in a fresh interpreter and return what it printed."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


def third_party(path: Path) -> set[tuple[int, str]]:
    """(line, top-level package) of a file's imports from outside the standard library."""
    modules = {(line, name.partition(".")[0]) for line, name in imported_modules(parse(path))}
    own = sys.stdlib_module_names | {"headrace"}
    return {(line, name) for line, name in modules if name not in own}


def test_tests_run_on_the_installed_package(repository: Path) -> None:
    assert Path(headrace.__file__).parent == Path(sysconfig.get_path("purelib")) / "headrace"
    assert str(repository / "src") not in {str(Path(entry).resolve()) for entry in sys.path}


def test_the_installed_package_is_the_checkout() -> None:
    installed = Path(headrace.__file__).parent
    for path in PACKAGE.rglob("*.py"):
        copy = installed / path.relative_to(PACKAGE)
        assert copy.is_file(), f"{relative(path)} is not installed: run pip install again"
        assert copy.read_bytes() == path.read_bytes(), f"{relative(path)} is newer: install again"


@pytest.mark.parametrize(
    "module",
    ["headrace", "headrace.config", "headrace.contracts.step", "headrace.engine"],
)
def test_importing_is_light(module: str, tmp_path: Path) -> None:
    heavy = ("torch", "fastapi", "uvicorn", "transformers", "tokenizers", "headrace.server")
    code = f"import sys, {module}; print([name for name in {heavy!r} if name in sys.modules])"
    assert run_python(code, tmp_path) == "[]"


def test_the_command_line_starts_light(tmp_path: Path) -> None:
    code = "import sys, headrace.cli; print([n for n in ('torch', 'fastapi') if n in sys.modules])"
    assert run_python(code, tmp_path) == "[]"


def test_computing_rooms_use_few_packages() -> None:
    found = [
        f"{relative(path)}:{line} {name}"
        for path in PACKAGE.rglob("*.py")
        if room(path) in COMPUTING_ROOMS and path != HUB
        for line, name in third_party(path)
        if name not in COMPUTING_PACKAGES
    ]
    assert found == []
    assert {name for _, name in third_party(HUB)} == {"huggingface_hub"}


def test_generating_needs_only_the_computing_packages(tmp_path: Path) -> None:
    """As on a machine that has nothing else, where GPU tests run."""
    code = f"""
import sys
sys.modules.update(dict.fromkeys({BEYOND_COMPUTING.split()!r}))
from headrace import LLM, SamplingParams
with LLM(max_model_len=64) as llm:
    (output,) = llm.generate("import os", SamplingParams(max_tokens=3, ignore_eos=True))
print(len(output.outputs[0].token_ids))
"""
    assert run_python(code, tmp_path) == "3"


def test_declared_and_imported_packages_are_the_same() -> None:
    """Nothing is used that an install would not bring, and nothing is installed for nothing."""
    requirements = map(Requirement, requires("headrace") or ())
    declared = {
        canonicalize_name(r.name)
        for r in requirements
        if r.marker is None or r.marker.evaluate({"extra": "plots"})
    }
    distributions = packages_distributions()
    imported = {name for path in PACKAGE.rglob("*.py") for _, name in third_party(path)}
    owners = {canonicalize_name(owner) for name in imported for owner in distributions[name]}
    assert {COMPANIONS.get(owner, owner) for owner in owners} == declared
