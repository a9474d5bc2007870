"""A sharding plan: for every tensor of a model where it lies on a mesh, and why. Plain data, made without a device.

A plan names, for each parameter, buffer, cache tensor and input, one mesh axis (or none) for every dim. It is strict both ways: a
parameter that no rule covers is an error, and so is a rule that covers no parameter.
"""

from __future__ import annotations

import fnmatch
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

from ..errors import PlanError, UsageError, cause, lines, listed, shown
from ..model.rope import FOLLOWING
from ..model.spec import ModelSpec
from . import heads
from .heads import HeadLayout
from .mesh_shape import DATA, MODEL, MeshShape, axis_name

Axes = tuple[str | None, ...]
Overrides = Mapping[str, str | Sequence[str | None]]
"""Parameter-name pattern to a style or a list of axes."""
STYLES = ("colwise", "rowwise", "vocab", "replicate")
"""`colwise` splits a weight `[out, in]` on `out`, `rowwise` on `in`, `vocab` an embedding or head `[V, E]` on `V`."""

# transformers' own style names, where they differ from ours.
_TRANSFORMERS_STYLES = {
    "replicated_with_grad_allreduce": "replicate",
    "colwise_gather_output": "vocab",
    "colwise_rep": "vocab",
    "embedding_rowwise": "vocab",
}
_QUERY, _KV, _INTERMEDIATE, _VOCAB = "query heads", "kv heads", "intermediate", "vocab"
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


@dataclass(frozen=True, kw_only=True)
class Blocks:
    """How one dim of a laid-out tensor is made from the checkpoint's: block `i` is the checkpoint's block `sources[i]`.

    Attributes:
        dim: the dim that is laid out.
        block: its block size, in elements.
        sources: checkpoint block of each laid-out block, or `heads.EMPTY` for zeros.
        heads: what a block is, where it is a head.
    """

    dim: int
    block: int
    sources: tuple[int, ...]
    heads: Literal["query", "KV"] | None = None


