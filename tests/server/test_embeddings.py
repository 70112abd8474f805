"""``/v1/embeddings`` of encoders and decoders, used with the real ``openai`` client."""

from __future__ import annotations

import base64
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import numpy.typing as npt
import openai
import pytest

from headrace import LLM, AsyncLLM
from headrace.contracts.outputs import RequestOutput
from tests.models.test_embeddings import ENCODERS, randomize
from tests.server.loopback import serving
from tests.server.reading import metrics
from tests.support.checkpoints import make_checkpoint, write_tokenizer

MODEL = "embedder"
WIDTH, CONTEXT, QUEUE = 64, 130, 16
TEXTS = ["water", "a wheel that turns in the headrace", "Rad", "x" * CONTEXT]
OPTIONS: dict[str, Any] = {
    "reference": True,
    "num_threads": 1,
    "kv_cache_memory_bytes": 1 << 21,
    "max_num_waiting": QUEUE,
}

Vectors = npt.NDArray[np.float32]


@dataclass(frozen=True)
class Server:
    """A running server, clients for it, and what the model makes of ``TEXTS`` offline."""

    client: openai.OpenAI
    http: httpx.Client
    expected: Vectors

    def embed(self, texts: Any, **options: Any) -> Any:
        return self.client.embeddings.create(model=MODEL, input=texts, **options)

    def refusal(self, **fields: Any) -> Any:
        """The error that answers a request with these fields."""
        body = {"model": MODEL, "input": "a", **fields}
        response = self.http.post("/v1/embeddings", json=body)
        assert response.status_code == 400, response.text
        return response.json()["error"]


def vectors_of(outputs: list[RequestOutput]) -> Vectors:
    return np.stack([output.embedding for output in outputs if output.embedding is not None])


