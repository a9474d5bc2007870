"""Forward and backward of one micro-step on each device's own part, through transformers' unmodified forward.

The model is run layer by layer as autograd's graphs: each layer starts from a leaf, and going back they are taken up in reverse order. So a layer can be run again for its backward pass
instead of kept (Chen et al., "Training Deep Nets with Sublinear Memory Cost", 2016), and its weights put together anew. Gradients of matrices don't go through autograd but into `Gradients`,
where those of all micro-steps are summed before anything crosses "data".

Shapes: `B` rows of a device, `S` positions, `E` hidden, `O` out, `N = B * S`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from ...engine.torch_xla.mesh import DeviceMesh
from ...engine.torch_xla.ordering import (
    TRIGONOMETRIC,
    after,
    all_there,
    barrier,
    kept_apart,
    one_unknown_to_xla,
)
from ...engine.torch_xla.scopes import scope
from ...plan.mesh_shape import DATA, MODEL
from ...plan.train_collectives import BACKWARD
from ..layout import TrainingPlan
from ..options import StepOptions
from . import regions
from .objective import token_losses
from .weights import Weight, product, scaled

_plain_linear = torch.nn.functional.linear
_PRODUCTS = {torch.Tensor.mul, torch.Tensor.__mul__, torch.mul}


class Gradients:
    """Sums of gradients by parameter name, in float32, each as the device's part of the weight put together over "data"."""

    def __init__(self) -> None:
        self.sums: dict[str, torch.Tensor] = {}

    def add(self, name: str, gradient: torch.Tensor) -> None:
        gradient = gradient.float()
        # A barrier, or XLA would add them up where the sum is used: every micro-step's gradients would be kept.
        self.sums[name] = barrier(self.sums[name] + gradient) if name in self.sums else gradient

    def all_there(self, one: torch.Tensor) -> torch.Tensor | None:
        """A number `[1]` that is only there when every sum so far is; None if there is none.

        Args:
            one: see `ordering.all_there`.
        """
        return all_there(self.sums.values(), one) if self.sums else None


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
        ranks: `[1, 1]` int64, the device's place along "model".
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
        self._rank = rank
        self._along = options.sequence_parallel and mesh.shape.model > 1
        self._trained = {placement.name for placement in plan.trained}
        self._anchor = torch.zeros((), device=rank.device, requires_grad=True)
        self._weights: dict[str, Weight] = {}
        self._vectors: dict[str, torch.Tensor] = {}
        for placement in plan.parameters:
            name, part = placement.name, parts[placement.name]
            if part.dim() == 1:
                self._vectors[name] = (
                    part.to(self._dtype).detach().requires_grad_(name in self._trained)
                )
            else:
                sink = (
                    (lambda gradient, name=name: self.gradients.add(name, gradient))
                    if name in self._trained
                    else None
                )
                gather = placement.axes.index(DATA) if DATA in placement.axes else None
                self._weights[name] = Weight(
                    name.removesuffix(".weight"),
                    mesh,
                    part,
                    gather,
                    self._dtype,
                    sink,
                    self._anchor,
                )
        self._buffers = buffers
        self._by_tensor = {id(weight.part): name for name, weight in self._weights.items()}
        self._scales = (
            {id(vector) for vector in self._vectors.values()}
            if mesh.backend.weights_first
            else set()
        )
        self._one = one_unknown_to_xla(rank)
        self._tape: list[_Run] = []
        self._after: torch.Tensor | None = None

    def run(
        self, micro_step: MicroStep, scale: torch.Tensor | None, dropout: Dropout | None = None
    ) -> torch.Tensor:
        """The sum of the losses of a device's positions, fp32 scalar. Where `scale` is given, gradients of `scale * sum` are added to those before."""
        with self._installed(), _Form(self), torch.set_grad_enabled(scale is not None):
            self._tape, self._micro_step, self._dropout = [], micro_step, dropout
            self._after = self.gradients.all_there(self._one) if scale is not None else None
            hidden = self.base(
                input_ids=micro_step.ids,
                position_ids=micro_step.positions,
                use_cache=False,
                documents=micro_step.documents,
            ).last_hidden_state
            loss = self._loss(hidden, micro_step.targets)
            if scale is not None:
                self._backward(loss, scale)
        return loss.detach()

    # -- forward

    def scaled(self, factor: Any, other: Any) -> torch.Tensor | None:
        """Their product, if one is the weight of a norm whose gradient is summed by a product."""
        return (
            scaled(factor, other, self._one)
            if id(factor) in self._scales and torch.is_grad_enabled()
            else None
        )

    def linear(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        name = self._by_tensor[id(weight)]
        out = product(x, self._weights[name])
        base = name.removesuffix(".weight")
        adapter = f"{base}.lora_A.weight"
        if adapter in self._weights:
            assert self.options.lora is not None
            dropped = x if self._dropout is None else self._dropout(x, base)
            low = product(dropped, self._weights[adapter])
            out = (
                out + product(low, self._weights[f"{base}.lora_B.weight"]) * self.options.lora.scale
            )
        if self.plan[name].axes[1] == MODEL:
            out = regions.leave(out, self.mesh, along_sequence=self._along, name=base)
        return out if bias is None else out + bias

    def embedding(self, ids: torch.Tensor) -> torch.Tensor:
        """`[B, S]` -> `[B, S, E]`, or the device's part of `S`. Its gradient is added by `_backward`.

        A micro-step begins when the one before is done: XLA would run all of them forward first, and keep the activations of all.
        """
        rows = self._embedded(ids)
        return rows if self._after is None else after(rows, self._after)

    def _embedded(self, ids: torch.Tensor) -> torch.Tensor:
        table = self._weights["model.embed_tokens.weight"].whole(ids)
        if not self.plan.split("embed_tokens"):
            return torch.nn.functional.embedding(ids, table)
        own, place = self._own_rows(ids, table.shape[0])
        rows = torch.nn.functional.embedding(place, table)
        rows = torch.where(
            own[..., None], rows, torch.zeros((), dtype=rows.dtype, device=rows.device)
        )
        return regions.leave_forward(rows, self.mesh, along_sequence=self._along)

    def _own_rows(self, ids: torch.Tensor, rows: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which ids are among the device's rows of the table, and which row each is; 0 for others."""
        place = ids - self._rank * rows
        own = (place >= 0) & (place < rows)
        return own, torch.where(own, place, torch.zeros_like(place))

    def _loss(self, hidden: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        split = self.plan.split("lm_head") and self.mesh.shape.model > 1
        with scope("lm_head"):
            if split:
                hidden = regions.enter(
                    hidden, self.mesh, along_sequence=self._along, name="lm_head"
                )
            logits = product(hidden, self._weights[self.plan.head]).flatten(0, 1)
        with scope("loss"):
            places = torch.arange(logits.shape[-1], device=logits.device)
            if split:
                places = places + self._rank[0] * logits.shape[-1]
            real = (
                places < self.plan.model.vocab if self.plan.vocab != self.plan.model.vocab else None
            )
            losses = token_losses(
                logits, targets.flatten(), places, real=real, mesh=self.mesh if split else None
            )
            return losses.sum()

    # -- backward

    def _backward(self, loss: torch.Tensor, scale: torch.Tensor) -> None:
        last = self._tape[-1].following
        gradient = self._grad(
            loss, scale, last, {"model.norm.weight": self._vectors["model.norm.weight"]}
        )
        for layer, run in reversed(list(enumerate(self._tape))):
            if gradient is None:
                return
            names = {
                name: vector
                for name, vector in self._vectors.items()
                if name.startswith(f"model.layers.{layer}.")
            }
            if self.options.rematerialized(layer):
                run = run.again(gradient)
            gradient = self._grad(run.output, gradient, run.input, names)
        name = "model.embed_tokens.weight"
        if gradient is not None and name in self._trained:
            with scope(f"model.embed_tokens{BACKWARD}"):
                self.gradients.add(name, self._embedding_gradient(gradient.detach(), name))

    def _grad(
        self,
        output: torch.Tensor,
        gradient: torch.Tensor,
        input: torch.Tensor,
        vectors: Mapping[str, torch.Tensor],
    ) -> torch.Tensor | None:
        """Go back through one graph: vectors' gradients are kept, the input's is returned, None if it needs none."""
        wanted = [name for name, vector in vectors.items() if vector.requires_grad]
        inputs = [input] if input.requires_grad else []
        asked = [*inputs, *(vectors[name] for name in wanted), self._anchor]
        found = torch.autograd.grad([output], asked, [gradient], allow_unused=True)
        for name, each in zip(wanted, found[len(inputs) : -1], strict=True):
            assert each is not None, name
            self.gradients.add(name, each)
        return found[0] if inputs else None

    def _embedding_gradient(self, gradient: torch.Tensor, name: str) -> torch.Tensor:
        weight = self._weights[name]
        rows = weight.part.shape[0] * (self.mesh.shape.data if weight.gather == 0 else 1)
        ids = self._micro_step.ids
        if self.plan.split("embed_tokens"):
            gradient = regions.leave_backward(gradient, self.mesh, along_sequence=self._along)
            own, ids = self._own_rows(ids, rows)
            gradient = torch.where(
                own[..., None],
                gradient,
                torch.zeros((), dtype=gradient.dtype, device=gradient.device),
            )
        flat = gradient.flatten(0, 1).float()
        if (
            self.base.embed_tokens.padding_idx is not None
        ):  # torch's embedding learns nothing for it
            flat = torch.where(
                (self._micro_step.ids == self.base.embed_tokens.padding_idx).flatten()[:, None],
                torch.zeros((), device=flat.device),
                flat,
            )
        return flat.new_zeros(rows, flat.shape[1]).index_add_(0, ids.flatten(), flat)

    # -- the model's parts

    @contextmanager
    def _installed(self) -> Iterator[None]:
        """Within: the model has the device's parts as its parameters, and its layers keep a tape."""
        undo: list[Callable[[], None]] = []
        tensors = {name: weight.part for name, weight in self._weights.items()} | self._vectors
        for module_name, module in self.base.named_modules():
            for leaf in list(module._parameters):
                name = f"model.{module_name}.{leaf}" if module_name else f"model.{leaf}"
                if module._parameters[leaf] is not None:
                    undo.append(_replaced(module._parameters, leaf, tensors[name]))
            for leaf in list(module._buffers):
                if f"{module_name}.{leaf}" in self._buffers:
                    undo.append(
                        _replaced(module._buffers, leaf, self._buffers[f"{module_name}.{leaf}"])
                    )
        for number, layer in enumerate(self.base.layers):
            layer.forward = _Layer(self, layer.forward, number)
            undo.append(partial(delattr, layer, "forward"))
            for part in ("self_attn", "mlp"):
                name = f"model.layers.{number}.{part}"
                if self.plan.split(name) and self.mesh.shape.model > 1:
                    undo.append(
                        getattr(layer, part)
                        .register_forward_pre_hook(partial(self._enter, name), with_kwargs=True)
                        .remove
                    )
        try:
            yield
        finally:
            for each in reversed(undo):
                each()

    def _enter(
        self, name: str, _module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """A pre-hook: what is split over "model" takes the residual stream in whole."""
        entered = regions.enter(
            args[0] if args else kwargs["hidden_states"],
            self.mesh,
            along_sequence=self._along,
            name=name,
        )
        return (
            ((entered, *args[1:]), kwargs) if args else (args, kwargs | {"hidden_states": entered})
        )


Dropout = Callable[[torch.Tensor, str], torch.Tensor]
"""An adapter's inputs, and the name of its linear -> the same with some dropped."""


@dataclass(frozen=True, kw_only=True)
class _Run:
    """One run of a layer.

    Attributes:
        input, output: where its graph begins and ends.
        following: what the next layer begins with: the output, without the graph.
        call: runs it from an input.
    """

    input: torch.Tensor
    output: torch.Tensor
    following: torch.Tensor
    call: Callable[[torch.Tensor], torch.Tensor]

    def again(self, gradient: torch.Tensor) -> _Run:
        """The layer run once more for its backward pass, when that has come to it. XLA must not see that it is the same again, or it would keep the first run's values."""
        input = after(self.input.detach(), gradient)
        input.requires_grad_(self.input.requires_grad)
        return _Run(input=input, output=self.call(input), following=self.following, call=self.call)


class _Layer:
    """A layer's forward that starts a graph of its own and notes it on the tape."""

    def __init__(self, passes: Passes, forward: Callable[..., torch.Tensor], number: int) -> None:
        self._passes, self._forward, self._number = passes, forward, number

    def __call__(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return self._forward(hidden_states, **kwargs)
        passes = self._passes
        if hidden_states.grad_fn is not None or not hidden_states.is_leaf or self._number == 0:
            hidden_states = hidden_states.detach().requires_grad_(
                "model.embed_tokens.weight" in passes._trained
            )

        def call(input: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                return self._forward(input, **kwargs)

        if passes.options.rematerialized(self._number):
            with torch.no_grad():
                output = self._forward(hidden_states, **kwargs)
            needs = True
        else:
            output = call(hidden_states)
            needs = output.requires_grad
        following = output.detach().requires_grad_(needs)
        passes._tape.append(
            _Run(input=hidden_states, output=output, following=following, call=call)
        )
        return following


class _Form(TorchFunctionMode):
    """The model's linears and its embedding go to `Passes`; its rotary table is computed once."""

    def __init__(self, passes: Passes) -> None:
        super().__init__()
        self._passes = passes

    def __torch_function__(
        self,
        function: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        if function is _plain_linear:
            given = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs or {})
            return self._passes.linear(given["input"], given["weight"], given.get("bias"))
        if (
            function in _PRODUCTS
            and not kwargs
            and (found := self._passes.scaled(*args)) is not None
        ):
            return found
        if function in TRIGONOMETRIC and self._passes.mesh.backend.weights_first:
            return kept_apart(function(*args, **(kwargs or {})))
        if function is torch.nn.functional.embedding and id(args[1]) in self._passes._by_tensor:
            return self._passes.embedding(args[0])
        return function(*args, **(kwargs or {}))


def _replaced(holder: dict[str, Any], key: str, value: Any) -> Callable[[], None]:
    before = holder[key]
    holder[key] = value
    return lambda: holder.__setitem__(key, before)
