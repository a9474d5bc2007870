"""The activations of a model at which two runs of it are compared, in the order they are computed.

An activation is the output of a module, `[B, S, W]`. Where parts of a module have activations of
their own, the module's is what it computes besides them:

- `self_attn` is rotary embedding, scores and their mixture: the input of `o_proj`;
- `mlp` is the activation function times `up_proj`: the input of `down_proj`;
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

_ROTARY = "model.rotary_emb"
Kind = Literal["lookup", "table", "product", "attention"]
Hook = Callable[[str, torch.Tensor], torch.Tensor | None]
"""Called with an activation's name and tensor. It may return a tensor to go on with instead."""


@dataclass(frozen=True, kw_only=True)
class Activation:
    """One activation.

    Attributes:
        name: of its module.
        inputs: the activations that it is computed from.
        terms: length of the sums in it.
        depth: number of decoder layers up to it, with the one that it is in.
        kind: how it is computed.
        like: a parameter and a dim of it: the activation's last dim is split as that dim is. None
            if every device has the whole last dim.
        into: the module that takes it as input, where it isn't the output of `name`.
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


def activations(spec: ModelSpec) -> tuple[Activation, ...]:
    """All activations of a causal LM, in the order in which they are computed."""
    stream = "model.embed_tokens"
    found = [
        Activation(name=stream, inputs=(), terms=1, depth=0, kind="lookup"),
        Activation(name=_ROTARY, inputs=(), terms=1, depth=0, kind="table"),
    ]
    for index in range(spec.layers):
        found += _of_layer(spec, index, stream)
        stream = found[-1].name
    head = "model.embed_tokens.weight" if spec.tied else "lm_head.weight"
    norm = Activation(name="model.norm", inputs=(stream,), terms=spec.hidden, depth=spec.layers)
    logits = Activation(
        name="lm_head", inputs=(norm.name,), terms=spec.hidden, depth=spec.layers, like=(head, 0)
    )
    return (*found, norm, logits)


def _of_layer(spec: ModelSpec, index: int, stream: str) -> list[Activation]:
    """The activations of a decoder layer; the last one is the layer's output.

    Args:
        stream: name of the layer's input.
    """
    layer, hidden = f"model.layers.{index}", spec.hidden
    found: list[Activation] = []

    def add(name: str, inputs: tuple[str, ...], terms: int, **more: Any) -> str:
        made = Activation(
            name=f"{layer}.{name}", inputs=inputs, terms=terms, depth=index + 1, **more
        )
        found.append(made)
        return made.name

    normed = add("input_layernorm", (stream,), hidden)
    mixed = []
    for letter in "qkv":
        like = (f"{layer}.self_attn.{letter}_proj.weight", 0)
        made = add(f"self_attn.{letter}_proj", (normed,), hidden, like=like)
        if spec.head_norms and letter != "v":
            made = add(f"self_attn.{letter}_norm", (made,), spec.head_dim, like=like)
        mixed.append(made)
    output = f"{layer}.self_attn.o_proj"
    mixture = add(
        "self_attn",
        (*mixed, _ROTARY),
        spec.head_dim,
        kind="attention",
        like=(f"{output}.weight", 1),
        into=output,
    )
    attended = add("self_attn.o_proj", (mixture,), spec.query_heads * spec.head_dim)
    normed = add("post_attention_layernorm", (stream, attended), hidden)
    gate = add("mlp.gate_proj", (normed,), hidden, like=(f"{layer}.mlp.gate_proj.weight", 0))
    up = add("mlp.up_proj", (normed,), hidden, like=(f"{layer}.mlp.up_proj.weight", 0))
    down = f"{layer}.mlp.down_proj"
    product = add("mlp", (gate, up), 1, like=(f"{down}.weight", 1), into=down)
    lowered = add("mlp.down_proj", (product,), spec.intermediate)
    inputs = (stream, attended, lowered)
    return [*found, Activation(name=layer, inputs=inputs, terms=1, depth=index + 1)]


@contextmanager
def hooked(
    watched: tuple[Activation, ...], module: Callable[[str], torch.nn.Module], hook: Hook
) -> Iterator[None]:
    """Within: `hook` is called with every watched activation of a model that runs.

    Args:
        module: gives a module of the model by its name.
        hook: is given tensors `[B, S, W]`.
    """
    handles = [_register(activation, module, hook) for activation in watched]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _register(
    activation: Activation, module: Callable[[str], torch.nn.Module], hook: Hook
) -> torch.utils.hooks.RemovableHandle:
    def replaced(tensor: torch.Tensor) -> torch.Tensor | None:
        flat = tensor if tensor.dim() == 3 else tensor.flatten(2)
        instead = hook(activation.name, flat)
        return None if instead is None else instead.reshape(tensor.shape)

    def of_input(_module: Any, arguments: tuple[Any, ...]) -> Any:
        instead = replaced(arguments[0])
        return None if instead is None else (instead, *arguments[1:])

    def of_output(_module: Any, _arguments: Any, output: Any) -> Any:
        if activation.kind != "table":
            return replaced(output)
        instead = replaced(torch.cat(output, dim=-1))
        return None if instead is None else instead.chunk(2, dim=-1)

    if activation.into is not None:
        return module(activation.into).register_forward_pre_hook(of_input)
    return module(activation.name).register_forward_hook(of_output)