@contextlib.contextmanager
def started(directory: Path) -> Iterator[Server]:
    """A server of the checkpoint."""
    with LLM(str(directory), **OPTIONS) as offline:
        expected = vectors_of(offline.embed(TEXTS))
    llm = AsyncLLM(str(directory), **OPTIONS)
    with (
        contextlib.closing(llm),
        serving(llm, model_names=(MODEL,)) as url,
        openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client,
        httpx.Client(base_url=url, timeout=60) as http,
    ):
        yield Server(client, http, expected)


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Of BERT, which makes nothing but embeddings."""
    directory = tmp_path_factory.mktemp("encoder")
    randomize(ENCODERS["bert"]()).save_pretrained(directory)
    write_tokenizer(directory)
    with started(directory) as server:
        yield server


@pytest.fixture(scope="module")
def decoder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """Of Qwen3, which generates text as well."""
    with started(make_checkpoint(tmp_path_factory.mktemp("decoder"), "qwen3")) as server:
        yield server


@pytest.fixture(params=["encoder", "decoder"])
def server(request: pytest.FixtureRequest) -> Server:
    """Each of them in turn."""
    found: Server = request.getfixturevalue(request.param)
    return found


def near(found: Any, expected: Vectors) -> bool:
    return np.allclose(np.array(found, dtype=np.float32), expected, rtol=0, atol=1e-5)


def test_a_batch_in_its_order(server: Server) -> None:
    answer = server.embed(TEXTS)
    assert (answer.object, answer.model) == ("list", MODEL)
    assert [(entry.object, entry.index) for entry in answer.data] == [
        ("embedding", index) for index in range(len(TEXTS))
    ]
    assert near([entry.embedding for entry in answer.data], server.expected)
    assert np.abs(server.expected[0] - server.expected[1:]).max(axis=1).min() > 0.01
    count = sum(map(len, TEXTS))
    assert (answer.usage.prompt_tokens, answer.usage.total_tokens) == (count, count)


def test_numbers_and_base64_are_the_same(server: Server) -> None:
    """The client asks for base64 by itself, and decodes it; asked for it, it hands it through."""
    listed = server.embed(TEXTS, encoding_format="float").data
    assert near([entry.embedding for entry in listed], server.expected)
    for entry, plain in zip(
        server.embed(TEXTS, encoding_format="base64").data, listed, strict=True
    ):
        raw = base64.b64decode(entry.embedding, validate=True)
        assert np.frombuffer(raw, dtype="<f4").tolist() == plain.embedding
    body = {"input": TEXTS[0], "encoding_format": None}
    plain = server.http.post("/v1/embeddings", json=body).json()["data"][0]["embedding"]
    assert plain == listed[0].embedding


def test_forms_of_the_input(server: Server) -> None:
    text = TEXTS[1]
    ids = server.http.post("/tokenize", json={"prompt": text}).json()["tokens"]
    for form, count in ((text, 1), ([text], 1), (ids, 1), ([ids, ids], 2), ([text, ids], 2)):
        found = server.embed(form).data
        assert len(found) == count
        assert near([entry.embedding for entry in found], server.expected[[1] * count])


def test_dimensions(server: Server) -> None:
    (cut,) = server.embed(TEXTS[1], dimensions=16).data
    wanted = server.expected[1, :16]
    assert near(cut.embedding, wanted / np.linalg.norm(wanted))
    (whole,) = server.embed(TEXTS[1], dimensions=WIDTH).data
    assert near(whole.embedding, server.expected[1])


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"input": ""}, "input"),
        ({"input": []}, "input"),
        ({"input": ["water", ""]}, "input"),
        ({"input": [[1], []]}, "input"),
        ({"input": None}, "input"),
        ({"input": {"text": "a"}}, "input"),
        ({"input": [10**6]}, "input"),
        ({"input": [-1]}, "input"),
        ({"input": "x" * 1000}, "input"),
        ({"input": ["a"] * (QUEUE + 1)}, "input"),
        ({"dimensions": 0}, "dimensions"),
        ({"dimensions": WIDTH + 1}, "dimensions"),
        ({"dimensions": "16"}, "dimensions"),
        ({"encoding_format": "int8"}, "encoding_format"),
        ({"max_tokens": 4}, "max_tokens"),
        ({"temperature": 0.0}, "temperature"),
        ({"stream": True}, "stream"),
        ({"inputs": "a"}, "inputs"),
    ],
)
def test_a_bad_request_names_its_field(server: Server, fields: dict[str, Any], param: str) -> None:
    found = server.refusal(**fields)
    assert (found["type"], found["param"]) == ("invalid_request_error", param)
    assert param in found["message"] and len(found["message"]) < 500


def test_a_text_that_is_a_token_too_long(encoder: Server) -> None:
    assert near(encoder.embed("x" * CONTEXT).data[0].embedding, encoder.expected[-1])
    with pytest.raises(openai.BadRequestError, match=f"the context holds {CONTEXT}") as caught:
        encoder.embed("x" * (CONTEXT + 1))
    assert caught.value.param == "input"


def test_an_unknown_model(server: Server) -> None:
    with pytest.raises(openai.NotFoundError, match=f"served: {MODEL}"):
        server.client.embeddings.create(model="other", input="a")


@pytest.mark.parametrize("stream", [False, True])
def test_an_encoder_completes_nothing(encoder: Server, stream: bool) -> None:
    with pytest.raises(openai.BadRequestError, match="makes embeddings") as caught:
        encoder.client.completions.create(model=MODEL, prompt="a", max_tokens=2, stream=stream)
    assert caught.value.param == "model"


def test_a_decoder_completes_too(decoder: Server) -> None:
    prompt = TEXTS[1]
    before = decoder.client.completions.create(model=MODEL, prompt=prompt, temperature=0)
    assert near([e.embedding for e in decoder.embed(TEXTS).data], decoder.expected)
    after = decoder.client.completions.create(model=MODEL, prompt=prompt, temperature=0)
    assert after.choices[0].text == before.choices[0].text


def test_nothing_is_left_behind(server: Server) -> None:
    before = metrics(server.http)
    server.embed(TEXTS)
    server.refusal(dimensions=WIDTH + 1)
    after = metrics(server.http)
    assert after["headrace_pages_used"] == after["headrace_requests_running"] == 0
    grown = {name: after[name] - before.get(name, 0) for name in after}
    assert grown["headrace_request_duration_seconds_count"] == len(TEXTS)
    assert grown["headrace_generation_tokens_total"] == 0
