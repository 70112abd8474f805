"""What an engine is put together for, and what is refused."""

from __future__ import annotations

from dataclasses import replace

import pytest

from headrace.config import EngineConfig
from headrace.contracts.cache import CacheLayout, LayerState, PlaneSpec, attention_state, layout_of
from headrace.engine.compose import shares_prefixes
from headrace.errors import ConfigurationError

ATTENTION = layout_of([attention_state(2, 8, "float32")] * 2, 16)
STATE = LayerState((PlaneSpec("recurrent", "sequence", 2, 8, "float32"),))
WATCHED = replace(ATTENTION, method_states=((0, STATE.planes[0]),))
RECURRENT = layout_of([STATE, attention_state(2, 8, "float32")], 16)


@pytest.mark.parametrize("asked", [None, True, False])
@pytest.mark.parametrize(
    ("layout", "causal", "reason"),
    [
        (ATTENTION, True, None),
        (WATCHED, True, None),
        (RECURRENT, True, "enable_prefix_caching: .*recurrent state.*leave the option out"),
        (ATTENTION, False, "enable_prefix_caching: .*depends on those behind it"),
    ],
)
def test_prefixes_are_shared_where_the_model_allows_it(
    layout: CacheLayout, causal: bool, reason: str | None, asked: bool | None
) -> None:
    config = EngineConfig(enable_prefix_caching=asked)
    if asked and reason is not None:
        with pytest.raises(ConfigurationError, match=reason):
            shares_prefixes(config, layout, causal)
    else:
        expected = reason is None and asked is not False
        assert shares_prefixes(config, layout, causal) == expected
