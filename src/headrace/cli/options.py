"""Options that several commands share: the fields of ``EngineConfig`` and ``SamplingParams``.

They are read from the dataclasses, names, types, defaults and help alike, so that a new field is
a new option of every command that takes its kind.
"""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, fields
from types import NoneType, UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

import typer

from headrace.config import EngineConfig
from headrace.contracts.sampling import SamplingParams
from headrace.errors import ConfigurationError

Json = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]

_UNITS = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}


def parse_bytes(text: str) -> int:
    """Read a size: a number, with a unit if wanted ("2GiB", "512M"; units are powers of 1024)."""
    match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?)(?:i?b)?\s*", text.lower())
    if match is None:
        raise typer.BadParameter(f"{text!r} is not a size; write for example 2GiB or 512MiB")
    return int(float(match[1]) * 2 ** _UNITS[match[2]])


def meanings(cls: type[Any]) -> dict[str, str]:
    """Field -> meaning, from the ``Args`` of a dataclass's docstring.

    An entry may name several fields; a field without an entry is explained in one that quotes it.
    """
    text = inspect.getdoc(cls) or ""
    section = re.search(r"^Args:\n(.*?)(?=^\S|\Z)", text, re.MULTILINE | re.DOTALL)
    entries = re.findall(
        r"^ {4}(\w[\w, ]*): (.*(?:\n {8}.*)*)", section[1] if section else "", re.MULTILINE
    )
    found = {
        name: " ".join(meaning.split()) for names, meaning in entries for name in names.split(", ")
    }
    for name in {field.name for field in fields(cls)} - found.keys():
        found[name] = next(f"see ``{other}``" for other in found if f"``{name}``" in found[other])
    return found


@dataclass(frozen=True)
class OptionSet:
    """The options of a dataclass: one keyword-only parameter each, ``None`` when not given."""

    dataclass: type[Any]
    parameters: Mapping[str, inspect.Parameter]

    def collect(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """The fields that were given.

        Raises:
            HeadraceError: a value is out of range; raised here, before any work.
        """
        given = {name: values[name] for name in self.parameters if values[name] not in (None, [])}
        self.dataclass(**given)
        return given


def option_set(
    cls: type[Any],
    panel: str,
    *,
    flags: Mapping[str, str] | None = None,
    argument: str | None = None,
    without: Sequence[str] = (),
) -> OptionSet:
    """Make options of a dataclass's fields.

    Args:
        panel: heading in the help.
        flags: of fields that are not simply ``--field-name`` (and ``--no-field-name`` to switch
            off what is on), separated by spaces.
        argument: the field that is given by its place instead of by a flag.
        without: fields that are no options.
    """
    hints, meaning = get_type_hints(cls), meanings(cls)
    parameters = {}
    for field in fields(cls):
        if field.name in without:
            continue
        help = meaning[field.name].replace("if ``None``", "if not given").replace("``", "")
        if field.default not in (None, True, False):
            help += f" ({field.default})"
        option: Any
        if field.name == argument:
            option = typer.Argument(help=help, show_default=False)
        else:
            name = field.name.replace("_", "-")
            usual = f"--{name}/--no-{name}" if field.default is True else f"--{name}"
            option = typer.Option(
                *(flags or {}).get(field.name, usual).split(),
                help=help,
                rich_help_panel=panel,
                show_default=False,
                parser=parse_bytes if field.name.endswith("_bytes") else None,
                metavar="SIZE" if field.name.endswith("_bytes") else None,
            )
        parameters[field.name] = inspect.Parameter(
            field.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[_option_type(hints[field.name]), option],
        )
    return OptionSet(cls, parameters)


def _option_type(hint: Any) -> Any:
    """What the parser reads for a field: one value, or a list for a sequence; always optional."""
    several = get_origin(hint) in (Union, UnionType)
    kinds = [kind for kind in get_args(hint) if kind is not NoneType] if several else [hint]
    for kind in kinds:
        if get_origin(kind) is not None:
            return list[get_args(kind)[0]] | None  # type: ignore[misc]
    return kinds[0] | None


def takes(**sets: OptionSet) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Add option sets to a command, which receives the given fields of each under its name.

    Two sets may have a field of the same name: it is then one option, and both receive it.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        signature = inspect.signature(command, eval_str=True)
        own = {
            name: parameter.replace(kind=inspect.Parameter.KEYWORD_ONLY)
            for name, parameter in signature.parameters.items()
            if name not in sets
        }
        merged = dict(own)
        for options in sets.values():
            merged = {**merged, **options.parameters, **merged}

        @functools.wraps(command)
        def wrapper(**values: Any) -> None:
            collected = {name: options.collect(values) for name, options in sets.items()}
            command(**{name: values[name] for name in own}, **collected)

        wrapper.__dict__["__signature__"] = inspect.Signature(list(merged.values()))
        wrapper.__annotations__ = {name: p.annotation for name, p in merged.items()}
        return wrapper

    return decorate


_ENGINE_FLAGS = {
    "model": "--model -m",
    "kv_cache_memory_bytes": "--kv-cache-memory",
    "enable_prefix_caching": "--prefix-caching/--no-prefix-caching",
    "num_threads": "--threads",
    "methods": "--method",
}
ENGINE = option_set(EngineConfig, "Engine", flags=_ENGINE_FLAGS)
ENGINE_OF_MODEL = option_set(EngineConfig, "Engine", flags=_ENGINE_FLAGS, argument="model")


def read_engine_options(words: Sequence[str]) -> dict[str, Any]:
    """MODEL and options of the engine, read as a command would.

    Raises:
        ConfigurationError: one of them is unknown or wrong.
    """
    found: dict[str, Any] = {}

    @takes(engine=ENGINE_OF_MODEL)
    def collect(engine: dict[str, Any]) -> None:
        found.update(engine)

    program = typer.Typer(add_completion=False)
    program.command()(collect)
    try:
        typer.main.get_command(program).main(list(words), standalone_mode=False)
    except typer.TyperException as error:
        raise ConfigurationError(f"{' '.join(words)}: {error.format_message()}") from None
    return found


SAMPLING = option_set(
    SamplingParams,
    "Sampling",
    without=("n", "logit_bias", "logprobs", "prompt_logprobs", "detokenize"),
)
