"""Embeddings equal those that transformers' hidden states give."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from torch import Tensor

from headrace import LLM, SamplingParams
from headrace.errors import InvalidRequestError
from tests.models.expected import Expected, load, prompt_of
from tests.support.architectures import VOCAB, WITH_LLAMA
from tests.support.checkpoints import write_tokenizer

SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "intermediate_size": 112,
    "max_position_embeddings": 130,
    "layer_norm_eps": 0.05,
}
ENCODERS: dict[str, Callable[[], Any]] = {
    "bert": lambda: transformers.BertModel(transformers.BertConfig(**SIZES)),
    "roberta": lambda: transformers.RobertaModel(
        transformers.RobertaConfig(**SIZES, pad_token_id=1, type_vocab_size=1)
    ),
    "xlm_roberta": lambda: transformers.XLMRobertaModel(
        transformers.XLMRobertaConfig(**SIZES, pad_token_id=1, type_vocab_size=1)
    ),
}
TEXTS = [prompt_of(length) for length in (1, 100, 17, 40)]


def randomize(model: Any) -> Any:
    """Weights that all matter."""
    torch.manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
            elif "LayerNorm" in name:
                parameter.uniform_(0.5, 1.5)
            else:
                parameter.normal_(std=1 / math.sqrt(parameter.shape[-1]))
    return model.eval()


@pytest.fixture(scope="module", params=ENCODERS)
def encoder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Expected:
    """An encoder of transformers and its checkpoint."""
    directory = tmp_path_factory.mktemp(request.param)
    model = randomize(ENCODERS[request.param]())
    model.save_pretrained(directory)
    write_tokenizer(directory)
    return Expected(model, directory)


def hidden_states(model: Any, ids: list[int]) -> Tensor:
    """``[T, hidden]`` of one text."""
    with torch.inference_mode():
        tokens = torch.tensor([ids])
        # Of RoBERTa they begin behind those of padding, whose id may be among the random ones.
        first = model.config.pad_token_id + 1 if "roberta" in model.config.model_type else 0
        positions = torch.arange(first, first + len(ids))[None]
        hidden: Tensor = model(tokens, position_ids=positions).last_hidden_state[0]
    return hidden


def write_pooling(directory: Path, mode: str, *, normalized: bool) -> None:
    """The files of sentence-transformers."""
    kinds = ["Transformer", "Pooling", *(["Normalize"] if normalized else [])]
    modules = [
        {"idx": i, "name": str(i), "path": f"{i}_{kind}" if i else "", "type": f"st.models.{kind}"}
        for i, kind in enumerate(kinds)
    ]
    (directory / "modules.json").write_text(json.dumps(modules))
    (directory / "1_Pooling").mkdir(exist_ok=True)
    names = ("cls_token", "mean_tokens", "max_tokens", "lasttoken")
    settings = {f"pooling_mode_{name}": name == mode for name in names}
    (directory / "1_Pooling" / "config.json").write_text(json.dumps(settings))


@pytest.mark.parametrize(
    ("mode", "pick"),
    [
        ("cls_token", lambda hidden: hidden[0]),
        ("mean_tokens", lambda hidden: hidden.mean(0)),
        ("lasttoken", lambda hidden: hidden[-1]),
    ],
)
@pytest.mark.parametrize("reference", [False, True], ids=["fast", "reference"])
def test_encoder(
    encoder: Expected, mode: str, pick: Callable[[Tensor], Tensor], reference: bool
) -> None:
    write_pooling(encoder.directory, mode, normalized=False)
    with load(encoder.directory, reference=reference) as llm:
        outputs = llm.embed(TEXTS)
    for text, output in zip(TEXTS, outputs, strict=True):
        wanted = pick(hidden_states(encoder.model, text))
        assert output.error is None and output.embedding is not None
        np.testing.assert_allclose(output.embedding, wanted.numpy(), rtol=0, atol=1e-4)


def test_normalized_and_cut(encoder: Expected) -> None:
    write_pooling(encoder.directory, "mean_tokens", normalized=True)
    with load(encoder.directory) as llm:
        whole, cut = (llm.embed([TEXTS[1]], dimensions=n)[0].embedding for n in (None, 16))
        with pytest.raises(InvalidRequestError, match="dimensions"):
            llm.embed([TEXTS[1]], dimensions=65)
    assert whole is not None and cut is not None
    assert np.linalg.norm(whole) == pytest.approx(1) and np.linalg.norm(cut) == pytest.approx(1)
    np.testing.assert_allclose(cut, whole[:16] / np.linalg.norm(whole[:16]), rtol=1e-5)


def test_an_encoder_generates_nothing(encoder: Expected) -> None:
    with load(encoder.directory) as llm, pytest.raises(InvalidRequestError, match="generates"):
        llm.generate([TEXTS[1]], SamplingParams(max_tokens=2))


def test_long_texts_wait_for_a_step_with_room(encoder: Expected) -> None:
    texts = [prompt_of(100, seed) for seed in range(5)]
    with load(encoder.directory, max_num_batched_tokens=130, max_num_seqs=8) as llm:
        together = llm.embed(texts)
        alone = [llm.embed([text])[0] for text in texts]
    for one, other in zip(together, alone, strict=True):
        np.testing.assert_allclose(one.embedding, other.embedding, rtol=0, atol=1e-5)


@pytest.mark.parametrize("options", [{}, {"max_num_batched_tokens": 16}], ids=["whole", "chunks"])
@pytest.mark.parametrize("mode", ["lasttoken", "mean_tokens"])
def test_decoder(
    expectations: Callable[[str], Expected],
    options: dict[str, Any],
    mode: str,
    tmp_path: Path,
) -> None:
    expected = expectations("qwen3")
    directory = tmp_path / "embedder"
    expected.model.save_pretrained(directory)
    write_tokenizer(directory)
    write_pooling(directory, mode, normalized=True)
    with LLM(str(directory), dtype="float32", num_threads=1, **options) as llm:
        outputs = llm.embed(TEXTS) + llm.embed(TEXTS)
    for text, output in zip(TEXTS * 2, outputs, strict=True):
        with torch.inference_mode():
            hidden = expected.model.model(torch.tensor([text])).last_hidden_state[0]
        wanted = hidden.mean(0) if mode == "mean_tokens" else hidden[-1]
        wanted = wanted / wanted.norm()
        assert output.embedding is not None
        np.testing.assert_allclose(output.embedding, wanted.numpy(), rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", WITH_LLAMA)
def test_every_decoder(name: str, expectations: Callable[[str], Expected]) -> None:
    """Without files that say otherwise, the last token counts."""
    expected = expectations(name)
    with load(expected.directory, max_num_batched_tokens=16) as llm:
        outputs = llm.embed(TEXTS)
    for text, output in zip(TEXTS, outputs, strict=True):
        with torch.inference_mode():
            hidden = expected.model.base_model(torch.tensor([text])).last_hidden_state[0, -1]
        wanted = hidden / hidden.norm()
        assert output.embedding is not None
        np.testing.assert_allclose(output.embedding, wanted.numpy(), rtol=0, atol=1e-4)
