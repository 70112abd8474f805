"""The profile: everything of a request, besides its tokens, that touches KV bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Profile:
    """Part of the prefix tree's key: pages are shared only between equal profiles.

    Args:
        methods: (name, options) of each method that alters activations, positions or KV bytes.
        adapter: name and version of the adapter in use.
        salt: keeps the caches of tenants apart.
    """

    methods: tuple[tuple[str, str], ...] = ()
    adapter: str = ""
    salt: str = ""


EXACT = Profile()
"""The unmodified model."""
