"""Adapters as models of the server, used with the real ``openai`` client."""

from __future__ import annotations

import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from safetensors.torch import load_file, save_file

from headrace import LLM, AsyncLLM, SamplingParams
from headrace.errors import ConfigurationError
from tests.server.loopback import serving, wait_until
from tests.support.adapters import write_adapter
from tests.support.checkpoints import make_checkpoint

MODEL = "tiny"
TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"
MESSAGES: list[Any] = [{"role": "user", "content": "Which way does the water go?"}]
PROMPT = "A headrace brings the water of a river to the wheel of a mill."
TOKENS = 24
OPTIONS: dict[str, Any] = {
    "reference": True,
    "num_threads": 1,
    "kv_cache_memory_bytes": 1 << 21,
    "block_size": 8,
}
"""Of engines whose results do not depend on the batch."""


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small model with random weights."""
    directory = make_checkpoint(tmp_path_factory.mktemp("base"), "llama3")
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": TEMPLATE}))
    return directory


@pytest.fixture(scope="module")
def adapters(base: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two adapters for it. Not to be altered."""
    directory = tmp_path_factory.mktemp("adapters")
    return {name: write_adapter(base, directory / name, seed) for seed, name in enumerate("ab")}


@dataclass(frozen=True)
class Answers:
    """What each model says alone, offline: name -> text."""

    completion: dict[str, str]
    chat: dict[str, str]


@pytest.fixture(scope="module")
def alone(base: Path, adapters: dict[str, Path]) -> Answers:
    params = SamplingParams(max_tokens=TOKENS, temperature=0.0, ignore_eos=True)
    names = {MODEL: None, "a": "a", "b": "b"}
    with LLM(str(base), adapters=adapters, **OPTIONS) as llm:
        texts = {
            name: llm.generate(PROMPT, params, adapter=adapter)[0].outputs[0].text
            for name, adapter in names.items()
        }
        chats = {
            name: llm.chat(MESSAGES, params, adapter=adapter)[0].outputs[0].text
            for name, adapter in names.items()
        }
    assert len(set(texts.values())) == len(set(chats.values())) == 3
    return Answers(texts, chats)


@dataclass(frozen=True)
class Server:
    """A running server, and clients for it."""

    llm: AsyncLLM
    client: openai.OpenAI
    http: httpx.Client

    def complete(self, model: str, **options: Any) -> Any:
        """A completion of exactly ``TOKENS`` tokens unless told."""
        options = {"prompt": PROMPT, "max_tokens": TOKENS, "temperature": 0, **options}
        return self.client.completions.create(
            model=model, extra_body={"ignore_eos": True}, **options
        )

    def cached(self, model: str) -> tuple[str, int]:
        """Text of a completion, and how many tokens of its prompt came out of the cache."""
        answer = self.complete(model)
        return answer.choices[0].text, answer.usage.prompt_tokens_details.cached_tokens

    def load(self, name: str, directory: Path) -> httpx.Response:
        body = {"lora_name": name, "lora_path": str(directory)}
        return self.http.post("/v1/load_lora_adapter", json=body)

    def unload(self, name: str) -> httpx.Response:
        return self.http.post("/v1/unload_lora_adapter", json={"lora_name": name})

    @property
    def models(self) -> list[str]:
        return [model.id for model in self.client.models.list()]

    @property
    def kept(self) -> set[str]:
        """Keys of the adapters that are in memory."""
        targets = self.llm.adapters._bank._targets
        return {key for target in targets for key in target.linear.adapters}


Start = Callable[..., Server]


@pytest.fixture
def start(base: Path) -> Iterator[Start]:
    """Starts servers of the model, which end with the test."""
    with contextlib.ExitStack() as stack:

        def run(adapters: dict[str, Path] | None = None, updates: bool = True) -> Server:
            llm = AsyncLLM(str(base), adapters=adapters, **OPTIONS)
            stack.callback(llm.close)
            options = {"model_names": (MODEL,), "allow_adapter_updates": updates}
            url = stack.enter_context(serving(llm, **options))
            client = openai.OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)
            http = httpx.Client(base_url=url, timeout=60)
            return Server(llm, stack.enter_context(client), stack.enter_context(http))

        yield run


@pytest.fixture
def server(start: Start, adapters: dict[str, Path]) -> Server:
    """A server of both adapters."""
    return start(adapters)


# -- requests ---------------------------------------------------------------------------------


def test_adapters_are_listed_as_models(server: Server, adapters: dict[str, Path]) -> None:
    listed = server.http.get("/v1/models").json()["data"]
    assert [model["id"] for model in listed] == [MODEL, "a", "b"]
    assert "parent" not in listed[0]
    for model, directory in zip(listed[1:], adapters.values(), strict=True):
        assert (model["parent"], model["root"]) == (MODEL, str(directory))
        assert model["max_model_len"] == listed[0]["max_model_len"]
        assert server.http.get(f"/v1/models/{model['id']}").json() == model


