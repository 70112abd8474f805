"""The tokenizer of the model family: byte-level BPE with 4,096 tokens, made for Python source."""

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

VOCABULARY_SIZE = 4096
NAMED_SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|pad|>",
    "<|begin|>",
    "<|system|>",
    "<|user|>",
    "<|assistant|>",
    "<|tool|>",
    "<|end|>",
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<|fim_prefix|>",
    "<|fim_middle|>",
    "<|fim_suffix|>",
    "<|fim_pad|>",
    "<|file_sep|>",
    "<|repo_name|>",
)
SPECIAL_TOKEN_COUNT = 64
SPECIAL_TOKENS = NAMED_SPECIAL_TOKENS + tuple(
    f"<|reserved_{index}|>" for index in range(SPECIAL_TOKEN_COUNT - len(NAMED_SPECIAL_TOKENS))
)

# One alternative each: a single digit; an identifier or word; a run of punctuation; a run of line
# ends; an indentation; any other white space. Line ends and indentation stay apart, because a
# prompt may stop after a line end and the model must then be able to write the indentation.
PRE_TOKENIZER_PATTERN = r"\p{N}| ?[\p{L}_]+| ?[^\s\p{L}\p{N}_]+|[\r\n]+|[ \t]{2,}|\s"

# Values passed through tojson are printed on their own: joined to a string, plain Jinja would
# escape the string as HTML.
CHAT_TEMPLATE = """\
{%- macro text(content) -%}
{%- if content is string -%}{{ content }}
{%- elif content -%}
{%- for part in content if part.type == 'text' -%}{{ part.text }}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
{%- set has_system = messages and messages[0].role == 'system' -%}
{%- if has_system or tools -%}
{{- '<|system|>\\n' -}}
{%- if has_system -%}{{- text(messages[0].content) -}}{%- endif -%}
{%- if has_system and tools -%}{{- '\\n\\n' -}}{%- endif -%}
{%- if tools -%}
{{- '# Tools' -}}
{%- for tool in tools -%}{{- '\\n' -}}{{- tool | tojson -}}{%- endfor -%}
{%- endif -%}
{{- '<|end|>\\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if not (loop.first and has_system) -%}
{{- '<|' + message.role + '|>\\n' -}}
{%- if message.role == 'tool' -%}
{{- '<tool_response>\\n' + text(message.content) + '\\n</tool_response>' -}}
{%- else -%}
{{- text(message.content) -}}
{%- endif -%}
{%- for call in message.tool_calls or [] -%}
{%- set function = call.function or call -%}
{{- '<tool_call>\\n{"name": ' -}}{{- function.name | tojson -}}{{- ', "arguments": ' -}}
{%- if function.arguments is string -%}
{{- function.arguments -}}
{%- else -%}
{{- function.arguments | tojson -}}
{%- endif -%}
{{- '}\\n</tool_call>' -}}
{%- endfor -%}
{{- '<|end|>\\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>\\n' -}}{%- endif -%}
"""


def train_tokenizer(texts: Iterable[str]) -> Tokenizer:
    """Learn the merges from the texts; raises ValueError if they are too small for the size.

    "Neural Machine Translation of Rare Words with Subword Units", over bytes, so that every
    UTF-8 text survives encoding and decoding unchanged.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(PRE_TOKENIZER_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE,
        special_tokens=list(SPECIAL_TOKENS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer=trainer)
    if tokenizer.get_vocab_size() != VOCABULARY_SIZE:
        raise ValueError(f"the texts give only {tokenizer.get_vocab_size()} tokens")
    return tokenizer


def load_tokenizer(path: Path) -> Tokenizer:
    """Read a ``tokenizer.json``."""
    tokenizer: Tokenizer = Tokenizer.from_file(str(path))
    return tokenizer


def token_id(tokenizer: Tokenizer, token: str) -> int:
    """Return the identifier of a token; raises KeyError if the vocabulary lacks it."""
    identifier: int | None = tokenizer.token_to_id(token)
    if identifier is None:
        raise KeyError(token)
    return identifier


def tokenizer_config(context_length: int) -> dict[str, Any]:
    """Return the contents of ``tokenizer_config.json``."""
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "add_bos_token": False,
        "add_eos_token": False,
        "bos_token": None,
        "eos_token": "<|endoftext|>",
        "pad_token": "<|pad|>",
        "unk_token": None,
        "clean_up_tokenization_spaces": False,
        "model_max_length": context_length,
        "additional_special_tokens": list(SPECIAL_TOKENS),
        "chat_template": CHAT_TEMPLATE,
    }


def save_tokenizer(tokenizer: Tokenizer, directory: Path, context_length: int) -> None:
    """Write ``tokenizer.json`` and ``tokenizer_config.json``."""
    tokenizer.save(str(directory / "tokenizer.json"))
    config = json.dumps(tokenizer_config(context_length), indent=2)
    (directory / "tokenizer_config.json").write_text(config + "\n", encoding="utf-8")
