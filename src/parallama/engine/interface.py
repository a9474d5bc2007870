"""The door: what the other rooms ask of an engine, and what it gives them. Pure.

An engine puts named tensors on a mesh of devices and runs *steps* on them, which `engine.steps`
lists. How a step is computed is the engine's own affair, and so is all that comes with it: lazy
tensors, marks, the order of outputs, compiler flags, libraries.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from ..plan.mesh_shape import MeshShape
from .devices.plugins import ApiVersion
from .devices.plugins import OptionValue as OptionValue
from .steps import StepKey

if TYPE_CHECKING:
    import torch

    from ..plan.placement import Plan

Axes = Sequence[str | None]
"""Of a tensor: for every dim the mesh axis that it is split over, or None."""
DeviceTensor = Any
"""A tensor on the devices: the engine's own object.

It has `shape`, `dtype` (torch's), `element_size()` and `numel()`, of the whole tensor. Other rooms
keep it under its name, give it back, and ask the engine for more. On the host, a tensor is torch's.
"""
State = Mapping[str, DeviceTensor]


@dataclass(frozen=True, kw_only=True)
class Backend:
    """What an engine runs on.

    Attributes:
        name: `cpu`, `tpu`, `tt`, or the name of a plugin.
        devices: devices of this process.
        library: the plugin's file; None where the engine brings its own client.
        api: PJRT API version that the plugin speaks.
        options: what its client was made with.
    """

    name: str
    devices: int
    library: Path | None = None
    api: ApiVersion | None = None
    options: Mapping[str, OptionValue] = field(default_factory=lambda: MappingProxyType({}))


@dataclass(frozen=True, kw_only=True)
class Traits:
    """What other rooms must know of an engine.

    Attributes:
        in_host_memory: what is on the devices is in the host's memory.
        adopts: `Engine.adopt` works.
        sum_bytes: bytes that a number takes at least while it is summed or gathered over devices;
            1 where it keeps its own size.
        trains: it has the steps of training.
    """

    in_host_memory: bool
    adopts: bool
    sum_bytes: int
    trains: bool


class Compiled(ABC):
    """One compiled step.

    Attributes:
        trace_s: seconds that tracing took.
        last_run_s: seconds that the last call took to give the devices their work.
    """

    trace_s: float
    last_run_s: float

    @abstractmethod
    def __call__(self, state: State) -> dict[str, DeviceTensor]:
        """Run it. What of the cache and `counts` went in is dead: take what comes out.

        Raises:
            ProgramError: a tensor has another shape or dtype than the step was compiled for.
        """

    @abstractmethod
    def hlo(self) -> list[str]:
        """Its optimized HLO, a text for each program that it took.

        Raises:
            RunError: the engine was not started with `keep_hlo`.
        """

    @abstractmethod
    def temp_bytes(self) -> int:
        """Bytes that it takes on each device beside arguments and results; errors as for `hlo`."""


class Steps(ABC):
    """The steps of inference of one model on one mesh.

    Attributes:
        mesh: the devices.
        plan: how the weights are placed.
        weights: parameter name to tensor on the devices.
        dtype: of the cache and the activations.
        follows_span: steps take and give `span`.
    """

    mesh: Engine
    plan: Plan
    weights: Mapping[str, DeviceTensor]
    dtype: torch.dtype
    follows_span: bool

    @abstractmethod
    def compile(self, key: StepKey, state: State) -> Compiled:
        """Compile a step for a state of these shapes. The state is read, not changed."""


class Engine(ABC):
    """Devices as a named mesh, and what runs on them.

    Attributes:
        shape: axes and sizes of the mesh.
        backend: what it runs on.
        traits: what other rooms must know.
        lock: held while anything is compiled or run; one for each set of devices. It is re-entrant.
    """

    shape: MeshShape
    backend: Backend
    traits: Traits
    lock: AbstractContextManager[Any]

    # -- tensors

    @abstractmethod
    def put_shards(self, shard: Callable[[int], torch.Tensor], axes: Axes) -> DeviceTensor:
        """Make a tensor from each device's own part, without ever holding the whole.

        The parts are copied: they may be views of memory that is written or freed afterwards.

        Args:
            shard: device number to its part on the host, contiguous. It is called once for every
                distinct part, with the devices of `MeshShape.holders`.
            axes: mesh axis of every dim.
        """

    @abstractmethod
    def adopt(self, tensor: torch.Tensor) -> DeviceTensor:
        """Make a host tensor the device's, with its memory and without a copy.

        Only where `traits.adopts`. Nobody else may write to that memory any more.

        Args:
            tensor: contiguous, with memory of its own that begins at a multiple of 64 bytes.
        """

    @abstractmethod
    def shards(self, tensor: DeviceTensor) -> list[torch.Tensor]:
        """A copy of each device's part on the host, in device order; compiles nothing."""

    @abstractmethod
    def parts(self, tensor: DeviceTensor) -> list[tuple[slice, ...]]:
        """Each device's slices of a tensor, by the runtime's word; nothing is copied."""

    @abstractmethod
    def relay(self, tensor: DeviceTensor, axes: Axes) -> DeviceTensor:
        """The same numbers, split over other axes. May compile a program."""

    def put(self, tensor: torch.Tensor, axes: Axes) -> DeviceTensor:
        """Move a whole host tensor to the devices; every dim divides by its axis."""
        return self.put_shards(
            lambda device: tensor[self.local_slices(tensor.shape, axes, device)].contiguous(), axes
        )

    def fetch(self, tensor: DeviceTensor, axes: Axes) -> torch.Tensor:
        """Bring a device tensor that is split over `axes` back to the host; compiles nothing."""
        shards = self.shards(tensor)
        if all(self.shape.size(axis) == 1 for axis in axes):
            return shards[0]
        whole = shards[0].new_empty(tensor.shape)
        for device in range(len(shards)):
            whole[self.local_slices(tensor.shape, axes, device)] = shards[device]
            shards[device] = whole  # each part is freed when it has its place
        return whole

    def local_shapes(self, tensor: DeviceTensor) -> list[tuple[int, ...]]:
        """The shape of each device's part, by the runtime's word."""
        return [tuple(each.stop - each.start for each in part) for part in self.parts(tensor)]

    def local_bytes(self, tensor: DeviceTensor) -> list[int]:
        """Bytes that each device holds of a tensor, by the runtime's word."""
        return [math.prod(shape) * tensor.element_size() for shape in self.local_shapes(tensor)]

    def local_slices(self, shape: Sequence[int], axes: Axes, device: int) -> tuple[slice, ...]:
        """Which part of a tensor of `shape` a device has; see `MeshShape.local_slices`."""
        return self.shape.local_slices(shape, axes, device)

    # -- steps

    @abstractmethod
    def steps(
        self, skeleton: Any, plan: Plan, weights: Mapping[str, DeviceTensor], dtype: torch.dtype
    ) -> Steps:
        """The steps of a model.

        Args:
            skeleton: the transformers causal LM without weights. An engine with a forward of its
                own reads `skeleton.config`.
            plan: how the weights are placed on this mesh.
            weights: by parameter name, on the devices.
            dtype: of the cache and the activations.
        """

    @abstractmethod
    def compilations(self) -> int:
        """How many programs were compiled in this process until now."""

    @contextmanager
    def counted(self) -> Iterator[Callable[[], int]]:
        """Have the devices alone; gives a function that tells the programs compiled meanwhile."""
        with self.lock:
            before = self.compilations()
            yield lambda: self.compilations() - before

    @abstractmethod
    def reshaped(self, shape: MeshShape) -> Engine:
        """The same devices, all of them, as a mesh of another shape."""

    @abstractmethod
    def wait(self) -> None:
        """Return when every device has finished what it was given."""

    @abstractmethod
    def device_names(self) -> list[str]:
        """What the backend calls its devices, in order."""


SELF_TEST = "parallama.engine.torch_xla.selftest"
"""The module that checks a backend, run in a process of its own with a JSON object as argument."""


def start(
    shape: MeshShape | str | tuple[int, ...],
    *,
    backend: str = "cpu",
    backend_options: Mapping[str, OptionValue] | None = None,
    devices: int | None = None,
    keep_hlo: bool = False,
) -> Engine:
    """Start the engine of a backend on a mesh. The one place where an engine is chosen.

    Args:
        shape: `1x8`, `data=2,model=4`, or a `MeshShape`.
        backend: `cpu`, `tpu`, `tt`, the path of a PJRT plugin, or an installed plugin's name.
        backend_options: for the client that a plugin makes.
        devices: device count of the process; follows from the shape if None.
        keep_hlo: keep what the compiler writes, for `Compiled.hlo`.

    Raises:
        FitError: the mesh does not cover the devices exactly.
        BackendError: the backend is not available.
    """
    from .torch_xla.mesh import DeviceMesh

    return DeviceMesh(
        shape,
        backend=backend,
        backend_options=backend_options,
        devices=devices,
        keep_hlo=keep_hlo,
    )
