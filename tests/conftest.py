"""What all tests share. It imports only pytest: GPU tests run on machines that have little else."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest

# Read by tensor libraries when they load, here and in the processes that tests start: one thread is
# enough for the models of the tests, and files that run side by side do not crowd each other out.
os.environ.setdefault("OMP_NUM_THREADS", "1")

GPU_TESTS = Path(__file__).with_name("gpu")


def pytest_configure(config: pytest.Config) -> None:
    """Choose how hypothesis searches: the same examples on every CI run, new ones elsewhere."""
    if importlib.util.find_spec("hypothesis") is None:
        return
    from hypothesis import settings

    settings.register_profile("local", deadline=None)
    settings.register_profile("ci", deadline=None, derandomize=True, database=None)
    settings.load_profile("ci" if "CI" in os.environ else "local")


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Collect only the GPU tests when only they are asked for: others import more packages."""
    if config.option.markexpr != "gpu":
        return None
    on_the_way = collection_path == GPU_TESTS or collection_path in GPU_TESTS.parents
    return None if on_the_way or GPU_TESTS in collection_path.parents else True


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Mark the GPU tests by their place, before they are selected by their mark."""
    for item in items:
        if GPU_TESTS in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(scope="session")
def repository() -> Path:
    """Root of the checkout."""
    return Path(__file__).parents[1]


@pytest.fixture(scope="session")
def embedded_dir() -> Path:
    """Directory of the embedded model in the installed package."""
    import headrace

    return Path(headrace.__file__).parent / "assets" / "embedded"
