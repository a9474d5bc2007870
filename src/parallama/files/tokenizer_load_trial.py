"""Loads a tokenizer in a process of its own, to see that it does so in time and memory.

It is for files that could make that take for ever: see `tokenizer_pipeline.is_bounded_file`.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from .. import isolated_process
from ..errors import CheckpointError, ParallamaError, from_reply, lines, to_reply
from .bounded_process import limit_memory

LIMIT_S = 60.0
_MEMORY_BYTES = 4 << 30


def check(stage: Path, folder: Path) -> None:
    """Raise `CheckpointError` unless a tokenizer loads within limits.

    Args:
        stage: where its files are.
        folder: what they are of, for messages.
    """
    ended = isolated_process.run_module(__name__, str(stage), str(folder), limit_s=LIMIT_S)
    if ended.code != 0:
        raise CheckpointError(
            lines(
                f"the tokenizer in {str(folder)!r} cannot be read: loading it {ended.how}",
                f"expected it to load within {LIMIT_S:g} s, in at most {_MEMORY_BYTES >> 30} GB",
            )
        )
    reply = ended.reply("the trial of a tokenizer")
    if reply:
        raise from_reply(reply)


def main(stage: Path, folder: Path) -> dict[str, str]:
    """Load it. Returns what went wrong, if anything did."""
    modules: dict[str, Any] = sys.modules
    modules["torch"] = None  # transformers does without, and starts three times as fast
    from transformers import AutoTokenizer  # noqa: F401

    from .tokenizer_files import load

    limit_memory(_MEMORY_BYTES)
    try:
        load(stage, folder)
    except ParallamaError as error:
        return to_reply(error)
    return {}


if __name__ == "__main__":
    sys.stdout.write(json.dumps(main(Path(sys.argv[1]), Path(sys.argv[2]))) + "\n")
