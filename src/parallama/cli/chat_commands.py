"""Lines of a chat that are no messages: `/help` and the like. Pure."""

from __future__ import annotations

import re
from typing import Literal

from ..errors import UsageError, lines

HELP = """\
/new   start over: the model forgets the conversation, but for the system message
/help  show this
/exit  leave; so does the end of input (Ctrl-D)
Any other line is a message to the model."""
ChatCommand = Literal["new", "help", "exit"]
_SAME: dict[str, ChatCommand] = {
    **dict.fromkeys(("new", "clear", "reset", "restart"), "new"),
    **dict.fromkeys(("help", "?", "h", "commands"), "help"),
    **dict.fromkeys(("exit", "quit", "bye", "q"), "exit"),
}
"""With the words of other programs."""


def command_of(line: str) -> ChatCommand | None:
    """What a line asks for; None if it is a message.

    Raises:
        UsageError: it is a single word behind `/` that stands for nothing.
    """
    found = re.fullmatch(r"/([A-Za-z]+|\?)", line.strip())
    if found is None:
        return None
    word = found[1].lower()
    if word not in _SAME:
        raise UsageError(
            lines(f"/{word} is no command", "expected /new, /help, /exit, or a message")
        )
    return _SAME[word]
