"""How one request's tokens are chosen, and what is told of them. Pure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from ..engine.row_sampling import RowSampling


@dataclass(frozen=True, kw_only=True)
class TokenBias:
    """What is added to a request's logits, as its text goes on.

    Attributes:
        added: to the logits of these tokens, always.
        allowed: no other tokens are chosen; None allows all.
        late: tokens that aren't chosen before there are `least` new ones.
        words: sequences of tokens of which the last one isn't chosen behind the others.
    """

    added: Mapping[int, float]
    allowed: frozenset[int] | None
    late: frozenset[int]
    least: int
    words: tuple[tuple[int, ...], ...]

    @property
    def reach(self) -> int:
        """How many tokens before the next one matter."""
        return max((len(word) - 1 for word in self.words), default=0)

    def hidden(self, ids: Sequence[int], new: int) -> frozenset[int]:
        """Tokens that aren't to follow.

        Args:
            ids: the prompt and what was chosen, or the last `reach` of them.
            new: how many were chosen.
        """
        ended = {
            word[-1]
            for word in self.words
            if len(word) == 1 or tuple(ids[1 - len(word) :]) == word[:-1]
        }
        return frozenset(ended | self.late) if new < self.least else frozenset(ended)


@dataclass(frozen=True, kw_only=True)
class Choosing:
    """How the tokens of a request are chosen.

    Attributes:
        sampling: what `RowSampling` says.
        bias: what is added to its logits, if anything is.
        tops: how many likeliest tokens are told with each chosen one.
        scored: how many are told with each token of the prompt, which is scored; None if it isn't.
    """

    sampling: RowSampling = field(default_factory=RowSampling)
    bias: TokenBias | None = None
    tops: int = 0
    scored: int | None = None
