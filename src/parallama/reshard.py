"""Move tensors from one mesh and layout to another while they live: tensor by tensor over the host, each freed before its successor is made.

Nothing is read from the checkpoint again, and the host holds one tensor at a time, once (see `replicas`). Both meshes are over the devices of this process.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import torch

from . import replicas
from .errors import FitError, UsageError, lines
from .host import high_water_bytes, lean_host_memory, restart_high_water, rss_bytes
from .mesh import DeviceMesh
from .plan import Plan, make_plan
from .program import compiled_programs
from .shard import Layout, cut, settle, undo
from .topology import MeshShape

_TRIMS = 8
"""How often freed memory is given back while as much is moved as the largest tensor has. What is moved leaves twice as much behind in holes of the heap that the next tensors don't fit in."""


@dataclass(frozen=True, kw_only=True)
class Resharding:
    """What a move took.

    Attributes:
        before, after: the meshes.
        tensors, bytes: moved: how many, and what they take on the new mesh's devices together.
        largest_tensor_bytes: as the host held it, in the checkpoint's layout.
        peak_device_bytes: most that old and new tensors together took on any one device.
        baseline_rss_bytes: memory of the process before.
        peak_rss_bytes: the most that the process held meanwhile (ever, where the system can't tell).
        programs: compiled for moving: one for every shape and placement of large tensors that a mesh repeats.
        move_s: of moving.
        compile_s: of making the programs that go on from there; 0 where nothing runs.
    """

    before: MeshShape
    after: MeshShape
    tensors: int
    bytes: int
    largest_tensor_bytes: int
    peak_device_bytes: int
    baseline_rss_bytes: int
    peak_rss_bytes: int
    programs: int
    move_s: float
    compile_s: float = 0.0


def relay(
    take: Callable[[], torch.Tensor], mesh: DeviceMesh, old: Layout, new_mesh: DeviceMesh, new: Layout, rows: int | None = None
) -> torch.Tensor:
    """A device tensor that lies as `old` says, laid as `new` says; bit-equal in the checkpoint's layout.

    Args:
        take: gives the tensor, and lets go of it if it shall be freed before the new one is made.
        rows: of the first dim so many are kept, and zeros follow, where the layouts differ in its size.
    """
    whole = undo(replicas.fetch(mesh, take, old.axes), old.blocks)
    if rows is not None and old.shape[0] != new.shape[0]:
        whole = torch.cat([whole[:rows], whole.new_zeros(new.shape[0] - rows, *whole.shape[1:])])
    return replicas.put(
        new_mesh,
        lambda axes, device: cut(whole.__getitem__, replace(new, axes=axes), device, whole.dtype),
        new.shape,
        whole.dtype,
        new.axes,
    )


class Mover:
    """Moves tensors from one mesh to another, and counts.

    Args:
        tensors: all that will be moved.
        progress: called with bytes moved, and all.
    """

    def __init__(
        self,
        mesh: DeviceMesh,
        new_mesh: DeviceMesh,
        tensors: Iterable[torch.Tensor],
        progress: Callable[[int, int], None] | None = None,
    ) -> None:
        if mesh.shape.devices != new_mesh.shape.devices:
            raise FitError(
                lines(f"mesh {new_mesh.shape} has {new_mesh.shape.devices} devices", f"expected {mesh.shape.devices}, as before")
            )
        self.mesh = mesh
        self.new_mesh = new_mesh
        self._progress = progress
        self._began = time.perf_counter()
        self._tensors = self._bytes = self._largest = self._done = self._total = self._programs = 0
        mesh.run()
        self._held = [0] * mesh.shape.devices
        for tensor in tensors:
            self._hold(mesh.local_bytes(tensor))
            self._total += tensor.numel() * tensor.element_size()
        self._peak = max(self._held)
        self._baseline = rss_bytes()
        restart_high_water()

    def _hold(self, bytes_per_device: Iterable[int]) -> None:
        self._held = [have + more for have, more in zip(self._held, bytes_per_device, strict=True)]

    def __call__(
        self, tensors: dict[str, torch.Tensor], old: Callable[[str], Layout], new: Callable[[str], Layout], *, rows: int | None = None
    ) -> dict[str, torch.Tensor]:
        """Move named tensors; the dict is emptied on the way, so that each is freed unless somebody else holds it.

        Args:
            old, new: a tensor's name to how it lies and how it shall lie.
            rows: see `relay`.
        """
        moved: dict[str, torch.Tensor] = {}
        names, becomes = list(tensors), {name: new(name).device_bytes(tensor.element_size()) for name, tensor in tensors.items()}
        grows = sum(becomes.values()) > sum(sum(self.mesh.local_bytes(tensor)) for tensor in tensors.values())
        waiting, compiled = 0, compiled_programs()
        with lean_host_memory() as give_back:
            # The largest while there is most room: what a tensor takes on its way then adds nothing to the peak.
            for name in sorted(names, key=becomes.__getitem__, reverse=grows):
                freed, size = self.mesh.local_bytes(tensors[name]), tensors[name].numel() * tensors[name].element_size()
                moved[name] = relay(partial(tensors.pop, name), self.mesh, old(name), self.new_mesh, new(name), rows)
                waiting += size
                if _TRIMS * waiting >= self._largest:
                    give_back()
                    waiting = 0
                made = self.new_mesh.local_bytes(moved[name])
                self._hold(made)
                self._peak = max(self._peak, *self._held)
                self._hold(-gone for gone in freed)
                self._tensors += 1
                self._bytes += sum(made)
                self._largest = max(self._largest, size)
                self._done += size
                if self._progress is not None:
                    self._progress(self._done, self._total)
            self.new_mesh.wait()
        self._programs += compiled_programs() - compiled
        return {name: moved[name] for name in names}

    def result(self, compile_s: float = 0.0) -> Resharding:
        """What it took, until now."""
        return Resharding(
            before=self.mesh.shape,
            after=self.new_mesh.shape,
            tensors=self._tensors,
            bytes=self._bytes,
            largest_tensor_bytes=self._largest,
            peak_device_bytes=self._peak,
            baseline_rss_bytes=self._baseline,
            peak_rss_bytes=max(self._baseline, high_water_bytes()),  # the system counts both in batches
            programs=self._programs,
            move_s=time.perf_counter() - self._began - compile_s,
            compile_s=compile_s,
        )


