"""Put a plan on a model, and take it off again.

A checkpoint's tensor becomes a laid-out one block by block (head groups repeated or padded, sizes padded with zeros), and each device's part is
cut straight from the checkpoint's tensor: the laid-out whole never exists.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import attention, heads, replicas
from .errors import CheckpointError, FitError, UsageError, lines
from .mesh import DeviceMesh
from .plan import Axes, Blocks, Placement, Plan, make_plan
from .spec import ModelSpec
from .tensor_source import Slices
from .topology import DATA, MeshShape

Run = tuple[int, int]
"""Of a dim: a start in the checkpoint's tensor (or `heads.EMPTY`), and a length."""


@dataclass(frozen=True, kw_only=True)
class Layout:
    """How a tensor lies on a mesh.

    Attributes:
        shape: over all devices.
        axes: for every dim the mesh axis it is split over, or None.
        blocks: how one dim is made from the checkpoint's; None where the tensor lies as in the checkpoint.
    """

    mesh: MeshShape
    shape: tuple[int, ...]
    axes: Axes
    blocks: Blocks | None = None

    @classmethod
    def of(cls, plan: Plan, name: str) -> Layout:
        """Of a parameter, and of what goes with it number by number (gradient, optimizer state)."""
        placement = plan[name]
        return cls(mesh=plan.mesh, shape=tuple(int(size) for size in placement.shape), axes=placement.axes, blocks=plan.blocks(name))

    @property
    def local_shape(self) -> tuple[int, ...]:
        """The shape of each device's part."""
        return tuple(size // self.mesh.size(axis) for size, axis in zip(self.shape, self.axes, strict=True))

    def device_bytes(self, itemsize: int) -> int:
        """Bytes on all devices together, of numbers of so many bytes."""
        return math.prod(self.local_shape) * self.mesh.devices * itemsize


def device_part(source: torch.Tensor, plan: Plan, placement: Placement, device: int) -> torch.Tensor:
    """One device's part of a parameter, cut from the checkpoint's tensor.

    Args:
        source: of shape `placement.source_shape`, any dtype.

    Returns:
        A tensor of shape `placement.local_shape(plan.mesh)`; a view where it can be one.
    """
    return cut(source.__getitem__, Layout.of(plan, placement.name), device, source.dtype)


def cut(read: Callable[[Slices], torch.Tensor], layout: Layout, device: int, dtype: torch.dtype, *, own: bool = False) -> torch.Tensor:
    """One device's part of a tensor, from slices of the checkpoint's tensor: only those that the part is made of are asked for.

    Args:
        read: slices of every dim to what lies there, of any dtype.
        own: the part has memory of its own in any case.

    Returns:
        A tensor of `dtype` and of shape `layout.local_shape`: what was read itself, if that is the part as it is; otherwise it is copied, cast and laid out at once.
    """
    blocks, coordinates = layout.blocks, layout.mesh.coordinates(device)
    spans: list[list[Run]] = []
    for dim, (step, axis) in enumerate(zip(layout.local_shape, layout.axes, strict=True)):
        first = step * (coordinates[axis] if axis is not None else 0)
        laid_out = blocks is not None and blocks.dim == dim
        spans.append(list(runs(blocks.sources, first, step, blocks.block)) if blocks is not None and laid_out else [(first, step)])
    if all(len(found) == 1 and found[0][0] != heads.EMPTY for found in spans):
        part = read(tuple(slice(at, at + length) for ((at, length),) in spans))
        return part if part.dtype == dtype and not own else torch.empty(part.shape, dtype=dtype).copy_(part)
    whole = torch.empty(layout.local_shape, dtype=dtype)
    for pieces in itertools.product(*map(_placed, spans)):
        target = whole[tuple(slice(place, place + length) for place, _, length in pieces)]
        if any(at == heads.EMPTY for _, at, _ in pieces):
            target.zero_()
        else:
            target.copy_(read(tuple(slice(at, at + length) for _, at, length in pieces)))
    return whole


def _placed(spans: Iterable[Run]) -> Iterator[tuple[int, int, int]]:
    """Runs with the place in the part where each begins."""
    place = 0
    for at, length in spans:
        yield place, at, length
        place += length


def runs(sources: Sequence[int], first: int, count: int, block: int) -> Iterator[Run]:
    """The longest runs (start in the source or `EMPTY`, length) that make up a stretch of a laid-out dim."""
    position, end = first, first + count
    start, length = 0, 0
    while position < end:
        index, inside = divmod(position, block)
        take = min(block - inside, end - position)
        at = heads.EMPTY if sources[index] == heads.EMPTY else sources[index] * block + inside
        if length and (at == start + length if start != heads.EMPTY else at == heads.EMPTY):
            length += take
        else:
            if length:
                yield start, length
            start, length = at, take
        position += take
    yield start, length


def take_off(laid_out: torch.Tensor, plan: Plan, name: str) -> torch.Tensor:
    """The checkpoint's tensor again, from a whole laid-out one."""
    return undo(laid_out, plan.blocks(name))


def undo(laid_out: torch.Tensor, blocks: Blocks | None) -> torch.Tensor:
    """A tensor as in the checkpoint, from a whole laid-out one; a view where it can be one."""
    if blocks is None:
        return laid_out
    first: dict[int, int] = {}
    for place, source in enumerate(blocks.sources):
        first.setdefault(source, place)
    count = max(blocks.sources) + 1
    places = torch.tensor([first[source] for source in range(count)])
    if torch.equal(places, torch.arange(count)):  # only padded, or not even that
        return laid_out.narrow(blocks.dim, 0, count * blocks.block)
    index = (places[:, None] * blocks.block + torch.arange(blocks.block)).flatten()
    return laid_out.index_select(blocks.dim, index)


def take_off_gradient(laid_out: torch.Tensor, plan: Plan, name: str) -> torch.Tensor:
    """The gradient of the checkpoint's tensor, from that of a whole laid-out one: the adjoint of laying out.

    What stands in several places (repeated KV heads) gets the sum of their gradients; what stands nowhere in the checkpoint (zero heads, padded sizes) is dropped.
    """
    blocks = plan.blocks(name)
    if blocks is None:
        return laid_out
    places, sources = correspondence(blocks)
    shape = list(laid_out.shape)
    shape[blocks.dim] = blocks.block * (max(blocks.sources) + 1)
    return laid_out.new_zeros(shape).index_add_(blocks.dim, sources, laid_out.index_select(blocks.dim, places))


def correspondence(blocks: Blocks) -> tuple[torch.Tensor, torch.Tensor]:
    """Every element of a laid-out dim that holds something of the checkpoint's: its place, and the place in the checkpoint."""
    inside = torch.arange(blocks.block)
    held = [(place, source) for place, source in enumerate(blocks.sources) if source != heads.EMPTY]
    places, sources = torch.tensor(held).t()
    return (places[:, None] * blocks.block + inside).flatten(), (sources[:, None] * blocks.block + inside).flatten()


@dataclass(frozen=True, kw_only=True)
class DeviceWeights:
    """A model's parameters on the devices.

    Attributes:
        tensors: by parameter name.
    """

    plan: Plan
    mesh: DeviceMesh
    tensors: dict[str, torch.Tensor]

    def fetch(self, name: str) -> torch.Tensor:
        """A parameter on the host, as in the checkpoint."""
        return take_off(replicas.fetch(self.mesh, lambda: self.tensors[name], self.plan[name].axes), self.plan, name).contiguous()

    def bytes_per_device(self) -> list[int]:
        """Measured from the shards that lie on the devices, not from the plan."""
        totals = [0] * self.mesh.shape.devices
        for tensor in self.tensors.values():
            for device, size in enumerate(self.mesh.local_bytes(tensor)):
                totals[device] += size
        return totals


def put_parameter(source: torch.Tensor, plan: Plan, mesh: DeviceMesh, name: str, dtype: torch.dtype) -> torch.Tensor:
    """Move one parameter to the devices, laid out, cast and split.

    Raises:
        CheckpointError: the source has not the shape that the plan expects.
    """
    placement = plan[name]
    if tuple(source.shape) != placement.source_shape:
        raise CheckpointError(
            lines(f"tensor {name} has shape {list(source.shape)}", f"expected {list(placement.source_shape)}, from the config")
        )

    layout = Layout.of(plan, name)

    def part(device: int) -> torch.Tensor:
        local = cut(source.__getitem__, layout, device, dtype).contiguous()
        return local.clone() if local.data_ptr() == source.data_ptr() else local

    return mesh.put_shards(part, placement.axes)


def shard_model(model: Any, mesh: DeviceMesh | MeshShape | str, plan: Plan | Mapping[str, Any] | None = None) -> Any:
    """Split a model that you built with transformers over a mesh, in place.

    The model keeps its own forward: parameters become device tensors, attention goes through `attention.plain_attention`, inputs given on
    the host are moved to the devices (rows over "data"), and padded vocabulary is cut from the logits.

    Args:
        model: a `LlamaModel`, a `LlamaForCausalLM`, or their like of another supported family, on the CPU.
        mesh: a mesh, or a shape such as `"1x8"` to make one.
        plan: a `Plan`, or overrides for one (see `plan.make_plan`).

    Returns:
        The same model. `model.parallama_plan` and `model.parallama_mesh` tell how it lies.

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
        raise UsageError(lines(f"{type(model).__name__} is sharded already", "expected a model on the CPU"))
    spec = ModelSpec.from_config(model.config)
    model.parallama_overrides = plan
    parameters = {name: parameter for name, parameter in model.named_parameters()}
    if not isinstance(plan, Plan):
        plan = make_plan(spec, mesh.shape, plan, parameters=[(name, tuple(p.shape)) for name, p in parameters.items()])
    if plan.mesh != mesh.shape:
        raise FitError(lines(f"the plan is for mesh {plan.mesh}, the mesh is {mesh.shape}", "expected the same"))
    attention.register()
    model.config._attn_implementation = attention.PLAIN
    tied = {id(parameter): name for name, parameter in parameters.items()}
    moved = {
        name: torch.nn.Parameter(put_parameter(parameter.data, plan, mesh, name, parameter.dtype), requires_grad=parameter.requires_grad)
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


def settle(model: Any, plan: Plan, mesh: DeviceMesh) -> None:
    """Have a model whose parameters lie on a mesh know it: sizes of its modules, how inputs come in and logits go out."""
    for name, module in model.named_modules():
        if name.endswith("self_attn"):
            module.num_key_value_groups = plan.head_layout.group
        if isinstance(module, torch.nn.Linear):
            module.out_features, module.in_features = module.weight.shape
    for hook in getattr(model, "parallama_hooks", ()):
        hook.remove()
    hooks = [model.register_forward_pre_hook(_InputMover(mesh, plan.model.vocab), with_kwargs=True)]
    if getattr(model, "lm_head", None) is not None and plan.vocab != plan.model.vocab:
        hooks.append(model.lm_head.register_forward_hook(lambda _module, _args, logits: logits[..., : plan.model.vocab]))
    model.parallama_plan, model.parallama_mesh, model.parallama_hooks = plan, mesh, hooks


class _InputMover:
    """A forward pre-hook: host tensors go to the devices, rows over "data"."""

    def __init__(self, mesh: DeviceMesh, vocab: int) -> None:
        self.mesh = mesh
        self.vocab = vocab

    def __call__(self, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        ids = args[0] if args else kwargs.get("input_ids")
        if isinstance(ids, torch.Tensor) and ids.device.type == "cpu":
            check_ids(ids.flatten().tolist(), self.vocab)
        return tuple(self._move(value) for value in args), {key: self._move(value) for key, value in kwargs.items()}

    def _move(self, value: Any) -> Any:
        if not isinstance(value, torch.Tensor) or value.device.type != "cpu":
            return value
        rows, parts = (value.shape[0] if value.dim() else 1), self.mesh.shape.data
        if value.dim() == 0 or rows == 1:
            return self.mesh.put(value, (None,) * value.dim())
        if rows % parts:
            raise FitError(lines(f"a batch of {rows} rows does not divide over {parts} devices along 'data'", "expected a multiple"))
        return self.mesh.put(value, (DATA, *(None,) * (value.dim() - 1)))


def check_ids(ids: Iterable[int], vocab: int) -> None:
    """Raise `UsageError` unless every token id is one of the model's: XLA clamps others silently or reads garbage."""
    for token in ids:
        if not 0 <= token < vocab:
            raise UsageError(lines(f"token id {token} is out of range", f"expected 0 to {vocab - 1}, the model's vocabulary"))
