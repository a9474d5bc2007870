"""What would fit instead: meshes, and changes of a run, each with the bytes it brings. Pure."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from ..errors import FitError, PlanError
from .mesh_shape import MeshShape

Needed = Callable[[MeshShape], int]
"""Bytes on each device of a mesh; it raises where a plan cannot be made for it."""


@dataclass(frozen=True, kw_only=True)
class Alternative:
    """A change of a run.

    Attributes:
        options: as they would stand on the command line, or what would be needed in words.
        needed_bytes: on each device, with this change alone.
        saved_bytes: beside the run as it was asked for.
        fits: it suffices alone.
    """

    options: str
    needed_bytes: int
    saved_bytes: int
    fits: bool


@dataclass(frozen=True, kw_only=True)
class Alternatives:
    """What a hardware would do instead.

    Attributes:
        smallest_mesh: with the fewest devices on which the run fits as it is; null if there is
            none among those that were tried.
        counts: devices along "model", with the run's own "data" -> whether it fits there.
        changes: what brings bytes on the mesh as it is, where the run doesn't fit.
    """

    smallest_mesh: MeshShape | None
    counts: Mapping[int, bool]
    changes: tuple[Alternative, ...]

    def smallest(self) -> str:
        """The smallest mesh, in words."""
        if self.smallest_mesh is None:
            return f"no mesh of up to {max(self.counts)} devices along 'model' fits"
        return f"the smallest mesh that fits is {self.smallest_mesh}"

    def advice(self) -> str:
        """In a line, what to do where the run does not fit."""
        found = [self.smallest()]
        enough = [each.options for each in self.changes if each.fits]
        if enough:
            found.append(f"on this one fits {' or '.join(enough[:3])}")
        return "; ".join(found)


def bytes_on(needed: Needed, mesh: MeshShape) -> int | None:
    """Bytes on each device; None for a mesh that the run cannot have."""
    try:
        return needed(mesh)
    except (FitError, PlanError):
        return None


def smallest_mesh(
    needed: Needed, room: int, *, rows: int, counts: Sequence[int]
) -> MeshShape | None:
    """The mesh with the fewest devices on which a run fits; of several the one that needs least.

    Args:
        rows: of the run: devices along "data" divide them, and each more of them holds less.
        counts: of devices along "model", the smallest first; "data" has no more than the last.
    """
    over_data = [size for size in range(1, min(rows, counts[-1]) + 1) if rows % size == 0]
    best: tuple[int, int, MeshShape] | None = None
    for model in counts:
        if best is not None and model > best[0]:
            break
        meshes = [MeshShape(data=data, model=model) for data in over_data]
        if not _fits(needed, meshes[-1], room):
            continue
        mesh = next(each for each in meshes if _fits(needed, each, room))
        found = mesh.devices, needed(mesh), mesh
        best = found if best is None else min(best, found, key=lambda each: each[:2])
    return None if best is None else best[2]


def _fits(needed: Needed, mesh: MeshShape, room: int) -> bool:
    found = bytes_on(needed, mesh)
    return found is not None and found <= room
