"""Chat templates: the prompts that transformers makes, and a sandbox that holds."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from headrace.errors import CheckpointError, InvalidRequestError
from headrace.text.chat_template import ChatTemplate
from headrace.text.tokenizer import Tokenizer
from tests.text import builders

LLAMA3 = """\
{{- bos_token }}
{%- if not date_string is defined %}
    {%- set date_string = strftime_now("%Y") %}
{%- endif %}
{#- The system message comes first, if there is one. #}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content']|trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{{- "<|start_header_id|>system<|end_header_id|>\\n\\n" }}
{{- "Today Date: " + date_string + "\\n\\n" }}
{%- if tools is not none %}
    {{- "You have access to the following functions.\\n\\n" }}
    {%- for t in tools %}
        {{- t | tojson(indent=4) }}
        {{- "\\n\\n" }}
    {%- endfor %}
{%- endif %}
{{- system_message }}
{{- "<|eot_id|>" }}
{%- for message in messages %}
    {%- if not (message.role == 'ipython' or 'tool_calls' in message) %}
        {{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\\n\\n'
            + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- if not message.tool_calls|length == 1 %}
            {{- raise_exception("This model only supports single tool-calls at once!") }}
        {%- endif %}
        {%- set tool_call = message.tool_calls[0].function %}
        {{- '{"name": "' + tool_call.name + '", "parameters": ' }}
        {{- tool_call.arguments | tojson }}
        {{- "}<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}
{%- endif %}
"""

CHATML = """\
{%- if tools %}
    {{- '<|im_start|>system\\n' }}
    {%- if messages[0].role == 'system' %}{{- messages[0].content + '\\n\\n' }}{%- endif %}
    {{- "# Tools\\n\\n<tools>" }}
    {%- for tool in tools %}
        {{- "\\n" }}
        {{- tool | tojson }}
    {%- endfor %}
    {{- "\\n</tools><|im_end|>\\n" }}
{%- elif messages[0].role == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0].content + '<|im_end|>\\n' }}
{%- endif %}
{%- set ns = namespace(multi_step_tool=true, last_query_index=messages|length - 1) %}
{%- for message in messages[::-1] %}
    {%- set index = (messages|length - 1) - loop.index0 %}
    {%- if ns.multi_step_tool and message.role == "user" %}
        {%- set ns.multi_step_tool = false %}
        {%- set ns.last_query_index = index %}
        {%- break %}
    {%- endif %}
{%- endfor %}
{%- for message in messages %}
    {%- set content = message.content if message.content is string else '' %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) %}
        {{- '<|im_start|>' + message.role + '\\n' + content + '<|im_end|>' + '\\n' }}
    {%- elif message.role == "assistant" %}
        {%- set reasoning = '' %}
        {%- if '</think>' in content %}
            {%- set reasoning = content.split('</think>')[0].rstrip('\\n').split('<think>')[-1] %}
            {%- set content = content.split('</think>')[-1].lstrip('\\n') %}
        {%- endif %}
        {% generation %}
        {%- if loop.index0 > ns.last_query_index and reasoning %}
            {{- '<|im_start|>assistant\\n<think>\\n' + reasoning.strip('\\n') + '\\n</think>\\n' }}
        {%- else %}
            {{- '<|im_start|>assistant\\n' }}
        {%- endif %}
        {{- content }}
        {%- for call in message.tool_calls or [] %}
            {%- if (loop.first and content) or (not loop.first) %}{{- '\\n' }}{%- endif %}
            {%- set call = call.function if call.function else call %}
            {{- '<tool_call>\\n{"name": "' + call.name + '", "arguments": ' }}
            {{- call.arguments if call.arguments is string else call.arguments | tojson }}
            {{- '}\\n</tool_call>' }}
        {%- endfor %}
        {{- '<|im_end|>\\n' }}
        {% endgeneration %}
    {%- elif message.role == "tool" %}
        {%- if loop.first or (messages[loop.index0 - 1].role != "tool") %}
            {{- '<|im_start|>user' }}
        {%- endif %}
        {{- '\\n<tool_response>\\n' + content + '\\n</tool_response>' }}
        {%- if loop.last or (messages[loop.index0 + 1].role != "tool") %}
            {{- '<|im_end|>\\n' }}
        {%- endif %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
    {%- if enable_thinking is defined and enable_thinking is false %}
        {{- '<think>\\n\\n</think>\\n\\n' }}
    {%- endif %}
{%- endif %}
"""

MISTRAL = """\
{%- if messages[0]["role"] == "system" %}
    {%- set system_message = messages[0]["content"] %}
    {%- set loop_messages = messages[1:] %}
{%- else %}
    {%- set loop_messages = messages %}
{%- endif %}
{%- set user_messages = loop_messages | selectattr("role", "equalto", "user") | list %}
{%- set ns = namespace() %}
{%- set ns.index = 0 %}
{%- for message in loop_messages %}
    {%- if (message["role"] == "user") != (ns.index % 2 == 0) %}
        {{- raise_exception("conversation roles must alternate user/assistant/...") }}
    {%- endif %}
    {%- set ns.index = ns.index + 1 %}
{%- endfor %}
{{- bos_token }}
{%- for message in loop_messages %}
    {%- if message["role"] == "user" %}
        {%- if tools is not none and (message == user_messages[-1]) %}
            {{- "[AVAILABLE_TOOLS] [" }}
            {%- for tool in tools %}
                {%- for key, val in tool.function.items() if key != "return" %}
                    {{- '"' + key + '": ' + val | tojson }}
                    {%- if not loop.last %}{{- ", " }}{%- endif %}
                {%- endfor %}
                {{- ", " if not loop.last else "]" }}
            {%- endfor %}
            {{- "[/AVAILABLE_TOOLS]" }}
        {%- endif %}
        {%- if loop.last and system_message is defined %}
            {{- "[INST] " + system_message + "\\n\\n" + message["content"] + "[/INST]" }}
        {%- else %}
            {{- "[INST] " + message["content"] + "[/INST]" }}
        {%- endif %}
    {%- elif message["role"] == "assistant" %}
        {{- " " + message["content"] | trim + eos_token }}
    {%- else %}
        {{- raise_exception("Only user and assistant roles are supported!") }}
    {%- endif %}
{%- endfor %}
"""

GEMMA = """\
{{ bos_token }}
{%- if messages[0]['role'] == 'system' -%}
    {%- if messages[0]['content'] is string -%}
        {%- set first_user_prefix = messages[0]['content'] + '\\n\\n' -%}
    {%- else -%}
        {%- set first_user_prefix = messages[0]['content'][0]['text'] + '\\n\\n' -%}
    {%- endif -%}
    {%- set loop_messages = messages[1:] -%}
{%- else -%}
    {%- set first_user_prefix = "" -%}
    {%- set loop_messages = messages -%}
{%- endif -%}
{%- for message in loop_messages -%}
    {%- if (message['role'] == 'user') != (loop.index0 % 2 == 0) -%}
        {{ raise_exception("Conversation roles must alternate user/assistant/user/assistant") }}
    {%- endif -%}
    {%- set role = "model" if message['role'] == 'assistant' else message['role'] -%}
    {{ '<start_of_turn>' + role + '\\n' + (first_user_prefix if loop.first else "") }}
    {%- if message['content'] is string -%}
        {{ message['content'] | trim }}
    {%- elif message['content'] is iterable -%}
        {%- for item in message['content'] -%}
            {%- if item['type'] == 'image' -%}
                {{ '<start_of_image>' }}
            {%- elif item['type'] == 'text' -%}
                {{ item['text'] | trim }}
            {%- endif -%}
        {%- endfor -%}
    {%- else -%}
        {{ raise_exception("Invalid content type") }}
    {%- endif -%}
    {{ '<end_of_turn>\\n' }}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{ '<start_of_turn>model\\n' }}
{%- endif -%}
"""

LLAMA31 = """\
{{- bos_token }}
{%- if custom_tools is defined %}
    {%- set tools = custom_tools %}
{%- endif %}
{%- if not tools_in_user_message is defined %}
    {%- set tools_in_user_message = true %}
{%- endif %}
{%- if not tools is defined %}
    {%- set tools = none %}
{%- endif %}
{%- if messages[0]['role'] == 'system' %}
    {%- set system_message = messages[0]['content'] | trim %}
    {%- set messages = messages[1:] %}
{%- else %}
    {%- set system_message = "" %}
{%- endif %}
{%- macro header(role) -%}
    {{ '<|start_header_id|>' ~ role ~ '<|end_header_id|>\\n\\n' }}
{%- endmacro %}
{{- header("system") }}
{%- if builtin_tools is defined or tools is not none %}
    {{- "Environment: ipython\\n" }}
{%- endif %}
{%- if builtin_tools is defined %}
    {{- "Tools: " + builtin_tools | reject('equalto', 'code_interpreter') | join(", ") + "\\n" }}
{%- endif %}
{%- if tools is not none and not tools_in_user_message %}
    {{- tools | map('tojson', indent=4) | join("\\n\\n") }}
{%- endif %}
{{- system_message + '<|eot_id|>' }}
{%- if tools_in_user_message and not tools is none %}
    {%- if messages | length != 0 %}
        {%- set first_user_message = messages[0]['content'] | trim %}
        {%- set messages = messages[1:] %}
    {%- else %}
        {{- raise_exception("There is no user message to put the tools into!") }}
    {%- endif %}
    {{- header("user") }}
    {%- for t in tools %}
        {{- t | tojson(indent=4, separators=(",", ": "), sort_keys=true) + "\\n\\n" }}
    {%- endfor %}
    {{- first_user_message + "<|eot_id|>" }}
{%- endif %}
{%- for message in messages %}
    {%- if not (message.role in ['ipython', 'tool'] or 'tool_calls' in message) %}
        {{- header(message['role']) + message['content'] | trim + '<|eot_id|>' }}
    {%- elif 'tool_calls' in message %}
        {%- set call = message.tool_calls[0].function %}
        {{- header('assistant') }}
        {%- if builtin_tools is defined and call.name in builtin_tools %}
            {{- "<|python_tag|>" + call.name + ".call(" }}
            {%- for name, value in call.arguments | items %}
                {{- '%s="%s"' % (name, value) }}{{ ", " if not loop.last }}
            {%- endfor %}
            {{- ")<|eom_id|>" }}
        {%- else %}
            {{- '{"name": "{}", "parameters": '.replace('{}', call.name) }}
            {{- call.arguments | tojson + "}<|eot_id|>" }}
        {%- endif %}
    {%- else %}
        {{- header("ipython") }}
        {{- message.content | tojson if message.content is mapping else message.content }}
        {{- "<|eot_id|>" }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- header("assistant") }}
{%- endif %}
"""

REASONING = """\
{%- set ns = namespace(system='', first=true) -%}
{%- for message in messages if message['role'] == 'system' -%}
    {%- set ns.system = ns.system + ('' if ns.first else '\\n\\n') + message['content'] -%}
    {%- set ns.first = false -%}
{%- endfor -%}
{{ bos_token }}{{ ns.system }}
{%- for message in messages | rejectattr('role', 'in', ['system']) -%}
    {%- if message.role == 'assistant' -%}
        <|assistant|>
        {%- if message.reasoning_content is defined -%}
            <think>{{ message['reasoning_content'] }}|{{ message.thinking }}</think>
        {%- endif -%}
        {{ (message.content or '').split('</think>') | last }}{{ eos_token }}
    {%- else -%}
        {{ '<|{}|>{:<4}'.format(message.role | title, message['content']) }}
    {%- endif -%}
{%- endfor -%}
{{ '<|assistant|>' if add_generation_prompt }}
{%- if enable_thinking | default(true) %}{{ '<think>\\n' }}{% endif %}
"""

TEMPLATES = {
    "llama3": LLAMA3,
    "llama31": LLAMA31,
    "chatml": CHATML,
    "mistral": MISTRAL,
    "gemma": GEMMA,
    "reasoning": REASONING,
}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "open_gate",
            "description": "Öffnet das <Tor> & lets 水 in",
            "parameters": {"type": "object", "properties": {"width": {"type": "number"}}},
        },
    }
]
USER = {"role": "user", "content": "  How much water? <水> & 'more'  "}
ANSWER = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nEnough."}
CALL = {"type": "function", "function": {"name": "open_gate", "arguments": {"width": 0.5}}}
CONVERSATIONS = {
    "question": [USER],
    "system": [{"role": "system", "content": "Be terse."}, USER],
    "turns": [USER, ANSWER, {"role": "user", "content": "And now?"}],
    "parts": [
        {"role": "system", "content": [{"type": "text", "text": "Be terse."}]},
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": " What? "}]},
    ],
    "reasoning": [USER, ANSWER | {"reasoning": "so"}, USER, ANSWER | {"reasoning_content": "b"}],
    "absent entries": [USER, ANSWER | {"name": None, "tool_calls": None}, USER],
    "tools": [
        USER,
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "tool", "content": "done"},
        ANSWER,
    ],
}


OPTIONS: list[dict[str, Any]] = [
    {},
    {"date_string": "26 Jul 2024", "enable_thinking": False, "tools_in_user_message": False},
    {"date_string": "", "builtin_tools": ["code_interpreter", "open_gate", "search"]},
]


@pytest.fixture
def directory(tmp_path: Path) -> Path:
    names = {"bos_token": "<|begin|>", "eos_token": {"__type": "AddedToken", "content": "<|end|>"}}
    return builders.save(builders.byte_level(), tmp_path, names)


def put(directory: Path, template: object) -> None:
    """Make a template the one in the tokenizer's settings."""
    file = directory / "tokenizer_config.json"
    settings = json.loads(file.read_text(encoding="utf-8"))
    file.write_text(json.dumps(settings | {"chat_template": template}), encoding="utf-8")


