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
from ..files.find import find
from ..plan.mesh_shape import DATA
from ..plan.placement import Plan
from ..sharded.layout import take_off_gradient
from ..sharded.shard_model import shard_model
from .metrics import pcc, relative_l2
from .reference import Answers

SMALL = 1e-3
"""A gradient whose elements are this small beside those of all parameters is held against this share of theirs: what is zero but for rounding has no relative error."""


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


def compare_gradients(
    model: str,
    plan: Plan,
    mesh: Engine,
    dtype: torch.dtype,
    ids: Sequence[int],
    answers: Answers,
    limit: float,
) -> list[GradientFigures]:
    """Run the language-model loss of a text on the sharded model, backward too, and hold each gradient against the reference's.

    Args:
        model: its name, as for `loading.find`. It is loaded once more, for training.
        limit: the tolerance of relative L2.
    """
    if not isinstance(mesh, DeviceMesh):
        raise BackendError(
            lines(
                f"backend {mesh.backend.name!r} has no autograd of torch",
                "expected one that torch-xla runs",
            )
        )
    wanted = {placement.name: answers.gradient(placement.name) for placement in plan.parameters}
    count = sum(gradient.numel() for gradient in wanted.values())
    rms = math.sqrt(
        sum(float(gradient.double().square().sum()) for gradient in wanted.values()) / count
    )
    found = []
    for name, ours in _gradients(skeleton.to_host(find(model), dtype), plan, mesh, ids).items():
        distance = relative_l2(ours, wanted[name], floor=SMALL * rms * math.sqrt(ours.numel()))
        found.append(
            GradientFigures(
                name=name, relative_l2=distance, pcc=pcc(ours, wanted[name]), ok=distance <= limit
            )
        )
    return found


def _gradients(
    model: Any, plan: Plan, mesh: DeviceMesh, ids: Sequence[int]
) -> dict[str, torch.Tensor]:
    """By parameter name, on the host, in the checkpoint's layout. Every row of the mesh runs the text: the mean loss is that of one."""
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
