"""What a training checkpoint says about itself: `manifest.json`, read strictly. Pure."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    ValidationError,
)

from ..errors import CheckpointError, UsageError, lines
from ..plan.heads import EMPTY
from ..plan.mesh_shape import MeshShape
from ..plan.placement import Blocks

NAME = "manifest.json"
FORMAT = "parallama-train"
VERSION = 1
_STRICT = ConfigDict(extra="forbid", strict=True, frozen=True)
_MOST_DEVICES = 1 << 20
"""No mesh of ours has more: what a manifest says must not keep a reader busy."""


def _mesh(sizes: object) -> MeshShape:
    """Every axis by its own name, with a size."""
    axes = [*MeshShape()]
    if not isinstance(sizes, dict) or sizes.keys() != set(axes):
        raise ValueError(f"expected a size for each of {', '.join(axes)}")
    try:
        mesh = MeshShape(sizes)
    except UsageError as error:
        raise ValueError(str(error).replace("\n", ", ")) from None
    if mesh.devices > _MOST_DEVICES:
        raise ValueError(f"mesh {mesh} has {mesh.devices} devices, more than {_MOST_DEVICES}")
    return mesh


def _axis(name: str) -> str:
    """An axis by its own name."""
    if name not in MeshShape():
        raise ValueError(f"expected one of {', '.join(MeshShape())}")
    return name


Mesh = Annotated[MeshShape, PlainValidator(_mesh), PlainSerializer(dict)]
Axis = Annotated[str, AfterValidator(_axis)]


class FileEntry(BaseModel):
    """One file of the checkpoint."""

    model_config = _STRICT

    bytes: int = Field(ge=0)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class BlockRuns(BaseModel):
    """`placement.Blocks`, its sources as runs of (first source, count).

    A run whose first source is `EMPTY` is that many empty blocks.
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
        sources: list[int] = []
        for first, count in self.runs:
            sources += [EMPTY] * count if first == EMPTY else range(first, first + count)
        return Blocks(dim=self.dim, block=self.block, sources=tuple(sources))

    def fits(self, shape: list[int]) -> bool:
        """Whether they can make a dim of this shape, and hold every block of the model's own dim.

        The runs are not spelled out for this: a manifest may claim any number of blocks.
        """
        held = 0  # blocks of the model's own dim, from the first on
        for first, count in sorted(self.runs):
            if first < EMPTY or first > held or count < 1:
                return False
            if first != EMPTY:
                held = max(held, first + count)
        size = self.block * sum(count for _, count in self.runs)
        return held > 0 and self.dim < len(shape) and size == shape[self.dim]


def _follows(source: int, first: int, count: int) -> bool:
    """Whether a source goes on with a run."""
    if EMPTY in (source, first):
        return source == first
    return source == first + count


class TensorEntry(BaseModel):
    """One tensor, as it is split over the mesh.

    Attributes:
        shape: over all devices, as placed.
        axes: the mesh axis of every dim.
        blocks: how the placed dim is made from the model's own, if it isn't the same.
    """

    model_config = _STRICT

    dtype: str
    shape: list[int]
    axes: list[Axis | None]
    blocks: BlockRuns | None

    def fits(self, mesh: MeshShape) -> bool:
        """Whether shape, axes and blocks can be of one tensor on the mesh."""
        split = [axis for axis in self.axes if axis is not None]
        if len(self.axes) != len(self.shape) or len(split) != len(set(split)):
            return False
        divides = all(
            size >= 0 and size % mesh.size(axis) == 0
            for size, axis in zip(self.shape, self.axes, strict=True)
        )
        return divides and (self.blocks is None or self.blocks.fits(self.shape))

    def holders(self, mesh: MeshShape) -> Iterable[int]:
        """The devices whose files hold the parts: of those with the same part, the first."""
        return mesh.first_holders(self.axes)

    def part(self, mesh: MeshShape, device: int) -> tuple[slice, ...]:
        """Which part of the tensor is a device's."""
        return mesh.local_slices(self.shape, self.axes, device)


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
    mesh = manifest.mesh
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
