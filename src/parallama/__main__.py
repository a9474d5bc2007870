"""The command line's entry: runs a command, and makes of what goes wrong at most three lines and an
exit code.
"""

from __future__ import annotations

import os
import signal
import sys
from itertools import pairwise
from types import FrameType
from typing import Any

import typer

from .errors import ParallamaError

READER_GONE = 128 + signal.SIGPIPE
"""What a shell reports of a program that SIGPIPE ended, as it does `head`'s writers."""


def main() -> None:
    """Run `parallama` with the process's arguments."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    _open_closed_streams()
    code = run(sys.argv[1:])
    if code == READER_GONE:
        _write_to_nobody()
    sys.exit(code)


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    try:
        try:
            return _run(arguments)
        finally:
            for stream in (sys.stdout, sys.stderr):
                stream.flush()
    except BrokenPipeError:
        return READER_GONE
    except SystemExit as end:
        # So rich and typer end where they cannot write.
        if isinstance(end.__context__, BrokenPipeError):
            return READER_GONE
        raise


def _run(arguments: list[str]) -> int:
    debug = "--debug" in arguments
    try:
        from .cli import app

        result: Any = app(
            [argument for argument in arguments if argument != "--debug"], standalone_mode=False
        )
        return result if isinstance(result, int) else 0
    except ParallamaError as error:
        if debug:
            raise
        _complain(str(error))
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except typer.TyperException as error:
        _complain(_wrong_usage(error, arguments))
        return 2
    except BrokenPipeError:
        raise
    except Exception as error:
        if _is_of_memory(error):
            _complain("host memory ran out\nuse fewer or shorter prompts, or a smaller model")
            return 4
        if debug:
            raise
        said = str(error).strip().splitlines()
        what = said[0][:300] if said else "no message"
        _complain(
            f"{type(error).__name__}: {what}\nthis is a fault of parallama; --debug shows where"
        )
        return 1


def _wrong_usage(error: typer.TyperException, arguments: list[str]) -> str:
    """What typer says of a wrong option or argument, with the value that was given."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "parallama"
    message: str = getattr(error, "format_message", error.__str__)()
    options = getattr(getattr(error, "param", None), "opts", [])
    given = [f" (got {value!r})" for option, value in pairwise(arguments) if option in options]
    return f"{' '.join(message.split())}{''.join(given[:1])}\nsee: {command} --help"


def _is_of_memory(error: Exception) -> bool:
    """Whether host memory ran out; torch has no kind of error for that."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


def _complain(message: str) -> None:
    print(f"parallama: {message}", file=sys.stderr)  # noqa: T201 - the command line's own voice


def _open_closed_streams() -> None:
    """Give a standard stream that was closed (`2>&-`) to nobody: files get its number otherwise."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode, encoding="utf-8"))  # noqa: SIM115, PTH123


def _write_to_nobody() -> None:
    """Let what is still to be written go: Python would try once more at its end, and complain."""
    nobody = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(nobody, stream)


def _on_sigterm(_signal: int, _frame: FrameType | None) -> None:
    sys.exit(128 + signal.SIGTERM)


if __name__ == "__main__":
    main()
