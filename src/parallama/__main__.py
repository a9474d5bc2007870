"""The command line's entry: runs a command and turns what goes wrong into at most three lines and an exit code."""

from __future__ import annotations

import signal
import sys
from itertools import pairwise
from types import FrameType
from typing import Any

import typer

from .errors import ParallamaError


def main() -> None:
    """Run `parallama` with the process's arguments."""
    signal.signal(signal.SIGTERM, _on_sigterm)
    sys.exit(run(sys.argv[1:]))


def run(arguments: list[str]) -> int:
    """Run one command line and return its exit code."""
    from .cli import app

    debug = "--debug" in arguments
    try:
        result: Any = app(
            [argument for argument in arguments if argument != "--debug"], standalone_mode=False
        )
        sys.stdout.flush()
        return result if isinstance(result, int) else 0
    except ParallamaError as error:
        if debug:
            raise
        _complain(str(error))
        return error.exit_code
    except (typer.Abort, KeyboardInterrupt):
        return 130
    except typer.TyperException as error:  # a wrong option or argument
        context = getattr(error, "ctx", None)
        command = context.command_path if context is not None else "parallama"
        message: str = getattr(error, "format_message", error.__str__)()
        options = getattr(getattr(error, "param", None), "opts", [])
        given = [f" (got {value!r})" for option, value in pairwise(arguments) if option in options]
        _complain(f"{' '.join(message.split())}{''.join(given[:1])}\nsee: {command} --help")
        return 2
    except BrokenPipeError:
        # The reader has gone; there is nobody to write to, and Python would try once more at exit.
        sys.stdout = None
        return 1
    except MemoryError:
        _complain("host memory ran out\nuse fewer or shorter prompts, or a smaller model")
        return 4
    except Exception as error:
        if debug:
            raise
        text = str(error).strip().splitlines()
        _complain(
            f"{type(error).__name__}: {text[0][:300] if text else 'no message'}\nthis is a fault of parallama; --debug shows where"
        )
        return 1


def _complain(message: str) -> None:
    print(f"parallama: {message}", file=sys.stderr)  # noqa: T201 - the command line's own voice


def _on_sigterm(_signal: int, _frame: FrameType | None) -> None:
    sys.exit(143)


if __name__ == "__main__":
    main()
