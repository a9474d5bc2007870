"""Every layer as an autograd graph of its own, so that it can be run again for its backward pass.

The forward pass notes each layer's graph on a tape, and the backward pass takes them in reverse
order. Rematerialization is that of Chen et al., "Training Deep Nets with Sublinear Memory Cost",
2016.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from ...engine.torch_xla.ordering import after
from ..options import StepOptions


@dataclass(frozen=True, kw_only=True)
class LayerRun:
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

    def again(self, gradient: torch.Tensor) -> LayerRun:
        """The layer run once more for its backward pass, when `gradient` has come to it.

        XLA must not see that it is the same run again, or it would keep the first run's values.
        """
        input = after(self.input.detach(), gradient)
        input.requires_grad_(self.input.requires_grad)
        return LayerRun(
            input=input, output=self.call(input), following=self.following, call=self.call
        )


class Tape:
    """The layers' graphs of one micro-step.

    Args:
        input_trained: the embedding is trained, so the first layer's input needs a gradient.
    """

    def __init__(self, options: StepOptions, *, input_trained: bool) -> None:
        self.options, self.input_trained = options, input_trained
        self.runs: list[LayerRun] = []


class TapedLayer:
    """A layer's forward that starts a graph of its own and notes it on the tape."""

    def __init__(self, tape: Tape, forward: Callable[..., torch.Tensor], number: int) -> None:
        self._tape, self._forward, self._number = tape, forward, number

    def __call__(self, hidden_states: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        if not torch.is_grad_enabled():
            return self._forward(hidden_states, **kwargs)
        if self._number == 0:
            hidden_states = hidden_states.detach().requires_grad_(self._tape.input_trained)

        def call(input: torch.Tensor) -> torch.Tensor:
            with torch.enable_grad():
                return self._forward(input, **kwargs)

        if self._tape.options.rematerialized(self._number):
            with torch.no_grad():
                output = self._forward(hidden_states, **kwargs)
            needs_gradient = True
        else:
            output = call(hidden_states)
            needs_gradient = output.requires_grad
        following = output.detach().requires_grad_(needs_gradient)
        self._tape.runs.append(
            LayerRun(input=hidden_states, output=output, following=following, call=call)
        )
        return following
