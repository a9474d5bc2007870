"""The command line's entry: runs a command, and makes of what goes wrong at most three lines and an
exit code.
"""

from __future__ import annotations

import os
import signal
import sys
from types import FrameType
from typing import Any

import typer

from .errors import FitError, ParallamaError, UsageError

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
        from .cli import app, output

        output.begin()
        result: Any = app(
            [argument for argument in arguments if argument != "--debug"], standalone_mode=False
        )
        return result if isinstance(result, int) else 0
    except ParallamaError as error:
        _complain(arguments, type(error).__name__, str(error), error.exit_code)
        if debug:
            raise
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except typer.TyperException as error:
        from .cli.wrong_usage import explained

        usage = UsageError(explained(error, arguments))
        _complain(arguments, type(usage).__name__, str(usage), usage.exit_code)
        return usage.exit_code
    except BrokenPipeError:
        raise
    except Exception as error:
        if _is_of_memory(error):
            full = FitError("host memory ran out\nuse fewer or shorter prompts, or a smaller model")
            _complain(arguments, type(full).__name__, str(full), full.exit_code)
            return full.exit_code
        said = str(error).strip().splitlines()
        what = f"{type(error).__name__}: {said[0][:300] if said else 'no message'}"
        message = f"{what}\nthis is a fault of parallama; --debug shows where"
        _complain(arguments, type(error).__name__, message, 1)
        if debug:
            raise
        return 1


def _complain(arguments: list[str], kind: str, message: str, exit_code: int) -> None:
    """Say what went wrong: to people, and with `--json` to programs."""
    print(f"parallama: {message}", file=sys.stderr)  # noqa: T201 - the command line's own voice
    if "--json" in arguments:
        from .cli import output

        output.print_error(kind, message, exit_code)


def _is_of_memory(error: Exception) -> bool:
    """Whether host memory ran out; torch has no kind of error for that."""
    return isinstance(error, MemoryError) or "can't allocate memory" in str(error)


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
