"""How a row's tokens are chosen. Pure."""

from __future__ import annotations

import math
from dataclasses import dataclass

from ..errors import UsageError, lines

_TEMPERATURE = "a number from 0 (greedy) to 100"
_TOP_K = "a whole number of at least 0 (0: all)"
_TOP_P = "a number above 0 and at most 1"
_MIN_P = "a number from 0 to 1"
_PENALTY = "a number above 0"
_SUBTRACTED = "a number from -2 to 2"
_SEED = "a whole number from 0 to 2^64 - 1, or none to have one drawn"


HIDDEN = -1e30
"""Logit of a token that isn't to be chosen."""


@dataclass(frozen=True, kw_only=True)
class RowSampling:
    """How a row's tokens are chosen, to the last number; names are transformers' and vLLM's.

    Attributes:
        temperature: 0 is greedy.
        top_k: keep the so many best; 0 keeps all.
        top_p: keep the smallest set of best tokens with at least this probability.
        min_p: keep tokens with at least this share of the best one's probability.
        repetition_penalty: above 1 makes tokens of the prompt and the text so far less likely.
        presence_penalty: taken from the logit of each token of the text so far.
        frequency_penalty: the same, once for each time that the text has it.
        seed: same seed, same text.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0

    def __post_init__(self) -> None:
        warmth, penalty = self.temperature, self.repetition_penalty
        self._check("temperature", _is_number(warmth) and 0 <= warmth <= 100, _TEMPERATURE)
        self._check("top_k", _is_whole(self.top_k) and self.top_k >= 0, _TOP_K)
        self._check("top_p", _is_number(self.top_p) and 0 < self.top_p <= 1, _TOP_P)
        self._check("min_p", _is_number(self.min_p) and 0 <= self.min_p <= 1, _MIN_P)
        self._check("repetition_penalty", _is_number(penalty) and penalty > 0, _PENALTY)
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            self._check(name, _is_number(value) and -2 <= value <= 2, _SUBTRACTED)
        check_seed(self.seed)

    def _check(self, name: str, good: bool, expected: str) -> None:
        if not good:
            raise UsageError(lines(f"{name} is {getattr(self, name)!r}", f"expected {expected}"))

    @property
    def seed_word(self) -> int:
        """The seed as the devices take it: 32 bits, signed."""
        return signed32(mix32(self.seed & 0xFFFFFFFF) ^ mix32((self.seed >> 32) + 0x5BD1E995))


def check_seed(seed: object) -> None:
    """Raise `UsageError` unless this is a seed."""
    if type(seed) is not int or not 0 <= seed < 1 << 64:
        raise UsageError(lines(f"seed is {seed!r}", f"expected {_SEED}"))


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return math.isfinite(value)


def _is_whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def mix32(x: int) -> int:
    """A 32-bit integer hash (C. Wellons' `triple32`), unsigned."""
    x &= 0xFFFFFFFF
    for shift, factor in ((17, 0xED5AD4BB), (11, 0xAC4C1B51), (15, 0x31848BAB)):
        x = ((x ^ (x >> shift)) * factor) & 0xFFFFFFFF
    return x ^ (x >> 14)


def signed32(x: int) -> int:
    """The same 32 bits as a signed number."""
    x &= 0xFFFFFFFF
    return x - (1 << 32) if x >= 1 << 31 else x
