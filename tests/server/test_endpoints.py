"""The smaller routes: models, tokenizer, health, metrics."""

from __future__ import annotations

import httpx

from tests.server.fake_llm import END, FakeLLM
from tests.server.loopback import serving
from tests.server.reading import metrics

USER = {"role": "user", "content": "hi"}


def test_models(client: httpx.Client) -> None:
    listed = client.get("/v1/models").json()
    assert listed["object"] == "list"
    assert [model["id"] for model in listed["data"]] == ["fake", "alias"]
    assert client.get("/v1/models/alias").json() == listed["data"][1]
    assert listed["data"][1]["max_model_len"] == 4096


def test_tokenize(client: httpx.Client) -> None:
    response = client.post("/tokenize", json={"prompt": "hi"})
    assert response.json() == {"count": 2, "max_model_len": 4096, "tokens": [104, 105]}
    response = client.post("/tokenize", json={"messages": [USER], "add_generation_prompt": False})
    assert bytes(response.json()["tokens"]) == b"user: hi\n"


def test_detokenize(client: httpx.Client) -> None:
    response = client.post("/detokenize", json={"tokens": [104, END]})
    assert response.json() == {"prompt": "h<end>"}


def test_health(client: httpx.Client) -> None:
    assert client.get("/health").status_code == 200


def test_an_engine_that_has_stopped_is_not_healthy(client: httpx.Client, llm: FakeLLM) -> None:
    llm.is_running = False
    response = client.get("/health")
    llm.is_running = True
    assert response.status_code == 503
    assert response.json()["error"]["code"] == "engine_stopped"


def test_the_engines_counts_are_metrics(client: httpx.Client) -> None:
    found = metrics(client)
    assert found["headrace_pages_total"] == 99
    assert found["headrace_preemptions_total"] == 7
    assert found["headrace_spec_decode_num_drafts_total"] == 3
    assert found["headrace_spec_decode_num_draft_tokens_total"] == 12
    assert found["headrace_spec_decode_num_accepted_tokens_total"] == 5


def test_finished_requests_are_metrics() -> None:
    with serving(FakeLLM()) as url, httpx.Client(base_url=url) as client:
        client.post("/v1/completions", json={"prompt": ["hey", "you"], "n": 3})
        found = metrics(client)
    assert found["headrace_completions_finished_total{finish_reason=length}"] == 6
    assert found["headrace_time_to_first_token_seconds_count"] == 2
    assert found["headrace_time_to_first_token_seconds_sum"] == 0.5
    assert found["headrace_time_per_output_token_seconds_sum"] == 1.0
    assert found["headrace_request_duration_seconds_sum"] == 2.5
