"""How what is trained lies on a mesh: a plan, with parameters split over "data" too, and with adapters. Pure.

An adapter of a linear `[O, E]` is `lora_A` `[R, E]` and `lora_B` `[O, R]`. Each lies as its weight does where it has the weight's dim, padded and repeated heads included, and is whole elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..errors import FitError, lines, listed
from ..model.rope import FOLLOWING, ROPE_TYPES
from ..plan.mesh_shape import DATA, MODEL, MeshShape
from ..plan.placement import Blocks, Placement, Plan
from ..plan.train_collectives import ADAPTER, TrainStep, check_trainable, trained_parameters
from .options import LoraOptions, StepOptions

_EMBEDDING, _HEAD = "model.embed_tokens.weight", "lm_head.weight"


@dataclass(frozen=True, kw_only=True)
class TrainingPlan(Plan):
    """A plan of a training run.

    Attributes:
        adapters: parameter names of adapters: part of `parameters`, in the order of their weights.
    """

    adapters: Mapping[str, Blocks | None] = field(default_factory=dict)

    def blocks(self, name: str) -> Blocks | None:
        return self.adapters[name] if name in self.adapters else super().blocks(name)

    @property
    def trained(self) -> tuple[Placement, ...]:
        """What gets gradients: the adapters if there are any, else every parameter."""
        return trained_parameters(self)

    def split(self, module: str) -> bool:
        """Whether a layer's `self_attn` or `mlp`, the embedding or the head is split over "model"."""
        name = {"embed_tokens": _EMBEDDING, "lm_head": self.head}.get(module)
        if name is None:
            name = f"{module}.{'o_proj' if module.endswith('self_attn') else 'down_proj'}.weight"
            return self[name].axes[1] == MODEL
        return self[name].axes[0] == MODEL

    @property
    def head(self) -> str:
        """The parameter that scores the vocabulary."""
        return _EMBEDDING if self.model.tied else _HEAD


def training_plan(plan: Plan, *, fsdp: bool, lora: LoraOptions | None) -> TrainingPlan:
    """The plan of a training run on the plan's mesh.

    Raises:
        PlanError: the plan is not one that training follows: attention and MLP, embedding and head each split the way of Megatron-LM over "model", or whole.
    """
    check_trainable(plan)
    placements = [
        _over_data(each, plan, plan.blocks(each.name))
        if fsdp and each.kind == "parameter"
        else each
        for each in plan.placements
    ]
    adapters: dict[str, Blocks | None] = {}
    if lora is not None:
        made = []
        for placement in placements:
            made.append(placement)
            target = placement.name.removesuffix(".weight").rpartition(".")[2]
            if (
                placement.kind == "parameter"
                and placement.name.endswith(".weight")
                and target in lora.targets
            ):
                for adapter, blocks in _adapters(placement, plan, lora.rank):
                    adapter = _over_data(adapter, plan, blocks) if fsdp else adapter
                    made.append(adapter)
                    adapters[adapter.name] = blocks
        placements = made
    return TrainingPlan(
        model=plan.model,
        mesh=plan.mesh,
        head_layout=plan.head_layout,
        placements=tuple(placements),
        adapters=adapters,
    )


def train_step(options: StepOptions, layers: int, sum_bytes: int = 1) -> TrainStep:
    """What of a step's options decides about its collectives.

    Args:
        sum_bytes: see `Traits`.
    """
    itemsize = 2 if options.dtype == "bfloat16" else 4
    return TrainStep(
        batch=options.batch_size,
        seq=options.seq_len,
        micro_steps=options.grad_accum,
        rematerialized=frozenset(layer for layer in range(layers) if options.rematerialized(layer)),
        sequence_parallel=options.sequence_parallel,
        itemsize=itemsize,
        moved_itemsize=max(itemsize, sum_bytes),
    )


def check_batch(batch_size: int, mesh: MeshShape) -> None:
    """Raise `FitError` unless a micro-step's sequences divide over the mesh."""
    if batch_size % mesh.data:
        raise FitError(
            lines(
                f"batch_size {batch_size} does not divide over {mesh.data} devices along 'data' "
                f"(mesh {mesh})",
                f"expected a multiple of {mesh.data}; batch_size counts the sequences of one "
                "micro-step over all devices",
            )
        )


def check_fit(options: StepOptions, plan: TrainingPlan) -> None:
    """Raise `FitError` unless a batch divides over the mesh, and the model is one that a step can train."""
    mesh = plan.mesh
    if plan.model.rope in FOLLOWING:
        raise FitError(
            lines(
                f"rope type {plan.model.rope!r} is not supported in training: its frequencies follow the length of what is run",
                f"expected one of {', '.join(kind for kind in ROPE_TYPES if kind not in FOLLOWING)}",
            )
        )
    check_batch(options.batch_size, mesh)
    if options.sequence_parallel and options.seq_len % mesh.model:
        raise FitError(
            lines(
                f"seq_len is {options.seq_len}",
                f"expected a multiple of {mesh.model}, the devices along 'model', for sequence parallelism",
            )
        )
    if options.sequence_parallel and mesh.model > 1:
        parts = [
            f"model.layers.{layer}.{part}"
            for layer in range(plan.model.layers)
            for part in ("self_attn", "mlp")
        ]
        whole = [part for part in (*parts, "embed_tokens", "lm_head") if not plan.split(part)]
        if whole:
            raise FitError(
                lines(
                    f"sequence parallelism with {listed(whole)} whole on every device",
                    "expected a plan that splits them over 'model'",
                )
            )
    if options.seq_len > plan.model.max_positions:
        raise FitError(
            lines(
                f"seq_len is {options.seq_len}",
                f"expected at most {plan.model.max_positions}, the model's positions",
            )
        )


def _over_data(placement: Placement, plan: Plan, blocks: Blocks | None) -> Placement:
    """The same, split over "data" along the last whole dim of a matrix that divides, but never through heads; vectors stay as they are."""
    parts = plan.mesh.data
    if parts == 1 or DATA in placement.axes or len(placement.shape) < 2:
        return placement
    for dim in reversed(range(len(placement.shape))):
        through_heads = blocks is not None and blocks.heads is not None and blocks.dim == dim
        if (
            placement.axes[dim] is None
            and not through_heads
            and int(placement.shape[dim]) % parts == 0
        ):
            axes = tuple(DATA if at == dim else axis for at, axis in enumerate(placement.axes))
            return replace(
                placement, axes=axes, reason=f"{placement.reason}; dim {dim} over data (fsdp)"
            )
    return replace(
        placement, reason=f"{placement.reason}; no whole dim divides over data ({parts} devices)"
    )


def _adapters(weight: Placement, plan: Plan, rank: int) -> list[tuple[Placement, Blocks | None]]:
    blocks = plan.blocks(weight.name)
    base = weight.name.removesuffix(".weight")
    found = []
    for letter, dim in (("A", 1), ("B", 0)):
        axis = weight.axes[dim] if weight.axes[dim] == MODEL else None
        whole = (rank, weight.shape[1]) if letter == "A" else (weight.shape[0], rank)
        source = (rank, weight.source_shape[1]) if letter == "A" else (weight.source_shape[0], rank)
        placement = Placement(
            name=f"{base}.lora_{letter}.weight",
            kind="parameter",
            source_shape=source,
            shape=whole,
            axes=(None, axis) if letter == "A" else (axis, None),
            style=ADAPTER,
            reason=f"adapter of {base}: lies as dim {dim} of its weight",
        )
        found.append((placement, blocks if blocks is not None and blocks.dim == dim else None))
    return found
