"""What commands print: remarks to standard error, results to standard output. Pure."""

from __future__ import annotations

import ctypes
import json
import math
import os
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, redirect_stdout, suppress
from typing import TYPE_CHECKING, Any

import typer

if TYPE_CHECKING:
    from rich.console import Console

_STDOUT, _STDERR = 1, 2
_printed: list[bool] = []  # one for each document of `--json` that the command has printed


def say(text: str) -> None:
    """Print a line to standard error, where logs and figures go."""
    typer.echo(text, err=True)


def print_json(document: Mapping[str, Any], *, readable: bool = False) -> None:
    """Print a document of `--json`. A number that is not finite is null: JSON has no word for it.

    Args:
        readable: keep letters that are not ASCII as they are, for documents that hold texts.
    """
    typer.echo(json.dumps(_finite(document), ensure_ascii=not readable, allow_nan=False))
    _printed.append(True)


def print_error(kind: str, message: str, exit_code: int) -> None:
    """With `--json`, print why a command failed, if it has not printed its document before."""
    if not _printed:
        print_json({"error": {"type": kind, "message": message, "exit_code": exit_code}})


def begin() -> None:
    """Before a command: it has printed no document."""
    _printed.clear()


def _finite(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def wide_console() -> Console:
    """For tables on standard output; at least 100 columns where that is no terminal."""
    from rich.console import Console

    console = Console()
    if not console.is_terminal:
        console.width = max(console.width, 100)
    return console


@contextmanager
def only_json(asked: bool) -> Iterator[None]:
    """With `--json`: keep standard output for the document.

    What anything else prints meanwhile, libraries in C too, goes to standard error.
    """
    if not asked:
        yield
        return
    kept = os.dup(_STDOUT)
    os.dup2(_STDERR, _STDOUT)
    try:
        with redirect_stdout(sys.stderr):
            yield
    finally:
        with suppress(OSError, AttributeError):
            ctypes.CDLL(None).fflush(None)  # what C has printed is buffered until now
        os.dup2(kept, _STDOUT)
        os.close(kept)
