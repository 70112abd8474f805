"""The adapters of a running engine: loaded, chosen and unloaded by name."""

from __future__ import annotations

import itertools
import threading
from pathlib import Path

from headrace.errors import ConfigurationError, InvalidRequestError
from headrace.weights.adapters import AdapterBank, AdapterWeights, read_adapter

__all__ = ["AdapterRegistry", "AdapterWeights", "read_adapter"]


class AdapterRegistry:
    """Names of adapters, and which of them requests still use.

    An adapter that is loaded again under its name gets another key, so that nothing computed with
    the old one is taken for the new one's; requests go on with the one they began with. ``add``,
    ``remove`` and ``release`` belong to the thread that runs the engine.
    """

    def __init__(self, bank: AdapterBank) -> None:
        self._bank = bank
        self._lock = threading.Lock()
        self._keys: dict[str, str] = {}
        self._directories: dict[str, Path] = {}
        self._users: dict[str, int] = {}
        self._versions = itertools.count(1)

    @property
    def directories(self) -> dict[str, Path]:
        """Name of each adapter that can be chosen -> where it came from."""
        return self._directories.copy()

    def add(self, name: str, weights: AdapterWeights) -> None:
        """Offer an adapter under a name, in place of one that had it.

        Raises:
            CheckpointError: it is for another model.
            ConfigurationError: the name is empty or holds a #.
        """
        if not name or "#" in name:
            raise ConfigurationError(
                f"adapter: {name!r} is no name; it must not be empty or hold #"
            )
        key = f"{name}#{next(self._versions)}"
        self._bank.add(key, weights)
        with self._lock:
            old, self._keys[name] = self._keys.get(name), key
            self._directories[name] = weights.directory
        self._drop_unused(old)

    def remove(self, name: str) -> None:
        """Offer an adapter no longer. Raises InvalidRequestError if there is none of that name."""
        with self._lock:
            self._check(name)
            old = self._keys.pop(name)
            del self._directories[name]
        self._drop_unused(old)

    def acquire(self, name: str) -> str:
        """The key of an adapter, which stays until it is released. Raises InvalidRequestError."""
        with self._lock:
            self._check(name)
            key = self._keys[name]
            self._users[key] = self._users.get(key, 0) + 1
        return key

    def release(self, key: str) -> None:
        """A request that had acquired ``key`` has ended."""
        with self._lock:
            self._users[key] -= 1
            if not self._users[key]:
                del self._users[key]
        self._drop_unused(key)

    def _check(self, name: str) -> None:
        if name not in self._keys:
            known = ", ".join(self._keys) or "none"
            raise InvalidRequestError("adapter", f"{name!r} is not loaded; loaded: {known}")

    def _drop_unused(self, key: str | None) -> None:
        with self._lock:
            unused = key is not None and key not in self._users
            unused = unused and key not in self._keys.values()
        if unused and key is not None:
            self._bank.remove(key)
