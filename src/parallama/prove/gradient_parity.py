"""Every parameter's gradient, of the sharded model against the reference's."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..engine.interface import Engine
from ..engine.torch_xla.loss import next_token_loss
from ..engine.torch_xla.mesh import DeviceMesh
from ..errors import BackendError, lines
from ..files import skeleton
from ..files.checkpoint import Checkpoint
from ..plan.mesh_shape import DATA
from ..plan.placement import Plan
from ..sharded.layout import take_off_gradient
from ..sharded.shard_model import shard_model
from .metrics import pcc, relative_l2
from .reference import ReferenceOutputs

SMALL = 1e-3
"""The least size of a gradient's elements that a difference is divided by, as a share of the root
mean square of all gradients. A gradient that is zero but for rounding has no relative error."""


@dataclass(frozen=True, kw_only=True)
class GradientFigures:
    """A parameter's gradient against the reference's, in the checkpoint's layout.

    Attributes:
        relative_l2: length of the difference over that of the reference, or over what `SMALL` says.
        pcc: Pearson's correlation; NaN where one of the two is constant.
        ok: `relative_l2` is within the tolerance.
    """

    name: str
    relative_l2: float
    pcc: float
    ok: bool


def torch_mesh(mesh: Engine) -> DeviceMesh:
    """The mesh, of an engine on which torch computes gradients.

    Raises:
        BackendError: it is another engine's.
    """
    if not isinstance(mesh, DeviceMesh):
        raise BackendError(
            lines(
                f"backend {mesh.backend.name!r} computes no gradients by torch",
                "expected a backend of torch-xla: the loss is differentiated by torch's autograd",
            )
        )
    return mesh


def compare_gradients(
    source: Checkpoint,
    plan: Plan,
    mesh: Engine,
    dtype: torch.dtype,
    ids: Sequence[int],
    reference: ReferenceOutputs,
    limit: float,
) -> list[GradientFigures]:
    """Compare the gradients of a text's language-model loss, parameter by parameter.

    Args:
        source: of the model. It is loaded once more, for training.
        limit: the tolerance of relative L2.

    Raises:
        BackendError: torch computes no gradients on this engine.
    """
    mesh = torch_mesh(mesh)
    wanted = {placement.name: reference.gradient(placement.name) for placement in plan.parameters}
    count = sum(gradient.numel() for gradient in wanted.values())
    squares = sum(float(gradient.double().square().sum()) for gradient in wanted.values())
    small = SMALL * math.sqrt(squares / count)
    found = []
    for name, ours in _gradients(skeleton.to_host(source, dtype), plan, mesh, ids).items():
        distance = relative_l2(ours, wanted[name], floor=small * math.sqrt(ours.numel()))
        found.append(
            GradientFigures(
                name=name,
                relative_l2=distance,
                pcc=pcc(ours, wanted[name]),
                ok=distance <= limit,
            )
        )
    return found


def _gradients(
    model: Any, plan: Plan, mesh: DeviceMesh, ids: Sequence[int]
) -> dict[str, torch.Tensor]:
    """Gradients by parameter name, on the host, in the checkpoint's layout.

    Every data row of the mesh runs the text: the mean loss is that of one.
    """
    batch = torch.tensor([list(ids)] * mesh.shape.data)
    model = shard_model(model, mesh, plan)
    logits = model(input_ids=batch, use_cache=False).logits
    next_token_loss(logits, mesh.put(batch, (DATA, None)), parts=mesh.shape.model).backward()
    gradients = {
        name: mesh.mark(parameter.grad, plan[name].axes)
        for name, parameter in model.named_parameters()
    }
    mesh.run()
    return {
        name: take_off_gradient(mesh.fetch(gradient, plan[name].axes), plan, name)
        for name, gradient in gradients.items()
    }
