"""KV policies, by name and options: ``"random-eviction:keep=0.25"``."""

from __future__ import annotations

from typing import Any, get_type_hints

from headrace.contracts.kv_policy import KVPolicy
from headrace.errors import ConfigurationError
from headrace.registry import Registry

FULL = "full"
"""Everything is kept."""

KV_POLICIES = Registry(
    "KV policy",
    {"random-eviction": "headrace.kv.policies.random_eviction:RandomEviction"},
)
"""Name -> a dataclass whose fields are the policy's options."""


def make_kv_policy(text: str) -> KVPolicy | None:
    """The policy that ``text`` describes; ``None`` where everything is kept.

    Raises:
        ConfigurationError: no policy has that name, it has no such option, or a value is wrong.
    """
    name, _, listed = text.partition(":")
    if name == FULL:
        if listed:
            raise ConfigurationError(f"kv: {FULL!r} has no options")
        return None
    if name not in KV_POLICIES:
        known = ", ".join([FULL, *KV_POLICIES])
        raise ConfigurationError(f"kv: {name!r} is unknown; known: {known}")
    kind = KV_POLICIES.resolve(name)
    types = get_type_hints(kind)
    options: dict[str, Any] = {}
    for part in filter(None, listed.split(",")):
        key, _, value = part.partition("=")
        if key not in types:
            raise ConfigurationError(f"kv: {name} has no option {key!r}; it has {', '.join(types)}")
        try:
            options[key] = types[key](value)
        except ValueError:
            raise ConfigurationError(
                f"kv: {name}: {key} must be of type {types[key].__name__}, got {value!r}"
            ) from None
    try:
        policy: KVPolicy = kind(**options)
    except ValueError as error:
        raise ConfigurationError(f"kv: {name}: {error}") from None
    return policy
