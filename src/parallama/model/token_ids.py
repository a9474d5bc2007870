"""Token ids, held against the model's vocabulary. Pure."""

from __future__ import annotations

from collections.abc import Iterable

from ..errors import UsageError, lines


def check_ids(ids: Iterable[int], vocab: int) -> None:
    """Raise `UsageError` unless every token id is one of the model's.

    XLA would silently clamp others, or read garbage.
    """
    for token in ids:
        if not 0 <= token < vocab:
            raise UsageError(
                lines(
                    f"token id {token} is out of range",
                    f"expected 0 to {vocab - 1}, the model's vocabulary",
                )
            )
