"""What tests ask of a message: names and values, in at most three lines. Not its words."""

from __future__ import annotations

import json

from forks import Done

from parallama.errors import ParallamaError


def says(message: object, *parts: object) -> bool:
    """Whether a message has at most three lines, and all of these are in it."""
    text = str(message)
    return len(text.splitlines()) <= 3 and all(str(part) in text for part in parts)


def check_raised(error: ParallamaError, code: int, *parts: object) -> None:
    """An error has this exit code and such a message."""
    assert error.exit_code == code and says(error, *parts), repr(error)


def check_refusal(done: Done, code: int, *parts: object, as_json: bool = False) -> None:
    """A command ended with this code and such a message, and printed nothing else.

    Args:
        as_json: it was asked for JSON, so the error is a document, too.
    """
    if as_json:
        error = json.loads(done.out)["error"]
        assert (done.code, error["exit_code"], says(error["message"], *parts)) == (code, code, True)
    else:
        assert (done.code, done.out) == (code, ""), done
    assert done.err.startswith("parallama: ") and says(done.err, *parts), done.err
    assert "Traceback" not in done.err and "fault of parallama" not in done.err
