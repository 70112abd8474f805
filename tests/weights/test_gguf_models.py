"""Models out of GGUF files: the same as out of the checkpoints that these were made of."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from headrace import LLM, SamplingParams
from headrace.errors import CheckpointError
from tests.support.checkpoints import write_tokenizer
from tests.support.gguf_files import RawTensor, convert, encoded
from tests.support.gguf_models import CONFIGS

PROMPTS = [list(range(3, 45)), [7, 7, 9], [101, 5, 250, 6] * 9]
OPTIONS: dict[str, Any] = {"max_model_len": 96, "num_threads": 1, "max_num_seqs": 4}
GREEDY = SamplingParams(max_tokens=5, temperature=0, logprobs=0, prompt_logprobs=0, ignore_eos=True)
ENCODERS = ("bert",)
DECODERS = [name for name in CONFIGS if not name.startswith(ENCODERS)]


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    directory = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(directory)
    return str(directory)


def logprobs(model: Path, tokenizer: str, **options: Any) -> tuple[list[list[int]], Tensor]:
    """Tokens drawn for the prompts, and the log-probabilities of these and of the prompts'."""
    found: list[float] = []
    with LLM(str(model), tokenizer=tokenizer, **OPTIONS, **options) as llm:
        outputs = llm.generate(PROMPTS, GREEDY)
    tokens = []
    for prompt, output in zip(PROMPTS, outputs, strict=True):
        [completion] = output.outputs
        assert completion.logprobs is not None and output.prompt_logprobs is not None
        tokens.append(completion.token_ids)
        for token, entry in zip(prompt[1:], output.prompt_logprobs[1:], strict=True):
            assert entry is not None
            found.append(entry[token].logprob)
        found += [
            e[t].logprob for t, e in zip(completion.token_ids, completion.logprobs, strict=True)
        ]
    return tokens, torch.tensor(found)


@pytest.mark.parametrize("name", DECODERS)
def test_reference(name: str, originals: Callable[[str], Path], tokenizer: str) -> None:
    directory = originals(name)
    tokens, expected = logprobs(directory, tokenizer, reference=True)
    again, found = logprobs(directory / "model.gguf", tokenizer, reference=True)
    assert again == tokens
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith(ENCODERS)])
def test_embeddings(name: str, originals: Callable[[str], Path], tokenizer: str) -> None:
    directory = originals(name)
    found = []
    for model in (directory, directory / "model.gguf"):
        with LLM(str(model), tokenizer=tokenizer, reference=True, **OPTIONS) as llm:
            found.append(torch.tensor([list(out.embedding) for out in llm.embed(PROMPTS)]))
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=1e-4)


def quantize(name: str, tensor: Tensor) -> RawTensor:
    """Of matrices with rows of whole blocks."""
    blocks = tensor.ndim > 1 and tensor.shape[-1] % 32 == 0 and tensor.numel() > 64 * 8
    return encoded(name, tensor, "Q8_0" if blocks and "conv" not in name else "F32")


@pytest.mark.parametrize(
    "name", ["llama", "llama-biases", "qwen3_moe", "gemma3_text", "phi3", "gpt2"]
)
def test_quantized(
    name: str, originals: Callable[[str], Path], tokenizer: str, tmp_path: Path
) -> None:
    """Blocks as they are stored give what their values give in fp32, but for rounding."""
    path = convert(originals(name), tmp_path / "model.gguf", quantize)
    _, expected = logprobs(path, tokenizer, reference=True)
    with LLM(str(path), tokenizer=tokenizer, **OPTIONS) as llm:
        assert "Q8_0" in llm.model_info.weight_format
    _, found = logprobs(path, tokenizer)
    # Tokens drawn may differ, and with them what follows: the prompt's are the same.
    prompt = len(PROMPTS[0]) - 1
    error = (found - expected)[:prompt].pow(2).mean().sqrt() / expected[:prompt].std()
    assert float(error) < 0.2


def test_a_tokenizer_is_asked_for(originals: Callable[[str], Path]) -> None:
    """These files say nothing of one."""
    with pytest.raises(CheckpointError, match=r"tokenizer\.ggml\.model"):
        LLM(str(originals("llama") / "model.gguf"), **OPTIONS)
