"""Move a model that `shard_model` split to another mesh or plan, in place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ..engine.torch_xla.mesh import DeviceMesh
from ..errors import FitError, UsageError, lines
from ..plan.make_plan import make_plan
from ..plan.mesh_shape import MeshShape
from ..plan.placement import Plan
from .layout import Layout
from .reshard import Mover, Resharding, another_mesh
from .shard_model import settle


def reshard_model(
    model: Any,
    mesh: DeviceMesh | MeshShape | str | tuple[int, ...] | None = None,
    plan: Plan | Mapping[str, Any] | None = None,
    *,
    optimizer: torch.optim.Optimizer | None = None,
) -> Resharding:
    """Move a model that `shard_model` split to another mesh or plan, in place.

    Parameters move with their gradients and an optimizer's state. They stay the same objects, so an
    optimizer goes on with them. No graph of an earlier step may be alive (`del loss`): it remembers
    their old shapes.

    Args:
        model: from `shard_model`.
        mesh: of as many devices; the present one if None.
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
        raise UsageError(
            lines(f"{type(model).__name__} is not sharded", "expected a model from shard_model")
        )
    old_mesh: DeviceMesh = model.parallama_mesh
    new_mesh = another_mesh(old_mesh, mesh)
    assert isinstance(new_mesh, DeviceMesh)
    if plan is None:
        plan = model.parallama_overrides
        if isinstance(plan, Plan):
            raise UsageError(
                lines(
                    "the model was split by a whole Plan, which is for one mesh only",
                    "expected one for the new mesh, as plan=",
                )
            )
    if not isinstance(plan, Plan):
        shapes = [
            (placement.name, tuple(int(size) for size in placement.source_shape))
            for placement in old.parameters
        ]
        overrides, plan = plan, make_plan(old.model, new_mesh.shape, plan, parameters=shapes)
        model.parallama_overrides = overrides
    if plan.mesh != new_mesh.shape:
        raise FitError(
            lines(
                f"the plan is for mesh {plan.mesh}, the mesh is {new_mesh.shape}",
                "expected the same",
            )
        )
    made, parameters = plan, dict(model.named_parameters())
    states = _states(optimizer, parameters)
    gradients = [parameter.grad for parameter in parameters.values() if parameter.grad is not None]
    held = [tensor for state in states.values() for tensor in state.values()]
    old_mesh.run()
    mover = Mover(
        old_mesh,
        new_mesh,
        [*(parameter.data for parameter in parameters.values()), *gradients, *held],
    )
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
        arrived = mover(
            going, dict.fromkeys(going, before).__getitem__, dict.fromkeys(going, after).__getitem__
        )
        parameter.data = arrived.pop("data")
        parameter.grad = arrived.pop("grad", None)
        if optimizer is not None and arrived:
            optimizer.state[parameter].update(arrived)
    settle(model, made, new_mesh)
    return mover.result()


def _states(
    optimizer: torch.optim.Optimizer | None, parameters: Mapping[str, torch.Tensor]
) -> dict[str, dict[str, torch.Tensor]]:
    """What an optimizer holds of each parameter, number by number.

    Counters are single numbers, and stay where they are.
    """
    if optimizer is None:
        return {}
    names = {id(parameter): name for name, parameter in parameters.items()}
    found: dict[str, dict[str, torch.Tensor]] = {}
    for parameter, state in optimizer.state.items():
        tensors = {
            key: value
            for key, value in state.items()
            if isinstance(value, torch.Tensor) and value.dim() > 0
        }
        for key, value in tensors.items():
            if id(parameter) not in names or value.shape != parameter.shape:
                raise UsageError(
                    lines(
                        f"the optimizer's {key} has shape {list(value.shape)},"
                        f" its parameter {list(parameter.shape)}",
                        "expected state of the model's parameters, number by number",
                    )
                )
        if tensors:
            found[names[id(parameter)]] = tensors
    return found
