"""Split a transformers model that the user built, in place. It keeps its own forward."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch

from ..engine.torch_xla import attention
from ..engine.torch_xla.mesh import DeviceMesh
from ..errors import FitError, UsageError, lines
from ..model.spec import ModelSpec
from ..model.token_ids import check_ids
from ..plan.make_plan import make_plan
from ..plan.mesh_shape import DATA, MeshShape
from ..plan.placement import Plan
from .device_weights import put_parameter


def shard_model(
    model: Any, mesh: DeviceMesh | MeshShape | str, plan: Plan | Mapping[str, Any] | None = None
) -> Any:
    """Split a model that you built with transformers over a mesh, in place.

    The model keeps its own forward. Parameters become device tensors, and attention goes through
    `attention.plain_attention`. Inputs on the host are moved to the devices, with rows split over
    "data". Padded vocabulary is cut from the logits.

    Args:
        model: a `LlamaModel`, a `LlamaForCausalLM`, or their like of another supported family, on
            the CPU.
        mesh: a mesh, or a shape such as `"1x8"` to make one.
        plan: a `Plan`, or overrides for one (see `plan.make_plan`).

    Returns:
        The same model. `model.parallama_plan` and `model.parallama_mesh` tell how it is placed.

    Raises:
        CheckpointError: the model is of a family that is not supported.
        PlanError: the plan doesn't describe the model.
        FitError: the mesh doesn't cover the process's devices.

    Example:
        >>> model = shard_model(LlamaForCausalLM(config), "1x8")
        >>> logits = model(torch.tensor([[1, 2, 3]])).logits.cpu()
    """
    mesh = mesh if isinstance(mesh, DeviceMesh) else DeviceMesh(mesh)
    if getattr(model, "parallama_plan", None) is not None:
        raise UsageError(
            lines(f"{type(model).__name__} is sharded already", "expected a model on the CPU")
        )
    spec = ModelSpec.from_config(model.config)
    model.parallama_overrides = plan
    parameters = {name: parameter for name, parameter in model.named_parameters()}
    if not isinstance(plan, Plan):
        shapes = [(name, tuple(parameter.shape)) for name, parameter in parameters.items()]
        plan = make_plan(spec, mesh.shape, plan, parameters=shapes)
    if plan.mesh != mesh.shape:
        raise FitError(
            lines(f"the plan is for mesh {plan.mesh}, not for {mesh.shape}", "expected the same")
        )
    attention.register()
    _own_config(model)._attn_implementation = attention.PLAIN
    tied = {id(parameter): name for name, parameter in parameters.items()}
    moved = {
        name: torch.nn.Parameter(
            put_parameter(parameter.data, plan, mesh, name, parameter.dtype),
            requires_grad=parameter.requires_grad,
        )
        for name, parameter in parameters.items()
    }
    for module in model.modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[leaf] = moved[tied[id(parameter)]]
        for leaf, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[leaf] = mesh.put(buffer, (None,) * buffer.dim())
    settle(model, plan, mesh)
    return model


def _own_config(model: Any) -> Any:
    """Give a model a config of its own: the user may have made other models of the present one."""
    shared, own = model.config, copy.deepcopy(model.config)
    for module in model.modules():
        if getattr(module, "config", None) is shared:
            module.config = own
    return own


def settle(model: Any, plan: Plan, mesh: DeviceMesh) -> None:
    """Tell a model that its parameters are on a mesh.

    Its modules get their sizes, and hooks for inputs and logits.
    """
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            module.num_key_value_groups = plan.head_layout.group
        if isinstance(module, torch.nn.Linear):
            module.out_features, module.in_features = module.weight.shape
    for hook in getattr(model, "parallama_hooks", ()):
        hook.remove()
    hooks = [model.register_forward_pre_hook(_InputMover(mesh, plan.model.vocab), with_kwargs=True)]
    if getattr(model, "lm_head", None) is not None and plan.vocab != plan.model.vocab:
        hooks.append(
            model.lm_head.register_forward_hook(
                lambda _module, _args, logits: logits[..., : plan.model.vocab]
            )
        )
    model.parallama_plan, model.parallama_mesh, model.parallama_hooks = plan, mesh, hooks


class _InputMover:
    """A forward pre-hook: host tensors go to the devices, rows over "data"."""

    def __init__(self, mesh: DeviceMesh, vocab: int) -> None:
        self.mesh = mesh
        self.vocab = vocab

    def __call__(
        self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = args[0] if args else kwargs.get("input_ids")
        if isinstance(ids, torch.Tensor) and ids.device.type == "cpu":
            check_ids(ids.flatten().tolist(), self.vocab)
        first = kwargs.get("inputs_embeds") if ids is None else ids
        rows = first.shape[0] if isinstance(first, torch.Tensor) else 1
        moved = {key: self._move(value, rows) for key, value in kwargs.items()}
        return tuple(self._move(value, rows) for value in args), moved

    def _move(self, value: Any, rows: int) -> Any:
        """One input on the devices. Only what has a row for each of the batch is split.

        1-D inputs such as `cache_position` have none.
        """
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
            return value
        axes: list[str | None] = [None] * value.dim()
        if value.dim() > 1 and value.shape[0] == rows and rows > 1:
            if rows % self.mesh.shape.data:
                raise FitError(
                    lines(
                        f"a batch of {rows} rows does not divide over"
                        f" {self.mesh.shape.data} devices along 'data'",
                        "expected a multiple",
                    )
                )
            axes[0] = DATA
        return self.mesh.put(value, axes)