def render(source: str, *messages: dict[str, Any], **variables: Any) -> str:
    return ChatTemplate(source, Path("t.jinja")).render(list(messages), variables)


# The same prompts as transformers


@pytest.mark.parametrize("tools", [None, TOOLS], ids=["plain", "with tools"])
@pytest.mark.parametrize("conversation", sorted(CONVERSATIONS))
@pytest.mark.parametrize("name", sorted(TEMPLATES))
def test_renders_as_transformers(
    directory: Path, name: str, conversation: str, tools: list[dict[str, Any]] | None
) -> None:
    put(directory, TEMPLATES[name])
    messages = CONVERSATIONS[conversation]
    ours, theirs = Tokenizer(directory), PreTrainedTokenizerFast.from_pretrained(directory)
    for options in OPTIONS:
        for prompt in (True, False):
            arguments: dict[str, Any] = {"tools": tools, "add_generation_prompt": prompt} | options
            expected = attempt(theirs.apply_chat_template, messages, tokenize=False, **arguments)
            found = attempt(ours.apply_chat_template, messages, **arguments)
            if isinstance(expected, Exception):
                assert isinstance(found, InvalidRequestError) and found.field == "messages"
                assert str(expected) in found.message
            else:
                assert found == expected


def attempt(function: Callable[..., str], *args: Any, **kwargs: Any) -> str | Exception:
    try:
        return function(*args, **kwargs)
    except Exception as error:
        return error


