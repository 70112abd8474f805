"""What clients may send: strict pydantic models, and what they turn into for the engine.

A field that is ``null`` counts as absent. Types are checked here; ranges are checked where they
are defined, in ``SamplingParams``.
"""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    FailFast,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)
from pydantic_core import PydanticCustomError
from typing_extensions import TypeAliasType

from headrace.contracts.sampling import SamplingParams
from headrace.errors import InvalidRequestError

MAX_PROMPTS = 2048
_NAME_LENGTH = 64

Model = TypeVar("Model", bound="StrictModel")
Harmless = tuple[Any, ...]
"""Values of an unsupported field that ask for nothing, and are therefore accepted."""


class StrictModel(BaseModel):
    """Refuses unknown fields, unsupported fields and values of another type."""

    model_config = ConfigDict(strict=True, extra="forbid")
    unsupported: ClassVar[dict[str, Harmless]] = {}

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in cls.unsupported:
                if value is not None and value not in cls.unsupported[name]:
                    raise _field_error(name, "is not supported yet; leave it out")
            elif name not in cls.model_fields:
                raise _field_error(name[:_NAME_LENGTH], f"unknown field{cls._suggestion(name)}")
            elif value is not None:
                kept[name] = value
        return kept

    @classmethod
    def _suggestion(cls, name: str) -> str:
        close = difflib.get_close_matches(name[:_NAME_LENGTH], cls.model_fields, n=1)
        return f"; did you mean {close[0]!r}?" if close else ""


