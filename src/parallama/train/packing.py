"""Documents into sequences of fixed length, in an order that the seed decides. Pure; numpy only.

The order can be taken up at any position. Shapes: `N` documents, `R` rows of an epoch, `S` tokens
of a row.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import CheckpointError, UsageError, lines
from .batch import IGNORED, PADDING, Batch


class Documents(Protocol):
    """Tokenized documents."""

    @property
    def lengths(self) -> NDArray[Any]:
        """`[N]` tokens of each."""
        ...

    def document(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """Token ids and loss mask, each `[length]`."""
        ...


@dataclass(frozen=True, kw_only=True)
class Position:
    """Where in the data a run is: the next row to be read.

    Attributes:
        epoch: passes over the data that are done.
        row: rows of this pass that are done.
    """

    epoch: int = 0
    row: int = 0


@dataclass(frozen=True, kw_only=True)
class Row:
    """One sequence, each field `[S]`.

    Attributes:
        ids: token ids; 0 where there is padding.
        labels: the same, or `IGNORED` where nothing is trained on: in prompts, in padding, and at
            the first token of every document, which nothing precedes.
        positions: counted from 0 within each document; 0 where there is padding.
        documents: which of the row's documents each token belongs to, from 0, or `PADDING`.
    """

    ids: NDArray[Any]
    labels: NDArray[Any]
    positions: NDArray[Any]
    documents: NDArray[Any]


def plan_rows(
    lengths: NDArray[Any],
    seq_len: int,
    seed: int,
    epoch: int,
    *,
    packing: bool = True,
    shuffle: bool = True,
) -> list[list[int]]:
    """Which documents each row of an epoch holds.

    Documents come in an order drawn from (seed, epoch). Each goes into the fullest row that has
    room for it: best fit, as in Ding et al., 2024, "Fewer Truncations Improve Language Modeling",
    but in the drawn order. No document is cut. The rows' order is drawn, too.

    Args:
        lengths: `[N]`, each from 1 to `seq_len`.
        packing: several documents a row; otherwise one.
        shuffle: draw both orders; otherwise documents and rows keep theirs.

    Raises:
        UsageError: a length is out of these bounds, or there is none.
    """
    if not len(lengths) or lengths.min() < 1 or lengths.max() > seq_len:
        found = f"{lengths.min()} to {lengths.max()} tokens" if len(lengths) else "none"
        raise UsageError(
            lines(f"documents to pack: {found}", f"expected some, of 1 to {seq_len} tokens")
        )
    draw = np.random.default_rng([seed, epoch])
    order = draw.permutation(len(lengths)) if shuffle else np.arange(len(lengths))
    rows: list[list[int]] = []
    room: dict[int, list[int]] = {}  # free tokens -> rows that have so many
    sizes: list[int] = []  # the keys of `room`, ascending
    for index in order.tolist():
        length = int(lengths[index])
        at = bisect_left(sizes, length) if packing else len(sizes)
        if at < len(sizes):
            free = sizes[at]
            row = room[free].pop()
            if not room[free]:
                del room[free], sizes[at]
        else:
            free, row = seq_len, len(rows)
            rows.append([])
        rows[row].append(index)
        left = free - length
        if left not in room:
            room[left] = []
            insort(sizes, left)
        room[left].append(row)
    return [rows[row] for row in draw.permutation(len(rows))] if shuffle else rows


def make_row(documents: Documents, members: list[int], seq_len: int) -> Row:
    """Put documents side by side into one row, which has room for them (see `plan_rows`)."""
    row = empty_row(seq_len)
    at = 0
    for number, index in enumerate(members):
        tokens, trained = documents.document(index)
        # From unsigned ids numpy would make the label -100 a large number.
        tokens = np.asarray(tokens, np.int64)
        here = slice(at, at + len(tokens))
        row.ids[here] = tokens
        row.labels[here] = np.where(trained, tokens, IGNORED)
        row.labels[at] = IGNORED
        row.positions[here] = np.arange(len(tokens))
        row.documents[here] = number
        at += len(tokens)
    return row


def empty_row(seq_len: int) -> Row:
    """A row of padding, which fills up a batch that has too few."""
    return Row(
        ids=np.zeros(seq_len, np.int64),
        labels=np.full(seq_len, IGNORED, np.int64),
        positions=np.zeros(seq_len, np.int64),
        documents=np.full(seq_len, PADDING, np.int64),
    )


class Rows:
    """The rows of all epochs, from a position on.

    Args:
        documents: what they are made of.
        packing, shuffle: see `plan_rows`.
        position: of the first row.

    Attributes:
        position: of the next row.

    Raises:
        CheckpointError: the position is behind the last row of its epoch.
    """

    def __init__(
        self,
        documents: Documents,
        seq_len: int,
        *,
        seed: int = 0,
        packing: bool = True,
        shuffle: bool = True,
        position: Position | None = None,
    ) -> None:
        self.position = position or Position()
        self._documents = documents
        self._seq_len = seq_len

        @lru_cache(maxsize=1)
        def planned(epoch: int) -> list[list[int]]:
            return plan_rows(
                documents.lengths, seq_len, seed, epoch, packing=packing, shuffle=shuffle
            )

        self._planned = planned
        if self.position.row >= len(self):
            raise CheckpointError(
                lines(
                    f"the checkpoint's place in the data is row {self.position.row}",
                    f"expected 0 to {len(self) - 1}, the rows of an epoch",
                )
            )

    def __len__(self) -> int:
        """Rows of the current epoch."""
        return len(self._planned(self.position.epoch))

    def count(self, epochs: float) -> int:
        """Rows of the first so many epochs; of a part of one, as many as it takes."""
        whole = math.floor(epochs)
        rows = sum(len(self._planned(epoch)) for epoch in range(whole))
        left = epochs - whole
        return rows + (math.ceil(left * len(self._planned(whole))) if left else 0)

    def take(self, count: int) -> list[Row]:
        """The next rows; the first of an epoch follows the last of the one before."""
        return list(self._take(count))

    def _take(self, count: int) -> Iterator[Row]:
        for _ in range(count):
            rows = self._planned(self.position.epoch)
            yield make_row(self._documents, rows[self.position.row], self._seq_len)
            row = self.position.row + 1
            if row < len(rows):
                self.position = Position(epoch=self.position.epoch, row=row)
            else:
                self.position = Position(epoch=self.position.epoch + 1)


def make_batch(rows: list[Row], micro_steps: int) -> Batch:
    """Rows, in order, as the micro-steps of one optimizer step.

    The number of rows is a multiple of that of micro-steps.
    """
    names = ("ids", "labels", "positions", "documents")
    arrays = {name: np.stack([getattr(row, name) for row in rows]) for name in names}
    return Batch(
        **{name: array.reshape(micro_steps, -1, array.shape[-1]) for name, array in arrays.items()}
    )