@dataclass(frozen=True, kw_only=True)
class Placement:
    """One tensor of a plan.

    Attributes:
        name: parameter name as transformers gives it, or `cache.key`, `input.ids`, ...
        kind: parameter, buffer, cache, input or output.
        source_shape: its shape in the checkpoint (dims that depend on the run are letters, as `B`).
        shape: its shape over all devices, after head layout and padding.
        axes: for every dim the mesh axis it is split over, or None.
        style: the rule it follows.
        reason: one line for people.
    """

    name: str
    kind: Literal["parameter", "buffer", "cache", "input", "output"]
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
    """Where everything lies.

    Attributes:
        model: the sizes it was made for.
        mesh: the mesh it was made for.
        head_layout: how query and KV heads lie along `model`.
        placements: every tensor, in the model's order.
    """

    model: ModelSpec
    mesh: MeshShape
    head_layout: HeadLayout
    placements: tuple[Placement, ...]
    _by_name: dict[str, Placement] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(
            self, "_by_name", {placement.name: placement for placement in self.placements}
        )

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
        return heads.padded(self.model.intermediate, self.mesh.model)

    @property
    def vocab(self) -> int:
        """`V` after padding; ids from `model.vocab` on are never sampled."""
        return heads.padded(self.model.vocab, self.mesh.model)

    def blocks(self, name: str) -> Blocks | None:
        """How the laid-out dim of a parameter is made, or None if the parameter lies as in the checkpoint."""
        module = _module_key(name)
        if module not in _LAID_OUT:
            return None
        dim, what = _LAID_OUT[module]
        if name.endswith(".bias"):
            if dim == 1:
                return None
            dim = 0
        if what == _QUERY:
            return Blocks(
                dim=dim,
                block=self.model.head_dim,
                sources=self.head_layout.query_sources,
                heads="query",
            )
        if what == _KV:
            return Blocks(
                dim=dim, block=self.model.head_dim, sources=self.head_layout.kv_sources, heads="KV"
            )
        size, full = (
            (self.model.intermediate, self.intermediate)
            if what == _INTERMEDIATE
            else (self.model.vocab, self.vocab)
        )
        block = math.gcd(size, full)
        return Blocks(
            dim=dim,
            block=block,
            sources=tuple(range(size // block)) + (heads.EMPTY,) * ((full - size) // block),
        )

    def cache_blocks(self) -> Blocks:
        """How the heads of the cache's tensors, `[B, slots, T, D]`, are made from those of the checkpoint."""
        return Blocks(dim=1, block=1, sources=self.head_layout.kv_sources, heads="KV")

    def vocab_blocks(self) -> Blocks:
        """How the vocabulary of logits and the like, `[B, V]`, is made from the checkpoint's."""
        empty = (heads.EMPTY,) * (self.vocab - self.model.vocab)
        return Blocks(dim=1, block=1, sources=(*range(self.model.vocab), *empty))

    def parameter_bytes(self, itemsize: int) -> list[int]:
        """Bytes of parameters on each device (every device holds as many)."""
        each = (
            sum(math.prod(placement.local_shape(self.mesh)) for placement in self.parameters)
            * itemsize
        )
        return [each] * self.mesh.devices

    def cache_bytes(self, batch: int, length: int, itemsize: int) -> list[int]:
        """Bytes of KV cache on each device for `batch` rows (over all devices) of `length` positions."""
        rows, slots = math.ceil(batch / self.mesh.data), self.head_layout.slots // self.mesh.model
        each = 2 * self.model.layers * rows * slots * length * self.model.head_dim * itemsize
        return [each] * self.mesh.devices

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
        """Read what `to_json` wrote."""
        document = json.loads(text)

        def tuples(item: dict[str, Any]) -> dict[str, Any]:
            return {
                key: tuple(value) if isinstance(value, list) else value
                for key, value in item.items()
            }

        return cls(
            model=ModelSpec(**document["model"]),
            mesh=MeshShape(**document["mesh"]),
            head_layout=HeadLayout(**tuples(document["heads"])),
            placements=tuple(Placement(**tuples(item)) for item in document["placements"]),
        )


def make_plan(
    model: ModelSpec,
    mesh: MeshShape,
    overrides: Mapping[str, str | Sequence[str | None]] | None = None,
    *,
    parameters: Iterable[tuple[str, tuple[int, ...]]] | None = None,
) -> Plan:
    """Plan a model on a mesh.

    Args:
        model: sizes and transformers' tensor-parallel plan.
        mesh: the mesh's shape.
        overrides: parameter-name pattern (`*` stands for one dotted part) to a style of `STYLES` or a list of axes, one per dim. Later
            patterns win over earlier ones, and all of them over the model's own plan.
        parameters: names and checkpoint shapes, where they are not those of the causal LM (a bare `LlamaModel`, say).

    Raises:
        PlanError: a pattern matches nothing, a parameter is not covered, or a dim does not divide by its axis.
    """
    shapes = dict(model.parameters() if parameters is None else parameters)
    layout = heads.choose(model.query_heads, model.kv_heads, mesh.model)
    draft = Plan(model=model, mesh=mesh, head_layout=layout, placements=())
    rules = _default_rules(model, shapes)
    for pattern, style in (overrides or {}).items():
        rules.append((pattern, style, f"asked for by the pattern {pattern!r}"))
    chosen: dict[str, tuple[str | Sequence[str | None], str]] = {}
    for pattern, style, reason in rules:
        matched = [name for name in shapes if matches(pattern, name)]
        if not matched:
            hint = (
                "lm_head.weight is tied to model.embed_tokens.weight; "
                if model.tied and "lm_head" in pattern
                else ""
            )
            raise PlanError(
                lines(
                    f"plan pattern {pattern!r} matches no parameter",
                    f"{hint}expected a name such as {listed(list(shapes)[1:2])}",
                )
            )
        chosen.update(dict.fromkeys(matched, (style, reason)))
    uncovered = [name for name in shapes if name not in chosen]
    if uncovered:
        raise PlanError(
            lines(
                f"no rule of the plan covers {listed(uncovered)}",
                "add a pattern for it, as 'replicate' if nothing else fits",
            )
        )
    placements = [_place(draft, name, shape, *chosen[name]) for name, shape in shapes.items()]
    return Plan(
        model=model,
        mesh=mesh,
        head_layout=layout,
        placements=(*placements, *_run_placements(draft)),
    )


def matches(pattern: str, name: str) -> bool:
    """Whether a dotted pattern covers a dotted name; `*` and `?` never reach over a dot."""
    parts, names = pattern.split("."), name.split(".")
    return len(parts) == len(names) and all(
        fnmatch.fnmatchcase(n, p) for p, n in zip(parts, names, strict=True)
    )


def read_overrides(path: str | Path) -> dict[str, str | list[str | None]]:
    """Read a user's plan, YAML or JSON: a mapping from parameter-name pattern to a style name or a list of axes per dim.

    Raises:
        PlanError: the file can't be read or isn't such a mapping.
    """
    import yaml

    try:
        text = Path(path).read_text(encoding="utf-8")
        document = yaml.safe_load(text)
        nodes = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise PlanError(
            lines(
                f"plan file {str(path)!r} cannot be read: {cause(error, 120)}",
                "expected YAML or JSON",
            )
        ) from None
    if not isinstance(document, dict) or not document:
        raise PlanError(
            lines(
                f"plan file {str(path)!r} holds no mapping",
                "expected 'pattern: style' or 'pattern: [axis, ...]' lines",
            )
        )
    keys = [key.value for key, _ in nodes.value] if isinstance(nodes, yaml.MappingNode) else []
    twice = [key for key in keys if keys.count(key) > 1]
    if twice:
        raise PlanError(
            lines(
                f"plan file {str(path)!r} has the pattern {twice[0]!r} twice", "expected each once"
            )
        )
    for pattern, style in document.items():
        is_axes = isinstance(style, list) and all(
            axis is None or isinstance(axis, str) for axis in style
        )
        if not isinstance(pattern, str) or not (isinstance(style, str) or is_axes):
            raise PlanError(
                lines(
                    f"plan file {str(path)!r}: {shown(pattern)} maps to {shown(style)}",
                    f"expected one of {', '.join(STYLES)}, or a list of axis names and nulls, one per dim",
                )
            )
    return document


def _default_rules(
    model: ModelSpec, shapes: Mapping[str, tuple[int, ...]]
) -> list[tuple[str, str | Sequence[str | None], str]]:
    prefix = "model." if any(name.startswith("model.") for name in shapes) else ""
    reasons = {
        "colwise": "split on its outputs: input replicated, no communication",
        "rowwise": "split on its inputs: partial sums, one all-reduce",
        "replicate": "small: every device holds it",
    }
    rules: list[tuple[str, str | Sequence[str | None], str]] = []
    for module, theirs in model.tp_plan.items():
        style = _TRANSFORMERS_STYLES.get(theirs, theirs)
        if style not in STYLES:
            raise PlanError(
                lines(
                    f"transformers' plan gives {module!r} the style {theirs!r}",
                    f"expected one of {', '.join(STYLES)}",
                )
            )
        rules.append((f"{prefix}{module}.*", style, reasons[style]))
    tie = "; the head shares it" if model.tied else ""
    rules.append(
        (
            f"{prefix}embed_tokens.weight",
            "vocab",
            f"rows split: each device looks up its own ids, one all-reduce{tie}",
        )
    )
    norm = "norms are small: every device holds them"
    rules += [
        (f"{prefix}layers.*.{name}.weight", "replicate", norm)
        for name in ("input_layernorm", "post_attention_layernorm")
    ]
    rules.append((f"{prefix}norm.weight", "replicate", norm))
    if "lm_head.weight" in shapes:
        rules.append(
            (
                "lm_head.weight",
                "vocab",
                "rows split: each device scores its own ids, only candidates are gathered",
            )
        )
    return rules


def _place(
    draft: Plan, name: str, source: tuple[int, ...], style: str | Sequence[str | None], reason: str
) -> Placement:
    shape = list(source)
    blocks = draft.blocks(name)
    if blocks is not None:
        if blocks.block * (max(blocks.sources) + 1) != source[blocks.dim]:
            raise PlanError(
                lines(
                    f"{name} has shape {list(source)}",
                    f"expected {blocks.block * (max(blocks.sources) + 1)} in dim {blocks.dim}, from the config",
                )
            )
        shape[blocks.dim] = blocks.block * len(blocks.sources)
        if shape[blocks.dim] != source[blocks.dim]:
            of_heads = _LAID_OUT[_module_key(name)][1] in (_QUERY, _KV)
            what = (
                draft.head_layout.reason
                if of_heads
                else f"padded from {source[blocks.dim]} to {shape[blocks.dim]}"
            )
            reason = f"{reason}; {what}"
    axes = _axes(name, len(source), style)
    if style == "rowwise" and len(source) == 1:
        reason = "added once, after the all-reduce: every device holds it"
    for dim, (size, axis) in enumerate(zip(shape, axes, strict=True)):
        if size % draft.mesh.size(axis):
            raise PlanError(
                lines(
                    f"{name} dim {dim} has size {size}, which axis {axis!r} ({draft.mesh.size(axis)} devices) does not divide",
                    "expected a multiple; only heads, intermediate and vocabulary are padded",
                )
            )
    style_name = style if isinstance(style, str) else "axes"
    return Placement(
        name=name,
        kind="parameter",
        source_shape=source,
        shape=tuple(shape),
        axes=axes,
        style=style_name,
        reason=reason,
    )


def _axes(name: str, rank: int, style: str | Sequence[str | None]) -> Axes:
    if isinstance(style, str):
        if style not in STYLES:
            raise PlanError(
                lines(
                    f"style {style!r} for {name} is unknown",
                    f"expected one of {', '.join(STYLES)}, or a list of axes",
                )
            )
        if style == "replicate" or (style == "rowwise" and rank == 1):
            return (None,) * rank
        if style == "rowwise":
            return (*(None,) * (rank - 1), MODEL)
        return (MODEL, *(None,) * (rank - 1))
    if not isinstance(style, Sequence) or not all(
        axis is None or isinstance(axis, str) for axis in style
    ):
        raise PlanError(
            lines(
                f"{name} is given {shown(style)}",
                f"expected one of {', '.join(STYLES)}, or a list of axis names and nulls",
            )
        )
    try:
        axes = tuple(None if axis is None else axis_name(axis) for axis in style)
    except UsageError as error:
        raise PlanError(str(error)) from None
    if len(axes) != rank:
        raise PlanError(
            lines(
                f"{name} has {rank} dims, the plan gives {len(axes)} axes: {list(axes)}",
                "expected one axis (or null) per dim",
            )
        )
    used = [axis for axis in axes if axis is not None]
    if len(used) != len(set(used)):
        raise PlanError(
            lines(
                f"{name}: axes {list(axes)} use one axis twice", "expected each axis at most once"
            )
        )
    return axes


def _run_placements(draft: Plan) -> list[Placement]:
    """The tensors that come with a run: rotary table, KV cache, inputs, logits."""
    model, slots = draft.model, draft.head_layout.slots
    heads_reason = f"rows over data, heads over model; {draft.head_layout.reason}"
    rows: Axes = (DATA,)
    table: list[
        tuple[
            str,
            Literal["buffer", "cache", "input", "output"],
            tuple[int | str, ...],
            tuple[int | str, ...],
            Axes,
            str,
        ]
    ] = [
        (
            "model.rotary_emb.inv_freq",
            "buffer",
            (model.head_dim // 2,),
            (model.head_dim // 2,),
            (None,),
            "rotary frequencies: every device turns its own heads",
        ),
        *(
            (
                "model.rotary_emb.long_inv_freq",
                "buffer",
                (model.head_dim // 2,),
                (model.head_dim // 2,),
                (None,),
                "rotary frequencies for texts longer than the model was trained on",
            )
            for _ in range(model.rope == "longrope")
        ),
        *(
            (
                name,
                "cache",
                ("B", model.kv_heads, "T", model.head_dim),
                ("B", slots, "T", model.head_dim),
                (DATA, MODEL, None, None),
                heads_reason,
            )
            for name in ("cache.key", "cache.value")
        ),
        ("input.ids", "input", ("B", "S"), ("B", "S"), (DATA, None), "rows over data"),
        ("input.positions", "input", ("B",), ("B",), rows, "rows over data"),
        *(
            (
                "input.span",
                "input",
                (1,),
                (1,),
                (None,),
                "the longest row's length, which rotary frequencies follow",
            )
            for _ in range(model.rope in FOLLOWING)
        ),
        (
            "output.logits",
            "output",
            ("B", model.vocab),
            ("B", draft.vocab),
            (DATA, MODEL),
            "rows over data, vocabulary over model; never gathered to sample",
        ),
    ]
    return [
        Placement(
            name=name,
            kind=kind,
            source_shape=source,
            shape=shape,
            axes=axes,
            style="run",
            reason=reason,
        )
        for name, kind, source, shape, axes, reason in table
    ]


def _module_key(name: str) -> str:
    """`model.layers.3.mlp.up_proj.weight` -> `mlp.up_proj`; `model.embed_tokens.weight` -> `embed_tokens`."""
    parts = name.split(".")[:-1]
    if "layers" in parts:
        parts = parts[parts.index("layers") + 2 :]
    elif parts and parts[0] == "model":
        parts = parts[1:]
    return ".".join(parts)
