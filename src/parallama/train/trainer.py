"""The one way to an engine's optimizer steps."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

from ..engine.interface import Engine
from ..errors import BackendError, lines
from ..files.checkpoint import Checkpoint
from ..plan.placement import Plan
from .options import StepOptions

if TYPE_CHECKING:
    from .torch_xla.step import Trainer as Trainer


def make_trainer(
    checkpoint: Checkpoint,
    mesh: Engine,
    options: StepOptions,
    *,
    plan: Plan | None = None,
    seed: int = 0,
    progress: Callable[[int, int], None] | None = None,
    allow_nonfinite: bool = False,
) -> Trainer:
    """A model in training on a mesh. Arguments and errors are those of `torch_xla.step.Trainer`.

    Only torch-xla trains for now: the passes, reductions and updates are written on autograd.

    Raises:
        BackendError: the engine has no steps of training.
    """
    from ..engine.torch_xla.mesh import DeviceMesh
    from .torch_xla.step import Trainer

    if not isinstance(mesh, DeviceMesh) or not mesh.traits.trains:
        raise BackendError(
            lines(
                f"backend {mesh.backend.name!r} cannot train",
                "expected one that torch-xla runs",
            )
        )
    return Trainer(
        checkpoint,
        mesh,
        options,
        plan=plan,
        seed=seed,
        progress=progress,
        allow_nonfinite=allow_nonfinite,
    )
