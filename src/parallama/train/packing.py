"""Documents into sequences of fixed length, in an order that the seed decides, from any position on. Pure; numpy only.

Shapes: `N` documents, `R` rows of an epoch, `S` tokens of a row.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

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
        labels: the same, `IGNORED` where nothing is trained on: prompts, padding, and the first token of every document, which nothing precedes.
        positions: counted from 0 within each document; 0 where there is padding.
        documents: which of the row's documents each token belongs to, from 0; `PADDING` where there is padding.
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

    Documents come in an order drawn from (seed, epoch), and each goes into the fullest row that has room for it (best fit, as in
    Ding et al., 2024, "Fewer Truncations Improve Language Modeling", but in the drawn order). No document is cut. The rows' order is drawn, too.

    Args:
        lengths: `[N]`, each from 1 to `seq_len`.
        packing: several documents a row; otherwise one.
        shuffle: draw both orders; otherwise documents and rows come as they stand.
    """
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
    """Lay documents side by side in one row."""
    ids, labels = np.zeros(seq_len, np.int64), np.full(seq_len, IGNORED, np.int64)
    positions, numbers = np.zeros(seq_len, np.int64), np.full(seq_len, PADDING, np.int64)
    at = 0
    for number, index in enumerate(members):
        tokens, trained = documents.document(index)
        tokens = np.asarray(
            tokens, np.int64
        )  # of unsigned ones numpy would make the label -100 a large number
        here = slice(at, at + len(tokens))
        ids[here] = tokens
        labels[here] = np.where(trained, tokens, IGNORED)
        labels[at] = IGNORED
        positions[here] = np.arange(len(tokens))
        numbers[here] = number
        at += len(tokens)
    assert at <= seq_len, (at, seq_len)
    return Row(ids=ids, labels=labels, positions=positions, documents=numbers)


class Rows:
    """The rows of all epochs, from a position on.

    Args:
        documents: what they are made of.
        packing, shuffle: see `plan_rows`.
        position: of the first row.

    Attributes:
        position: of the next row.
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

    def __len__(self) -> int:
        """Rows of the current epoch."""
        return len(self._planned(self.position.epoch))

    def take(self, count: int) -> list[Row]:
        """The next rows; the first of an epoch follows the last of the one before."""
        return list(self._take(count))

    def _take(self, count: int) -> Iterator[Row]:
        for _ in range(count):
            rows = self._planned(self.position.epoch)
            yield make_row(self._documents, rows[self.position.row], self._seq_len)
            row = self.position.row + 1
            self.position = (
                Position(epoch=self.position.epoch, row=row)
                if row < len(rows)
                else Position(epoch=self.position.epoch + 1)
            )


def make_batch(rows: list[Row], micro_steps: int) -> Batch:
    """Rows, in order, as the micro-steps of one optimizer step; their number divides by that of micro-steps."""
    names = ("ids", "labels", "positions", "documents")
    arrays = {name: np.stack([getattr(row, name) for row in rows]) for name in names}
    return Batch(
        **{name: array.reshape(micro_steps, -1, array.shape[-1]) for name, array in arrays.items()}
    )


def empty_row(seq_len: int) -> Row:
    """A row of padding, which fills up a batch that has too few."""
    zeros, ignored = np.zeros(seq_len, np.int64), np.full(seq_len, IGNORED, np.int64)
    return Row(
        ids=zeros, labels=ignored, positions=zeros, documents=np.full(seq_len, PADDING, np.int64)
    )
