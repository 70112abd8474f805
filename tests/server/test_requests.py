"""Bodies of requests: what is taken, and how what is wrong is named."""

from __future__ import annotations

from typing import Any

import pytest

from headrace.contracts.sampling import SamplingParams
from headrace.errors import InvalidRequestError
from headrace.server.requests import ChatRequest, CompletionRequest, TokenizeRequest, validate

USER = {"role": "user", "content": "hi"}


def completion(**fields: Any) -> CompletionRequest:
    return validate(CompletionRequest, {"prompt": "hi", **fields})


def chat(**fields: Any) -> ChatRequest:
    return validate(ChatRequest, {"messages": [USER], **fields})


@pytest.mark.parametrize(
    ("prompt", "listed"),
    [
        ("hi", ["hi"]),
        (["hi", "you"], ["hi", "you"]),
        ([1, 2], [[1, 2]]),
        ([[1, 2], [3]], [[1, 2], [3]]),
        ("", [""]),
    ],
)
def test_every_form_of_prompt_becomes_a_list(prompt: Any, listed: Any) -> None:
    assert completion(prompt=prompt).prompt == listed


@pytest.mark.parametrize("prompt", [[], 5, {}, [True], [1, "a"], [[1, "a"]], [1.5], ["a"] * 2049])
def test_other_prompts_are_refused(prompt: Any) -> None:
    with pytest.raises(InvalidRequestError, match="prompt: should be a string, a list") as caught:
        completion(prompt=prompt)
    assert caught.value.field == "prompt"


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"prompt": None}, "prompt", "is required"),
        ({"temperature": "hot"}, "temperature", "should be a valid number, got 'hot'"),
        ({"temperature": True}, "temperature", "should be a valid number"),
        ({"temperature": 10**400}, "temperature", "should be a valid number"),
        ({"max_tokens": 1.5}, "max_tokens", "should be a valid integer, got 1.5"),
        ({"max_tokens": "9"}, "max_tokens", "should be a valid integer, got '9'"),
        ({"ignore_eos": 1}, "ignore_eos", "should be a valid boolean"),
        ({"stop": ["a", 3]}, "stop", "should be a string or a list of strings"),
        ({"stop_token_ids": [1, "2"]}, "stop_token_ids[1]", "should be a valid integer"),
        ({"logprobs": True}, "logprobs", "should be a valid integer"),
        ({"temprature": 1}, "temprature", "unknown field; did you mean 'temperature'?"),
        ({"temprature": None}, "temprature", "unknown field"),
        ({"max_completion_tokens": 5}, "max_completion_tokens", "unknown field"),
        ({"stream_options": {"use": 1}}, "stream_options.use", "unknown field"),
        ({"stream_options": True}, "stream_options", "should be a JSON object"),
        ({"suffix": "end"}, "suffix", "is not supported yet"),
        ({"best_of": 2}, "best_of", "is not supported yet"),
        ({"cache_salt": "x"}, "cache_salt", "is not supported yet"),
        ({"response_format": {"type": "json_object"}}, "response_format", "not supported yet"),
    ],
)
def test_a_wrong_field_is_named(fields: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completion(**fields)
    assert caught.value.field == field
    assert message in caught.value.message


@pytest.mark.parametrize(
    ("fields", "field", "message"),
    [
        ({"messages": []}, "messages", "must not be empty"),
        ({"messages": "hi"}, "messages", "should be a list"),
        ({"messages": ["hi"]}, "messages[0]", "should be a JSON object"),
        ({"messages": [USER, {"content": "x"}]}, "messages[1].role", "is required"),
        ({"messages": [{"role": "user"}]}, "messages[0].content", "is required"),
        ({"messages": [{**USER, "role": "tool"}]}, "messages[0].role", "should be 'system'"),
        ({"messages": [{**USER, "content": 3}]}, "messages[0].content", "should be a list"),
        ({"messages": [{**USER, "nmae": "x"}]}, "messages[0].nmae", "did you mean 'name'?"),
        (
            {"messages": [{**USER, "content": [{"type": "image_url", "image_url": {}}]}]},
            "messages[0].content[0].image_url",
            "is not supported yet",
        ),
        (
            {"messages": [{**USER, "content": [{"type": "video", "text": "x"}]}]},
            "messages[0].content[0].type",
            "should be 'text'",
        ),
        (
            {"messages": [{"role": "assistant", "content": "", "tool_calls": [{}]}]},
            "messages[0].tool_calls",
            "is not supported yet",
        ),
        ({"tools": [{"type": "function"}]}, "tools", "is not supported yet"),
        ({"tool_choice": "required"}, "tool_choice", "is not supported yet"),
        ({"functions": [{}]}, "functions", "is not supported yet"),
        ({"modalities": ["text", "audio"]}, "modalities", "is not supported yet"),
        ({"web_search_options": {}}, "web_search_options", "is not supported yet"),
        ({"prediction": {"type": "content"}}, "prediction", "is not supported yet"),
        ({"store": True}, "store", "is not supported yet"),
        ({"logprobs": 1}, "logprobs", "should be a valid boolean"),
    ],
)
def test_a_wrong_chat_field_is_named(fields: dict[str, Any], field: str, message: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        chat(**fields)
    assert caught.value.field == field
    assert message in caught.value.message


def test_what_asks_for_nothing_is_accepted() -> None:
    chat(
        tools=[],
        tool_choice="none",
        parallel_tool_calls=True,
        response_format={"type": "text"},
        modalities=["text"],
        store=False,
        user="me",
        metadata={"run": "1"},
        service_tier="auto",
        temperature=None,
        audio=None,
    )
    completion(suffix="").check()


@pytest.mark.parametrize(
    ("body", "field"),
    [
        (completion(stream_options={"include_usage": True}), "stream_options"),
        (completion(stream=True, prompt_logprobs=1), "prompt_logprobs"),
        (chat(top_logprobs=2), "top_logprobs"),
        (validate(TokenizeRequest, {}), "prompt"),
        (validate(TokenizeRequest, {"prompt": "a", "messages": [USER]}), "prompt"),
    ],
)
def test_contradictions_are_refused(body: Any, field: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        body.check()
    assert caught.value.field == field


def test_a_silent_request_sets_only_max_tokens() -> None:
    assert completion().sampling_fields() == {"max_tokens": 16}
    assert chat().sampling_fields() == {"max_tokens": None, "logprobs": None}


def test_sampling_fields_reach_the_engine() -> None:
    fields = {
        "n": 2,
        "max_tokens": 5,
        "min_tokens": 1,
        "temperature": 0.5,
        "top_p": 0.9,
        "top_k": 4,
        "min_p": 0.1,
        "repetition_penalty": 1.1,
        "presence_penalty": 0.2,
        "frequency_penalty": 0.3,
        "seed": 7,
        "stop": ["\n"],
        "stop_token_ids": [3],
        "ignore_eos": True,
        "logprobs": 2,
        "prompt_logprobs": 3,
        "skip_special_tokens": False,
        "include_stop_str_in_output": True,
    }
    body = completion(**fields, logit_bias={"5": -1})
    assert body.sampling_fields() == {**fields, "logit_bias": {5: -1}}
    served_by_headrace = set(SamplingParams.field_names()) - {"detokenize"}
    assert served_by_headrace == fields.keys() | {"logit_bias"}


def test_echo_asks_for_the_prompts_logprobs() -> None:
    assert completion(echo=True, logprobs=2).sampling_fields()["prompt_logprobs"] == 2
    assert "prompt_logprobs" not in completion(echo=True).sampling_fields()


def test_chat_names_for_the_same_things() -> None:
    body = chat(max_completion_tokens=9, max_tokens=5, logprobs=True, top_logprobs=3)
    assert body.sampling_fields() == {"max_tokens": 9, "logprobs": 3}
    assert body.field_name("max_tokens") == "max_completion_tokens"
    assert body.field_name("logprobs") == "top_logprobs"
    assert body.field_name("prompt") == "messages"
    assert chat(max_tokens=5).field_name("max_tokens") == "max_tokens"


@pytest.mark.parametrize("key", ["x", "-1", "", "1.5", "9" * 5000])
def test_logit_bias_takes_token_ids(key: str) -> None:
    with pytest.raises(InvalidRequestError) as caught:
        completion(logit_bias={key: 1}).sampling_fields()
    assert caught.value.field == "logit_bias"


def test_content_for_the_template() -> None:
    parts = [{"type": "text", "text": "one"}, {"type": "text", "text": "two"}]
    body = chat(messages=[{"role": "developer", "content": parts}, {**USER, "name": "Ada"}])
    assert [message.for_template() for message in body.messages] == [
        {"role": "system", "content": "one\ntwo"},
        {"role": "user", "content": "hi", "name": "Ada"},
    ]


def test_many_wrong_items_make_one_short_error() -> None:
    for fields in (
        {"prompt": ["x", *range(200_000)]},
        {"stop": [3] * 200_000},
        {f"unknown{i}": 1 for i in range(200_000)},
        {"x" * 10_000_000: 1},
    ):
        with pytest.raises(InvalidRequestError) as caught:
            completion(**fields)
        assert len(str(caught.value)) < 300
