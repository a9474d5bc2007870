"""Forward and backward of one micro-step, on each device's own part.

The model is transformers', unmodified; each of its layers is an autograd graph of its own (see
`layer_graphs`), for which weights are all-gathered anew. Gradients of matrices don't go through
autograd but into `Gradients`, which sums those of all micro-steps before they are transferred over
"data". Shapes: `B` rows of a device, `S` positions, `E` hidden.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch

from ...engine.torch_xla.mesh import DeviceMesh
from ...engine.torch_xla.ops import held_until, scope
from ...plan.mesh_shape import DATA, MODEL
from ...plan.train_collectives import BACKWARD
from ..layout import TrainingPlan
from ..options import StepOptions
from . import regions
from .gradients import Gradients
from .layer_graphs import Tape, TapedLayer
from .model_parts import ModelForm, parts_in_place
from .objective import token_losses
from .weights import Weight, product, scaled

_EMBEDDING, _NORM = "model.embed_tokens.weight", "model.norm.weight"
InputDropout = Callable[[torch.Tensor, str], torch.Tensor]
"""An adapter's inputs, and the name of its linear -> the same with some dropped."""


@dataclass(frozen=True, kw_only=True)
class MicroStep:
    """What a device has of a micro-step; each `[B, S]` int64, as in `batch.Batch`."""

    ids: torch.Tensor
    targets: torch.Tensor
    positions: torch.Tensor
    documents: torch.Tensor


