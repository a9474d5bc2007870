"""Writes a run's checkpoints, one at a time, if asked for while training goes on."""

from __future__ import annotations

import threading
from pathlib import Path
from typing import Self

from ..files.disk import Disk
from .checkpoints import Verified, kept, name_of, write
from .snapshot import Snapshot


class Saver:
    """Writes checkpoints, one at a time; if asynchronous, while training goes on.

    An error of a write comes up at the next call.

    Args:
        folder: of all checkpoints of the run.
        verified: what is known of those that are there.
    """

    def __init__(
        self,
        folder: Path,
        *,
        keep_last: int,
        asynchronous: bool,
        disk: Disk | None = None,
        verified: Verified | None = None,
    ) -> None:
        self.folder = folder
        self._keep_last = keep_last
        self._asynchronous = asynchronous
        self._disk = disk or Disk()
        self._verified = verified or Verified()
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None

    def save(self, snapshot: Snapshot) -> None:
        """Begin to write a checkpoint, when the one before is written."""
        self.wait()
        if not self._asynchronous:
            self._write(snapshot)
            return
        self._thread = threading.Thread(target=self._run, args=(snapshot,), name="checkpoint")
        self._thread.start()

    def path(self, step: int) -> Path:
        """Where the checkpoint of a step is."""
        return self.folder / name_of(step)

    def state(self) -> str:
        """Which checkpoint there is to go back to, in words."""
        return kept(self.folder, self._verified)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_error: object) -> None:
        """Wait for the write that is under way, and say nothing about it.

        The run breaks for another reason, or has heard of it in `wait`.
        """
        self._join()

    def check(self) -> None:
        """Raise what went wrong in the background, if something did."""
        if self._error is not None:
            error, self._error = self._error, None
            raise error

    def wait(self) -> None:
        """Return when nothing is being written; raises as `check`."""
        self._join()
        self.check()

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _write(self, snapshot: Snapshot) -> None:
        write(
            self.folder,
            snapshot,
            keep_last=self._keep_last,
            disk=self._disk,
            verified=self._verified,
        )

    def _run(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except BaseException as error:
            self._error = error
