"""Seeds of rows: what a request's draws depend on. Pure."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence


def row_seed(seed: int, ids: Sequence[int], number: int) -> int:
    """The 64-bit seed of a row.

    It depends on nothing but the request: not on its neighbours, its batch or the mesh. Equal
    prompts are told apart by their number.

    Args:
        seed: of the call, below 2^64.
        ids: the prompt's tokens.
        number: how many equal prompts came before it in the call.
    """
    content = array("Q", [seed, number]).tobytes() + array("q", ids).tobytes()
    return int.from_bytes(hashlib.blake2b(content, digest_size=8).digest(), "little")
