"""What really lies on the devices: each device's part of every tensor, by the runtime's word, held against the plan."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..errors import UsageError, lines
from ..inference import state
from ..inference.llm import LLM
from ..plan.collectives import Phase
from ..plan.layer_patterns import ranges, without_layer
from ..plan.mesh_shape import MeshShape
from ..plan.overrides import matches
from ..plan.placement import Axes, Blocks
from ..plan.program_shapes import cache_buckets
from .audit import compiled, step_key
from .source_slices import Content, Slices, content, faults, shown_slices


@dataclass(frozen=True, kw_only=True)
class Held:
    """One tensor on the devices, as measured.

    Attributes:
        name: of the parameter, or `cache.key.L`, `cache.value.L`.
        shape: over all devices.
        source_shape: in the checkpoint; of a cache, with the checkpoint's KV heads.
        axes: the plan's, one a dim.
        parts: by device.
        bytes_per_device: by device.
        planned: the parts that the plan wants, by device.
        wrong: how the tensor lies otherwise than planned, in words; None if it does not.
    """

    name: str
    shape: tuple[int, ...]
    source_shape: tuple[int, ...]
    axes: Axes
    parts: tuple[Slices, ...]
    bytes_per_device: tuple[int, ...]
    planned: tuple[Slices, ...]
    wrong: str | None

    @property
    def local_shape(self) -> tuple[int, ...] | None:
        """What each device holds; None where devices hold parts of different shapes."""
        shapes = {tuple(last - first for first, last in part) for part in self.parts}
        return shapes.pop() if len(shapes) == 1 else None

    @property
    def is_cache(self) -> bool:
        return self.name.startswith("cache.")

    def to_dict(self) -> dict[str, Any]:
        """An entry of `tensors` in the document of `--json`."""
        return {
            "name": self.name,
            "shape": self.shape,
            "local_shape": self.local_shape,
            "bytes_per_device": self.bytes_per_device,
            "partition": self.axes,
            "as_planned": self.wrong is None,
            "parts": [{"device": device, "slices": part} for device, part in enumerate(self.parts)],
        }


@dataclass(frozen=True, kw_only=True)
class Alike:
    """Tensors that differ only in their layer.

    Attributes:
        name: with `*` for the layer; where not all layers lie alike, with these layers' numbers, as `0,2-5`.
        count: how many there are.
        first: the first of them.
    """

    name: str
    count: int
    first: Held

    @property
    def title(self) -> str:
        return self.name.removeprefix("model.") + (f" x{self.count}" if self.count > 1 else "")


@dataclass(frozen=True, kw_only=True)
class Inspection:
    """A sharded model as it lies.

    Attributes:
        device_names: what the runtime calls the devices.
        batch, positions: of the KV cache that was put on the devices for this.
        tensors: parameters in the model's order, then the cache.
    """

    model: str
    backend: str
    mesh: dict[str, int]
    dtype: str
    device_names: tuple[str, ...]
    batch: int
    positions: int
    tensors: tuple[Held, ...]

    @property
    def findings(self) -> tuple[str, ...]:
        """What lies otherwise than planned, a sentence a kind."""
        return tuple(
            f"{group.title}: {group.first.wrong}"
            for group in alike(self.tensors)
            if group.first.wrong is not None
        )

    def bytes_on(self, device: int, *, cached: bool) -> int:
        """Bytes that a device holds of the cache, or of the parameters."""
        return sum(
            held.bytes_per_device[device] for held in self.tensors if held.is_cache == cached
        )

    def to_dict(self) -> dict[str, Any]:
        """The document of `--json`, without what its other options add."""
        shape = MeshShape(self.mesh)
        return {
            "model": self.model,
            "backend": self.backend,
            "mesh": self.mesh,
            "dtype": self.dtype,
            "batch": self.batch,
            "cache_positions": self.positions,
            "devices": [
                {
                    "id": device,
                    "name": name,
                    "coordinates": shape.coordinates(device),
                    "param_bytes": self.bytes_on(device, cached=False),
                    "kv_bytes": self.bytes_on(device, cached=True),
                }
                for device, name in enumerate(self.device_names)
            ],
            "tensors": [held.to_dict() for held in self.tensors],
        }


class Inspector:
    """A loaded model with a KV cache beside it, both there to be looked at.

    Args:
        batch: rows of the cache over all devices; a multiple of the "data" axis.
        max_model_len: positions that the cache must hold; it gets what a session of that length would end with, a multiple of 256, or of 64 for many rows.
    """

    def __init__(self, llm: LLM, *, batch: int, max_model_len: int) -> None:
        self.llm, self.batch, self.max_model_len = llm, batch, max_model_len
        self.positions = cache_buckets(max_model_len, rows=batch)[-1]
        self._cache = state.empty_cache(llm.steps, batch, self.positions)

    @property
    def tensors(self) -> dict[str, torch.Tensor]:
        """Everything there is to look at, by name."""
        weights = self.llm.steps.weights
        return {
            placement.name: weights[placement.name] for placement in self.llm.plan.parameters
        } | self._cache

    def inspect(self) -> Inspection:
        """Measure how every tensor lies."""
        mesh = self.llm.mesh
        return Inspection(
            model=self.llm.name,
            backend=mesh.backend.name,
            mesh=dict(mesh.shape),
            dtype=str(self.llm.steps.dtype).removeprefix("torch."),
            device_names=tuple(mesh.device_names()),
            batch=self.batch,
            positions=self.positions,
            tensors=tuple(self._held(name, tensor) for name, tensor in self.tensors.items()),
        )

    def select(self, pattern: str) -> list[str]:
        """Names that a pattern covers; `*` stands for one dotted part, or some of it.

        Raises:
            UsageError: there are none.
        """
        names = [name for name in self.tensors if matches(pattern, name)]
        if not names:
            first = next(name for name in self.tensors if "layers" in name)
            example = without_layer(first)[0]
            raise UsageError(
                lines(
                    f"--tensor {pattern!r} matches no tensor",
                    f"expected a name as {first}, or {example} for all layers, or cache.key.0",
                )
            )
        return names

    def contents(self, name: str) -> tuple[tuple[Content, ...], tuple[str, ...]]:
        """What every device holds of a tensor, and what is wrong with it in words: copies that differ, padding that is not zero."""
        held, blocks = self._held(name, self.tensors[name]), self._blocks(name)
        shards = self.llm.mesh.shards(self.tensors[name])
        found = tuple(
            content(name, device, slices, shard, blocks, known=self._has_planned_shape(held))
            for device, (slices, shard) in enumerate(zip(held.parts, shards, strict=True))
        )
        return found, tuple(
            f"{name}: {fault}" for fault in faults(found, shards, held.source_shape)
        )

    def save_hlo(self, folder: Path, phase: Phase) -> Path:
        """Compile a phase's step for this cache, and save its optimized HLO as `<phase>.txt` in a new or empty folder.

        Raises:
            UsageError: the folder cannot be made or written to, or holds something.
            RunError: the engine was not started with `keep_hlo`.
        """
        positions = self.max_model_len - (phase == "decode")
        text = "\n".join(compiled(self.llm.programs, step_key(phase, self.batch, positions)).hlo())
        check_folder(folder)
        path = folder / f"{phase}.txt"
        try:
            folder.mkdir(exist_ok=True)
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise UsageError(
                lines(
                    f"--hlo {folder} cannot be written: {error.strerror}",
                    "expected a new or an empty folder",
                )
            ) from None
        return path

    def _blocks(self, name: str) -> Blocks | None:
        if name.startswith("cache."):
            return Blocks(dim=1, block=1, sources=self.llm.plan.head_layout.kv_sources, heads="KV")
        return self.llm.plan.blocks(name)

    def _placed(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...], Axes]:
        """Shape in the checkpoint, planned shape, and planned axes; a cache's letters are this cache's numbers."""
        placement = self.llm.plan[name.rpartition(".")[0] if name.startswith("cache.") else name]
        letters = {"B": self.batch, "T": self.positions}

        def numbers(shape: Sequence[int | str]) -> tuple[int, ...]:
            return tuple(letters[size] if isinstance(size, str) else size for size in shape)

        return numbers(placement.source_shape), numbers(placement.shape), placement.axes

    def _has_planned_shape(self, held: Held) -> bool:
        return held.shape == self._placed(held.name)[1]

    def _held(self, name: str, tensor: torch.Tensor) -> Held:
        mesh = self.llm.mesh
        source_shape, shape, axes = self._placed(name)
        planned = tuple(
            tuple(
                part.indices(size)[:2]
                for part, size in zip(mesh.local_slices(shape, axes, device), shape, strict=True)
            )
            for device in range(mesh.shape.devices)
        )
        parts = tuple(
            tuple((part.start, part.stop) for part in slices) for slices in mesh.parts(tensor)
        )
        return Held(
            name=name,
            shape=tuple(tensor.shape),
            source_shape=source_shape,
            axes=axes,
            parts=parts,
            bytes_per_device=tuple(mesh.local_bytes(tensor)),
            planned=planned,
            wrong=_otherwise(tensor, self.llm.steps.dtype, shape, parts, planned),
        )


def alike(tensors: Sequence[Held]) -> tuple[Alike, ...]:
    """The kinds of tensors, in their order; layers that lie differently stand below one another."""
    found: dict[str, dict[tuple[object, ...], list[tuple[int | None, Held]]]] = {}
    for held in tensors:
        name, layer = _without_layer(held.name)
        how = (held.shape, held.parts, held.bytes_per_device, held.axes, held.wrong)
        found.setdefault(name, {}).setdefault(how, []).append((layer, held))
    return tuple(
        Alike(
            name=name
            if len(groups) == 1
            else name.replace("*", ranges([layer for layer, _ in members if layer is not None])),
            count=len(members),
            first=members[0][1],
        )
        for name, groups in found.items()
        for members in groups.values()
    )


def check_folder(folder: Path) -> None:
    """Raise `UsageError` unless `--hlo` can save into a folder without writing over anything: before anything else is done."""
    wanted = "expected a new or an empty folder"
    try:
        if folder.exists() and not folder.is_dir():
            raise UsageError(lines(f"--hlo {folder} is a file", wanted))
        if folder.is_dir() and any(folder.iterdir()):
            raise UsageError(
                lines(f"--hlo {folder} is not empty", f"{wanted}: nothing is written over")
            )
        if not folder.parent.is_dir():
            raise UsageError(
                lines(f"--hlo {folder} cannot be made: there is no folder {folder.parent}", wanted)
            )
    except OSError as error:
        raise UsageError(
            lines(f"--hlo {folder} cannot be used: {error.strerror}", wanted)
        ) from None


def _without_layer(name: str) -> tuple[str, int | None]:
    if name.startswith("cache."):
        kind, _, layer = name.rpartition(".")
        return f"{kind}.*", int(layer)
    return without_layer(name)


def _otherwise(
    tensor: torch.Tensor,
    dtype: torch.dtype,
    shape: tuple[int, ...],
    parts: tuple[Slices, ...],
    planned: tuple[Slices, ...],
) -> str | None:
    if tuple(tensor.shape) != shape:
        return f"has shape {list(tensor.shape)}, planned {list(shape)}"
    if tensor.dtype != dtype:
        return f"has dtype {str(tensor.dtype).removeprefix('torch.')}, planned {str(dtype).removeprefix('torch.')}"
    wrong = [
        device
        for device, (part, wanted) in enumerate(zip(parts, planned, strict=True))
        if part != wanted
    ]
    if not wrong:
        return None
    first = wrong[0]
    others = f" (and {len(wrong) - 1} more devices)" if len(wrong) > 1 else ""
    return f"device {first} holds {shown_slices(parts[first])}, planned {shown_slices(planned[first])}{others}"
