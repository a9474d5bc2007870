"""What parameters mean in a model's tokens: where a text ends, and what is kept from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..engine.row_sampling import RowSampling
from ..errors import UsageError, lines
from ..model.token_ids import check_ids
from .choosing import Choosing, TokenBias
from .sampling_params import SamplingParams

Ends = Mapping[int, int | str | None]
"""Tokens that end a text -> what is told of it: the id or the stop string; None for the model's."""


class TokenRules:
    """Parameters of a request in the tokens of a model.

    Args:
        tokenizer: of transformers, or None.
        ends: the model's end-of-text ids.
        vocab: ids of the model.
    """

    def __init__(self, tokenizer: Any | None, ends: Collection[int], vocab: int) -> None:
        self._tokenizer, self._ends, self._vocab = tokenizer, ends, vocab

    def ends(self, params: SamplingParams, of_chat: Collection[int]) -> Ends:
        """Tokens that end a request's text.

        Args:
            of_chat: that end an answer besides.

        Raises:
            UsageError: an id is out of range, or there are stop strings and no tokenizer.
        """
        check_ids(params.stop_token_ids, self._vocab)
        if self._tokenizer is None and params.stop:
            raise UsageError(
                lines(f"stop is {list(params.stop)!r}", "stop strings need a tokenizer")
            )
        found: dict[int, int | str | None] = {token: token for token in params.stop_token_ids}
        # A special token may be no part of the text: the token itself ends it.
        special = self._tokenizer.get_added_vocab() if self._tokenizer and params.stop else {}
        found |= {special[string]: string for string in params.stop if string in special}
        if not params.ignore_eos:
            found |= dict.fromkeys([*self._ends, *of_chat])
        return found

    def choosing(self, params: SamplingParams, sampling: RowSampling, ends: Ends) -> Choosing:
        """How a request's tokens are chosen.

        Raises:
            UsageError: an id is out of range, or there are bad words and no tokenizer.
        """
        return Choosing(
            sampling=sampling,
            bias=self._bias(params, ends),
            tops=min(params.logprobs or 0, self._vocab),
            scored=params.prompt_logprobs and min(params.prompt_logprobs, self._vocab),
        )

    def _bias(self, params: SamplingParams, ends: Ends) -> TokenBias | None:
        check_ids([*params.logit_bias, *params.allowed_token_ids], self._vocab)
        words = tuple(self._words(params.bad_words))
        late = frozenset(ends) if params.min_tokens else frozenset()
        if not (params.logit_bias or params.allowed_token_ids or words or late):
            return None
        return TokenBias(
            added=params.logit_bias,
            allowed=frozenset(params.allowed_token_ids) or None,
            late=late,
            least=params.min_tokens,
            words=words,
        )

    def _words(self, words: Collection[str]) -> set[tuple[int, ...]]:
        """The tokens of words, at the beginning of a text and behind a space."""
        if self._tokenizer is None and words:
            raise UsageError(lines(f"bad_words is {list(words)!r}", "they need a tokenizer"))
        found = set()
        for word in words:
            for text in (word.lstrip(), f" {word.lstrip()}"):
                assert self._tokenizer is not None
                ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
                if ids:
                    found.add(tuple(ids))
        return found
