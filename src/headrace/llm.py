"""The Python face: ``LLM`` for offline work, ``AsyncLLM`` for online serving."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import queue
import sys
import threading
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import aclosing
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from headrace.adapters import AdapterRegistry, read_adapter
from headrace.config import EngineConfig
from headrace.contracts.gang import gang_method
from headrace.contracts.outputs import RequestOutput, SequenceUpdate
from headrace.contracts.profile import EXACT, Profile
from headrace.contracts.sampling import SamplingParams
from headrace.contracts.stats import EngineStats
from headrace.contracts.step import Pooling
from headrace.errors import (
    EngineClosedError,
    GenerationError,
    InvalidRequestError,
    OverloadedError,
)
from headrace.loading import LoadProgress, load_engine, make_config
from headrace.methods import Choice
from headrace.request_output import OutputBuilder

Prompt = str | Sequence[int] | Mapping[str, Any]
"""A text, token ids, ``{"prompt": text}``, ``{"prompt_token_ids": ids}``, or
``{"segments": [...]}``: texts or lists of ids, each of which is in the KV cache, and has met the KV
policy, before anything of the next one is seen.
"""

Messages = Sequence[Mapping[str, Any]]

_NO_OUTPUT = SamplingParams(max_tokens=0)


class _Input(NamedTuple):
    """A prompt that could run: its text (if there is one), tokens, and ends of its segments.

    ``beginnings`` are tokens with which the sequences of a gang begin behind it.
    """

    text: str | None
    token_ids: list[int]
    boundaries: tuple[int, ...] = ()
    beginnings: tuple[list[int], ...] = ()


class _Face:
    """What the two faces share: a loaded engine, prompts in, sampling defaults."""

    def __init__(
        self,
        model: str | None = None,
        *,
        adapters: Mapping[str, str | Path] | None = None,
        progress: LoadProgress | None = None,
        **options: Any,
    ) -> None:
        """Load ``model`` (the embedded one if ``None``).

        Args:
            adapters: name -> directory of a PEFT adapter.
            progress: called with bytes loaded and bytes in all.
            options: fields of ``EngineConfig``.
        """
        self.config: EngineConfig = make_config(model, options)
        read = {name: read_adapter(Path(path)) for name, path in (adapters or {}).items()}
        loaded = load_engine(self.config, progress)
        self.engine = loaded.engine
        self.tokenizer = loaded.tokenizer
        self.model_info = loaded.info
        self._defaults = loaded.generation_defaults
        self._embedding = loaded.pooling
        self.methods = loaded.methods
        self.adapters = AdapterRegistry(loaded.adapters)
        self._numbers = itertools.count()
        for name, weights in read.items():
            self.adapters.add(name, weights)

    def default_sampling_params(self, **overrides: Any) -> SamplingParams:
        """What the model's ``generation_config.json`` recommends, changed by ``overrides``."""
        return SamplingParams(**{**self._defaults, **overrides})

    def get_tokenizer(self) -> Any:
        """The model's tokenizer."""
        return self.tokenizer

    def check(self, prompt: Prompt, sampling_params: SamplingParams) -> list[int]:
        """Token ids of a prompt that could run. Raises InvalidRequestError otherwise."""
        return self._prepare(prompt, sampling_params).token_ids

    def tokenize(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt. Raises InvalidRequestError if it is no prompt."""
        return self._tokenize(prompt).token_ids

    def stats(self) -> EngineStats:
        """A snapshot of the engine's gauges and counters."""
        return self.engine.stats()

    def check_text(self, text: Prompt) -> list[int]:
        """Token ids of a text that could be embedded. Raises InvalidRequestError otherwise."""
        return self._prepare(text, _NO_OUTPUT, self._embedding.pooling).token_ids

    def _prepare(
        self,
        prompt: Prompt,
        params: SamplingParams,
        pooling: Pooling | None = None,
        profile: Profile = EXACT,
    ) -> _Input:
        """Tokens of a request that could run."""
        if not isinstance(params, SamplingParams):
            raise InvalidRequestError("sampling_params", f"must be SamplingParams, got {params!r}")
        prepared = self._tokenize(prompt)
        gang = gang_method(profile.methods, params.n)
        if gang is not None:
            headers = (self.tokenizer.encode(text, False) for text in gang.headers(params.n))
            prepared = prepared._replace(beginnings=tuple(headers))
        self.engine.check_request(prepared.token_ids, params, pooling, profile, prepared.beginnings)
        return prepared

    def _finish_embedding(self, output: RequestOutput, dimensions: int | None) -> RequestOutput:
        if output.embedding is not None:
            output.embedding = self._embedding.finish(output.embedding, dimensions)
        return output

    def _tokenize(self, prompt: Prompt) -> _Input:
        if isinstance(prompt, Mapping):
            known = {"prompt", "prompt_token_ids", "segments"}
            if len(prompt) != 1 or not known & prompt.keys():
                raise InvalidRequestError(
                    "prompt", "a dictionary holds 'prompt', 'prompt_token_ids' or 'segments'"
                )
            [key] = prompt
            if key == "segments":
                return self._join(prompt[key])
            text_expected = key == "prompt"
            prompt = prompt[key]
            if isinstance(prompt, str) != text_expected:
                raise InvalidRequestError(key, "must be text" if text_expected else "must be ids")
        if isinstance(prompt, str):
            context = self.model_info.max_model_len
            if len(prompt) > 2 * context * self.tokenizer.longest_token:
                # Tokenizing would take seconds only to say the same more exactly.
                raise InvalidRequestError(
                    "prompt", f"{len(prompt)} characters cannot fit a context of {context} tokens"
                )
            return _Input(prompt, self.tokenizer.encode(prompt))
        if not _is_list(prompt) or not all(_is_token_id(t) for t in prompt):
            raise InvalidRequestError("prompt", "must be text or a list of token ids")
        return _Input(None, [int(token) for token in prompt])

    def _join(self, segments: Any) -> _Input:
        """One prompt of several, each tokenized for itself."""
        if not _is_list(segments) or any(isinstance(part, Mapping) for part in segments):
            raise InvalidRequestError("segments", "must be a list of texts or lists of token ids")
        parts = [self._tokenize(part) for part in segments]
        texts = [part.text for part in parts if part.text is not None]
        ends = itertools.accumulate(len(part.token_ids) for part in parts)
        return _Input(
            "".join(texts) if len(texts) == len(parts) else None,
            [token for part in parts for token in part.token_ids],
            tuple(ends)[:-1],
        )

    def _new_builder(
        self, request_id: str, prompt: _Input, params: SamplingParams
    ) -> OutputBuilder:
        return OutputBuilder(
            request_id, prompt.text, prompt.token_ids, params, self.tokenizer.token_text
        )


class LLM(_Face):
    """Offline generation: the engine runs in the caller's thread.

    >>> llm = LLM()
    >>> llm.generate("def fibonacci(n):", SamplingParams(max_tokens=32))[0].outputs[0].text
    """

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
        priority: int = 0,
        adapter: str | Sequence[str | None] | None = None,
        methods: Choice | Sequence[Choice | None] | None = None,
    ) -> list[RequestOutput]:
        """Complete prompts, batched. Results are in the order of the prompts.

        Args:
            prompts: one prompt or a list; a list of integers is one prompt of token ids.
            sampling_params: one for all prompts, one each, or the model's defaults.
            use_tqdm: show a progress bar; on a terminal if ``None``.
            priority: see ``EngineConfig.scheduling_policy``.
            adapter: name of a loaded adapter, for all prompts or one each; ``None`` is the model.
            methods: names of the engine's methods that are used, with options that requests may
                set, for all prompts or one each; ``None``: all of the engine's.

        Returns:
            One result per prompt; one that failed while running carries ``error``.

        Raises:
            InvalidRequestError: a prompt or parameter is wrong; nothing has run then.
        """
        listed = _list_prompts(prompts)
        params = self._params_for(len(listed), sampling_params)
        with self._profiles_for(len(listed), adapter, methods) as profiles:
            jobs = [
                (self._prepare(prompt, each, None, profile), each)
                for prompt, each, profile in zip(listed, params, profiles, strict=True)
            ]
            return self._run(jobs, profiles, use_tqdm, priority)

    def load_adapter(self, name: str, path: str | Path) -> None:
        """Load a PEFT adapter under a name, in place of one that had it.

        Raises:
            CheckpointError: it cannot be read, or is for another model.
        """
        self.adapters.add(name, read_adapter(Path(path)))

    def unload_adapter(self, name: str) -> None:
        """Forget an adapter. Raises InvalidRequestError if there is none of that name."""
        self.adapters.remove(name)

    def chat(
        self,
        messages: Messages | Sequence[Messages],
        sampling_params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        use_tqdm: bool | None = None,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        adapter: str | Sequence[str | None] | None = None,
        methods: Choice | Sequence[Choice | None] | None = None,
    ) -> list[RequestOutput]:
        """Answer conversations, formatted by the model's chat template; see ``generate``."""
        prompts = [
            {
                "prompt_token_ids": self.tokenizer.encode_chat(
                    conversation,
                    **{
                        **(chat_template_kwargs or {}),
                        "add_generation_prompt": add_generation_prompt,
                    },
                )
            }
            for conversation in _list_conversations(messages)
        ]
        return self.generate(
            prompts, sampling_params, use_tqdm=use_tqdm, adapter=adapter, methods=methods
        )

    def embed(
        self,
        texts: Prompt | Sequence[Prompt],
        *,
        dimensions: int | None = None,
        use_tqdm: bool | None = None,
        adapter: str | Sequence[str | None] | None = None,
        methods: Choice | Sequence[Choice | None] | None = None,
    ) -> list[RequestOutput]:
        """Embeddings of texts, batched, in the order of the texts.

        Pooled and normalized as the files of sentence-transformers in the checkpoint say; without
        them from the last token of a decoder, or the mean over all tokens of an encoder.

        Args:
            dimensions: elements of an embedding, of models whose first ones are embeddings too.
            adapter, methods: see ``generate``.

        Returns:
            One result per text, its ``embedding`` ``[width]``.

        Raises:
            InvalidRequestError: a text is wrong; nothing has run then.
        """
        if dimensions is not None and (not _is_token_id(dimensions) or dimensions < 1):
            raise InvalidRequestError("dimensions", f"must be positive, got {dimensions!r}")
        pooling = self._embedding.pooling
        jobs = [
            (self._prepare(text, _NO_OUTPUT, pooling), _NO_OUTPUT) for text in _list_prompts(texts)
        ]
        with self._profiles_for(len(jobs), adapter, methods) as profiles:
            outputs = self._run(jobs, profiles, use_tqdm, 0, pooling)
        return [self._finish_embedding(output, dimensions) for output in outputs]

    def _params_for(self, count: int, given: Any) -> list[SamplingParams]:
        """One for all, one each, or the defaults, as a list."""
        if given is None:
            given = self.default_sampling_params()
        if not _is_list(given):
            return [given] * count
        if len(given) != count:
            raise InvalidRequestError(
                "sampling_params", f"{len(given)} were given for {count} prompts"
            )
        return list(given)

    @contextlib.contextmanager
    def _profiles_for(
        self,
        count: int,
        adapter: str | Sequence[str | None] | None,
        methods: Choice | Sequence[Choice | None] | None,
    ) -> Iterator[list[Profile]]:
        """A profile for each prompt; adapters stay as long as the context lasts."""
        if adapter is None or isinstance(adapter, str):
            adapter = [adapter] * count
        if methods is None or isinstance(methods, Mapping):
            methods = [methods] * count
        for field, given in (("adapter", adapter), ("methods", methods)):
            if len(given) != count:
                raise InvalidRequestError(field, f"{len(given)} were given for {count} prompts")
        chosen = [self.methods.choose(each) for each in methods]
        keys: list[str] = []
        try:
            # One by one: those before a name that is unknown have to be released.
            keys.extend("" if name is None else self.adapters.acquire(name) for name in adapter)
            yield [Profile(each, key) for each, key in zip(chosen, keys, strict=True)]
        finally:
            for key in filter(None, keys):
                self.adapters.release(key)

    def _run(
        self,
        jobs: list[tuple[_Input, SamplingParams]],
        profiles: list[Profile],
        use_tqdm: bool | None,
        priority: int,
        pooling: Pooling | None = None,
    ) -> list[RequestOutput]:
        """Feed the queue as it has room, step until all jobs are done."""
        builders: dict[str, OutputBuilder] = {}
        pending = deque(zip(jobs, profiles, strict=True))
        show = sys.stderr.isatty() if use_tqdm is None else use_tqdm
        advance, stop = _progress_bar(len(jobs)) if show else (None, None)
        try:
            while pending or self.engine.has_unfinished_requests:
                while pending and not self.engine.queue_is_full:
                    (prompt, params), profile = pending.popleft()
                    request_id = str(next(self._numbers))
                    builders[request_id] = self._new_builder(request_id, prompt, params)
                    self.engine.add_request(
                        request_id,
                        prompt.token_ids,
                        params,
                        priority=priority,
                        profile=profile,
                        boundaries=prompt.boundaries,
                        pooling=pooling,
                        beginnings=prompt.beginnings,
                    )
                for update in self.engine.step():
                    if update.request_id not in builders:
                        continue  # the end of a call that was interrupted
                    builders[update.request_id].apply(update)
                    if update.request_finished and advance:
                        advance()
        finally:
            for request_id, builder in builders.items():
                if not builder.output.finished:
                    self.engine.abort_request(request_id)
            if stop:
                stop()
        return [builder.output for builder in builders.values()]

    def close(self) -> None:
        """Give back the engine's resources."""
        self.engine.runner.close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Stream:
    """Where the updates of one request go: a queue in its consumer's event loop."""

    __slots__ = ("loop", "updates")

    def __init__(self) -> None:
        self.loop = asyncio.get_running_loop()
        self.updates: asyncio.Queue[SequenceUpdate | BaseException] = asyncio.Queue()


