"""Which problems models are trained on and which they are tested on: never the same."""

from __future__ import annotations

import hashlib
from typing import Literal

Split = Literal["train", "test"]

TEST_SHARE = 1 / 8
"""Of all problems that can be made."""


def split_of(identity: str) -> Split:
    """Where the problem that is known by ``identity`` belongs, forever.

    The splits are disjoint by construction, whatever seeds problems are made from: what decides is
    the problem.
    """
    digest = hashlib.blake2b(identity.encode(), digest_size=8).digest()
    return "test" if int.from_bytes(digest, "little") < TEST_SHARE * 2**64 else "train"