def _field_error(field: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("field", "{message}", {"field": field, "message": message})


def one_of(expected: str) -> WrapValidator:
    """Say in one sentence what a union takes, instead of one error per member."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            raise PydanticCustomError(
                "union", "should be {expected}", {"expected": expected}
            ) from None

    return WrapValidator(check)


def _list_of_prompts(value: Any) -> Any:
    """One prompt, a text or token ids, becomes a list of one."""
    if isinstance(value, str):
        return [value]
    if isinstance(value, list) and value and not isinstance(value[0], str | list):
        return [value]
    return value


def _list_of_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


# Aliases by name: on Python 3.11 a union cannot hold the unhashable ``FailFast`` itself.
TokenIds = TypeAliasType("TokenIds", Annotated[list[int], FailFast()])
Strings = TypeAliasType("Strings", Annotated[list[str], FailFast()])
Prompts = Annotated[
    list[str | TokenIds],
    FailFast(),
    Field(min_length=1, max_length=MAX_PROMPTS),
    BeforeValidator(
        _list_of_prompts, json_schema_input_type=str | list[str] | list[int] | list[list[int]]
    ),
    one_of(f"a string, a list of token ids, or a list of 1 to {MAX_PROMPTS} of these"),
]
Stop = Annotated[str | Strings, one_of("a string or a list of strings")]


class TextPart(StrictModel):
    """A part of a message's content."""

    unsupported = {"image_url": (), "input_audio": (), "file": (), "video_url": (), "refusal": ()}
    type: Literal["text"]
    text: str


class Message(StrictModel):
    """A chat message: its content is one text, or a list of text parts."""

    unsupported = {
        "tool_calls": ([],),
        "tool_call_id": (),
        "function_call": (),
        "audio": (),
        "refusal": (),
        "annotations": ([],),
    }
    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[
        list[TextPart],
        FailFast(),
        BeforeValidator(_list_of_parts, json_schema_input_type=str | list[TextPart]),
    ]
    name: str | None = None

    def for_template(self) -> dict[str, Any]:
        """The form that templates take: parts as lines of one text, "system" for "developer"."""
        role = "system" if self.role == "developer" else self.role
        message = {"role": role, "content": "\n".join(part.text for part in self.content)}
        return message if self.name is None else {**message, "name": self.name}


Messages = TypeAliasType("Messages", Annotated[list[Message], FailFast(), Field(min_length=1)])


class StreamOptions(StrictModel):
    """What a stream reports beside the text."""

    include_usage: bool = False
    include_obfuscation: bool = False


class GenerationRequest(StrictModel):
    """The fields that both kinds of generation share. The second group has no effect here."""

    model: str | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: int = 0
    n: int | None = None
    max_tokens: int | None = None
    min_tokens: int | None = None
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    presence_penalty: float | None = None
    frequency_penalty: float | None = None
    logit_bias: dict[str, Any] | None = None
    seed: int | None = None
    stop: Stop | None = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    prompt_logprobs: int | None = None
    skip_special_tokens: bool | None = None
    include_stop_str_in_output: bool | None = None

    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a chunk that holds the usage."""
        return self.stream_options is not None and self.stream_options.include_usage

    def check(self) -> None:
        """Raise InvalidRequestError for fields that contradict each other."""
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options", "needs stream: true")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequestError("prompt_logprobs", "is not reported in streams")

    def field_name(self, engine_field: str) -> str:
        """The request's name for what the engine calls ``engine_field``."""
        return engine_field

    def sampling_fields(self) -> dict[str, Any]:
        """The given fields that ``SamplingParams`` has under the same name."""
        names = self.model_fields_set.intersection(SamplingParams.field_names())
        fields = {name: getattr(self, name) for name in names}
        if self.logit_bias is not None:
            fields["logit_bias"] = {_token_id(key): v for key, v in self.logit_bias.items()}
        return fields


def _token_id(text: str) -> int:
    if not text.isdecimal() or len(text) > _NAME_LENGTH:
        raise InvalidRequestError("logit_bias", f"{text[:_NAME_LENGTH]!r} is not a token id")
    return int(text)


_UNSUPPORTED: dict[str, Harmless] = {
    "cache_salt": (),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "use_beam_search": (False,),
    "length_penalty": (1.0,),
    "bad_words": ([],),
    "logits_processors": ([],),
    "truncate_prompt_tokens": (),
}


class CompletionRequest(GenerationRequest):
    """The body of ``/v1/completions``."""

    unsupported = {**_UNSUPPORTED, "suffix": ("",), "add_special_tokens": (True,)}
    prompt: Prompts
    echo: bool = False
    logprobs: int | None = None
    best_of: int | None = None

    def check(self) -> None:
        super().check()
        if self.best_of is not None and self.best_of != (self.n or 1):
            raise InvalidRequestError("best_of", "is not supported unless it equals n")

    def sampling_fields(self) -> dict[str, Any]:
        fields = {"max_tokens": 16, **super().sampling_fields()}
        if self.echo and self.logprobs is not None:
            fields["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
        return fields


class ChatRequest(GenerationRequest):
    """The body of ``/v1/chat/completions``."""

    unsupported = {
        **_UNSUPPORTED,
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "modalities": (["text"],),
        "audio": (),
        "prediction": (),
        "web_search_options": (),
        "moderation": (),
        "reasoning_effort": ("none",),
        "verbosity": ("medium",),
        "store": (False,),
        "chat_template": (),
        "documents": ([],),
        "continue_final_message": (False,),
        "add_special_tokens": (False,),
        "echo": (False,),
    }
    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)

    def check(self) -> None:
        super().check()
        if self.top_logprobs is not None and not self.logprobs:
            raise InvalidRequestError("top_logprobs", "needs logprobs: true")

    def sampling_fields(self) -> dict[str, Any]:
        fields = {"max_tokens": None, **super().sampling_fields()}
        fields["logprobs"] = (self.top_logprobs or 0) if self.logprobs else None
        if self.max_completion_tokens is not None:
            fields["max_tokens"] = self.max_completion_tokens
        return fields

    def field_name(self, engine_field: str) -> str:
        names = {"prompt": "messages", "logprobs": "top_logprobs"}
        if self.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        return names.get(engine_field, engine_field)


class TokenizeRequest(StrictModel):
    """The body of ``/tokenize``: a prompt or messages."""

    unsupported = {"continue_final_message": (False,), "chat_template": (), "tools": ([],)}
    model: str | None = None
    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)
    return_token_strs: bool = False

    def check(self) -> None:
        """Raise InvalidRequestError unless exactly one of prompt and messages is given."""
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("prompt", "give either prompt or messages")


class DetokenizeRequest(StrictModel):
    """The body of ``/detokenize``."""

    model: str | None = None
    tokens: TokenIds


def validate(model: type[Model], data: object) -> Model:
    """``data`` as ``model``. Raises InvalidRequestError that names the first wrong field."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise _request_error(error) from None


_PLAIN_WORDS = {
    "missing": "is required",
    "model_type": "should be a JSON object",
    "list_type": "should be a list",
    "too_short": "must not be empty",
}


def _request_error(error: ValidationError) -> InvalidRequestError:
    first = error.errors(include_url=False)[0]
    path = [*first["loc"]]
    message = first["msg"].removeprefix("Input ")
    kind = first["type"]
    if kind in _PLAIN_WORDS:
        message = _PLAIN_WORDS[kind]
    elif kind == "field":
        path.append(first["ctx"]["field"])
    elif isinstance(first["input"], str | float | bool):
        message += f", got {first['input']!r:.60}"
    return InvalidRequestError(_path(path) or "body", message)


def _path(parts: Sequence[str | int]) -> str:
    """``("messages", 0, "role")`` as ``messages[0].role``."""
    text = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in parts)
    return text.removeprefix(".")
