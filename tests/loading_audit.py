"""Loads and chats with a model twice in this process; `test_loading_runs_nothing` runs it.

The second time audit and profile hooks note whatever could run code.
"""

import _pickle
import builtins
import json
import sys
import threading
from pathlib import Path
from typing import Any

from parallama.errors import CheckpointError
from parallama.files import nonfinite
from parallama.files.checkpoint import SafetensorsFolder
from parallama.files.skeleton import make_skeleton

RUNNING = {
    "os.system",
    "os.exec",
    "os.fork",
    "os.forkpty",
    "os.posix_spawn",
    "os.spawn",
    "os.startfile",
    "subprocess.Popen",
    "pickle.find_class",
}
RUNNING |= {
    "ctypes.dlopen",
    "socket.connect",
    "socket.getaddrinfo",
    "webbrowser.open",
    "code.__new__",
    "marshal.loads",
}
CALLS = {builtins.eval, builtins.exec, builtins.compile, _pickle.loads, _pickle.load}


def load(folder: Path) -> str:
    try:
        checkpoint = SafetensorsFolder(folder)
        tokenizer = checkpoint.tokenizer()
        make_skeleton(checkpoint.config)
        count = sum(
            1
            for _ in nonfinite.finite_only(checkpoint.tensors(checkpoint.spec), checkpoint.file_of)
        )
    except CheckpointError:
        return "refused"
    return f"{count} tensors, tokenizer {type(tokenizer).__name__}"


def main() -> None:
    import torch

    def no_load(*_args: Any, **_kwargs: Any) -> None:
        raise AssertionError("torch.load was called")

    torch.load = no_load  # type: ignore[assignment]
    folders = [Path(name) for name in sys.argv[1:]]
    for folder in folders:
        load(folder)  # imports what it needs
    allowed = [
        str(Path(name).resolve())
        for name in (*sys.path, sys.prefix, sys.base_prefix, *folders)
        if name
    ]
    noted: list[str] = []
    opened: list[str] = []
    watching = False

    def audit(event: str, arguments: tuple[Any, ...]) -> None:
        if not watching:
            return
        if event in RUNNING or event in ("exec", "compile"):
            noted.append(f"{event} {arguments!r:.200}")
        elif event == "open" and isinstance(arguments[0], (str, bytes)):
            opened.append(
                str(
                    Path(
                        arguments[0] if isinstance(arguments[0], str) else arguments[0].decode()
                    ).resolve()
                )
            )

    def profile(_frame: Any, event: str, argument: Any) -> None:
        if watching and event == "c_call" and any(argument is each for each in CALLS):
            noted.append(f"call of {argument!r}")

    sys.addaudithook(audit)
    threading.setprofile(profile)
    sys.setprofile(profile)
    watching = True
    outcomes = [load(folder) for folder in folders]
    watching = False
    sys.setprofile(None)
    strangers = sorted(
        {
            name
            for name in opened
            if not any(name.startswith(each) for each in allowed)
            and "/parallama-tokenizer-" not in name
        }
    )
    print(
        json.dumps(
            {"outcomes": outcomes, "noted": noted, "outside": strangers, "opened": len(opened)}
        )
    )


if __name__ == "__main__":
    main()
