"""`RUN/log.jsonl`: one object a step. Written, cut back when a run resumes, read, and passed on to TensorBoard and W&B. No torch."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from ..errors import RunError, UsageError, cause, lines

NAME = "log.jsonl"
Entry = dict[str, Any]


class Sink(Protocol):
    """Where entries go."""

    def write(self, entry: Entry) -> None:
        """Take one step's entry."""
        ...

    def close(self) -> None:
        """Take no more."""
        ...


class JsonLog:
    """The log file of a run.

    Args:
        folder: of the run.
        steps_done: entries of later steps, which a run that was killed has left, are cut off.

    Raises:
        RunError: it can't be written.
    """

    def __init__(self, folder: Path, steps_done: int) -> None:
        self._path = folder / NAME
        try:
            if self._path.exists():
                kept = "".join(json.dumps(entry) + "\n" for entry in _whole_entries(self._path) if entry["step"] <= steps_done)
                new = folder / f".{NAME}"
                new.write_text(kept, encoding="utf-8")
                new.replace(self._path)
            self._stream = self._path.open("a", encoding="utf-8")
        except OSError as error:
            raise _unwritable(self._path, error) from None

    def write(self, entry: Entry) -> None:
        """One line; numbers that JSON doesn't have become null."""
        try:
            self._stream.write(json.dumps(_plain(entry), allow_nan=False, ensure_ascii=False) + "\n")
            self._stream.flush()
        except OSError as error:
            raise _unwritable(self._path, error) from None

    def sync(self) -> None:
        """Everything so far is on the disk when this returns."""
        try:
            os.fsync(self._stream.fileno())
        except OSError as error:
            raise _unwritable(self._path, error) from None

    def close(self) -> None:
        """Take no more."""
        self._stream.close()


class TensorBoard:
    """Event files in `RUN/tensorboard`. A resumed run adds a file, whose steps take the place of those after the checkpoint.

    Raises:
        UsageError: tensorboardX isn't installed.
    """

    def __init__(self, folder: Path, steps_done: int) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise UsageError(
                lines("report_to tensorboard needs the package 'tensorboardX'", "pip install 'parallama[tensorboard]'")
            ) from None
        self._writer = SummaryWriter(str(folder / "tensorboard"), purge_step=steps_done + 1)

    def write(self, entry: Entry) -> None:
        """Every number of an entry as a scalar, every sample as text."""
        for name, value in _numbers(entry):
            self._writer.add_scalar(f"train/{name}", value, entry["step"])
        for number, sample in enumerate(entry.get("samples", [])):
            self._writer.add_text(f"sample/{number}", f"{sample['prompt']}{sample['text']}", entry["step"])

    def close(self) -> None:
        """Take no more."""
        self._writer.close()


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
            raise UsageError(lines("report_to wandb needs the package 'wandb'", "pip install 'parallama[wandb]'")) from None
        try:
            self._run = wandb.init(project="parallama", name=folder.name, dir=str(folder), config=dict(settings))
        except Exception as error:  # of many kinds, network ones among them
            raise RunError(lines(f"wandb doesn't start: {cause(error)}", "run 'wandb login', or set WANDB_MODE=offline")) from None

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
            lines(f"run {str(run)!r} has no {NAME} that can be read: {error.strerror}", "expected the 'out' of a parallama train")
        ) from None
    if not entries:
        raise UsageError(lines(f"run {str(run)!r}: {NAME} has no step yet", "expected at least one"))
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
        (name, value) for name, value in entry.items() if name != "step" and isinstance(value, (int, float)) and not isinstance(value, bool)
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
    return RunError(lines(f"the log {str(path)!r} cannot be written: {cause(error)}", "expected a file that may be written to, and room"))
