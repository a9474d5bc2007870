"""transformers' tokenizer of a checkpoint, each call of which ends: with tokens, or an error.

A tokenizer with patterns that are not known to be harmless is tried in another process first.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from ..errors import CheckpointError, cause, lines
from .tokenizer_pipeline import is_bounded, is_bounded_model
from .tokenizer_trial import Trial


class BoundedTokenizer:
    """What is put before a tokenizer's own class.

    Attributes:
        encoding, decoding: trials of the two directions, where they are needed.
    """

    origin: str
    encoding: Trial | None
    decoding: Trial | None

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self).__mro__[2], self.__dict__)

    def _encode_plus(self, text: Any, text_pair: Any = None, **options: Any) -> Any:
        with _told(self.origin):
            if self.encoding is not None:
                self.encoding.encode(_texts((text, text_pair)))
            own: Any = super()
            return own._encode_plus(text, text_pair=text_pair, **options)

    def _decode(self, token_ids: Any, **options: Any) -> str:
        with _told(self.origin):
            if self.decoding is not None:
                ids = [token_ids] if isinstance(token_ids, int) else token_ids
                self.decoding.decode([int(token) for token in ids])
            own: Any = super()
            text: str = own._decode(token_ids, **options)
            return text


def bound(tokenizer: Any, origin: str) -> Any:
    """The same tokenizer, of a class that bounds its calls.

    Args:
        tokenizer: of transformers.
        origin: its model's name, for messages.
    """
    encoding, decoding = None, None
    backend = getattr(tokenizer, "backend_tokenizer", None)
    # One without is written in Python, with patterns of transformers.
    if backend is not None:
        parts = [_state(backend, name) for name in ("normalizer", "pre_tokenizer")]
        parts.append(_state(backend, "post_processor"))
        added = backend.get_added_tokens_decoder().values()
        # Before a token that takes spaces to its left, all text so far is searched for them.
        bounded = is_bounded_model(type(backend.model).__name__) and not any(
            token.lstrip for token in added
        )
        if not bounded or not all(map(is_bounded, parts)):
            encoding = Trial(backend, origin)
        if not is_bounded(_state(backend, "decoder")):
            decoding = encoding or Trial(backend, origin)
    own: Any = type(tokenizer)
    tokenizer.__class__ = _bounded_class(own)
    tokenizer.origin, tokenizer.encoding, tokenizer.decoding = origin, encoding, decoding
    return tokenizer


@functools.cache
def _bounded_class(own: type) -> type:
    names = {"__module__": own.__module__, "__doc__": own.__doc__}
    return type(own.__name__, (BoundedTokenizer, own), names)


def _rebuild(own: type, state: dict[str, Any]) -> Any:
    made: Any = object.__new__(_bounded_class(own))
    made.__dict__.update(state)
    return made


def _state(backend: Any, name: str) -> Any:
    """A component as in a tokenizer.json; None also where it is written in Python."""
    component = getattr(backend, name)
    try:
        return None if component is None else json.loads(component.__getstate__())
    except Exception:  # tokenizers raises a bare one
        return None


def _texts(given: Any) -> Iterator[str]:
    """The texts in nested lists and tuples."""
    if isinstance(given, str):
        yield given
    elif isinstance(given, (list, tuple)):
        for inner in given:
            yield from _texts(inner)


@contextmanager
def _told(origin: str) -> Iterator[None]:
    """What Rust raises, a bare `Exception` or a panic, becomes an error of the checkpoint."""
    try:
        yield
    except BaseException as error:
        if type(error) is Exception or type(error).__name__ == "PanicException":
            raise CheckpointError(
                lines(f"the tokenizer of {origin} cannot be used: {cause(error)}")
            ) from None
        raise