class Passes:
    """Runs micro-steps of one optimizer step and sums their gradients.

    Args:
        base: the transformers model without its head, its parameters on the meta device.
        parts: by parameter name, each device's part.
        buffers: by name within the causal LM, what replaces the model's own.
        rank: `[1]` int64, the device's place along "model".
    """

    def __init__(
        self,
        base: Any,
        plan: TrainingPlan,
        mesh: DeviceMesh,
        options: StepOptions,
        parts: Mapping[str, torch.Tensor],
        buffers: Mapping[str, torch.Tensor],
        rank: torch.Tensor,
    ) -> None:
        self.base, self.plan, self.mesh, self.options = base, plan, mesh, options
        self.gradients = Gradients()
        self._dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
        self._rank, self._buffers = rank, buffers
        self._along_sequence = options.sequence_parallel and mesh.shape.model > 1
        self._trained = {placement.name for placement in plan.trained}
        self._anchor = torch.zeros((), device=rank.device, requires_grad=True)
        self._weights: dict[str, Weight] = {}
        self._vectors: dict[str, torch.Tensor] = {}
        for placement in plan.parameters:
            name, part = placement.name, parts[placement.name]
            trained = name in self._trained
            if part.dim() == 1:
                vector = part.to(self._dtype).detach()
                self._vectors[name] = vector.requires_grad_(trained)
                continue
            self._weights[name] = Weight(
                module=name.removesuffix(".weight"),
                mesh=mesh,
                part=part,
                gather=placement.axes.index(DATA) if DATA in placement.axes else None,
                dtype=self._dtype,
                sink=partial(self.gradients.add, name) if trained else None,
                anchor=self._anchor,
            )
        self._by_tensor = {id(weight.part): name for name, weight in self._weights.items()}
        self._scales: set[int] = set()
        if mesh.backend.weights_first:
            self._scales = {id(vector) for vector in self._vectors.values()}
        self._one = (rank.flatten()[:1] >= 0).float()
        self._dropout: InputDropout | None = None
        self._after: torch.Tensor | None = None

    def run(
        self, micro_step: MicroStep, scale: torch.Tensor | None, dropout: InputDropout | None = None
    ) -> torch.Tensor:
        """The sum of the losses of a device's positions, fp32 scalar.

        Args:
            scale: gradients of `scale * sum` are added to those before; None computes none.
            dropout: of adapters' inputs.
        """
        tape = Tape(self.options, input_trained=_EMBEDDING in self._trained)
        form = ModelForm(self, unfused_rotary=self.mesh.backend.weights_first)
        with self._installed(tape), form, torch.set_grad_enabled(scale is not None):
            self._dropout = dropout
            self._after = self.gradients.all_there(self._one) if scale is not None else None
            hidden = self.base(
                input_ids=micro_step.ids,
                position_ids=micro_step.positions,
                use_cache=False,
                documents=micro_step.documents,
            ).last_hidden_state
            loss = self._loss(hidden, micro_step.targets)
            if scale is not None:
                self._backward(tape, loss, scale, micro_step.ids)
        return loss.detach()

    @contextmanager
    def _installed(self, tape: Tape) -> Iterator[None]:
        """Within: the model has the device's parts, and its layers write the tape."""
        tensors = {name: weight.part for name, weight in self._weights.items()}
        undo: list[Callable[[], None]] = []
        with parts_in_place(self.base, tensors | self._vectors | dict(self._buffers)):
            for number, layer in enumerate(self.base.layers):
                layer.forward = TapedLayer(tape, layer.forward, number)
                undo.append(partial(delattr, layer, "forward"))
                for part in ("self_attn", "mlp"):
                    name = f"model.layers.{number}.{part}"
                    if self.plan.split(name) and self.mesh.shape.model > 1:
                        hook = getattr(layer, part).register_forward_pre_hook(
                            partial(self._enter, name), with_kwargs=True
                        )
                        undo.append(hook.remove)
            try:
                yield
            finally:
                for each in reversed(undo):
                    each()

    # -- forward

    def scaled(self, factor: Any, other: Any) -> torch.Tensor | None:
        """A norm's weight times its input, where the weight's gradient is summed by a product."""
        if id(factor) in self._scales and torch.is_grad_enabled():
            return scaled(factor, other, self._one)
        return None

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """A linear by its part of the weight, with its adapter, summed over "model" if need be."""
        name = self._by_tensor[id(weight)]
        base = name.removesuffix(".weight")
        out = product(x, self._weights[name])
        low = self._weights.get(f"{base}.lora_A.weight")
        if low is not None and self.options.lora is not None:
            dropped = x if self._dropout is None else self._dropout(x, base)
            high = self._weights[f"{base}.lora_B.weight"]
            out = out + product(product(dropped, low), high) * self.options.lora.scale
        if self.plan[name].axes[1] == MODEL:
            out = regions.leave(out, self.mesh, along_sequence=self._along_sequence, name=base)
        return out if bias is None else out + bias

    def embedding(self, ids: torch.Tensor, table: torch.Tensor) -> torch.Tensor | None:
        """`[B, S]` -> `[B, S, E]`, or the device's part of `S`. `_backward` adds its gradient.

        A micro-step begins when the one before is done. XLA would run all of them forward first,
        and keep the activations of all.
        """
        if id(table) not in self._by_tensor:
            return None
        rows = self._embedded(ids)
        return rows if self._after is None else held_until(rows, self._after)

    def _embedded(self, ids: torch.Tensor) -> torch.Tensor:
        table = self._weights[_EMBEDDING].whole(ids)
        if not self.plan.split("embed_tokens"):
            return torch.nn.functional.embedding(ids, table)
        own, place = self._own_rows(ids, table.shape[0])
        rows = _kept(own, torch.nn.functional.embedding(place, table))
        return regions.leave_forward(rows, self.mesh, along_sequence=self._along_sequence)

    def _own_rows(self, ids: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which ids are among the device's rows of the table, and which row each is; else 0."""
        place = ids - self._rank * rows
        own = (place >= 0) & (place < rows)
        return own, torch.where(own, place, torch.zeros_like(place))

    def _loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        mesh, along_sequence = self.mesh, self._along_sequence
        split = self.plan.split("lm_head") and mesh.shape.model > 1
        with scope("lm_head"):
            if split:
                hidden = regions.enter(hidden, mesh, along_sequence=along_sequence, name="lm_head")
            logits = product(hidden, self._weights[self.plan.head]).flatten(0, 1)
        with scope("loss"):
            places = torch.arange(logits.shape[-1], device=logits.device)
            if split:
                places = places + self._rank[0] * logits.shape[-1]
            vocab = self.plan.model.vocab
            real = places < vocab if self.plan.vocab != vocab else None
            losses = token_losses(
                logits, targets.flatten(), places, real=real, mesh=mesh if split else None
            )
            return losses.sum()

    def _enter(
        self, name: str, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A pre-hook: what is split over "model" takes the whole residual stream in."""
        hidden = args[0] if args else kwargs["hidden_states"]
        entered = regions.enter(hidden, self.mesh, along_sequence=self._along_sequence, name=name)
        if args:
            return (entered, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": entered}

    # -- backward

    def _backward(
        self, tape: Tape, loss: torch.Tensor, scale: torch.Tensor, ids: torch.Tensor
    ) -> None:
        last = tape.runs[-1].following
        gradient = self._grad(loss, scale, last, {_NORM: self._vectors[_NORM]})
        for layer, run in reversed(list(enumerate(tape.runs))):
            if gradient is None:
                return
            prefix = f"model.layers.{layer}."
            vectors = {
                name: vector for name, vector in self._vectors.items() if name.startswith(prefix)
            }
            if self.options.rematerialized(layer):
                run = run.again(gradient)
            gradient = self._grad(run.output, gradient, run.input, vectors)
        if gradient is not None and _EMBEDDING in self._trained:
            with scope(f"model.embed_tokens{BACKWARD}"):
                self.gradients.add(_EMBEDDING, self._embedding_gradient(gradient.detach(), ids))

    def _grad(
        self,
        output: torch.Tensor,
        gradient: torch.Tensor,
        input: torch.Tensor,
        vectors: Mapping[str, torch.Tensor],
    ) -> torch.Tensor | None:
        """The backward pass of one graph.

        Returns:
            The input's gradient, None if it needs none. The vectors' gradients are added up.
        """
        wanted = [name for name, vector in vectors.items() if vector.requires_grad]
        inputs = [input] if input.requires_grad else []
        asked = [*inputs, *(vectors[name] for name in wanted), self._anchor]
        found = torch.autograd.grad([output], asked, [gradient], allow_unused=True)
        for name, each in zip(wanted, found[len(inputs) : -1], strict=True):
            assert each is not None, name  # a layer uses every vector of its own
            self.gradients.add(name, each)
        return found[0] if inputs else None

    def _embedding_gradient(self, gradient: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """`[rows, E]` fp32, of the device's rows of the table."""
        weight, padding = self._weights[_EMBEDDING], self.base.embed_tokens.padding_idx
        rows = weight.part.shape[0] * (self.mesh.shape.data if weight.gather == 0 else 1)
        place = ids
        if self.plan.split("embed_tokens"):
            gradient = regions.leave_backward(
                gradient, self.mesh, along_sequence=self._along_sequence
            )
            own, place = self._own_rows(ids, rows)
            gradient = _kept(own, gradient)
        flat = gradient.flatten(0, 1).float()
        if padding is not None:  # torch's embedding learns nothing for it
            flat = _kept((ids != padding).flatten(), flat)
        return flat.new_zeros(rows, flat.shape[1]).index_add_(0, place.flatten(), flat)


def _kept(kept: torch.Tensor, rows: torch.Tensor) -> torch.Tensor:
    """Rows `[..., E]`, zero where `kept` `[...]` is false."""
    return torch.where(kept[..., None], rows, torch.zeros((), dtype=rows.dtype, device=rows.device))
