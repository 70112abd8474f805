"""Methods by name: found, described, configured, and chosen by requests."""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_type_hints

from headrace.config import FULL, EngineConfig
from headrace.contracts.kv_codec import KVCodec
from headrace.contracts.kv_policy import KVPolicy
from headrace.contracts.load_map import GatedNames
from headrace.contracts.method import Method, ModelFacts, conflict, of_kind
from headrace.contracts.slot_policy import SlotPolicy
from headrace.contracts.token_pruning import TokenPruningMethod
from headrace.errors import ConfigurationError, InvalidRequestError
from headrace.exec.decoding.drafter import Drafter, DrafterMethod, DraftParts
from headrace.exec.depth import DepthMethod, DepthRouter
from headrace.exec.forward import Forward, LoadedModel
from headrace.exec.neurons import NeuronMethod, NeuronRouter, gated_layers
from headrace.exec.sampling.sampler import Sampler
from headrace.exec.taps import Tap, TapMethod
from headrace.models.base import DecoderModel
from headrace.ops.neurons import Activation, NeuronProduct
from headrace.ops.selection import Selection
from headrace.ops.table import Ops

ROOMS = (
    "headrace.kv.policies",
    "headrace.kv.codecs",
    "headrace.engine.gangs",
    "headrace.exec.steering",
    "headrace.exec.sparsity",
    "headrace.exec.exits",
    "headrace.exec.pruning",
    "headrace.exec.decoding.drafters",
    "headrace.exec.placement",
)
"""Packages in which every module is a method, named as it is."""

CACHE_KINDS: tuple[type[Method], ...] = (KVPolicy, SlotPolicy, KVCodec)
"""Kinds that decide what stays in the KV cache."""

Choice = Mapping[str, Mapping[str, Any]]
"""Name of a method -> the options that a request sets for itself."""


def known_methods() -> dict[str, str]:
    """Name -> module, of every method in the house."""
    found = {}
    for room in ROOMS:
        for module in pkgutil.iter_modules(importlib.import_module(room).__path__):
            found[module.name.replace("_", "-")] = f"{room}.{module.name}"
    return dict(sorted(found.items()))


def find_method(name: str) -> type[Method]:
    """The method of that name, or the class of a file for ``"file.py:Class"``.

    Raises:
        ConfigurationError: there is none; the known ones are listed.
    """
    path, separator, attribute = name.rpartition(":")
    if separator:
        return _method_in_file(Path(path), attribute)
    known = known_methods()
    if name not in known:
        raise ConfigurationError(f"method: {name!r} is unknown; known: {', '.join(known)}")
    module = importlib.import_module(known[name])
    [found] = (
        each
        for each in vars(module).values()
        if isinstance(each, type) and each.__module__ == module.__name__ and "card" in vars(each)
    )
    return found


