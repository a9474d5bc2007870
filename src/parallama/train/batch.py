"""What one optimizer step takes in. Pure: numpy, no torch."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import UsageError, lines

IGNORED = -100
"""The label of a position that has no loss, as in torch and transformers."""
PADDING = -1
"""The document number of a position that belongs to none."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """The tokens of one optimizer step.

    These are `A` micro-steps of `B` sequences of `S` tokens, over all devices. Every array is
    int64 `[A, B, S]`.

    Attributes:
        ids: token ids.
        labels: the ids that count for the loss, `IGNORED` elsewhere. They are aligned with `ids`:
            at position `t` the step predicts `labels[t + 1]`, within a document.
        positions: of each token in its document, from 0.
        documents: which of a row's packed documents a token belongs to, or `PADDING`. Attention
            stays within a document.
    """

    ids: NDArray[np.int64]
    labels: NDArray[np.int64]
    positions: NDArray[np.int64]
    documents: NDArray[np.int64]

    def __post_init__(self) -> None:
        for name in ("ids", "labels", "positions", "documents"):
            array = getattr(self, name)
            if array.ndim != 3 or array.shape != self.ids.shape or array.dtype != np.int64:
                raise UsageError(
                    lines(
                        f"batch: {name} is {array.dtype}{list(array.shape)}",
                        f"expected int64{list(self.ids.shape)}, as the ids, with three dims",
                    )
                )

    @property
    def shape(self) -> tuple[int, int, int]:
        """`(A, B, S)`."""
        micro_steps, rows, length = self.ids.shape
        return micro_steps, rows, length

    @property
    def targets(self) -> NDArray[np.int64]:
        """`[A, B, S]`: what is predicted at each position.

        That is the next label of the same document, or `IGNORED`.
        """
        targets = np.full_like(self.labels, IGNORED)
        following = self.documents[..., 1:]
        same = (following == self.documents[..., :-1]) & (following != PADDING)
        targets[..., :-1] = np.where(same, self.labels[..., 1:], IGNORED)
        return targets

    @property
    def target_tokens(self) -> int:
        """How many tokens the loss is the mean of."""
        return int((self.targets != IGNORED).sum())

    def check(self, vocab: int) -> None:
        """Check that every id and label is one of the model's, and that there is a target.

        XLA clamps other ids silently, or reads garbage.

        Raises:
            UsageError: one of these is not so.
        """
        for name, array in (("ids", self.ids), ("labels", self.labels[self.labels != IGNORED])):
            if array.size and not (array.min() >= 0 and array.max() < vocab):
                wrong = int(array.min() if array.min() < 0 else array.max())
                raise UsageError(
                    lines(
                        f"batch: {name} hold the token {wrong}",
                        f"expected 0 to {vocab - 1}, the model's vocabulary",
                    )
                )
        if not self.target_tokens:
            raise UsageError(
                lines(
                    "batch: no position has a label to predict",
                    f"expected at least one label that isn't {IGNORED} after the first token "
                    "of a document",
                )
            )
