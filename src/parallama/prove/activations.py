"""The points of a model at which two runs of it are held against each other: what flows out of every module, in order.

A point is the output of a module, `[B, S, W]`. Where a module has parts with points of their own, it stands for what it does besides them:

- `self_attn` is rotary embedding, scores and mixture: what goes into `o_proj`;
- `mlp` is the activation and its product with `up_proj`: what goes into `down_proj`;
- `layers.3` is the two residual additions: the layer's output.

`model.rotary_emb` is cosines and sines, side by side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch

from ..model.spec import ModelSpec
from ..plan.mesh_shape import DATA, MODEL
from ..plan.placement import Plan
from .tolerance import Tolerance

Kind = Literal["lookup", "table", "product", "attention"]
Tap = Callable[[str, torch.Tensor], torch.Tensor | None]
"""Called with a point's name and its tensor; what it returns, if not None, goes on in the tensor's place."""


@dataclass(frozen=True, kw_only=True)
class Point:
    """One point.

    Attributes:
        name: of the module it stands for.
        inputs: the points that feed it.
        terms: length of the sums in it.
        depth: decoder layers behind it, the one that it is in included.
        like: a parameter, and the dim of it that lies as the point's last dim does; None if that dim is whole on every device.
        into: the module whose input it is, where it isn't the output of `name`.
    """

    name: str
    inputs: tuple[str, ...]
    terms: int
    depth: int
    kind: Kind = "product"
    like: tuple[str, int] | None = None
    into: str | None = None

    def axes(self, plan: Plan) -> tuple[str | None, ...]:
        """Mesh axis of each dim."""
        axis = None if self.like is None else plan[self.like[0]].axes[self.like[1]]
        return (DATA, None, axis if axis == MODEL else None)

    def alone(self, tolerance: Tolerance, positions: int) -> float:
        """How far it may be from the reference's if its inputs are the reference's."""
        if self.kind == "table":
            return tolerance.rotary(positions)
        if self.kind == "attention":
            return tolerance.attention(self.terms + positions)
        return tolerance.product(self.terms)


def points(spec: ModelSpec) -> tuple[Point, ...]:
    """All points of a causal LM, in the order in which they are computed."""
    hidden = spec.hidden
    query, table, stream = (
        spec.query_heads * spec.head_dim,
        "model.rotary_emb",
        "model.embed_tokens",
    )
    found = [
        Point(name=stream, inputs=(), terms=1, depth=0, kind="lookup"),
        Point(name=table, inputs=(), terms=1, depth=0, kind="table"),
    ]
    for index in range(spec.layers):
        layer, depth = f"model.layers.{index}", index + 1

        def point(
            name: str,
            inputs: tuple[str, ...],
            terms: int,
            *,
            at: str = layer,
            depth: int = depth,
            **more: Any,
        ) -> str:
            found.append(
                Point(name=f"{at}.{name}", inputs=inputs, terms=terms, depth=depth, **more)
            )
            return found[-1].name

        normed = point("input_layernorm", (stream,), hidden)
        fed = []
        for letter in "qkv":
            like = (f"{layer}.self_attn.{letter}_proj.weight", 0)
            made = point(f"self_attn.{letter}_proj", (normed,), hidden, like=like)
            if spec.head_norms and letter != "v":
                made = point(f"self_attn.{letter}_norm", (made,), spec.head_dim, like=like)
            fed.append(made)
        output, down = f"{layer}.self_attn.o_proj", f"{layer}.mlp.down_proj"
        mixed = point(
            "self_attn",
            (*fed, table),
            spec.head_dim,
            kind="attention",
            like=(f"{output}.weight", 1),
            into=output,
        )
        attended = point("self_attn.o_proj", (mixed,), query)
        normed = point("post_attention_layernorm", (stream, attended), hidden)
        gated = tuple(
            point(
                f"mlp.{name}_proj", (normed,), hidden, like=(f"{layer}.mlp.{name}_proj.weight", 0)
            )
            for name in ("gate", "up")
        )
        product = point("mlp", gated, 1, like=(f"{down}.weight", 1), into=down)
        lowered = point("mlp.down_proj", (product,), spec.intermediate)
        found.append(Point(name=layer, inputs=(stream, attended, lowered), terms=1, depth=depth))
        stream = layer
    found.append(Point(name="model.norm", inputs=(stream,), terms=hidden, depth=spec.layers))
    head = "model.embed_tokens.weight" if spec.tied else "lm_head.weight"
    found.append(
        Point(
            name="lm_head", inputs=("model.norm",), terms=hidden, depth=spec.layers, like=(head, 0)
        )
    )
    return tuple(found)


@contextmanager
def tapped(
    watched: tuple[Point, ...], module: Callable[[str], torch.nn.Module], tap: Tap
) -> Iterator[None]:
    """Within: every point of a model that runs goes through `tap`.

    Args:
        module: a module of the model by its name.
        tap: is given tensors `[B, S, W]`.
    """
    handles = [_hook(point, module, tap) for point in watched]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _hook(point: Point, module: Callable[[str], torch.nn.Module], tap: Tap) -> Any:
    def flat(tensor: torch.Tensor) -> torch.Tensor | None:
        instead = tap(point.name, tensor if tensor.dim() == 3 else tensor.flatten(2))
        return None if instead is None else instead.reshape(tensor.shape)

    def incoming(_module: Any, arguments: tuple[Any, ...]) -> Any:
        instead = flat(arguments[0])
        return None if instead is None else (instead, *arguments[1:])

    def outgoing(_module: Any, _arguments: Any, output: Any) -> Any:
        if point.kind != "table":
            return flat(output)
        instead = flat(torch.cat(output, dim=-1))
        return None if instead is None else instead.chunk(2, dim=-1)

    if point.into is not None:
        return module(point.into).register_forward_pre_hook(incoming)
    return module(point.name).register_forward_hook(outgoing)
