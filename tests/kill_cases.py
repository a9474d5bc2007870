"""Processes that are killed, or whose file operations fail: training, and single checkpoints."""

from __future__ import annotations

import json
import os
import signal
import time
from pathlib import Path
from typing import Any

import forks


def forked(what: str, log: Path, **arguments: Any) -> int:
    """Run a case of this module in a process of its own.

    It ends by itself, or by a signal that it gives itself: before the k-th operation of the save
    protocol, or some time after a step.

    Args:
        log: the file for what it writes.

    Returns: its exit code, 1 where it raised.
    """
    return forks.call(f"kill_cases:{what}", log=log, optimize=False, **arguments)


def counting(
    kill_at: int | None, errno: int | None = None, fail_at: int | None = None
) -> tuple[Any, list[str]]:
    """A disk whose `kill_at`-th operation (from 0) ends the process, and whose `fail_at`-th raises.

    Returns: the disk, and the list of its operations as they come.
    """
    from parallama.files.disk import Disk

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


def save(
    folder: str, step: int, kill_at: int | None = None, keep_last: int = 2, user: int | None = None
) -> int:
    """Write one checkpoint of known content."""
    from checkpoint_cases import snapshot

    from parallama.train import checkpoints

    if user is not None:
        os.setuid(user)
    disk, done = counting(kill_at)
    checkpoints.write(Path(folder), snapshot(step), keep_last=keep_last, disk=disk)
    Path(folder, "operations").write_text(json.dumps(done))
    return 0


def commands(runs: list[dict[str, Any]], found: str, user: int | None = None) -> int:
    """`parallama train` for each of some runs in turn; how each ended goes into a file.

    Args:
        runs: arguments of `_command`.
        found: the file; for each run what `_command` gives back.
        user: to run as.
    """
    if user is not None:
        os.setuid(user)
    Path(found).write_text(json.dumps([_command(**run) for run in runs]))
    return 0


def _command(
    options: list[str],
    errno: int | None = None,
    fail_at: int | None = None,
    after: int | None = None,
    then: list[Any] | None = None,
) -> dict[str, Any]:
    """One run: its exit code, what it said, the operations of its disk, and what it left.

    That is all names among its checkpoints, and the newest whole one with its files' hashes.

    Args:
        fail_at: which operation fails, with `errno`.
        after: a step, or 0 for before the run.
        then: a function of this module and its arguments, which is called there.
    """
    import contextlib
    import io

    from parallama import __main__
    from parallama.train import checkpoints, loop

    disk, done = counting(None, errno, fail_at)
    train = loop.train

    def reached(step: int) -> None:
        if step == after and then is not None:
            globals()[then[0]](*then[1:])

    def observed(settings: Any, *, watch: Any) -> Any:
        watch.step = lambda entry, _steps: reached(entry["step"])
        return train(settings, watch=watch, disk=disk)

    reached(0)
    loop.train = observed
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said):
            code = __main__.run(["train", *options, "--quiet"])
    finally:
        loop.train = train
    folder = Path(options[options.index("--out") + 1], "checkpoints")
    newest = checkpoints.newest(folder)
    hashes = (
        {}
        if newest is None
        else {name: entry.sha256 for name, entry in checkpoints.verify(newest).files.items()}
    )
    names = sorted(path.name for path in folder.iterdir()) if folder.is_dir() else []
    whole = None if newest is None else newest.name
    return {
        "code": code,
        "said": said.getvalue(),
        "operations": done,
        "names": names,
        "newest": whole,
        "hashes": hashes,
    }


def fill(folder: str, left: int, behind: str | None = None) -> None:
    """Fill a file system up but for so many bytes, when a file is there."""
    wait_for(behind)
    with Path(folder, "ballast").open("wb") as stream:
        about = os.statvfs(folder)
        stream.write(bytes(max(about.f_bavail * about.f_frsize - left, 0)))


def free(folder: str) -> None:
    """Undo `fill`."""
    Path(folder, "ballast").unlink()


def allow(folder: str, mode: int, behind: str | None = None) -> None:
    """Set the rights to a folder, when a file is there."""
    wait_for(behind)
    Path(folder).chmod(mode)


def wait_for(path: str | None) -> None:
    while path is not None and not Path(path).exists():
        time.sleep(0.01)


def limit_files(path: str | None, more: int = 0) -> None:
    """From now on no file of this process may be larger than this one is, and so many bytes.

    None: as large as before.
    """
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(
        resource.RLIMIT_FSIZE,
        (before if path is None else Path(path).stat().st_size + more, before),
    )


def train(
    options: list[str],
    kill_at: int | None = None,
    at_step: int | None = None,
    delay_s: float = 0.0,
    send: int = signal.SIGKILL,
) -> int:
    """A training run, as the command runs it; so many seconds after a step it gets a signal."""
    import threading

    from parallama.cli.train import _watch
    from parallama.train import loop
    from parallama.train import settings as settings_of

    disk, done = counting(kill_at)
    settings = settings_of.read(None, options)
    with _watch(False) as watch:
        tell = watch.step

        def step(entry: dict[str, Any], steps: int) -> None:
            tell(entry, steps)
            if entry["step"] == at_step:
                if delay_s:
                    threading.Timer(delay_s, os.kill, (os.getpid(), send)).start()
                else:
                    os.kill(os.getpid(), send)

        watch.step = step
        outcome = loop.train(settings, watch=watch, disk=disk)
    Path(settings.out, "operations").write_text(json.dumps(done))
    print(f"late programs: {outcome.programs_after_warmup}")
    return 0 if outcome.signal is None else 128 + outcome.signal
