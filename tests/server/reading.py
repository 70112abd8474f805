"""Reading what the server sends: streams of events, and metrics."""

from __future__ import annotations

import json
from typing import Any

import httpx
from prometheus_client.parser import text_string_to_metric_families


def events(response: httpx.Response) -> list[Any]:
    """The JSON values of a stream that has been read; "[DONE]" stays as it is."""
    blocks = response.text.split("\n\n")
    assert blocks.pop() == ""
    values = []
    for block in blocks:
        assert block.startswith("data: ")
        data = block.removeprefix("data: ")
        values.append(data if data == "[DONE]" else json.loads(data))
    return values


def metrics(client: httpx.Client) -> dict[str, float]:
    """Samples of ``/metrics`` by name, with their labels where they have any."""
    found = {}
    for family in text_string_to_metric_families(client.get("/metrics").text):
        for sample in family.samples:
            labels = ",".join(f"{k}={v}" for k, v in sample.labels.items())
            found[f"{sample.name}{{{labels}}}" if labels else sample.name] = sample.value
    return found