def test_the_comparison_covers_prompts_and_refusals(directory: Path) -> None:
    put(directory, MISTRAL)
    tokenizer = Tokenizer(directory)
    turns = tokenizer.apply_chat_template(CONVERSATIONS["turns"])
    assert turns.startswith("<|begin|>[INST] ") and "Enough.<|end|>[INST] And now?" in turns
    with pytest.raises(InvalidRequestError, match="roles must alternate"):
        tokenizer.apply_chat_template(CONVERSATIONS["tools"])


def test_the_thinking_switch(directory: Path) -> None:
    put(directory, CHATML)
    tokenizer = Tokenizer(directory)
    thinking = tokenizer.apply_chat_template([USER])
    quiet = tokenizer.apply_chat_template([USER], enable_thinking=False)
    assert quiet == thinking + "<think>\n\n</think>\n\n"


def test_a_conversation_is_encoded_as_its_prompt_says(directory: Path) -> None:
    put(directory, LLAMA3)
    tokenizer = Tokenizer(directory)
    text = tokenizer.apply_chat_template([USER], date_string="today", tools=TOOLS)
    ids = tokenizer.encode_chat([USER], date_string="today", tools=TOOLS)
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    shorter = tokenizer.encode_chat([USER], date_string="today", add_generation_prompt=False)
    assert "assistant" not in tokenizer.decode(shorter)


