"""Processes that are killed: this one imports what they need once, and forks a child for each.

    python kill_cases.py DEVICES < jobs

A job is a line of JSON; for each, a line of JSON comes back. A child ends by itself, or by SIGKILL: from its own hook before the k-th operation of the save protocol, or from here
after so many seconds. No device exists before the fork.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Run every job of standard input."""
    from parallama import backends

    devices = int(sys.argv[1])
    os.environ |= {"PJRT_DEVICE": "CPU", "CPU_NUM_DEVICES": str(devices), "XLA_REGISTER_INSTALLED_PLUGINS": "0"}
    backends._set_flags("cpu")
    import torch_xla  # noqa: F401
    import transformers  # noqa: F401
    from transformers import LlamaForCausalLM  # noqa: F401

    from parallama import loading  # noqa: F401
    from parallama.train import checkpoints, tokens  # noqa: F401

    for line in sys.stdin:
        job = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(_child(job))
        print(json.dumps(_await(child, job)), flush=True)


def _child(job: dict[str, Any]) -> int:
    with Path(job["log"]).open("w") as log:
        os.dup2(log.fileno(), 1)
        os.dup2(log.fileno(), 2)
    sys.stdout = sys.stderr = open(2, "w", closefd=False, buffering=1)  # noqa: SIM115
    try:
        return int(globals()[job["what"]](**job["arguments"]))
    except BaseException as error:
        import traceback

        traceback.print_exc()
        print(f"{type(error).__name__}: {error}")
        return 70
    finally:
        sys.stderr.flush()


def _await(child: int, job: dict[str, Any]) -> dict[str, Any]:
    """How a child ended; it is killed when the file that the job waits for is there, and so many seconds have passed since."""
    began = time.monotonic()
    kill_after, marker = job.get("kill_after_s"), job.get("kill_when")
    seen: float | None = None
    while True:
        ended, status = os.waitpid(child, os.WNOHANG)
        if ended:
            code = os.waitstatus_to_exitcode(status)
            return {"code": code, "seconds": time.monotonic() - began}
        if seen is None and (marker is None or Path(marker).exists()):
            seen = time.monotonic()
        if kill_after is not None and seen is not None and time.monotonic() - seen >= kill_after:
            with contextlib.suppress(ProcessLookupError):
                os.kill(child, job.get("signal", signal.SIGKILL))
            kill_after = None
        time.sleep(0.002)


def counting(kill_at: int | None, errno: int | None = None, fail_at: int | None = None) -> tuple[Any, list[str]]:
    """A disk whose `kill_at`-th operation (from 0) is the process's end, and whose `fail_at`-th raises; and the list of its operations as they come."""
    from parallama.train.disk import Disk

    done: list[str] = []

    def before(operation: str, path: Path) -> None:
        if len(done) == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        if len(done) == fail_at:
            assert errno is not None
            done.append(operation)
            raise OSError(errno, os.strerror(errno), str(path))
        done.append(f"{operation} {path.name}")

    return Disk(before), done


def save(folder: str, step: int, kill_at: int | None = None, keep_last: int = 2, user: int | None = None) -> int:
    """Write one checkpoint of known content."""
    from checkpoint_cases import snapshot

    from parallama.train import checkpoints

    if user is not None:
        os.setuid(user)
    disk, done = counting(kill_at)
    checkpoints.write(Path(folder), snapshot(step), keep_last=keep_last, disk=disk)
    Path(folder, "operations").write_text(json.dumps(done))
    return 0


if __name__ == "__main__":
    main()
