"""What an install brings along."""

from __future__ import annotations

from importlib.metadata import distribution

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

MOST_PACKAGES = 50


def required(package: str, extras: frozenset[str]) -> set[tuple[str, frozenset[str]]]:
    """The direct requirements of an installed package, in this environment."""
    found = set()
    for requirement in map(Requirement, distribution(package).requires or ()):
        marker = requirement.marker
        if marker is None or any(marker.evaluate({"extra": e}) for e in extras | {""}):
            found.add((canonicalize_name(requirement.name), frozenset(requirement.extras)))
    return found


def test_an_install_brings_few_packages() -> None:
    closure = {("headrace", frozenset[str]())}
    pending = list(closure)
    while pending:
        new = required(*pending.pop()) - closure
        closure |= new
        pending += new
    packages = {name for name, _ in closure} - {"headrace"}
    accelerator_libraries = {
        name for name in packages if name.startswith(("nvidia-", "cuda-", "triton"))
    }
    assert "torch" in packages
    assert len(packages - accelerator_libraries) <= MOST_PACKAGES, sorted(packages)