def _method_in_file(path: Path, attribute: str) -> type[Method]:
    if not path.is_file():
        raise ConfigurationError(f"method: the file {path} does not exist")
    spec = importlib.util.spec_from_file_location(path.stem, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        raise ConfigurationError(f"method: {path}: {type(error).__name__}: {error}") from error
    found = getattr(module, attribute, None)
    if not (isinstance(found, type) and issubclass(found, Method) and hasattr(found, "card")):
        raise ConfigurationError(
            f"method: {path} has no class {attribute!r} that is a Method with a card"
        )
    return found


def make_method(text: str) -> Method:
    """The method that ``"name:option=value,option=value"`` describes; the name may be a file's.

    Raises:
        ConfigurationError: no method has that name, it has no such option, or a value is wrong.
    """
    name, listed = _split(text)
    kind = find_method(name)
    try:
        return kind(**_read_options(kind, listed))
    except ValueError as error:
        raise ConfigurationError(f"method: {kind.name()}: {error}") from None


def configured_methods(config: EngineConfig) -> list[Method]:
    """The methods that a configuration asks for, the one for the KV cache first.

    Raises:
        ConfigurationError: see ``make_method``; or ``kv`` names a method of another kind.
    """
    if config.kv == FULL:
        return [make_method(text) for text in config.methods]
    policy = make_method(config.kv)
    if not any(of_kind([policy], kind) for kind in CACHE_KINDS):
        raise ConfigurationError(
            f"kv: {policy.name()} does not decide what stays in the KV cache; use --method"
        )
    return [policy, *(make_method(text) for text in config.methods)]


def _split(text: str) -> tuple[str, str]:
    """Name and options; the colon before the class in a file belongs to the name."""
    file, separator, rest = text.partition(".py:")
    if not separator:
        name, _, listed = text.partition(":")
        return name, listed
    attribute, _, listed = rest.partition(":")
    return f"{file}.py:{attribute}", listed


def _read_options(kind: type[Method], listed: str) -> dict[str, Any]:
    """Options written ``name=value,name=value``. Raises ValueError."""
    types = get_type_hints(kind)
    names = [field.name for field in fields(kind)]  # type: ignore[arg-type]
    options: dict[str, Any] = {}
    for part in filter(None, listed.split(",")):
        key, _, value = part.partition("=")
        if key not in names:
            raise ValueError(f"has no option {key!r}; it has {', '.join(names) or 'none'}")
        try:
            options[key] = _BOOLS[value] if types[key] is bool else types[key](value)
        except (KeyError, ValueError):
            raise ValueError(
                f"{key} must be of type {types[key].__name__}, got {value!r}"
            ) from None
    return options


_BOOLS = {"true": True, "false": False}


class MethodSet:
    """The methods of a running engine: all are on where a request does not choose.

    Attributes:
        taps, drafters: name of a method -> what it has made ready, once they are opened.

    Raises:
        ConfigurationError: the model lacks what one needs, or two do not go together.
    """

    def __init__(self, methods: Sequence[Method], model: ModelFacts) -> None:
        self.methods = tuple(methods)
        self.taps: dict[str, Tap[Any]] = {}
        self.drafters: dict[str, Drafter] = {}
        for pruning in of_kind(self.methods, TokenPruningMethod):
            model = replace(model, stages=pruning.begins(len(model.layers)))
        self._model = model
        for method in self.methods:
            try:
                method.check(model)
            except ValueError as error:
                raise ConfigurationError(f"method: {method.name()}: {error}") from None
        reason = conflict(self.methods)
        if reason is not None:
            raise ConfigurationError(f"method: {reason}")

    @property
    def stages(self) -> tuple[int, ...]:
        """Layers before which another stage begins; see ``ModelFacts``."""
        return self._model.stages

    def open_taps(self, forward: Forward) -> None:
        """Make taps ready for a model, whose shapes are traced if any method asks for them.

        Raises:
            ConfigurationError: a method does not fit the model.
        """
        methods = of_kind(self.methods, TapMethod)
        shapes = forward.trace_shapes() if methods else {}
        for method in methods:
            try:
                self.taps[method.name()] = method.open(shapes, forward.ops)
            except ValueError as error:
                raise ConfigurationError(f"method: {method.name()}: {error}") from None

    def open_neurons(
        self,
        model: DecoderModel,
        load: Callable[[GatedNames, Activation], NeuronProduct],
        selection: Selection,
    ) -> NeuronRouter | None:
        """What sends inputs through some inner neurons; ``None`` if no method asks for that.

        Raises:
            ConfigurationError: the model or its checkpoint lacks what it takes.
        """
        for method in of_kind(self.methods, NeuronMethod):
            try:
                return NeuronRouter(method, gated_layers(model), load, selection)
            except ValueError as error:
                raise ConfigurationError(f"method: {method.name()}: {error}") from None
        return None

    def open_depth(self, model: DecoderModel, ops: Ops) -> DepthRouter | None:
        """What lets rows leave early; ``None`` if no method asks for that. Raises as above."""
        for method in of_kind(self.methods, DepthMethod):
            try:
                return DepthRouter(method, model, ops)
            except ValueError as error:
                raise ConfigurationError(f"method: {method.name()}: {error}") from None
        return None

    def open_drafters(
        self,
        target: Forward,
        sampler: Sampler,
        load: Callable[[str], LoadedModel],
        table_rows: int,
        context: int,
    ) -> None:
        """Make ready what guesses tokens; see ``DraftParts``. Raises as ``open_taps``."""
        parts = DraftParts(target, sampler, load, table_rows, context, self._model.vocab_size)
        for method in of_kind(self.methods, DrafterMethod):
            try:
                self.drafters[method.name()] = method.open(parts)
            except ValueError as error:
                raise ConfigurationError(f"method: {method.name()}: {error}") from None

    def choose(self, choice: Choice | None) -> tuple[Method, ...]:
        """The methods of a request that names some, with options of its own; all for ``None``.

        Raises:
            InvalidRequestError: one is not loaded, or cannot be chosen so.
        """
        if choice is None:
            return self.methods
        names = {method.name() for method in self.methods}
        if unknown := sorted(choice.keys() - names):
            loaded = ", ".join(sorted(names)) or "none"
            raise InvalidRequestError("methods", f"{unknown[0]!r} is not loaded; loaded: {loaded}")
        chosen = []
        for method in self.methods:
            if method.name() in choice:
                chosen.append(self._with_options(method, choice[method.name()]))
            elif method.card.request_options is None:
                chosen.append(method)
        return tuple(chosen)

    def _with_options(self, method: Method, options: Mapping[str, Any]) -> Method:
        """The method as a request wants it."""
        _check_types(method, options)
        try:
            changed = replace(method, **options)  # type: ignore[type-var]
            if method.name() in self.taps:
                self.taps[method.name()].check(changed)
        except ValueError as error:
            raise InvalidRequestError(f"methods.{method.name()}", str(error)) from None
        try:
            changed.check_choice(method, self._model)
        except ValueError as error:
            field = f"methods.{method.name()}"
            raise InvalidRequestError(field, f"{', '.join(options)}: {error}") from None
        return changed


def _check_types(method: Method, options: Mapping[str, Any]) -> None:
    allowed = method.card.request_options or ()
    types = get_type_hints(type(method))
    for key, value in options.items():
        field = f"methods.{method.name()}.{key}"
        if key not in allowed:
            listed = ", ".join(allowed) or "none"
            raise InvalidRequestError(field, f"is not for requests; those that are: {listed}")
        kind = types[key]
        if type(value) is not kind and not (kind is float and type(value) is int):
            raise InvalidRequestError(field, f"must be of type {kind.__name__}, got {value!r}")
