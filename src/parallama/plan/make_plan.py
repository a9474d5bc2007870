"""Make the plan of a model on a mesh: transformers' own plan, then a user's overrides. Pure.

It is strict both ways: a parameter that no rule covers is an error, and so is a rule that covers
no parameter.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import NamedTuple

from ..errors import PlanError, lines, listed
from ..model.rope import LENGTH_DEPENDENT
from ..model.spec import ModelSpec
from . import heads
from .mesh_shape import DATA, MODEL, MeshShape
from .overrides import Overrides, matches
from .placement import Axes, Placement, Plan, TensorKind
from .styles import STYLES, TRANSFORMERS_STYLES, Style, axes_of

Shapes = Mapping[str, tuple[int, ...]]
_REASONS = {
    "colwise": "split on its outputs: input replicated, no communication",
    "rowwise": "split on its inputs: partial sums, one all-reduce",
    "vocab": "rows split: each device holds its own ids",
    "replicate": "small: every device holds it",
}


class _Rule(NamedTuple):
    pattern: str
    style: Style
    reason: str


def make_plan(
    model: ModelSpec,
    mesh: MeshShape,
    overrides: Overrides | None = None,
    *,
    parameters: Iterable[tuple[str, tuple[int, ...]]] | None = None,
) -> Plan:
    """Plan a model on a mesh.

    Args:
        model: sizes and transformers' tensor-parallel plan.
        mesh: the mesh's shape.
        overrides: parameter-name pattern (`*` stands for one dotted part) to a style of `STYLES`
            or a list of axes, one per dim. Later patterns win over earlier ones, and all of them
            over the model's own plan.
        parameters: names and checkpoint shapes, where they are not those of the causal LM (a bare
            `LlamaModel`, say).

    Raises:
        PlanError: a pattern matches nothing, a parameter is not covered, or a dim does not divide
            by its axis.
    """
    shapes = dict(model.parameters() if parameters is None else parameters)
    layout = heads.choose(model.query_heads, model.kv_heads, mesh.model)
    draft = Plan(model=model, mesh=mesh, head_layout=layout, placements=())
    rules = [*_default_rules(model, shapes)]
    for pattern, style in (overrides or {}).items():
        rules.append(_Rule(pattern, style, f"asked for by the pattern {pattern!r}"))
    chosen = _choose(rules, shapes, model)
    placements = [_place(draft, name, shape, chosen[name]) for name, shape in shapes.items()]
    return Plan(
        model=model,
        mesh=mesh,
        head_layout=layout,
        placements=(*placements, *_run_placements(draft)),
    )


def _default_rules(model: ModelSpec, shapes: Shapes) -> Iterator[_Rule]:
    prefix = "model." if any(name.startswith("model.") for name in shapes) else ""
    for module, theirs in model.tp_plan.items():
        style = TRANSFORMERS_STYLES.get(theirs, theirs)
        if style not in STYLES:
            raise PlanError(
                lines(
                    f"transformers' plan gives {module!r} the style {theirs!r}",
                    f"expected one of {', '.join(STYLES)}",
                )
            )
        yield _Rule(f"{prefix}{module}.*", style, _REASONS[style])
    tie = "; the head shares it" if model.tied else ""
    lookup = f"rows split: each device looks up its own ids, one all-reduce{tie}"
    yield _Rule(f"{prefix}embed_tokens.weight", "vocab", lookup)
    for norm in ("layers.*.input_layernorm", "layers.*.post_attention_layernorm", "norm"):
        reason = "norms are small: every device holds them"
        yield _Rule(f"{prefix}{norm}.weight", "replicate", reason)
    if "lm_head.weight" in shapes:
        scores = "rows split: each device scores its own ids, only candidates are gathered"
        yield _Rule("lm_head.weight", "vocab", scores)


def _choose(rules: Sequence[_Rule], shapes: Shapes, model: ModelSpec) -> dict[str, _Rule]:
    """The rule of every parameter: of those that match it the last."""
    chosen: dict[str, _Rule] = {}
    for rule in rules:
        matched = [name for name in shapes if matches(rule.pattern, name)]
        if not matched:
            tied = model.tied and "lm_head" in rule.pattern
            hint = "lm_head.weight is tied to model.embed_tokens.weight; " if tied else ""
            raise PlanError(
                lines(
                    f"plan pattern {rule.pattern!r} matches no parameter",
                    f"{hint}expected a name such as {listed(list(shapes)[1:2])}",
                )
            )
        chosen.update(dict.fromkeys(matched, rule))
    uncovered = [name for name in shapes if name not in chosen]
    if uncovered:
        raise PlanError(
            lines(
                f"no rule of the plan covers {listed(uncovered)}",
                "add a pattern for it, as 'replicate' if nothing else fits",
            )
        )
    return chosen


def _place(draft: Plan, name: str, source: tuple[int, ...], rule: _Rule) -> Placement:
    style, reason = rule.style, rule.reason
    shape, layout = _laid_out(draft, name, source)
    if layout:
        reason = f"{reason}; {layout}"
    axes = axes_of(name, len(source), style)
    if style == "rowwise" and len(source) == 1:
        reason = "added once, after the all-reduce: every device holds it"
    for dim, (size, axis) in enumerate(zip(shape, axes, strict=True)):
        parts = draft.mesh.size(axis)
        if size % parts:
            raise PlanError(
                lines(
                    f"{name} dim {dim} has size {size}, "
                    f"which axis {axis!r} ({parts} devices) does not divide",
                    "expected a multiple; only heads, intermediate and vocabulary are padded",
                )
            )
    return Placement(
        name=name,
        kind="parameter",
        source_shape=source,
        shape=shape,
        axes=axes,
        style=style if isinstance(style, str) else "axes",
        reason=reason,
    )


def _laid_out(draft: Plan, name: str, source: tuple[int, ...]) -> tuple[tuple[int, ...], str]:
    """A parameter's shape after head layout and padding, and why it is not the checkpoint's."""
    blocks = draft.blocks(name)
    if blocks is None:
        return source, ""
    dim = blocks.dim
    if blocks.source_size != source[dim]:
        raise PlanError(
            lines(
                f"{name} has shape {list(source)}",
                f"expected {blocks.source_size} in dim {dim}, from the config",
            )
        )
    if blocks.size == source[dim]:
        return source, ""
    padded = f"padded from {source[dim]} to {blocks.size}"
    reason = padded if blocks.heads is None else draft.head_layout.reason
    return (*source[:dim], blocks.size, *source[dim + 1 :]), reason


def _run_placements(draft: Plan) -> Iterator[Placement]:
    """The tensors that come with a run: rotary table, KV cache, inputs, logits."""
    model, slots = draft.model, draft.head_layout.slots
    frequencies = (model.head_dim // 2,)

    def placed(
        name: str,
        kind: TensorKind,
        shape: tuple[int | str, ...],
        axes: Axes,
        reason: str,
        *,
        source: tuple[int | str, ...] | None = None,
    ) -> Placement:
        return Placement(
            name=name,
            kind=kind,
            source_shape=source or shape,
            shape=shape,
            axes=axes,
            style="run",
            reason=reason,
        )

    reason = "rotary frequencies: every device rotates its own heads"
    yield placed("model.rotary_emb.inv_freq", "buffer", frequencies, (None,), reason)
    if model.rope == "longrope":
        reason = "rotary frequencies for texts longer than the model was trained on"
        yield placed("model.rotary_emb.long_inv_freq", "buffer", frequencies, (None,), reason)
    reason = f"rows over data, heads over model; {draft.head_layout.reason}"
    for name in ("cache.key", "cache.value"):
        yield placed(
            name,
            "cache",
            ("B", slots, "T", model.head_dim),
            (DATA, MODEL, None, None),
            reason,
            source=("B", model.kv_heads, "T", model.head_dim),
        )
    yield placed("input.ids", "input", ("B", "S"), (DATA, None), "rows over data")
    yield placed("input.positions", "input", ("B",), (DATA,), "rows over data")
    if model.rope in LENGTH_DEPENDENT:
        reason = "the longest row's length, which rotary frequencies follow"
        yield placed("input.span", "input", (1,), (None,), reason)
    reason = "rows over data, vocabulary over model; never gathered to sample"
    source = ("B", model.vocab)
    yield placed(
        "output.logits", "output", ("B", draft.vocab), (DATA, MODEL), reason, source=source
    )
