"""A sharding plan as data: for every tensor where it is placed on a mesh, and why. Pure.

A plan names, for every parameter, buffer, cache tensor, input and output, one mesh axis (or none)
for each dim. `make_plan` makes one.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from ..errors import PlanError, cause, lines
from ..model.spec import ModelSpec
from .heads import EMPTY, HeadLayout, padded
from .mesh_shape import MeshShape

Axes = tuple[str | None, ...]
TensorKind = Literal["parameter", "buffer", "cache", "input", "output"]

_QUERY, _KV, _INTERMEDIATE, _VOCAB = "query heads", "KV heads", "intermediate", "vocab"
_LAID_OUT = {
    "self_attn.q_proj": (0, _QUERY),
    "self_attn.k_proj": (0, _KV),
    "self_attn.v_proj": (0, _KV),
    "self_attn.o_proj": (1, _QUERY),
    "mlp.gate_proj": (0, _INTERMEDIATE),
    "mlp.up_proj": (0, _INTERMEDIATE),
    "mlp.down_proj": (1, _INTERMEDIATE),
    "embed_tokens": (0, _VOCAB),
    "lm_head": (0, _VOCAB),
}
"""Module to the dim of its weight that is laid out anew for the mesh, and what that dim counts."""


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How one dim of a laid-out tensor is made from the checkpoint's, block by block.

    Attributes:
        dim: the dim that is laid out.
        block: elements of one block.
        sources: for each block the checkpoint's block that it holds, or `heads.EMPTY` for zeros.
        heads: which heads the blocks are, if they are heads.
    """

    dim: int
    block: int
    sources: tuple[int, ...]
    heads: Literal["query", "KV"] | None = None

    @property
    def source_size(self) -> int:
        """Size of the dim in the checkpoint."""
        return self.block * (max(self.sources) + 1)

    @property
    def size(self) -> int:
        """Size of the dim over all devices."""
        return self.block * len(self.sources)


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One tensor of a plan.

    Attributes:
        name: parameter name as transformers gives it, or `cache.key`, `input.ids`, ...
        kind: parameter, buffer, cache, input or output.
        source_shape: its shape in the checkpoint. A dim that depends on the run is a letter.
        shape: its shape over all devices, after head layout and padding.
        axes: for every dim the mesh axis it is split over, or None.
        style: the rule it follows.
        reason: one line for people.
    """

    name: str
    kind: TensorKind
    source_shape: tuple[int | str, ...]
    shape: tuple[int | str, ...]
    axes: Axes
    style: str
    reason: str

    def local_shape(self, mesh: MeshShape) -> tuple[int, ...]:
        """The shape on each device; only for tensors without letters."""
        return tuple(
            int(size) // mesh.size(axis) for size, axis in zip(self.shape, self.axes, strict=True)
        )


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Where every tensor of a model is placed.

    Attributes:
        model: the sizes it was made for.
        mesh: the mesh it was made for.
        head_layout: how query and KV heads are split over "model".
        placements: every tensor, in the model's order.
    """

    model: ModelSpec
    mesh: MeshShape
    head_layout: HeadLayout
    placements: tuple[Placement, ...]
    _by_name: dict[str, Placement] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        by_name = {placement.name: placement for placement in self.placements}
        object.__setattr__(self, "_by_name", by_name)

    def __getitem__(self, name: str) -> Placement:
        return self._by_name[name]

    def __contains__(self, name: str) -> bool:
        return name in self._by_name

    @property
    def parameters(self) -> tuple[Placement, ...]:
        return tuple(placement for placement in self.placements if placement.kind == "parameter")

    @property
    def intermediate(self) -> int:
        """`F` after padding."""
        return padded(self.model.intermediate, self.mesh.model)

    @property
    def vocab(self) -> int:
        """`V` after padding; ids from `model.vocab` on are never sampled."""
        return padded(self.model.vocab, self.mesh.model)

    def blocks(self, name: str) -> Blocks | None:
        """How a parameter's laid-out dim is made; None if it is placed as in the checkpoint."""
        module = _module_of(name)
        if module not in _LAID_OUT:
            return None
        dim, counts = _LAID_OUT[module]
        if dim == 1 and name.endswith(".bias"):
            return None  # the bias of a row-parallel product has the residual stream's size
        layout, head_dim = self.head_layout, self.model.head_dim
        if counts == _QUERY:
            return Blocks(dim=dim, block=head_dim, sources=layout.query_sources, heads="query")
        if counts == _KV:
            return Blocks(dim=dim, block=head_dim, sources=layout.kv_sources, heads="KV")
        if counts == _INTERMEDIATE:
            return _padded_blocks(dim, self.model.intermediate, self.intermediate)
        return _padded_blocks(dim, self.model.vocab, self.vocab)

    def cache_blocks(self) -> Blocks:
        """How the KV heads of a cache tensor, `[B, slots, T, D]`, are made from the model's."""
        return Blocks(dim=1, block=1, sources=self.head_layout.kv_sources, heads="KV")

    def vocab_blocks(self) -> Blocks:
        """How the vocabulary of logits and the like, `[B, V]`, is made from the model's."""
        return _padded_blocks(1, self.model.vocab, self.vocab)

    def local_rows(self, batch: int) -> int:
        """Rows on each device; `batch` is filled up to a multiple of the "data" axis."""
        return math.ceil(batch / self.mesh.data)

    def parameter_bytes(self, itemsize: int) -> list[int]:
        """Bytes of parameters on each device (every device holds as many)."""
        elements = sum(math.prod(each.local_shape(self.mesh)) for each in self.parameters)
        return [elements * itemsize] * self.mesh.devices

    def cache_bytes(self, batch: int, length: int, itemsize: int) -> list[int]:
        """Bytes of KV cache on each device, for `batch` rows over all devices.

        Args:
            length: positions that the cache holds for every row.
        """
        slots = self.head_layout.slots // self.mesh.model
        row = 2 * self.model.layers * slots * length * self.model.head_dim
        return [self.local_rows(batch) * row * itemsize] * self.mesh.devices

    def to_json(self) -> str:
        """The plan as JSON; `Plan.from_json` gives an equal plan back."""
        document = {
            "model": asdict(self.model),
            "mesh": dict(self.mesh),
            "heads": asdict(self.head_layout),
            "placements": [asdict(placement) for placement in self.placements],
        }
        return json.dumps(document, indent=1)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read what `to_json` wrote.

        Raises:
            PlanError: the text is no such JSON.
        """
        try:
            document = json.loads(text)
            placements = [Placement(**_with_tuples(each)) for each in document["placements"]]
            return cls(
                model=ModelSpec(**document["model"]),
                mesh=MeshShape(document["mesh"]),
                head_layout=HeadLayout(**_with_tuples(document["heads"])),
                placements=tuple(placements),
            )
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError) as error:
            raise PlanError(
                lines(
                    f"a text of {len(text)} characters is no plan: {cause(error)}",
                    "expected JSON as Plan.to_json gives it",
                )
            ) from None


def _padded_blocks(dim: int, size: int, full: int) -> Blocks:
    """A dim of `size` that zeros at its end fill up to `full`."""
    block = math.gcd(size, full)
    empty = (EMPTY,) * ((full - size) // block)
    return Blocks(dim=dim, block=block, sources=(*range(size // block), *empty))


def _module_of(name: str) -> str:
    """The module within its layer, or within the model.

    `model.layers.3.mlp.up_proj.weight` -> `mlp.up_proj`, `lm_head.weight` -> `lm_head`.
    """
    parts = name.split(".")[:-1]
    if "layers" in parts:
        parts = parts[parts.index("layers") + 2 :]
    elif parts and parts[0] == "model":
        parts = parts[1:]
    return ".".join(parts)


def _with_tuples(item: dict[str, Any]) -> dict[str, Any]:
    """JSON has lists where our dataclasses have tuples."""
    return {key: tuple(value) if type(value) is list else value for key, value in item.items()}
