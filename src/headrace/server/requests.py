"""What clients may send: strict pydantic models, and what they turn into for the engine.

A field that is ``null`` counts as absent. Types are checked here; ranges are checked where they
are defined, in ``SamplingParams``.
"""

from __future__ import annotations

import difflib
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
MAX_ALTERNATIVES = 128
_NAME_LENGTH = 64
_UNSUPPORTED = frozenset(
    """
    annotations audio bad_words best_of cache_salt chat_template continue_final_message documents
    file function_call functions guided_choice guided_grammar guided_json guided_regex image_url
    input_audio length_penalty logits_processors modalities moderation prediction reasoning_effort
    refusal response_format store structured_outputs suffix tool_call_id tool_calls tool_choice
    tools truncate_prompt_tokens use_beam_search verbosity video_url web_search_options
    """.split()  # noqa: SIM905 - one name per line would be a page
)
_NOTHING: tuple[Any, ...] = (None, False, "", [], "none", "auto", ["text"], {"type": "text"})
"""Values of an unsupported field that ask for nothing, and are therefore accepted."""


class StrictModel(BaseModel):
    """Refuses unknown fields, unsupported fields and values of another type."""

    model_config = ConfigDict(strict=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        kept = {}
        for name, value in data.items():
            if name in cls.model_fields:
                if value is not None:
                    kept[name] = value
            elif name not in _UNSUPPORTED:
                name = name[:_NAME_LENGTH]
                close = difflib.get_close_matches(name, cls.model_fields, n=1)
                suggestion = f"; did you mean {close[0]!r}?" if close else ""
                raise _field_error(name, f"unknown field{suggestion}")
            elif value not in _NOTHING:
                raise _field_error(name, "is not supported yet; leave it out")
        return kept


def _field_error(field: str, message: str) -> PydanticCustomError:
    return PydanticCustomError("field", "{message}", {"field": field, "message": message})


def one_of(expected: str) -> WrapValidator:
    """Say in one sentence what a union takes, instead of one error per member."""

    def check(value: Any, handler: ValidatorFunctionWrapHandler) -> Any:
        try:
            return handler(value)
        except ValidationError:
            message = "should be {expected}"
            raise PydanticCustomError("union", message, {"expected": expected}) from None

    return WrapValidator(check)


def _list_of_prompts(value: Any) -> Any:
    """One prompt, a text or token ids, becomes a list of one."""
    is_ids = isinstance(value, list) and value and not isinstance(value[0], str | list)
    return [value] if is_ids or isinstance(value, str) else value


def _list_of_parts(value: Any) -> Any:
    return [{"type": "text", "text": value}] if isinstance(value, str) else value


# Aliases by name: on Python 3.11 a union cannot hold the unhashable ``FailFast`` itself.
TokenIds = TypeAliasType("TokenIds", Annotated[list[int], FailFast()])
Strings = TypeAliasType("Strings", Annotated[list[str], FailFast()])
Prompts = Annotated[
    list[str | TokenIds],
    FailFast(),
    Field(min_length=1, max_length=MAX_PROMPTS),
    BeforeValidator(_list_of_prompts),
    one_of(f"a string, a list of token ids, or a list of 1 to {MAX_PROMPTS} of these"),
]
Stop = Annotated[str | Strings, one_of("a string or a list of strings")]


class TextPart(StrictModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class Message(StrictModel):
    """A chat message: its content is one text, or a list of text parts."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Annotated[list[TextPart], FailFast(), BeforeValidator(_list_of_parts)]
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


MethodChoice = dict[str, dict[str, bool | int | float | str]]
"""Name of a method -> options of the request."""


class RequestBody(StrictModel):
    """What the body of every route has."""

    model: str | None = None

    def check(self) -> None:
        """Raise InvalidRequestError for fields that contradict each other."""


class Conversation(StrictModel):
    """How messages become a prompt."""

    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] = Field(default_factory=dict)


class GenerationRequest(RequestBody):
    """The fields that both kinds of generation share. The second group has no effect here."""

    logprob_fields: ClassVar[tuple[str, ...]]
    methods: MethodChoice | None = None
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

    parallel_tool_calls: bool | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None

    def check(self) -> None:
        if self.stream_options is not None and not self.stream:
            raise InvalidRequestError("stream_options", "needs stream: true")
        if self.prompt_logprobs is not None and self.stream:
            raise InvalidRequestError("prompt_logprobs", "is not reported in streams")
        for field in self.logprob_fields:
            # Every alternative becomes an object of the answer's JSON.
            if (getattr(self, field) or 0) > MAX_ALTERNATIVES:
                raise InvalidRequestError(field, f"must be at most {MAX_ALTERNATIVES}")

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


class CompletionRequest(GenerationRequest):
    """The body of ``/v1/completions``."""

    logprob_fields = ("prompt_logprobs", "logprobs")
    prompt: Prompts
    echo: bool = False
    logprobs: int | None = None

    def sampling_fields(self) -> dict[str, Any]:
        fields = {"max_tokens": 16, **super().sampling_fields()}
        if self.echo and self.logprobs is not None:
            fields["prompt_logprobs"] = max(self.logprobs, self.prompt_logprobs or 0)
        return fields


class ChatRequest(GenerationRequest, Conversation):
    """The body of ``/v1/chat/completions``."""

    logprob_fields = ("prompt_logprobs", "top_logprobs")
    messages: Messages
    max_completion_tokens: int | None = None
    logprobs: bool = False
    top_logprobs: int | None = None

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
        """The request's name for what the engine calls ``engine_field``."""
        names = {"prompt": "messages", "logprobs": "top_logprobs"}
        if self.max_completion_tokens is not None:
            names["max_tokens"] = "max_completion_tokens"
        return names.get(engine_field, engine_field)


class EmbeddingRequest(RequestBody):
    """The body of ``/v1/embeddings``. The second group has no effect here."""

    input: Prompts
    encoding_format: Literal["float", "base64"] = "float"
    dimensions: Annotated[int, Field(ge=1)] | None = None
    priority: int = 0
    methods: MethodChoice | None = None

    user: str | None = None


class TokenizeRequest(RequestBody, Conversation):
    """The body of ``/tokenize``: a prompt or messages."""

    prompt: str | None = None
    messages: Messages | None = None
    add_special_tokens: bool = True

    def check(self) -> None:
        if (self.prompt is None) == (self.messages is None):
            raise InvalidRequestError("prompt", "give either prompt or messages")


class LoadAdapterRequest(RequestBody):
    """The body of ``/v1/load_lora_adapter``."""

    lora_name: str
    lora_path: str


class UnloadAdapterRequest(RequestBody):
    """The body of ``/v1/unload_lora_adapter``."""

    lora_name: str


class DetokenizeRequest(RequestBody):
    """The body of ``/detokenize``."""

    tokens: TokenIds


Body = TypeVar("Body", bound=RequestBody)

_PLAIN_WORDS = {
    "missing": "is required",
    "model_type": "should be a JSON object",
    "list_type": "should be a list",
    "too_short": "must not be empty",
}


def validate(model: type[Body], data: object) -> Body:
    """``data`` as ``model``. Raises InvalidRequestError that names the first wrong field."""
    try:
        return model.model_validate(data)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
    path, kind = [*first["loc"]], first["type"]
    message = first["msg"].removeprefix("Input ")
    if kind in _PLAIN_WORDS:
        message = _PLAIN_WORDS[kind]
    elif kind == "field":
        path.append(first["ctx"]["field"])
    elif isinstance(first["input"], str | float | bool):
        message += f", got {first['input']!r:.60}"
    # ("messages", 0, "role") is shown as messages[0].role
    parts = [f"[{part}]" if isinstance(part, int) else f".{part}" for part in path]
    raise InvalidRequestError("".join(parts).removeprefix(".") or "body", message)