class AsyncLLM(_Face):
    """Online generation: the engine runs in a thread of its own.

    The thread owns the engine; others talk to it through an inbox that it empties between
    steps. Updates of a step reach each event loop in one call. The engine knows a request by a
    number that is never used again, so that nothing of an aborted request reaches a later one to
    which the caller gives the same id.
    """

    def __init__(
        self,
        model: str | None = None,
        *,
        adapters: Mapping[str, str | Path] | None = None,
        progress: LoadProgress | None = None,
        **options: Any,
    ) -> None:
        super().__init__(model, adapters=adapters, progress=progress, **options)
        self._inbox: queue.SimpleQueue[Callable[[], object]] = queue.SimpleQueue()
        self._streams: dict[str, _Stream] = {}
        self._engine_ids: dict[str, str] = {}
        self._calls: set[Future[object]] = set()
        self._closed = False
        self._draining = False
        self._failure: BaseException | None = None
        self._thread = threading.Thread(target=self._work, name="headrace-engine", daemon=True)
        self._thread.start()

    async def generate(
        self,
        prompt: Prompt,
        sampling_params: SamplingParams | None = None,
        request_id: str | None = None,
        *,
        priority: int = 0,
        profile: Profile = EXACT,
        pooling: Pooling | None = None,
        adapter: str | None = None,
        methods: Choice | None = None,
    ) -> AsyncGenerator[RequestOutput, None]:
        """Yield the request's live, cumulative result after each update.

        Closing the iterator early ends the request and frees its pages. ``adapter`` and
        ``methods`` are as in ``LLM.generate``.

        Raises:
            InvalidRequestError: the request is wrong.
            OverloadedError: the queue is full.
            GenerationError: the request failed while running.
            EngineClosedError: the engine is draining or closed.
        """
        params = self.default_sampling_params() if sampling_params is None else sampling_params
        profile = replace(profile, methods=self.methods.choose(methods))
        prepared = self._prepare(prompt, params, pooling, profile)
        engine_id = str(next(self._numbers))
        if request_id is None:
            request_id = f"request-{engine_id}"
        builder = self._new_builder(request_id, prepared, params)
        output, stream = builder.output, _Stream()
        if self._engine_ids.setdefault(request_id, engine_id) != engine_id:
            raise InvalidRequestError("request_id", f"{request_id!r} is already running")
        self._streams[engine_id] = stream
        key = None
        try:
            if adapter is not None:
                key = self.adapters.acquire(adapter)
                profile = replace(profile, adapter=key)
            self._check_open()
            self._check_room()
            self._inbox.put(
                lambda: self._add(engine_id, prepared, params, priority, profile, pooling)
            )
            while not output.finished:
                received = [await stream.updates.get()]
                while not stream.updates.empty():
                    received.append(stream.updates.get_nowait())
                for update in received:
                    if isinstance(update, BaseException):
                        raise update
                    builder.apply(update)
                if output.error is not None:
                    raise GenerationError(output.error)
                yield output
        finally:
            del self._streams[engine_id], self._engine_ids[request_id]
            if not output.finished:
                self._inbox.put(lambda: self.engine.abort_request(engine_id))
            if key is not None:
                self._inbox.put(partial(self.adapters.release, key))

    async def embed(
        self,
        text: Prompt,
        request_id: str | None = None,
        *,
        dimensions: int | None = None,
        priority: int = 0,
        adapter: str | None = None,
        methods: Choice | None = None,
    ) -> RequestOutput:
        """The embedding of a text; see ``LLM.embed``, and ``generate`` for what it raises."""
        stream = self.generate(
            text,
            _NO_OUTPUT,
            request_id,
            priority=priority,
            pooling=self._embedding.pooling,
            adapter=adapter,
            methods=methods,
        )
        async with aclosing(stream):
            outputs = [output async for output in stream]
        return self._finish_embedding(outputs[-1], dimensions)

    def _check_open(self) -> None:
        """Refuse what cannot be done any more.

        Its stream or call is known already: an engine that closes after this check tells it.
        """
        if self._closed or self._draining:
            raise EngineClosedError("the engine takes no more requests") from self._failure

    def _check_room(self) -> None:
        """Refuse a request that cannot be queued now."""
        if self.engine.queue_is_full:
            # Known at once; asking the engine's thread could take a whole step.
            raise OverloadedError("the queue is full; try again later")

    async def load_adapter(self, name: str, path: str | Path) -> None:
        """See ``LLM.load_adapter``; requests go on meanwhile.

        Raises:
            EngineClosedError: the engine is draining or closed.
        """
        weights = await asyncio.to_thread(read_adapter, Path(path))
        await self._in_engine(lambda: self.adapters.add(name, weights))

    async def unload_adapter(self, name: str) -> None:
        """Offer an adapter no longer; requests that use it go on with it."""
        await self._in_engine(lambda: self.adapters.remove(name))

    async def _in_engine(self, function: Callable[[], object]) -> None:
        """Call in the engine's thread, between two steps; raises what it raises.

        A call whose task is cancelled before its turn is left out.
        """
        done: Future[object] = Future()

        def call() -> None:
            if not done.set_running_or_notify_cancel():
                return
            try:
                done.set_result(function())
            except Exception as error:
                done.set_exception(error)

        self._calls.add(done)
        try:
            self._check_open()
            self._inbox.put(call)
            await asyncio.wrap_future(done)
        finally:
            self._calls.discard(done)

    @property
    def is_running(self) -> bool:
        """Whether the engine's thread lives."""
        return self._thread.is_alive()

    async def abort(self, request_id: str) -> None:
        """End a request; its iterator yields one last time, with finish_reason "abort"."""
        engine_id = self._engine_ids.get(request_id)
        if engine_id is not None:
            self._inbox.put(lambda: self.engine.abort_request(engine_id))

    async def drain(self, timeout: float) -> None:
        """Refuse new requests and wait, ``timeout`` seconds at most, until the others are done."""
        self._draining = True
        deadline = asyncio.get_running_loop().time() + timeout
        while self._streams and asyncio.get_running_loop().time() < deadline:
            await asyncio.sleep(0.02)

    def close(self) -> None:
        """End all requests, stop the thread, give back resources."""
        self._closed = True
        self._inbox.put(lambda: None)
        self._thread.join()
        self.engine.runner.close()

    # -- in the engine's thread -------------------------------------------------------------

    def _work(self) -> None:
        try:
            while not self._closed:
                self._empty_inbox(wait=not self.engine.has_unfinished_requests)
                if self.engine.has_unfinished_requests:
                    self._deliver(self.engine.step())
            self._empty_inbox(wait=False)
            for engine_id in list(self._streams):
                self.engine.abort_request(engine_id)
        except BaseException as error:
            self._failure = error
            raise
        finally:
            self._closed = True
            self._fail_everybody()

    def _add(
        self,
        engine_id: str,
        prompt: _Input,
        params: SamplingParams,
        priority: int,
        profile: Profile,
        pooling: Pooling | None,
    ) -> None:
        try:
            self.engine.add_request(
                engine_id,
                prompt.token_ids,
                params,
                priority=priority,
                profile=profile,
                boundaries=prompt.boundaries,
                pooling=pooling,
                beginnings=prompt.beginnings,
            )
        except Exception as error:
            if stream := self._streams.get(engine_id):
                _call_in(stream.loop, stream.updates.put_nowait, error)

    def _empty_inbox(self, wait: bool) -> None:
        if wait:
            self._inbox.get()()
        while True:
            try:
                self._inbox.get_nowait()()
            except queue.Empty:
                return

    def _deliver(self, updates: list[SequenceUpdate]) -> None:
        """Hand updates to their consumers: one wake-up per event loop."""
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, SequenceUpdate]]] = {}
        for update in updates:
            stream = self._streams.get(update.request_id)
            if stream is not None:
                by_loop.setdefault(stream.loop, []).append((stream, update))
        for loop, batch in by_loop.items():
            _call_in(loop, _put_all, batch)

    def _fail_everybody(self) -> None:
        """Tell all who wait for the engine that it has ended."""
        for stream in list(self._streams.values()):
            _call_in(stream.loop, stream.updates.put_nowait, self._ending())
        for done in list(self._calls):
            with contextlib.suppress(InvalidStateError):  # it was done, or nobody waits for it
                done.set_exception(self._ending())

    def _ending(self) -> EngineClosedError:
        error = EngineClosedError("the engine was closed while the request was running")
        error.__cause__ = self._failure
        return error