def another_mesh(mesh: DeviceMesh, shape: DeviceMesh | MeshShape | str | tuple[int, int] | None) -> DeviceMesh:
    """A mesh of this shape over the devices of `mesh`.

    Raises:
        FitError: it has another number of devices.
    """
    if isinstance(shape, DeviceMesh):
        return shape
    wanted = mesh.shape if shape is None else MeshShape.parse(shape)
    if wanted.devices != mesh.shape.devices:
        raise FitError(
            lines(
                f"mesh {wanted} has {wanted.devices} devices, the model lies on {mesh.shape.devices}",
                "torch-xla fixes the device count once per process",
                "use a mesh of as many devices, or another process",
            )
        )
    return mesh if wanted == mesh.shape else DeviceMesh(wanted, backend=mesh.backend.name, backend_options=mesh.backend.options)


def reshard_model(
    model: Any,
    mesh: DeviceMesh | MeshShape | str | tuple[int, int] | None = None,
    plan: Plan | Mapping[str, Any] | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> Resharding:
    """Move a model that `shard_model` split to another mesh or plan, in place: parameters, their gradients, and an optimizer's state.

    The parameters stay the same objects, so an optimizer goes on with them. No graph of an earlier step may be alive (`del loss`): it remembers their old shapes.

    Args:
        model: from `shard_model`.
        mesh: of as many devices; the one it lies on if None.
        plan: a `Plan`, or overrides for one; those that it was split by if None.
        optimizer: of the model's parameters.

    Raises:
        UsageError: the model isn't split, or the optimizer holds tensors that are no parameter's.
        PlanError: the plan doesn't describe the model.
        FitError: the mesh has another number of devices.

    Example:
        >>> model = shard_model(LlamaForCausalLM(config), "1x8")
        >>> reshard_model(model, "2x4").move_s
    """
    old: Plan | None = getattr(model, "parallama_plan", None)
    if old is None:
        raise UsageError(lines(f"{type(model).__name__} is not sharded", "expected a model from shard_model"))
    old_mesh: DeviceMesh = model.parallama_mesh
    new_mesh = another_mesh(old_mesh, mesh)
    if plan is None:
        plan = model.parallama_overrides
        if isinstance(plan, Plan):
            raise UsageError(
                lines("the model was split by a whole Plan, which is for one mesh only", "expected one for the new mesh, as plan=")
            )
    if not isinstance(plan, Plan):
        shapes = [(placement.name, tuple(int(size) for size in placement.source_shape)) for placement in old.parameters]
        overrides, plan = plan, make_plan(old.model, new_mesh.shape, plan, parameters=shapes)
        model.parallama_overrides = overrides
    if plan.mesh != new_mesh.shape:
        raise FitError(lines(f"the plan is for mesh {plan.mesh}, the mesh is {new_mesh.shape}", "expected the same"))
    made, parameters = plan, dict(model.named_parameters())
    states = _states(optimizer, parameters)
    gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    held = [tensor for state in states.values() for tensor in state.values()]
    mover = Mover(old_mesh, new_mesh, [*(parameter.data for parameter in parameters.values()), *gradients, *held])
    del gradients, held  # each shall be freed when it has moved
    for name, parameter in parameters.items():
        going = {"data": parameter.data}
        if parameter.grad is not None:
            going["grad"] = parameter.grad
            parameter.grad = None
        state = states.pop(name, {})
        for key in state:
            assert optimizer is not None
            del optimizer.state[parameter][key]
        going |= state
        state.clear()
        before, after = Layout.of(old, name), Layout.of(made, name)
        arrived = mover(going, dict.fromkeys(going, before).__getitem__, dict.fromkeys(going, after).__getitem__)
        parameter.data = arrived.pop("data")
        parameter.grad = arrived.pop("grad", None)
        if optimizer is not None and arrived:
            optimizer.state[parameter].update(arrived)
    settle(model, made, new_mesh)
    return mover.result()


def _states(optimizer: torch.optim.Optimizer | None, parameters: Mapping[str, torch.Tensor]) -> dict[str, dict[str, torch.Tensor]]:
    """For each parameter what an optimizer holds of it number by number; counters, which are one number, stay where they are."""
    if optimizer is None:
        return {}
    names = {id(parameter): name for name, parameter in parameters.items()}
    found: dict[str, dict[str, torch.Tensor]] = {}
    for parameter, state in optimizer.state.items():
        tensors = {key: value for key, value in state.items() if isinstance(value, torch.Tensor) and value.dim() > 0}
        for key, value in tensors.items():
            if id(parameter) not in names or value.shape != parameter.shape:
                raise UsageError(
                    lines(
                        f"the optimizer's {key} has shape {list(value.shape)}, its parameter {list(parameter.shape)}",
                        "expected state of the model's parameters, number by number",
                    )
                )
        if tensors:
            found[names[id(parameter)]] = tensors
    return found
