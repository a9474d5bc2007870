"""Measures what is really on the devices: each device's part of every tensor, as the runtime tells
it, held against the plan.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from ..engine.interface import DeviceTensor
from ..errors import UsageError, lines
from ..inference import state
from ..inference.llm import LLM
from ..plan.collectives import Phase
from ..plan.layer_patterns import without_layer
from ..plan.overrides import matches
from ..plan.placement import Axes, Blocks
from ..plan.program_shapes import slot_length
from .audit import compiled, step_key
from .inspection import Inspection, MeasuredTensor, Slices, shown_slices
from .shard_contents import ShardContent, read_shard, shard_faults

_EXPECTED_FOLDER = "expected a new or an empty folder"


class Inspector:
    """A loaded model, and a KV cache that is made to be inspected with it.

    Args:
        batch: rows of the cache over all devices; a multiple of the "data" axis.
        max_model_len: most tokens of a request. The cache gets as many positions as slots for such
            requests have.
    """

    def __init__(self, llm: LLM, *, batch: int, max_model_len: int) -> None:
        self.llm, self.batch, self.max_model_len = llm, batch, max_model_len
        self.positions = slot_length(max_model_len)
        self._cache = state.empty_cache(llm.steps, batch, self.positions)

    @property
    def tensors(self) -> dict[str, DeviceTensor]:
        """Everything that can be inspected, by name."""
        weights = self.llm.steps.weights
        names = [placement.name for placement in self.llm.plan.parameters]
        return {name: weights[name] for name in names} | self._cache

    def inspect(self) -> Inspection:
        """Measure how every tensor is placed."""
        mesh = self.llm.mesh
        return Inspection(
            model=self.llm.name,
            backend=mesh.backend.name,
            mesh=dict(mesh.shape),
            dtype=_name(self.llm.steps.dtype),
            device_names=tuple(mesh.device_names()),
            batch=self.batch,
            positions=self.positions,
            tensors=tuple(self._measured(name, tensor) for name, tensor in self.tensors.items()),
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

    def read(self, name: str) -> tuple[tuple[ShardContent, ...], tuple[str, ...]]:
        """Read what every device holds of a tensor.

        Returns:
            A content for each device, and in words what is wrong: copies that differ, padding
            that is not zero.
        """
        tensor = self.tensors[name]
        measured, blocks = self._measured(name, tensor), self._blocks(name)
        as_planned = measured.shape == self._placement(name)[1]
        shards = self.llm.mesh.shards(tensor)
        contents = tuple(
            read_shard(name, device, slices, shard, blocks, as_planned=as_planned)
            for device, (slices, shard) in enumerate(zip(measured.parts, shards, strict=True))
        )
        faults = shard_faults(contents, shards, measured.source_shape)
        return contents, tuple(f"{name}: {fault}" for fault in faults)

    def save_hlo(self, folder: Path, phase: Phase) -> Path:
        """Compile a phase's step for this cache, and save its optimized HLO.

        Returns:
            The file, `<phase>.txt` in the folder, which is new or empty.

        Raises:
            UsageError: the folder cannot be made or written to, or holds something.
            RunError: the engine was not started with `keep_hlo`.
        """
        positions = self.max_model_len - (phase == "decode")
        key = step_key(phase, self.batch, positions, self.llm.mesh.shape.data)
        program = compiled(self.llm.programs, key)
        text = "\n".join(program.hlo())
        check_folder(folder)
        path = folder / f"{phase}.txt"
        try:
            folder.mkdir(exist_ok=True)
            with path.open("x", encoding="utf-8") as file:
                file.write(text)
        except OSError as error:
            raise UsageError(
                lines(f"--hlo {folder} cannot be written: {error.strerror}", _EXPECTED_FOLDER)
            ) from None
        return path

    def _blocks(self, name: str) -> Blocks | None:
        if name.startswith("cache."):
            return self.llm.plan.cache_blocks()
        return self.llm.plan.blocks(name)

    def _placement(self, name: str) -> tuple[tuple[int, ...], tuple[int, ...], Axes]:
        """Shape in the checkpoint, planned shape, and planned axes."""
        placement = self.llm.plan[name.rpartition(".")[0] if name.startswith("cache.") else name]
        sizes = {"B": self.batch, "T": self.positions}  # the plan leaves these open

        def numbers(shape: Sequence[int | str]) -> tuple[int, ...]:
            return tuple(sizes[size] if isinstance(size, str) else size for size in shape)

        return numbers(placement.source_shape), numbers(placement.shape), placement.axes

    def _measured(self, name: str, tensor: DeviceTensor) -> MeasuredTensor:
        mesh = self.llm.mesh
        source_shape, shape, axes = self._placement(name)
        parts = tuple(
            tuple((part.start, part.stop) for part in slices) for slices in mesh.parts(tensor)
        )
        return MeasuredTensor(
            name=name,
            shape=tuple(tensor.shape),
            source_shape=source_shape,
            axes=axes,
            parts=parts,
            bytes_per_device=tuple(mesh.local_bytes(tensor)),
            wrong=self._wrong(tensor, shape, axes, parts),
        )

    def _wrong(
        self, tensor: DeviceTensor, shape: tuple[int, ...], axes: Axes, parts: Sequence[Slices]
    ) -> str | None:
        """How a tensor is placed otherwise than planned, in words; None if it is not."""
        if tuple(tensor.shape) != shape:
            return f"has shape {list(tensor.shape)}, planned {list(shape)}"
        dtype = self.llm.steps.dtype
        if tensor.dtype != dtype:
            return f"has dtype {_name(tensor.dtype)}, planned {_name(dtype)}"
        planned = [self._planned(shape, axes, device) for device in range(len(parts))]
        wrong = [device for device, part in enumerate(parts) if part != planned[device]]
        if not wrong:
            return None
        first, more = wrong[0], len(wrong) - 1
        found = f"device {first} holds {shown_slices(parts[first])}"
        others = f" (and {more} more devices)" if more else ""
        return f"{found}, planned {shown_slices(planned[first])}{others}"

    def _planned(self, shape: tuple[int, ...], axes: Axes, device: int) -> Slices:
        """The slices of a tensor that a device holds by the plan."""
        slices = self.llm.mesh.local_slices(shape, axes, device)
        spans = (part.indices(size) for part, size in zip(slices, shape, strict=True))
        return tuple((first, last) for first, last, _ in spans)


def check_folder(folder: Path) -> None:
    """Raise `UsageError` unless `--hlo` can save into a folder without overwriting anything.

    It is called before anything else is done.
    """
    try:
        if folder.exists() and not folder.is_dir():
            raise UsageError(lines(f"--hlo {folder} is a file", _EXPECTED_FOLDER))
        if folder.is_dir() and any(folder.iterdir()):
            raise UsageError(
                lines(
                    f"--hlo {folder} is not empty",
                    f"{_EXPECTED_FOLDER}: nothing is written over",
                )
            )
        if not folder.parent.is_dir():
            raise UsageError(
                lines(
                    f"--hlo {folder} cannot be made: there is no folder {folder.parent}",
                    _EXPECTED_FOLDER,
                )
            )
    except OSError as error:
        raise UsageError(
            lines(f"--hlo {folder} cannot be used: {error.strerror}", _EXPECTED_FOLDER)
        ) from None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