def test_no_tools_is_the_same_as_an_empty_list(directory: Path) -> None:
    put(directory, LLAMA3)
    tokenizer = Tokenizer(directory)
    assert tokenizer.apply_chat_template([USER], tools=[]) == tokenizer.apply_chat_template([USER])


# Where templates come from

NAMED = [
    {"name": "default", "template": "plain {{ messages | length }}"},
    {"name": "tool_use", "template": "tools {{ tools | length }}"},
]


def test_named_templates(directory: Path) -> None:
    put(directory, NAMED)
    tokenizer = Tokenizer(directory)
    assert tokenizer.apply_chat_template([USER]) == "plain 1"
    assert tokenizer.apply_chat_template([USER], tools=TOOLS) == "tools 1"


def test_named_templates_without_a_default(directory: Path) -> None:
    put(directory, NAMED[1:])
    with pytest.raises(InvalidRequestError, match="no default chat template, only tool_use"):
        Tokenizer(directory).apply_chat_template([USER])


def test_files_come_before_settings(directory: Path) -> None:
    put(directory, "settings")
    assert Tokenizer(directory).apply_chat_template([USER]) == "settings"
    (directory / "chat_template.json").write_text('{"chat_template": "json"}')
    assert Tokenizer(directory).apply_chat_template([USER]) == "json"
    (directory / "chat_template.jinja").write_text("jinja")
    assert Tokenizer(directory).apply_chat_template([USER]) == "jinja"
    (directory / "additional_chat_templates").mkdir()
    (directory / "additional_chat_templates" / "tool_use.jinja").write_text("jinja with tools")
    assert Tokenizer(directory).apply_chat_template([USER], tools=TOOLS) == "jinja with tools"


