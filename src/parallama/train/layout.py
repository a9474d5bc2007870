"""How what is trained is placed: a plan, parameters split over "data" too, and adapters. Pure.

An adapter of a linear `[O, E]` is `lora_A` `[R, E]` and `lora_B` `[O, R]`. The dim that it shares
with its weight is placed as the weight's is, with padded and repeated heads; the other is whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from ..errors import FitError, lines, listed
from ..model.rope import LENGTH_DEPENDENT, ROPE_TYPES
from ..plan.mesh_shape import DATA, MODEL, MeshShape
from ..plan.placement import Blocks, Placement, Plan
from ..plan.train_collectives import TrainStep
from ..plan.trainable import ADAPTER, check_trainable, trained_parameters
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
        """Whether a module is split over "model".

        Args:
            module: `embed_tokens`, `lm_head`, or a layer's `self_attn` or `mlp`.
        """
        if module == "embed_tokens":
            return self[_EMBEDDING].axes[0] == MODEL
        if module == "lm_head":
            return self[self.head].axes[0] == MODEL
        last = "o_proj" if module.endswith("self_attn") else "down_proj"
        return self[f"{module}.{last}.weight"].axes[1] == MODEL

    @property
    def head(self) -> str:
        """The parameter that scores the vocabulary."""
        return _EMBEDDING if self.model.tied else _HEAD


def training_plan(plan: Plan, *, fsdp: bool, lora: LoraOptions | None) -> TrainingPlan:
    """The plan of a training run on the plan's mesh.

    Raises:
        PlanError: the plan is not one that training follows. Attention and MLP, embedding and head
            must each be whole, or split over "model" as in Megatron-LM.
    """
    check_trainable(plan)
    placements: list[Placement] = []
    adapters: dict[str, Blocks | None] = {}
    for placement in plan.placements:
        is_parameter = placement.kind == "parameter"
        if fsdp and is_parameter:
            placement = _over_data(placement, plan, plan.blocks(placement.name))
        placements.append(placement)
        target = placement.name.removesuffix(".weight").rpartition(".")[2]
        is_weight = is_parameter and placement.name.endswith(".weight")
        if lora is None or not is_weight or target not in lora.targets:
            continue
        for adapter, blocks in _adapters(placement, plan, lora.rank):
            placements.append(_over_data(adapter, plan, blocks) if fsdp else adapter)
            adapters[adapter.name] = blocks
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
    """Raise `FitError` unless a batch divides over the mesh, and a step can train the model."""
    mesh = plan.mesh
    if plan.model.rope in LENGTH_DEPENDENT:
        trainable = [kind for kind in ROPE_TYPES if kind not in LENGTH_DEPENDENT]
        raise FitError(
            lines(
                f"rope type {plan.model.rope!r} is not supported in training: "
                "its frequencies follow the length of what is run",
                f"expected one of {', '.join(trainable)}",
            )
        )
    check_batch(options.batch_size, mesh)
    if options.sequence_parallel and options.seq_len % mesh.model:
        raise FitError(
            lines(
                f"seq_len is {options.seq_len}",
                f"expected a multiple of {mesh.model}, the devices along 'model', "
                "for sequence parallelism",
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
    """The same, split over "data" along the last whole dim of a matrix that divides.

    Heads are never split, and vectors stay as they are.
    """
    parts, reason = plan.mesh.data, placement.reason
    if parts == 1 or DATA in placement.axes or len(placement.shape) < 2:
        return placement
    for dim in reversed(range(len(placement.shape))):
        through_heads = blocks is not None and blocks.heads is not None and blocks.dim == dim
        divides = int(placement.shape[dim]) % parts == 0
        if placement.axes[dim] is None and divides and not through_heads:
            axes = tuple(DATA if at == dim else axis for at, axis in enumerate(placement.axes))
            return replace(placement, axes=axes, reason=f"{reason}; dim {dim} over data (fsdp)")
    return replace(placement, reason=f"{reason}; no whole dim divides over data ({parts} devices)")


def _adapters(weight: Placement, plan: Plan, rank: int) -> list[tuple[Placement, Blocks | None]]:
    """`lora_A` and `lora_B` of a weight `[O, E]`, each with the blocks that it shares with it."""
    blocks = plan.blocks(weight.name)
    base = weight.name.removesuffix(".weight")
    found = []
    for letter, dim in (("A", 1), ("B", 0)):
        axis = weight.axes[dim] if weight.axes[dim] == MODEL else None
        size, source_size = weight.shape[dim], weight.source_shape[dim]
        first = letter == "A"
        placement = Placement(
            name=f"{base}.lora_{letter}.weight",
            kind="parameter",
            source_shape=(rank, source_size) if first else (source_size, rank),
            shape=(rank, size) if first else (size, rank),
            axes=(None, axis) if first else (axis, None),
            style=ADAPTER,
            reason=f"adapter of {base}: placed as dim {dim} of its weight",
        )
        found.append((placement, blocks if blocks is not None and blocks.dim == dim else None))
    return found
