"""Put a plan on a model, and take it off again.

A checkpoint's tensor becomes a laid-out one block by block (head groups repeated or padded, sizes padded with zeros), and each device's part is
cut straight from the checkpoint's tensor: the laid-out whole never exists.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from . import attention, heads
from .errors import CheckpointError, FitError, UsageError, lines, listed
from .mesh import DeviceMesh
from .plan import Blocks, Placement, Plan, make_plan
from .spec import ModelSpec
from .topology import DATA, MeshShape


def device_part(source: torch.Tensor, plan: Plan, placement: Placement, device: int) -> torch.Tensor:
    """One device's part of a parameter, cut from the checkpoint's tensor.

    Args:
        source: of shape `placement.source_shape`, any dtype.

    Returns:
        A tensor of shape `placement.local_shape(plan.mesh)`; a view where it can be one.
    """
    blocks = plan.blocks(placement.name)
    coordinates = plan.mesh.coordinates(device)
    part = source
    for dim, axis in enumerate(placement.axes):
        size = int(placement.shape[dim])
        parts = plan.mesh.size(axis)
        step = size // parts
        first = step * (coordinates[axis] if axis is not None else 0)
        if blocks is None or blocks.dim != dim:
            part = part.narrow(dim, first, step)
        else:
            part = _lay_out(part, dim, first, step, blocks.block, blocks.sources)
    return part


def _lay_out(source: torch.Tensor, dim: int, first: int, count: int, block: int, sources: Sequence[int]) -> torch.Tensor:
    """Elements `first` to `first + count` of the dim whose block `i` is the source's block `sources[i]`."""
    pieces = []
    for at, run in runs(sources, first, count, block):
        if at == heads.EMPTY:
            shape = list(source.shape)
            shape[dim] = run
            pieces.append(torch.zeros(shape, dtype=source.dtype))
        else:
            pieces.append(source.narrow(dim, at, run))
    return pieces[0] if len(pieces) == 1 else torch.cat(pieces, dim)


def runs(sources: Sequence[int], first: int, count: int, block: int) -> Iterator[tuple[int, int]]:
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
    blocks = plan.blocks(name)
    if blocks is None:
        return laid_out
    first: dict[int, int] = {}
    for place, source in enumerate(blocks.sources):
        first.setdefault(source, place)
    places = torch.tensor([first[source] for source in range(max(blocks.sources) + 1)])
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
        return take_off(self.mesh.fetch(self.tensors[name], self.plan[name].axes), self.plan, name).contiguous()

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

    def part(device: int) -> torch.Tensor:
        local = device_part(source, plan, placement, device)
        local = local.to(dtype).contiguous()
        return local.clone() if local.data_ptr() == source.data_ptr() else local

    return mesh.put_shards(part, placement.axes)


def put_parameters(
    sources: Mapping[str, Callable[[], torch.Tensor]] | Iterator[tuple[str, torch.Tensor]],
    plan: Plan,
    mesh: DeviceMesh,
    dtype: torch.dtype,
    progress: Callable[[int, int], None] | None = None,
) -> DeviceWeights:
    """Move every parameter of a plan to the devices, one at a time.

    Args:
        sources: name to a function that reads the checkpoint's tensor, or an iterator that gives names and tensors in any order.
        progress: called with tensors done and their number.
    """
    pairs = ((name, read()) for name, read in sources.items()) if isinstance(sources, Mapping) else sources
    wanted = [placement.name for placement in plan.parameters]
    tensors: dict[str, torch.Tensor] = {}
    for name, source in pairs:
        tensors[name] = put_parameter(source, plan, mesh, name, dtype)
        if progress is not None:
            progress(len(tensors), len(wanted))
    missing = [name for name in wanted if name not in tensors]
    if missing:
        raise CheckpointError(lines(f"missing tensors: {listed(missing)}", "expected every parameter of the model"))
    return DeviceWeights(plan=plan, mesh=mesh, tensors=tensors)


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
    parameters = {name: parameter for name, parameter in model.named_parameters()}
    if not isinstance(plan, Plan):
        plan = make_plan(spec, mesh.shape, plan, parameters=[(name, tuple(p.shape)) for name, p in parameters.items()])
    if plan.mesh != mesh.shape:
        raise FitError(lines(f"the plan is for mesh {plan.mesh}, the mesh is {mesh.shape}", "expected the same"))
    layout = plan.head_layout
    attention.register()
    model.config._attn_implementation = attention.PLAIN
    tied = {id(parameter): name for name, parameter in parameters.items()}
    moved = {
        name: torch.nn.Parameter(put_parameter(parameter.data, plan, mesh, name, parameter.dtype), requires_grad=parameter.requires_grad)
        for name, parameter in parameters.items()
    }
    for module_name, module in model.named_modules():
        for leaf, parameter in list(module._parameters.items()):
            if parameter is not None:
                module._parameters[leaf] = moved[tied[id(parameter)]]
        for leaf, buffer in list(module._buffers.items()):
            if buffer is not None:
                module._buffers[leaf] = mesh.put(buffer, (None,) * buffer.dim())
        if module_name.endswith("self_attn"):
            module.num_key_value_groups = layout.group
        if isinstance(module, torch.nn.Linear):
            module.out_features, module.in_features = module.weight.shape
    model.register_forward_pre_hook(_InputMover(mesh, spec.vocab), with_kwargs=True)
    if getattr(model, "lm_head", None) is not None and plan.vocab != spec.vocab:
        model.lm_head.register_forward_hook(lambda _module, _args, logits: logits[..., : spec.vocab])
    model.parallama_plan, model.parallama_mesh = plan, mesh
    return model


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
