"""A process with two devices that runs commands and Python blocks, one after another.

It reads a JSON object a line from standard input, and answers with one on the file descriptor that
it is given.
"""

from __future__ import annotations

import contextlib
import io
import json
import os
import subprocess
import sys
import traceback
from pathlib import Path
from typing import Any

DEVICES = 2
START_S, LIMIT_S = 120, 600


class GuideProcess:
    """Such a process, for life.

    Args:
        home: its home folder, so that nothing is left in the user's.
    """

    def __init__(self, home: Path, *, keep_hlo: bool) -> None:
        read, write = os.pipe()
        home.mkdir()
        kept = {
            key: value
            for key, value in os.environ.items()
            if not key.startswith(("PJRT_", "XLA_", "CPU_NUM_", "TF_CPP_", "HF_"))
        }
        self._errors = home / "errors"
        with self._errors.open("wb") as errors:
            self._process = subprocess.Popen(
                [sys.executable, __file__, str(write), str(int(keep_hlo))],
                stdin=subprocess.PIPE,
                stdout=errors,
                stderr=errors,
                pass_fds=[write],
                env=kept | {"HF_HUB_OFFLINE": "1", "HOME": str(home)},
                text=True,
            )
        os.close(write)
        self._answers = os.fdopen(read, encoding="utf-8")

    def run(self, folder: Path, **task: Any) -> dict[str, Any]:
        """Run `words` with `stdin`, or `code`, in a folder.

        Returns:
            `code`, `out` and `err`.
        """
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps({"folder": str(folder)} | task) + "\n")
        self._process.stdin.flush()
        line = self._answers.readline()
        assert line, f"the process ended\n{self._errors.read_text()[-3000:]}"
        answer: dict[str, Any] = json.loads(line)
        return answer

    def stop(self) -> None:
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait()
        self._answers.close()


def _command(words: list[str], stdin: str) -> int:
    from parallama.__main__ import run

    sys.stdin = io.StringIO(stdin)
    return run(words)


def _python(code: str, where: str, names: dict[str, Any]) -> int:
    try:
        exec(compile(code, where, "exec"), names)
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def main() -> None:
    answers = os.fdopen(int(sys.argv[1]), "w", encoding="utf-8")
    from parallama.engine.interface import start

    start(f"1x{DEVICES}", keep_hlo=sys.argv[2] == "1")
    names: dict[str, dict[str, Any]] = {}  # of each folder's Python blocks
    for line in os.fdopen(os.dup(0), encoding="utf-8"):
        task = json.loads(line)
        os.chdir(task["folder"])
        out, err = io.StringIO(), io.StringIO()
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            if "words" in task:
                code = _command(task["words"], task["stdin"])
            else:
                own = names.setdefault(task["folder"], {"__name__": "__main__"})
                code = _python(task["code"], task["where"], own)
        answers.write(
            json.dumps({"code": code, "out": out.getvalue(), "err": err.getvalue()}) + "\n"
        )
        answers.flush()


if __name__ == "__main__":
    main()
    os._exit(0)  # XLA's threads need not be joined one by one
