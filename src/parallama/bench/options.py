"""What a benchmark of any kind is told, and how its report begins."""

from __future__ import annotations

import datetime
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from ..engine.devices.plugins import OptionValue
from ..errors import UsageError, lines
from ..host import processor, usable_cores
from ..model.dtype_names import unknown_dtype
from ..plan.mesh_shape import MeshShape
from ..sharded.loading import DTYPES
from .profile import check_perf
from .rows import Machine


@dataclass(frozen=True, kw_only=True)
class EngineOptions:
    """Which engines are measured on which meshes, and how they run.

    Attributes:
        repeats: how often each thing is measured.
        threads: cores that every engine may use; all if None.
        allow_nonfinite: load weights that hold NaN or infinity, too.
        profile: sample every engine after it was measured, to see where the time goes.
    """

    PEERS: ClassVar[tuple[str, ...]]
    """All peers that there are."""

    model: str
    meshes: tuple[MeshShape, ...]
    peers: tuple[str, ...] = ()
    repeats: int = 3
    threads: int | None = None
    dtype: str = "float32"
    backend: str = "cpu"
    backend_options: Mapping[str, OptionValue] = field(default_factory=dict)
    allow_nonfinite: bool = False
    profile: bool = False

    def __post_init__(self) -> None:
        unknown = [peer for peer in self.peers if peer not in self.PEERS]
        if unknown:
            raise UsageError(
                lines(f"peer {unknown[0]!r} is unknown", f"expected one of {', '.join(self.PEERS)}")
            )
        self.check_least("repeats", self.repeats, 1)
        if self.dtype not in DTYPES:
            raise unknown_dtype(self.dtype, DTYPES)
        if not self.meshes:
            raise UsageError(lines("there is no mesh", "expected at least one, as 1x1,1x2"))
        if self.threads is not None and not 1 <= self.threads <= usable_cores():
            raise UsageError(
                lines(
                    f"threads is {self.threads}",
                    f"expected 1 to {usable_cores()}, the cores this process may use",
                )
            )
        if self.profile:
            check_perf()

    @staticmethod
    def check_least(name: str, number: int | None, least: int) -> None:
        """Raise `UsageError` for a number that is too small, or none."""
        if number is None or number < least:
            raise UsageError(lines(f"{name} is {number}", f"expected at least {least}"))

    @property
    def cores(self) -> int:
        """What `threads` comes to."""
        return self.threads or usable_cores()

    def engine(self, name: str, mesh: MeshShape) -> dict[str, Any]:
        """What the process of an engine is told; see `worker`."""
        return {
            "engine": name,
            "model": self.model,
            "mesh": str(mesh),
            "devices": mesh.devices,
            "dtype": self.dtype,
            "backend": self.backend,
            "backend_options": dict(self.backend_options),
            "allow_nonfinite": self.allow_nonfinite,
            "threads": self.cores,
            "profiled": self.profile,
        }

    def about(
        self, command: str, readings: Sequence[Mapping[str, float]], versions: Mapping[str, str]
    ) -> dict[str, Any]:
        """The fields of a `rows.About`.

        Args:
            readings: of the machine's limits; the best of each counts.
            versions: of an engine of ours.
        """
        best = {name: max(each[name] for each in readings) for name in readings[0]}
        return {
            "command": command,
            "date": datetime.date.today().isoformat(),
            "model": self.model,
            "dtype": self.dtype,
            "backend": self.backend,
            "threads": self.cores,
            "machine": Machine(cpu=processor()[0], **best),
            "versions": dict(versions) | {"python": platform.python_version()},
        }