@pytest.mark.parametrize("model", [MODEL, "a", "b"])
def test_a_request_names_its_adapter_as_its_model(
    server: Server, alone: Answers, model: str
) -> None:
    answer = server.complete(model)
    assert (answer.model, answer.choices[0].text) == (model, alone.completion[model])
    chunks = list(server.complete(model, stream=True))
    assert "".join(chunk.choices[0].text for chunk in chunks) == alone.completion[model]
    options: dict[str, Any] = {"model": model, "messages": MESSAGES, "temperature": 0}
    options |= {"max_tokens": TOKENS, "extra_body": {"ignore_eos": True}}
    chat = server.client.chat.completions.create(**options)
    assert (chat.model, chat.choices[0].message.content) == (model, alone.chat[model])
    parts = server.client.chat.completions.create(**options, stream=True)
    text = "".join(part.choices[0].delta.content or "" for part in parts)
    assert text == alone.chat[model]


def test_models_that_share_steps_answer_as_alone(
    server: Server, alone: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    models, everybody = [MODEL, "a", "b", "a"], threading.Event()
    submit, steps = server.llm.engine.runner.submit, []

    def wait_and_submit(plan: Any, tables: Any) -> Any:
        assert everybody.wait(60)
        steps.append({row.adapter for row in plan.rows})
        return submit(plan, tables)

    monkeypatch.setattr(server.llm.engine.runner, "submit", wait_and_submit)
    with ThreadPoolExecutor(len(models)) as pool:
        answers = [pool.submit(server.complete, model) for model in models]
        wait_until(lambda: len(server.llm._streams) == len(models))
        everybody.set()
        texts = [answer.result().choices[0].text for answer in answers]
    assert texts == [alone.completion[model] for model in models]
    assert max(map(len, steps)) == 3, "no step had rows of all"


def test_embeddings_go_through_adapters(
    server: Server, base: Path, adapters: dict[str, Path]
) -> None:
    with LLM(str(base), adapters=adapters, **OPTIONS) as llm:
        for model, name in ((MODEL, None), ("a", "a"), ("b", "b")):
            (wanted,) = llm.embed(PROMPT, adapter=name)
            (found,) = server.client.embeddings.create(model=model, input=PROMPT).data
            assert wanted.embedding is not None
            assert found.embedding == pytest.approx(wanted.embedding.tolist(), abs=1e-5)


# -- adapters that come and go ----------------------------------------------------------------


def test_loading_and_unloading(start: Start, adapters: dict[str, Path], alone: Answers) -> None:
    server = start()
    with pytest.raises(openai.NotFoundError, match=f"served: {MODEL}"):
        server.complete("a")
    for name, directory in adapters.items():
        assert server.load(name, directory).status_code == 200
    assert server.models == [MODEL, "a", "b"]
    assert server.complete("a").choices[0].text == alone.completion["a"]
    assert server.unload("a").status_code == 200
    assert server.models == [MODEL, "b"]
    assert server.kept == {"b#2"}
    with pytest.raises(openai.NotFoundError, match=f"served: {MODEL}, b"):
        server.complete("a")
    assert server.http.get("/v1/models/a").status_code == 404
    assert server.complete("b").choices[0].text == alone.completion["b"]
    refused = server.unload("a")
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "lora_name"


def test_a_running_request_keeps_its_adapter(
    server: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = server.complete("a", max_tokens=80).choices[0].text
    other = server.complete("b", max_tokens=80).choices[0].text
    go_on, submit = threading.Event(), server.llm.engine.runner.submit

    def submit_slowly(plan: Any, tables: Any) -> Any:
        go_on.wait(0.1)
        return submit(plan, tables)

    monkeypatch.setattr(server.llm.engine.runner, "submit", submit_slowly)
    stream = server.complete("a", max_tokens=80, stream=True)
    text = next(stream).choices[0].text
    directory = server.llm.adapters.directories["b"]
    assert server.unload("a").status_code == 200
    assert server.models == [MODEL, "b"]
    with pytest.raises(openai.NotFoundError):
        server.complete("a")
    # Another one under the name has nothing to do with the one that runs.
    assert server.load("a", directory).status_code == 200
    assert server.kept == {"a#1", "b#2", "a#3"}
    go_on.set()
    assert text + "".join(chunk.choices[0].text for chunk in stream) == whole
    wait_until(lambda: server.kept == {"b#2", "a#3"})
    assert server.complete("a", max_tokens=80).choices[0].text == other != whole


def test_no_version_gets_pages_of_another(
    start: Start, adapters: dict[str, Path], alone: Answers
) -> None:
    server = start({"a": adapters["a"]})
    old, new = alone.completion["a"], alone.completion["b"]
    first, again = server.cached("a"), server.cached("a")
    assert first == (old, 0) and again[0] == old and again[1] > 0
    assert server.load("a", adapters["b"]).status_code == 200
    assert server.kept == {"a#2"}
    assert server.cached("a") == (new, 0)
    assert server.cached("a") == (new, again[1])
    assert server.cached(MODEL) == (alone.completion[MODEL], 0)
    # The files of the first one once more are a third version: they may have changed.
    assert server.unload("a").status_code == server.load("a", adapters["a"]).status_code == 200
    assert server.cached("a") == first


def test_versions_that_run_at_once_share_no_pages(
    start: Start, adapters: dict[str, Path], alone: Answers, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = start({"a": adapters["a"]})
    go_on, submit, steps = threading.Event(), server.llm.engine.runner.submit, []

    def submit_slowly(plan: Any, tables: Any) -> Any:
        go_on.wait(0.1)
        steps.append({row.adapter for row in plan.rows})
        return submit(plan, tables)

    monkeypatch.setattr(server.llm.engine.runner, "submit", submit_slowly)
    stream = server.complete("a", stream=True)
    text = next(stream).choices[0].text
    assert server.load("a", adapters["b"]).status_code == 200
    with ThreadPoolExecutor(1) as pool:
        answer = pool.submit(server.cached, "a")
        wait_until(lambda: {"a#1", "a#2"} in steps)
        go_on.set()
        assert answer.result() == (alone.completion["b"], 0)
    assert text + "".join(chunk.choices[0].text for chunk in stream) == alone.completion["a"]


# -- refusals ---------------------------------------------------------------------------------


def for_another_model(directory: Path) -> None:
    """Give the factors of queries a name that the model lacks."""
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name.replace("q_proj", "query"): tensor for name, tensor in tensors.items()}, file)


def for_a_taller_model(directory: Path) -> None:
    """Give the products more rows."""
    file = directory / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({n: t.repeat(2, 1) if "lora_B" in n else t for n, t in tensors.items()}, file)


def without_weights(directory: Path) -> None:
    (directory / "adapter_model.safetensors").unlink()


def without_config(directory: Path) -> None:
    (directory / "adapter_config.json").unlink()


def pickled(directory: Path) -> None:
    (directory / "adapter_model.safetensors").rename(directory / "adapter_model.bin")


def truncated(directory: Path) -> None:
    file = directory / "adapter_model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def empty(directory: Path) -> None:
    save_file({}, directory / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (for_another_model, "another model"),
        (for_a_taller_model, "another model"),
        (without_weights, "does not exist"),
        (without_config, "adapter_config.json"),
        (pickled, "pickle"),
        (truncated, "truncated"),
        (empty, "no factors"),
    ],
)
def test_bad_adapters(
    server: Server, base: Path, tmp_path: Path, damage: Callable[[Path], None], message: str
) -> None:
    """The one that has the name already stays."""
    before = server.complete("a").choices[0].text
    directory = write_adapter(base, tmp_path / "bad", 5)
    damage(directory)
    for name in ("a", "bad"):
        refused = server.load(name, directory)
        error = refused.json()["error"]
        assert (refused.status_code, error["param"]) == (400, "lora_path")
        assert message in error["message"] and str(directory) in error["message"]
    assert server.models == [MODEL, "a", "b"]
    assert server.kept == {"a#1", "b#2"}
    assert server.complete("a").choices[0].text == before


