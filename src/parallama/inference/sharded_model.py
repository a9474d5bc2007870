"""A model's weights on a mesh, and the sessions that run on them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from itertools import chain
from pathlib import Path
from typing import Any
from weakref import WeakSet

import torch

from ..engine.interface import Engine, Steps
from ..engine.row_sampling import RowSampling
from ..files.checkpoint import Checkpoint
from ..files.export import Exported, export_weights, resolve, stored_dtypes
from ..files.skeleton import make_skeleton
from ..files.weight_writer import SHARD_BYTES
from ..plan.make_plan import make_plan
from ..plan.mesh_shape import MeshShape
from ..plan.overrides import Overrides, read_overrides
from ..sharded.device_weights import DeviceWeights
from ..sharded.layout import Layout
from ..sharded.reshard import Mover, Resharding, another_mesh
from .programs import make_programs
from .session import Session
from .slot_shapes import SlotShapes
from .slots import SlotSession

Progress = Callable[[str, int, int], None]
"""Called with what is being done, how much of it is, and of how much."""


class ShardedModel:
    """Weights on a mesh, their programs, and sessions, which move with them.

    Args:
        skeleton: the transformers causal LM without weights.
        weights: its parameters on the devices.
        dtype: of the cache and the activations.
        overrides: by which the plan was made.
        source: the checkpoint.
        progress: called while programs are compiled, tensors moved and files written.

    Attributes:
        plan: where every tensor is placed, and why.
        mesh: the devices.
    """

    def __init__(
        self,
        skeleton: Any,
        weights: DeviceWeights,
        dtype: torch.dtype,
        *,
        overrides: Overrides | None,
        source: Checkpoint,
        progress: Progress | None,
    ) -> None:
        self._use(skeleton, weights, dtype)
        self.source = source
        self._overrides = overrides
        self._progress = progress
        self._sessions: WeakSet[Session | SlotSession] = WeakSet()

    def _use(self, skeleton: Any, weights: DeviceWeights, dtype: torch.dtype) -> None:
        """Run with these weights from now on."""
        self.weights, self.plan, self.mesh = weights, weights.plan, weights.mesh
        self.steps: Steps = self.mesh.steps(skeleton, self.plan, weights.tensors, dtype)
        self.programs = make_programs(self.steps)

    def report(self, what: str) -> Callable[[int, int], None] | None:
        """Tell the caller's `progress` about one kind of work; None where there is none."""
        if self._progress is None:
            return None
        progress = self._progress
        return lambda done, total: progress(what, done, total)

    def session(self, rows: Sequence[RowSampling], **options: Any) -> Session:
        """A session on this model, which moves with it in `reshard`; options as for `Session`."""
        made = Session(
            self.steps, self.programs, rows, progress=self.report("compiling"), **options
        )
        self._sessions.add(made)
        return made

    def slot_session(self, shapes: SlotShapes) -> SlotSession:
        """A session with slots on this model, which moves with it in `reshard`."""
        made = SlotSession(self.steps, self.programs, shapes)
        self._sessions.add(made)
        return made

    def forget(self) -> None:
        """Free what is kept on the devices for later runs."""

    def reshard(
        self,
        mesh: str | MeshShape | tuple[int, int] | Engine | None = None,
        plan: str | Path | Overrides | None = None,
    ) -> Resharding:
        """Move the model to another mesh or plan, with the caches of all that runs on it.

        Chats, and streams that are half read, go on from there. Tensors move one by one: the host
        never holds more than one, and nothing is read again. Programs are then compiled for the new
        layout.

        Args:
            mesh: of as many devices; the present one if None.
            plan: overrides as for `load`; the present ones if None.

        Raises:
            FitError: the mesh has another number of devices.
            PlanError: the plan doesn't describe the model; nothing has moved then.
        """
        new_mesh = another_mesh(self.mesh, mesh)
        overrides: Overrides | None = self._overrides
        if plan is not None:
            overrides = read_overrides(plan) if isinstance(plan, (str, Path)) else plan
        old, dtype = self.weights, self.steps.dtype
        made = make_plan(self.plan.model, new_mesh.shape, overrides)
        self.forget()
        sessions = list(self._sessions)
        moving = chain(old.tensors.values(), *(session.tensors() for session in sessions))
        with self.mesh.lock:
            mover = Mover(self.mesh, new_mesh, moving, self.report("moving"))
            for session in sessions:  # programs hold the weights that they were traced with
                session.leave()
            self.programs = make_programs(self.steps)
            tensors = mover(
                old.tensors,
                lambda name: Layout.of(old.plan, name),
                lambda name: Layout.of(made, name),
            )
            weights = DeviceWeights(plan=made, mesh=new_mesh, tensors=tensors)
            self._use(make_skeleton(self.source.config), weights, dtype)
            self._overrides = overrides
            for session in sessions:
                session.move(self.steps, self.programs, mover)
            began = time.perf_counter()
            for session in sessions:
                session.ready(self.report("compiling"))
        return mover.result(compile_s=time.perf_counter() - began)

    def export(
        self,
        folder: str | Path,
        *,
        dtype: str = "auto",
        shard_bytes: int = SHARD_BYTES,
        allow_nonfinite: bool = False,
    ) -> Exported:
        """Write the weights as they are on the devices, with all that came with the checkpoint.

        Args:
            dtype: `auto` is what they have on the devices, `stored` what they had in the
                checkpoint; or a name of `export.DTYPES`.
            shard_bytes, allow_nonfinite: see `export.export_weights`.
        """
        weights = self.weights
        return export_weights(
            ((name, weights.fetch(name)) for name in weights.tensors),
            self.source,
            folder,
            dtype=self.steps.dtype
            if dtype == "auto"
            else stored_dtypes(self.source)
            if dtype == "stored"
            else resolve(dtype),
            shard_bytes=shard_bytes,
            allow_nonfinite=allow_nonfinite,
            progress=self.report("writing"),
        )

    def param_bytes_per_device(self) -> list[int]:
        """Bytes of parameters on each device, measured on their shards."""
        return self.weights.bytes_per_device()
