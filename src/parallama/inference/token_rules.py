"""What parameters mean in a model's tokens: where a text ends, and what is kept from it."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from ..errors import UsageError, lines
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

    def read(self, params: SamplingParams, of_chat: Collection[int]) -> tuple[Ends, Choosing]:
        """What ends a text, and how its tokens are chosen, but for `Choosing.sampling`.

        Args:
            of_chat: tokens that end an answer besides.

        Raises:
            UsageError: a token id is out of range, or texts are given and there is no tokenizer.
        """
        for name in ("stop_token_ids", "allowed_token_ids", "logit_bias"):
            wrong = [token for token in getattr(params, name) if token >= self._vocab]
            if wrong:
                expected = f"expected 0 to {self._vocab - 1}, the model's vocabulary"
                raise UsageError(lines(f"{name} has token {wrong[0]}", expected))
        for name in ("stop", "bad_words"):
            texts = getattr(params, name)
            if texts and self._tokenizer is None:
                problem = f"{name} is {list(texts)!r}"
                raise UsageError(lines(problem, "it needs a tokenizer, which the model hasn't"))
        ends = self._found_ends(params, of_chat)
        return ends, Choosing(
            bias=self._bias(params, ends),
            tops=min(params.logprobs or 0, self._vocab),
            scored=params.prompt_logprobs and min(params.prompt_logprobs, self._vocab),
        )

    def _found_ends(self, params: SamplingParams, of_chat: Collection[int]) -> Ends:
        found: dict[int, int | str | None] = {token: token for token in params.stop_token_ids}
        # A special token may be no part of the text: the token itself ends it.
        special = self._tokenizer.get_added_vocab() if self._tokenizer and params.stop else {}
        found |= {special[string]: string for string in params.stop if string in special}
        if not params.ignore_eos:
            found |= dict.fromkeys([*self._ends, *of_chat])
        return found

    def _bias(self, params: SamplingParams, ends: Ends) -> TokenBias | None:
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
        found = set()
        for word in words:
            for text in (word.lstrip(), f" {word.lstrip()}"):
                assert self._tokenizer is not None
                ids = self._tokenizer(text, add_special_tokens=False)["input_ids"]
                if ids:
                    found.add(tuple(ids))
        return found