def test_a_directory_that_is_not_there(server: Server, tmp_path: Path) -> None:
    refused = server.load("bad", tmp_path / "nowhere")
    assert refused.json()["error"]["param"] == "lora_path"
    assert "nowhere" in refused.json()["error"]["message"]


@pytest.mark.parametrize("name", ["", "a#1", MODEL])
def test_bad_names(server: Server, adapters: dict[str, Path], name: str) -> None:
    refused = server.load(name, adapters["a"])
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == "lora_name"
    assert server.models == [MODEL, "a", "b"]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"lora_name": "a"}, "lora_path"),
        ({"lora_path": "a"}, "lora_name"),
        ({"lora_name": 1, "lora_path": "a"}, "lora_name"),
        ({"lora_name": "a", "lora_path": "a", "lora_rank": 8}, "lora_rank"),
    ],
)
def test_bad_bodies(server: Server, body: dict[str, Any], param: str) -> None:
    refused = server.http.post("/v1/load_lora_adapter", json=body)
    assert refused.status_code == 400
    assert refused.json()["error"]["param"] == param


def test_updates_that_are_not_allowed(start: Start, adapters: dict[str, Path]) -> None:
    server = start({"a": adapters["a"]}, updates=False)
    for refused in (server.load("b", adapters["b"]), server.unload("a")):
        assert refused.status_code == 403
        assert "--allow-adapter-updates" in refused.json()["error"]["message"]
    assert server.models == [MODEL, "a"]


def test_an_adapter_that_is_called_as_the_model_is(start: Start, adapters: dict[str, Path]) -> None:
    with pytest.raises(ConfigurationError, match="adapter: 'tiny' is the model's name"):
        start({MODEL: adapters["a"]})