def test_no_template(directory: Path) -> None:
    tokenizer = Tokenizer(directory)
    assert not tokenizer.has_chat_template
    with pytest.raises(InvalidRequestError, match="no chat template") as caught:
        tokenizer.apply_chat_template([USER])
    assert caught.value.field == "messages"


@pytest.mark.parametrize(
    "template", [3, ["x"], [{"name": "default"}], [{"name": [], "template": ""}]]
)
def test_settings_that_hold_no_template(directory: Path, template: object) -> None:
    put(directory, template)
    with pytest.raises(CheckpointError, match=r"chat_template in .*tokenizer_config\.json must be"):
        Tokenizer(directory)


@pytest.mark.parametrize(
    "source",
    [
        "{% for %}",
        "{{ x | no_such_filter }}",
        "{" * 3 + "(" * 5000,
        "{% for x in [1] %}" * 30 + "{% endfor %}" * 30,
        "{{ x | batch(3) }}",
    ],
)
def test_a_template_that_is_not_jinja(directory: Path, source: str) -> None:
    (directory / "chat_template.jinja").write_text(source)
    with pytest.raises(
        CheckpointError, match=r"'default' in .*chat_template\.jinja is not valid.*fix it or remove"
    ):
        Tokenizer(directory)


@pytest.mark.parametrize("name", ["chat_template.jinja", "chat_template.json"])
def test_a_damaged_file(directory: Path, name: str) -> None:
    (directory / name).write_bytes(b"\xff\xfe{")
    with pytest.raises(CheckpointError, match=rf"{name} cannot be read.*fetch it again"):
        Tokenizer(directory)


# Bad requests


@pytest.mark.parametrize(
    "messages", [[], ["text"], [None], "text", [{"role": "user", "content": object()}]]
)
def test_messages_must_be_a_list_of_objects(directory: Path, messages: Any) -> None:
    put(directory, CHATML)
    with pytest.raises(InvalidRequestError) as caught:
        Tokenizer(directory).apply_chat_template(messages)
    assert caught.value.field == "messages"


def test_a_variable_that_is_not_json_is_named(directory: Path) -> None:
    put(directory, CHATML)
    with pytest.raises(InvalidRequestError) as caught:
        Tokenizer(directory).apply_chat_template([USER], switch=object())
    assert caught.value.field == "switch"


def test_variables_cannot_replace_the_conversation(directory: Path) -> None:
    put(directory, "{{ messages[0].content }}")
    variables: dict[str, Any] = {"messages": "mine"}
    rendered = Tokenizer(directory).apply_chat_template([{"content": "theirs"}], **variables)
    assert rendered == "theirs"


def test_deeply_nested_messages_are_refused(directory: Path) -> None:
    put(directory, CHATML)
    content: Any = "deep"
    for _ in range(100_000):
        content = [content]
    with pytest.raises(InvalidRequestError):
        Tokenizer(directory).apply_chat_template([{"role": "user", "content": content}])
    while isinstance(content, list):
        content = content.pop()


def test_every_switch_reaches_the_template(directory: Path) -> None:
    put(
        directory,
        "{{ enable_thinking }} {{ reasoning_effort }} {{ other.deep[0] }} {{ tools[0].a }}",
    )
    rendered = Tokenizer(directory).apply_chat_template(
        [USER],
        tools=[{"a": "b"}],
        enable_thinking=False,
        reasoning_effort="high",
        other={"deep": [1]},
    )
    assert rendered == "False high 1 b"
