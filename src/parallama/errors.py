"""What can go wrong through the user's doing, each kind with its exit code."""

from __future__ import annotations

from collections.abc import Mapping


class ParallamaError(ValueError):
    """Base of every error that a user can cause.

    The message is for people, in at most three lines: what is wrong with its name and value, what was expected, what to do.
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


def lines(*parts: str) -> str:
    """Join the (at most three) lines of a message, leaving out empty ones.

    What a message repeats of a file (names, say) stays in its line: characters that a terminal would obey are escaped, and a long line is cut.
    """
    kept = [_printable(part) for part in parts if part]
    assert len(kept) <= 3, kept
    return "\n".join(kept)


def to_reply(error: ParallamaError) -> dict[str, str]:
    """For another process of ours, where `from_reply` makes the same error of it."""
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
    """`repr` for an error line: cut where it would flood the message."""
    text = repr(value)
    return text if len(text) <= limit else f"{text[:limit]}..."


def cause(error: BaseException, limit: int = 200) -> str:
    """What another library's exception says, in one line."""
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) <= limit else f"{text[:limit]}..."


def _printable(text: str, limit: int = 1000) -> str:
    text = text if len(text) <= limit else f"{text[:limit]}..."
    return (
        text
        if text.isprintable()
        else "".join(char if char.isprintable() else repr(char)[1:-1] for char in text)
    )
