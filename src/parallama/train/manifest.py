"""What a training checkpoint says about itself: `manifest.json`, read strictly. Pure."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from ..errors import CheckpointError, lines
from ..plan.heads import EMPTY
from ..plan.mesh_shape import MeshShape
from ..plan.placement import Blocks

NAME = "manifest.json"
FORMAT = "parallama-train"
VERSION = 1
_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)


class FileEntry(BaseModel):
    """One file of the checkpoint."""

    model_config = _STRICT

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class BlockRuns(BaseModel):
    """`plan.Blocks`, its sources as runs of (first source, count).

    A first of `EMPTY` is a run of empty blocks.
    """

    model_config = _STRICT

    dim: int = Field(ge=0)
    block: int = Field(ge=1)
    runs: list[tuple[int, int]]

    @classmethod
    def of(cls, blocks: Blocks) -> BlockRuns:
        """Runs of neighbouring sources."""
        runs: list[tuple[int, int]] = []
        for source in blocks.sources:
            if runs and _follows(source, *runs[-1]):
                runs[-1] = (runs[-1][0], runs[-1][1] + 1)
            else:
                runs.append((source, 1))
        return cls(dim=blocks.dim, block=blocks.block, runs=runs)

    @property
    def blocks(self) -> Blocks:
        sources = [
            source
            for first, count in self.runs
            for source in ([EMPTY] * count if first == EMPTY else range(first, first + count))
        ]
        return Blocks(dim=self.dim, block=self.block, sources=tuple(sources))

    def fits(self, shape: list[int]) -> bool:
        """Whether the placed dim is made of these blocks, each source from the first on in it."""
        if any(count < 1 or (first < 0 and first != EMPTY) for first, count in self.runs):
            return False
        count = sum(count for _, count in self.runs)
        if self.dim >= len(shape) or self.block * count != shape[self.dim]:
            return False
        sources = {source for source in self.blocks.sources if source != EMPTY}
        return sources == set(range(len(sources)))


def _follows(source: int, first: int, count: int) -> bool:
    """Whether a source goes on with a run."""
    if EMPTY in (source, first):
        return source == first
    return source == first + count


class TensorEntry(BaseModel):
    """One tensor, as it is placed on the mesh.

    Attributes:
        shape: over all devices, as placed.
        axes: the mesh axis of every dim.
        blocks: how the placed dim is made from the model's own, if it isn't the same.
    """

    model_config = _STRICT

    dtype: str
    shape: list[int]
    axes: list[Literal["data", "model"] | None]
    blocks: BlockRuns | None

    def fits(self, mesh: MeshShape) -> bool:
        """Whether shape, axes and blocks can be of one tensor on the mesh."""
        used = [axis for axis in self.axes if axis is not None]
        return (
            len(self.axes) == len(self.shape)
            and len(set(used)) == len(used)
            and all(
                size >= 0 and size % mesh.size(axis) == 0
                for size, axis in zip(self.shape, self.axes, strict=True)
            )
            and (self.blocks is None or self.blocks.fits(self.shape))
        )

    def holders(self, mesh: MeshShape) -> list[int]:
        """The devices whose files hold the parts: of those with the same part, the first."""
        return [
            device
            for device in range(mesh.devices)
            if all(
                place == 0
                for axis, place in mesh.coordinates(device).items()
                if axis not in self.axes
            )
        ]

    def part(self, mesh: MeshShape, device: int) -> tuple[slice, ...]:
        """Which part of the tensor is a device's."""
        coordinates = mesh.coordinates(device)
        slices = []
        for size, axis in zip(self.shape, self.axes, strict=True):
            step = size // mesh.size(axis)
            first = step * coordinates[axis] if axis is not None else 0
            slices.append(slice(first, first + step))
        return tuple(slices)


class Mesh(BaseModel):
    """The mesh it was written on."""

    model_config = _STRICT

    data: int = Field(ge=1)
    model: int = Field(ge=1)

    @property
    def shape(self) -> MeshShape:
        return MeshShape(data=self.data, model=self.model)


class DataState(BaseModel):
    """Where in the data the run is, and in which data."""

    model_config = _STRICT

    epoch: int = Field(ge=0)
    row: int = Field(ge=0)
    fingerprint: str


class Rng(BaseModel):
    """The state of every draw.

    Draws are functions of the seed and of the step (or epoch) to come, and have no other state.
    """

    model_config = _STRICT

    seed: int
    step: int


class Manifest(BaseModel):
    """All of a checkpoint but the numbers.

    Attributes:
        step: optimizer steps that are done.
        tokens: tokens that were trained on so far.
        schedule: the learning rate's: kind, peak, steps, warm-up, floor.
        plan: of the model on that mesh, as `Plan.to_json`.
        settings: the run's config.
        versions: of parallama, torch, torch_xla and transformers.
    """

    model_config = _STRICT

    format: Literal["parallama-train"] = "parallama-train"
    version: Literal[1] = 1
    step: int = Field(ge=0)
    tokens: int = Field(ge=0)
    mesh: Mesh
    data: DataState
    rng: Rng
    schedule: dict[str, Any]
    settings: dict[str, Any]
    plan: dict[str, Any]
    versions: dict[str, str]
    tensors: dict[str, TensorEntry]
    files: dict[str, FileEntry]


def read_manifest(folder: Path) -> Manifest:
    """A checkpoint's manifest, held against the names and sizes of its files.

    Raises:
        CheckpointError: there is none, it can't be read, or a file is missing or of another size.
    """
    path = folder / NAME
    try:
        manifest = Manifest.model_validate_json(path.read_bytes())
    except OSError as error:
        raise CheckpointError(
            lines(
                f"checkpoint {str(folder)!r} has no {NAME} that can be read: {error.strerror}",
                "expected a training checkpoint",
            )
        ) from None
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CheckpointError(
            lines(
                f"checkpoint {str(folder)!r}: {NAME} is wrong at {where!r}: {first['msg']}",
                f"expected {FORMAT}, version {VERSION}",
            )
        ) from None
    mesh = manifest.mesh.shape
    for name, tensor in manifest.tensors.items():
        if not tensor.fits(mesh) or any(
            f"device-{device}.safetensors" not in manifest.files for device in tensor.holders(mesh)
        ):
            raise CheckpointError(
                lines(
                    f"checkpoint {str(folder)!r}: {NAME} has {name!r} of shape {tensor.shape} "
                    f"over {tensor.axes}",
                    f"expected one that is placed on mesh {mesh}",
                )
            )
    for name, entry in manifest.files.items():
        file = folder / name
        if Path(name).name != name or file.is_symlink() or not file.is_file():
            raise CheckpointError(
                lines(
                    f"checkpoint {str(folder)!r}: file {name!r} is missing",
                    "expected every file that the manifest lists",
                )
            )
        size = file.stat().st_size
        if size != entry.bytes:
            raise CheckpointError(
                lines(
                    f"checkpoint {str(folder)!r}: file {name!r} has {size} bytes",
                    f"expected {entry.bytes}, by the manifest",
                )
            )
    return manifest
