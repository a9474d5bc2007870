"""Options that are declared once, as fields of a frozen dataclass. Pure.

A declaration has a kind, a default, a help text and a range. The settings of a run, the checks of
values and the command line's `--help` are made from it.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field, fields
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from ..errors import UsageError, lines, shown

REQUIRED = MISSING


@dataclass(frozen=True, kw_only=True)
class Range:
    """The numbers that an option takes."""

    least: int | None = None
    above: float | None = None
    below: float | None = None
    most: float | None = None

    def __contains__(self, value: float) -> bool:
        """Whether a number is in the range; NaN and infinity never are."""
        return (
            abs(value) <= sys.float_info.max
            and (self.least is None or value >= self.least)
            and (self.above is None or value > self.above)
            and (self.below is None or value < self.below)
            and (self.most is None or value <= self.most)
        )

    def __str__(self) -> str:
        parts = (
            ("of at least", self.least),
            ("above", self.above),
            ("below", self.below),
            ("of at most", self.most),
        )
        return " and ".join(f"{word} {bound}" for word, bound in parts if bound is not None)


def option(
    default: Any,
    help: str,
    *,
    words: bool = False,
    aliases: Mapping[Any, Any] | None = None,
    **bounds: Any,
) -> Any:
    """A field of a dataclass of options.

    Args:
        default: `REQUIRED` where there is none.
        help: what it means, in a few words.
        words: a list of words; `a,b` is the same as `[a, b]`.
        aliases: other words for some of its values.
        bounds: of a number; see `Range`.
    """
    about = {"help": help, "range": Range(**bounds), "words": words, "aliases": aliases or {}}
    return field(default=default, metadata=about)


class Declared:
    """Base of frozen dataclasses whose fields are `option`s.

    Lists become tuples, and a text where only a list is taken becomes a list of it. Whole numbers
    become floats or texts where these are declared, and `1e3` becomes a whole number.

    Raises:
        UsageError: a value is not of its kind, or not in its range.
    """

    def __post_init__(self) -> None:
        for declared in declarations(type(self)):
            value = declared.check(getattr(self, declared.name), declared.name)
            object.__setattr__(self, declared.name, value)

    def to_dict(self) -> dict[str, Any]:
        """The values by name, as JSON and YAML have them."""
        return {each.name: _plain(getattr(self, each.name)) for each in declarations(type(self))}


@dataclass(frozen=True, kw_only=True)
class Declaration:
    """What is known of one option.

    Attributes:
        kind: its type annotation.
        words, aliases: see `option`.
    """

    name: str
    kind: Any
    help: str
    range: Range
    default: Any
    words: bool
    aliases: Mapping[Any, Any]

    @property
    def required(self) -> bool:
        return self.default is REQUIRED

    @property
    def expected(self) -> str:
        """The values that it takes, in words."""
        *others, last = _words(self.kind, self.range)
        return f"{', '.join(others)} or {last}" if others else last

    @property
    def nested(self) -> type[Declared] | None:
        """The options that stand under its name, if it has such."""
        kinds = [each for each in (self.kind, *get_args(self.kind)) if isinstance(each, type)]
        return next((each for each in kinds if issubclass(each, Declared)), None)

    def check(self, value: Any, called: str, *more: str) -> Any:
        """The value as it is kept.

        Args:
            called: the option's name where it was given.
            more: another line of the message.

        Raises:
            UsageError: it is not of the kind, or not in the range.
        """
        kept = self._spelled_out(tuple(value) if isinstance(value, list) else value)
        kinds = get_args(self.kind) or (self.kind,)
        if type(value) is int and float in kinds and int not in kinds:
            kept = float(value) if value in Range() else value
        elif type(value) is float and int in kinds and float not in kinds and value.is_integer():
            kept = int(value)
        elif type(value) is int and str in kinds and int not in kinds:
            kept = str(value)
        if not _takes(self.kind, self.range, kept):
            raise UsageError(
                lines(f"{called} is {shown(value)}", f"expected {self.expected}", *more)
            )
        return kept

    def _spelled_out(self, value: Any) -> Any:
        """The value without aliases, and a list where only a list is taken."""
        is_list = get_origin(self.kind) is tuple
        if isinstance(value, str) and is_list:
            value = tuple(part.strip() for part in value.split(",")) if self.words else (value,)
        if not is_list or not self.aliases:
            return self.aliases.get(value, value) if isinstance(value, (str, bool)) else value
        each = [self.aliases.get(part, part) if isinstance(part, str) else part for part in value]
        spread = [part if isinstance(part, tuple) else (part,) for part in each]
        return tuple(part for parts in spread for part in parts)


def declarations(kind: type) -> tuple[Declaration, ...]:
    """The options of a dataclass, those that must be given first."""
    hints = get_type_hints(kind)
    found = [
        Declaration(
            name=each.name,
            kind=hints[each.name],
            help=each.metadata["help"],
            range=each.metadata["range"],
            default=each.default,
            words=each.metadata["words"],
            aliases=each.metadata["aliases"],
        )
        for each in fields(kind)
    ]
    return tuple(sorted(found, key=lambda declared: not declared.required))


def declaration(kind: type, name: str) -> Declaration:
    """One option of a dataclass."""
    return next(each for each in declarations(kind) if each.name == name)


def _takes(kind: Any, range: Range, value: Any) -> bool:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(_takes(part, range, value) for part in parts)
    if origin is Literal:
        return type(value) is str and value in parts
    if origin is tuple:
        return type(value) is tuple and all(_takes(parts[0], range, each) for each in value)
    return type(value) is kind and (kind not in (int, float) or value in range)


def _words(kind: Any, range: Range) -> Iterator[str]:
    origin, parts = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        for part in parts:
            yield from _words(part, range)
    elif origin is Literal:
        yield from parts
    elif origin is tuple:
        yield f"a list of {' or '.join(_words(parts[0], range))}"
    elif issubclass(kind, Declared):
        yield f"the keys {', '.join(each.name for each in declarations(kind))}"
    else:
        yield f"{_NAMES[kind]} {range}".strip() if kind in (int, float) else _NAMES[kind]


_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
_NAMES[NoneType] = "null"


def _plain(value: Any) -> Any:
    if isinstance(value, Declared):
        return value.to_dict()
    return list(value) if isinstance(value, tuple) else value
