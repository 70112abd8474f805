"""Which format each part of a model's weights is in, as users ask for it and as files state it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from headrace.errors import CheckpointError, ConfigurationError
from headrace.ops.packed_weight import LAYOUT_VERSION, WeightFormat
from headrace.weights.stored_formats import STORED_FORMATS, stored_method
from headrace.weights.stored_formats.section import SECTION, unsupported

AUTO = "auto"
METHOD = "headrace"
"""``quant_method`` of checkpoints in the packed layout."""


@dataclass(frozen=True, slots=True)
class WeightPlan:
    """Formats of the linear weights inside the layers and of the output head.

    ``None`` leaves the choice to the checkpoint: packed ones say, plain ones stay unquantized.
    """

    body: WeightFormat | None = None
    head: WeightFormat | None = None

    @classmethod
    def parse(cls, body: str, head: str = AUTO) -> WeightPlan:
        """The formats of these names, ``None`` for "auto".

        Raises:
            ConfigurationError: a name is unknown.
        """
        return cls(_parse("weights", body), _parse("head_weights", head))

    def completed(self) -> WeightPlan:
        """With a format for the head where the body has one.

        It is the body's, but of at least 8 bits: those of the head cost almost no quality, while 4
        bits there cost as much as in half of all layers.
        """
        if self.body is None or self.head is not None:
            return self
        return WeightPlan(self.body, WeightFormat(8) if self.body.bits < 8 else self.body)

    @classmethod
    def stored(cls, config: dict[str, Any]) -> WeightPlan | None:
        """What a ``config.json`` says of packed weights; ``None`` if they are not packed: plain, or
        quantized in one of ``STORED_FORMATS``, in which reading dequantizes them.

        Raises:
            CheckpointError: they are quantized in a way, or packed in a layout, that is not read.
        """
        section = config.get("quantization_config")
        if section is None or stored_method(config) is not None:
            return None
        if not isinstance(section, dict) or section.get("quant_method") != METHOD:
            method = section.get("quant_method") if isinstance(section, dict) else section
            raise unsupported("quant_method", method, (METHOD, *STORED_FORMATS))
        version = section.get("layout_version")
        if version != LAYOUT_VERSION:
            raise CheckpointError(
                f"{SECTION}: layout_version is {version!r}, and this Headrace reads version "
                f"{LAYOUT_VERSION}; quantize the original model again with `headrace quantize`"
            )
        return cls(_stored(section, "format"), _stored(section, "head_format"))

    def section(self) -> dict[str, Any]:
        """What ``config.json`` says of weights packed so."""
        assert self.body is not None and self.head is not None
        return {
            "quant_method": METHOD,
            "layout_version": LAYOUT_VERSION,
            "format": self.body.name,
            "head_format": self.head.name,
        }


def _parse(field: str, name: str) -> WeightFormat | None:
    try:
        return None if name == AUTO else WeightFormat.parse(name)
    except ConfigurationError as error:
        raise ConfigurationError(f"{field}: {error}") from None


def _stored(section: dict[str, Any], field: str) -> WeightFormat:
    try:
        return WeightFormat.parse(str(section.get(field)))
    except ConfigurationError as error:
        raise CheckpointError(f"{SECTION}: {field}: {error}") from None