def _put_all(batch: list[tuple[_Stream, SequenceUpdate]]) -> None:
    for stream, update in batch:
        stream.updates.put_nowait(update)


def _call_in(loop: asyncio.AbstractEventLoop, function: Callable[[Any], object], item: Any) -> None:
    """Call in the loop's thread; a loop that is closed has no consumers left."""
    with contextlib.suppress(RuntimeError):
        loop.call_soon_threadsafe(function, item)


def _is_list(value: object) -> bool:
    return isinstance(value, Sequence) and not isinstance(value, (str, bytes))


def _is_token_id(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _list_prompts(prompts: Any) -> list[Prompt]:
    """One prompt or many, as a list."""
    if not _is_list(prompts) or (prompts and all(_is_token_id(token) for token in prompts)):
        return [prompts]
    return list(prompts)


def _list_conversations(messages: Any) -> list[list[dict[str, Any]]]:
    """One conversation or many, as a list."""
    if _is_list(messages) and messages and isinstance(messages[0], Mapping):
        messages = [messages]
    if not _is_list(messages) or not all(
        _is_list(each) and all(isinstance(message, Mapping) for message in each)
        for each in messages
    ):
        raise InvalidRequestError("messages", "must be a list of messages, or a list of such lists")
    return [[dict(message) for message in each] for each in messages]


def _progress_bar(total: int) -> tuple[Callable[[], None], Callable[[], None]]:
    """(advance, stop) of a bar that counts finished requests."""
    from rich.console import Console
    from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

    bar = Progress(
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=Console(stderr=True),
    )
    task = bar.add_task("requests", total=total)
    bar.start()
    return lambda: bar.advance(task), bar.stop
