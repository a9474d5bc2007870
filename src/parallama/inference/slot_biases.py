"""The rows of `bias` on the devices, which change with a request's text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from ..engine.interface import DeviceTensor, Steps
from . import state
from .choosing import TokenBias

Row = tuple[TokenBias, frozenset[int]]
"""A request's bias, and the tokens that are hidden as its text stands."""


class BiasRows:
    """`bias`, `[B, V]`: put anew when a row that counts has changed, which is seldom.

    Args:
        rows: `B`.

    Attributes:
        tensor: on the devices.
    """

    def __init__(self, steps: Steps, rows: int) -> None:
        self._steps, self._rows = steps, rows
        self.tensor = state.no_bias(steps, rows)["bias"]
        self._host: torch.Tensor | None = None
        self._held: dict[int, Row] = {}

    def holding(self, wanted: Mapping[int, Row]) -> DeviceTensor:
        """The tensor, with these rows by their numbers; the others mean nothing."""
        new = {row: each for row, each in wanted.items() if self._held.get(row) != each}
        if new:
            vocab = self._steps.plan.vocab
            if self._host is None:
                self._host = torch.zeros(self._rows, vocab)
            for row, (bias, hidden) in new.items():
                self._host[row] = state.bias_row(bias, hidden, vocab)
            self._held |= new
            self.tensor = state.put(self._steps, {"bias": self._host})["bias"]
        return self.tensor


def row_of(bias: TokenBias, ids: Sequence[int], new: int) -> Row:
    """What a request's row holds behind these tokens, of which `new` were chosen."""
    return bias, bias.hidden(ids, new)
