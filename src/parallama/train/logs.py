"""A run's log: `RUN/log.jsonl`, one object a step, and the same for TensorBoard and W&B. No torch.

When a run resumes, the log is cut back to the checkpoint's step.
"""

from __future__ import annotations

import json
import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, Protocol

from ..errors import RunError, UsageError, cause, lines
from ..files.disk import Disk, unwritable

NAME = "log.jsonl"
FLUSH_S = 10.0
"""How often TensorBoard's events are written to the disk; at the end they all are."""
Entry = dict[str, Any]


class Sink(Protocol):
    """Where entries go."""

    def write(self, entry: Entry) -> None:
        """Take one step's entry."""
        ...

    def close(self) -> None:
        """Take no more.

        Raises:
            RunError: a part of it can't be written.
        """
        ...


@contextmanager
def closing(sinks: list[Sink]) -> Iterator[None]:
    """Closes what the list has in the end. An error of the body wins over one of closing."""
    try:
        yield
    except BaseException:
        for sink in sinks:
            with suppress(Exception):
                sink.close()
        raise
    for sink in sinks:
        sink.close()


class JsonLog:
    """The log file of a run.

    Args:
        folder: of the run.
        steps_done: entries of later steps, left by a run that was killed, are cut off.
        disk: what it is synced with.

    Raises:
        RunError: it can't be written.
    """

    def __init__(self, folder: Path, steps_done: int, disk: Disk | None = None) -> None:
        self._path = folder / NAME
        self._disk = disk or Disk()
        try:
            if self._path.exists():
                entries = [
                    each for each in _whole_entries(self._path) if each["step"] <= steps_done
                ]
                kept = "".join(json.dumps(entry) + "\n" for entry in entries)
                self._disk.replace(self._path, kept.encode())
            self._stream = self._path.open("a", encoding="utf-8")
            self._disk.sync_folder(folder)
        except OSError as error:
            raise _unwritable(self._path, error) from None

    def write(self, entry: Entry) -> None:
        """One line; numbers that JSON doesn't have become null."""
        line = json.dumps(_plain(entry), allow_nan=False, ensure_ascii=False)
        try:
            self._stream.write(line + "\n")
            self._stream.flush()
        except OSError as error:
            raise _unwritable(self._path, error) from None

    def sync(self) -> None:
        """Everything so far is on the disk when this returns."""
        try:
            self._disk.sync(self._path, self._stream)
        except OSError as error:
            raise _unwritable(self._path, error) from None

    def close(self) -> None:
        """Take no more."""
        try:
            self._stream.close()
        except OSError as error:
            raise _unwritable(self._path, error) from None


class TensorBoard:
    """Event files in `RUN/tensorboard`.

    A resumed run adds a file, whose steps take the place of those after the checkpoint.

    This thread writes the events. tensorboardX's own thread ends at the first one that it can't
    write, and the run would then wait for it for ever.

    Raises:
        UsageError: tensorboardX isn't installed.
        RunError: the files can't be written.
    """

    def __init__(self, folder: Path, steps_done: int) -> None:
        try:
            from tensorboardX.proto.event_pb2 import SessionLog
            from tensorboardX.record_writer import RecordWriter
        except ImportError:
            raise UsageError(
                lines(
                    "report_to tensorboard needs the package 'tensorboardX'",
                    "pip install 'parallama[tensorboard]'",
                )
            ) from None
        self._folder, self._flushed = folder / "tensorboard", -math.inf
        name = f"events.out.tfevents.{int(time.time())}.{platform.node()}.{steps_done}"
        with self._written():
            self._folder.mkdir(parents=True, exist_ok=True)
            self._writer = RecordWriter(str(self._folder / name))
            self._add(0, file_version="brain.Event:2")
            self._add(steps_done + 1, session_log=SessionLog(status=SessionLog.START))

    def write(self, entry: Entry) -> None:
        """Every number of an entry as a scalar, every sample as text."""
        from tensorboardX.summary import scalar, text

        made = [scalar(f"train/{name}", value) for name, value in _numbers(entry)]
        made += [
            text(f"sample/{number}", f"{each['prompt']}{each['text']}")
            for number, each in enumerate(entry.get("samples", []))
        ]
        with self._written():
            for summary in made:
                self._add(entry["step"], summary=summary)
            if time.monotonic() - self._flushed > FLUSH_S:
                self._writer.flush()
                self._flushed = time.monotonic()

    def close(self) -> None:
        """Take no more."""
        with self._written():
            self._writer.close()

    def _add(self, step: int, **content: Any) -> None:
        from tensorboardX.proto.event_pb2 import Event

        self._writer.write(Event(step=step, wall_time=time.time(), **content).SerializeToString())

    @contextmanager
    def _written(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise unwritable("the folder of TensorBoard's events", self._folder, error) from None


class WandB:
    """A run of Weights & Biases, in its own folder in `RUN`.

    Raises:
        UsageError: wandb isn't installed.
        RunError: it doesn't start.
    """

    def __init__(self, folder: Path, settings: Mapping[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise UsageError(
                lines("report_to wandb needs the package 'wandb'", "pip install 'parallama[wandb]'")
            ) from None
        try:
            self._run = wandb.init(
                project="parallama", name=folder.name, dir=str(folder), config=dict(settings)
            )
        except Exception as error:  # of many kinds, network ones among them
            raise RunError(
                lines(
                    f"wandb doesn't start: {cause(error)}",
                    "run 'wandb login', or set WANDB_MODE=offline",
                )
            ) from None

    def write(self, entry: Entry) -> None:
        """Every number of an entry."""
        self._run.log(dict(_numbers(entry)), step=entry["step"])

    def close(self) -> None:
        """Take no more."""
        self._run.finish()


def read_log(run: Path) -> list[Entry]:
    """A run's entries, in order.

    Raises:
        UsageError: there is no log, or no step in it.
    """
    path = run / NAME
    try:
        entries = _whole_entries(path)
    except OSError as error:
        raise UsageError(
            lines(
                f"run {str(run)!r} has no {NAME} that can be read: {error.strerror}",
                "expected the 'out' of a parallama train",
            )
        ) from None
    if not entries:
        raise UsageError(
            lines(f"run {str(run)!r}: {NAME} has no step yet", "expected at least one")
        )
    return entries


def _whole_entries(path: Path) -> list[Entry]:
    """The entries of a log up to the first that is torn."""
    entries: list[Entry] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            break
        if not isinstance(entry, dict) or type(entry.get("step")) is not int:
            break
        entries.append(entry)
    return entries


def _numbers(entry: Entry) -> list[tuple[str, float]]:
    return [
        (name, value)
        for name, value in entry.items()
        if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
    ]


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _plain(inner) for key, inner in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str):
        return [_plain(inner) for inner in value]
    return value


def _unwritable(path: Path, error: OSError) -> RunError:
    return unwritable("the log", path, error)
