"""What typer says of a wrong command line, with what was meant."""

from __future__ import annotations

import re
from itertools import pairwise

import typer

from .other_words import meant_command, meant_option


def explained(error: typer.TyperException, arguments: list[str]) -> str:
    """At most three lines: what is wrong, with the value that was given; what was meant; where
    help is.
    """
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "parallama"
    see = f"see: {command} --help"
    message: str = " ".join(getattr(error, "format_message", error.__str__)().split())
    option = getattr(error, "option_name", None)
    if context is not None and isinstance(option, str) and message.startswith("No such option"):
        offered = {opt for each in context.command.params for opt in each.opts}
        meant = meant_option(option, offered)
        return "\n".join([f"No such option: {option}", meant, see] if meant else [message, see])
    unknown = re.match(r"No such command '([^']*)'", message)
    if unknown is not None and (meant := meant_command(unknown[1], arguments)):
        return f"No such command {unknown[1]!r}.\n{meant}\n{see}"
    if message == "Missing argument 'model'.":
        return f"there is no model\nexpected MODEL, as: {command} smollm2\n{see}"
    options = getattr(getattr(error, "param", None), "opts", [])
    values = [value for name, value in pairwise(arguments) if name in options][:1]
    numbers = [_written_out(value) for value in values if "valid integer" in message]
    if any(numbers):
        return f"{message.partition(':')[0]}: {values[0]}\nexpected a whole number, as {numbers[0]}"
    given = "".join(f" (got {value!r})" for value in values)
    return f"{message}{given}\n{see}"


def _written_out(value: str) -> str:
    """`32k`, `1e3` and `1,000` as whole numbers; nothing for what is no number."""
    short = re.fullmatch(r"(\d{1,6})k", value.lower())
    if short is not None:
        return f"{int(short[1]) * 1024} or {int(short[1]) * 1000}"
    plain = value.replace(",", "").replace("_", "")
    if re.fullmatch(r"\d{1,9}(\.0*)?(e\d{1,2})?", plain):
        return str(int(float(plain)))
    return ""
