"""What can go wrong through the user's doing, each kind with its exit code. Pure."""

from __future__ import annotations

import itertools
import reprlib
from collections.abc import Mapping


class ParallamaError(ValueError):
    """Base of every error that a user can cause.

    The message is for people, in at most three lines: what is wrong with its name and value, what
    was expected, what to do.
    """

    exit_code = 1


class RunError(ParallamaError):
    """A check failed or a run broke."""


class UsageError(ParallamaError):
    """A wrong option, prompt or argument."""

    exit_code = 2


class CheckpointError(ParallamaError):
    """A model or checkpoint that cannot be used."""

    exit_code = 3


class FitError(ParallamaError):
    """Devices, mesh or memory do not suffice."""

    exit_code = 4


class BackendError(ParallamaError):
    """The backend is not available."""

    exit_code = 5


class PlanError(UsageError):
    """A sharding plan that does not describe the model."""


class ProgramError(RunError):
    """A step that is not one of the programs known before the run."""


class QueueFullError(RunError):
    """More requests or tokens wait than a server takes."""


class EngineStoppedError(RunError):
    """A server takes no more requests: it is stopping, or its engine has failed."""


def lines(*parts: str) -> str:
    """Join the (at most three) lines of a message, without empty ones.

    A part is one line, whatever it repeats of a file: characters that a terminal would obey are
    escaped, and a long part is cut.
    """
    kept = [_printable(part) for part in parts if part]
    assert len(kept) <= 3, kept
    return "\n".join(kept)


def to_reply(error: ParallamaError) -> dict[str, str]:
    """The error for another process of ours, where `from_reply` makes the same of it."""
    return {"refused": type(error).__name__, "message": str(error)}


def from_reply(reply: Mapping[str, object]) -> ParallamaError:
    """The error of `to_reply`; of what is none, a `RunError` that says so."""
    kind, message = globals().get(str(reply.get("refused"))), reply.get("message")
    if isinstance(kind, type) and issubclass(kind, ParallamaError) and isinstance(message, str):
        return kind(message)
    came = f"a process of ours refused, and said {shown(dict(reply), 160)}"
    return RunError(lines(came, "expected the name of an error, and its message"))


def listed(names: list[str], limit: int = 4) -> str:
    """`a, b, c and 7 more`: names for an error line that must stay short."""
    shown = ", ".join(names[:limit])
    return shown if len(names) <= limit else f"{shown} and {len(names) - limit} more"


def shown(value: object, limit: int = 80) -> str:
    """`repr` for an error line, cut after `limit` characters.

    It takes little time whatever the value is: a YAML file of a few lines can stand for a list of
    millions.
    """
    try:
        text = _Brief(limit).repr(value)
    except ValueError:  # Python writes no whole number of more than 4300 digits
        text = f"a {type(value).__name__} too long to show"
    return text if len(text) <= limit else f"{text[:limit]}..."


class _Brief(reprlib.Repr):
    """`repr` of the first few levels and members, with at least `limit` characters of it."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.maxlevel = 4
        members = limit // 3 + 1  # each takes three characters or more
        self.maxlist = self.maxtuple = self.maxset = self.maxfrozenset = self.maxdict = members
        self.maxstring = self.maxlong = self.maxother = 4 * limit

    def repr_dict(self, x: Mapping[object, object], level: int) -> str:
        """In the order of the mapping, unlike reprlib's own."""
        if level <= 0 and x:
            return "{...}"
        items = list(itertools.islice(x.items(), self.maxdict))
        pairs = [
            f"{self.repr1(key, level - 1)}: {self.repr1(value, level - 1)}" for key, value in items
        ]
        return f"{{{', '.join(pairs)}}}"


def cause(error: BaseException, limit: int = 200) -> str:
    """What another library's exception says, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]}..."


def _printable(text: str, limit: int = 1000) -> str:
    text = text if len(text) <= limit else f"{text[:limit]}..."
    if text.isprintable():
        return text
    return "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
