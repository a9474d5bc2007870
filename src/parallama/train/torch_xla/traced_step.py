"""What the programs of training compute: a step, an evaluation, gradients; each traced once.

A program is one manually partitioned region (see `regions`): all micro-steps, the reduction, the
clipping and the update are in it. So what is transferred between devices is what
`plan.train_collectives` says.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from ...engine.torch_xla.mesh import DeviceMesh
from ...engine.torch_xla.ordering import read_backwards
from ...engine.torch_xla.scopes import scope
from ...plan import heads
from ...plan.mesh_shape import DATA
from ...plan.placement import Axes
from ...plan.train_collectives import TOGETHER
from ..options import StepOptions
from . import lora, optimizer
from .passes import MicroStep, Passes
from .reduction import Reduction
from .state_layout import PARAMETER, STEP, StateLayout

INPUTS = ("ids", "targets", "positions", "documents")
BATCH_AXES: Axes = (None, DATA, None)
Tensors = Mapping[str, torch.Tensor]


class TracedStep:
    """The functions that are traced, from named tensors to named tensors.

    Arguments are the state, the inputs, `scalars` `[2]` fp32 (learning rate, one over the target
    tokens), and the constants.

    Args:
        base: the transformers model without its head, its parameters on the meta device.
        seed: of dropout.

    Attributes:
        constants: on the devices: rotary frequencies, each device's place along every axis, and
            which of the checkpoint's heads its blocks are.
    """

    def __init__(
        self,
        base: Any,
        layout: StateLayout,
        mesh: DeviceMesh,
        options: StepOptions,
        seed: int,
    ) -> None:
        self._base, self._layout, self._mesh = base, layout, mesh
        self._options, self._seed = options, seed
        self.constants: dict[str, torch.Tensor] = {}
        self._constant_axes: dict[str, Axes] = {}
        self._put("inv_freq", base.rotary_emb.inv_freq, (None,))
        for axis, size in mesh.shape.items():
            self._put(f"rank.{axis}", torch.arange(size), (axis,))
        self._heads = self._put_heads()

    def _put(self, name: str, tensor: torch.Tensor, axes: Axes) -> None:
        self.constants[name] = self._mesh.put(tensor, axes)
        self._constant_axes[name] = axes

    def _put_heads(self) -> dict[str, str]:
        """Constants about each device's blocks of heads.

        `heads.KEY` is the checkpoint's block that each is, or `EMPTY`; `first.KEY` says whether it
        is the first of its copies.

        Returns:
            By parameter name its key. Layers share them.
        """
        found: dict[str, str] = {}
        for placement in self._layout.plan.trained:
            blocks = self._layout.plan.blocks(placement.name)
            if blocks is None or blocks.heads is None:
                continue
            axis = placement.axes[blocks.dim]
            key = found[placement.name] = f"{blocks.heads}.{axis}"
            if f"heads.{key}" in self.constants:
                continue
            first = [
                source != heads.EMPTY and blocks.sources.index(source) == place
                for place, source in enumerate(blocks.sources)
            ]
            self._put(f"heads.{key}", torch.tensor(blocks.sources), (axis,))
            self._put(f"first.{key}", torch.tensor(first), (axis,))
        return found

    # -- what is traced

    def step(self, given: Tensors) -> dict[str, torch.Tensor]:
        """One optimizer step: `report` `[3]` (loss, gradient norm, finite), and the new state."""
        own = self._enter(given)
        losses, sums = self._run(own, backward=True)
        with scope(TOGETHER):
            reduction = self._reduction(own)
            gradients = reduction(sums)
            first = {name: own[f"first.{key}"] for name, key in self._heads.items()}
            ranks = {axis: own[f"rank.{axis}"] for axis in self._mesh.shape}
            square = reduction.square_norm(gradients, first, ranks)
            only_once = losses
            for axis, rank in ranks.items():
                if axis != DATA:
                    only_once = torch.where(rank == 0, only_once, torch.zeros_like(losses))
            loss_and_square = torch.cat([only_once * own["scalars"][1], square])
            everywhere = self._mesh.all_reduce(loss_and_square, *self._mesh.shape)
        loss, norm = everywhere[:1], everywhere[1:].sqrt()
        # It stands first among the outputs, and the update depends on it.
        changing = self._layout.changing()
        order = read_backwards([own[name] for name in changing])
        finite = torch.isfinite(loss) & torch.isfinite(norm) & torch.isfinite(order).all()
        out = {"order": order, "report": torch.cat([loss, norm, finite.float()])}
        with scope("optimizer"):
            updated = self._updated(own, gradients, norm, finite)
            out |= {name: updated[name] for name in changing}
        return {name: self._leave(name, tensor) for name, tensor in out.items()}

    def evaluate(self, given: Tensors) -> dict[str, torch.Tensor]:
        """`loss` `[1]`: the sum of all losses of a batch."""
        losses, _ = self._run(self._enter(given), backward=False)
        return {"loss": self._leave("report", self._mesh.all_reduce(losses, DATA))}

    def gradients(self, given: Tensors) -> dict[str, torch.Tensor]:
        """The gradient of every trained parameter, by its name."""
        own = self._enter(given)
        _, sums = self._run(own, backward=True)
        return {
            name: self._leave(PARAMETER + name, gradient)
            for name, gradient in self._reduction(own)(sums).items()
        }

    def _run(self, own: Tensors, *, backward: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        """The sum of the device's losses `[1]`, and its sums of gradients of the mean loss."""
        options, plan = self._options, self._layout.plan
        passes = Passes(
            self._base,
            plan,
            self._mesh,
            options,
            {placement.name: own[PARAMETER + placement.name] for placement in plan.parameters},
            {"model.rotary_emb.inv_freq": own["inv_freq"]},
            own["rank.model"],
        )
        losses = torch.zeros(1, device=own["scalars"].device)
        for index in range(options.grad_accum):
            micro_step = MicroStep(**{name: own[name][index] for name in INPUTS})
            dropout = None
            if backward and options.lora is not None and options.lora.dropout:
                dropout = lora.Dropout(
                    options.lora.dropout,
                    self._seed,
                    own[STEP].to(torch.int64) * options.grad_accum + index,
                    own["rank.data"],
                    own["rank.model"],
                    plan,
                )
            scale = own["scalars"][1] if backward else None
            losses = losses + passes.run(micro_step, scale, dropout)
        return losses, passes.gradients.sums

    def _updated(
        self, own: Tensors, gradients: Tensors, norm: torch.Tensor, finite: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The state after the step; as it was where loss or gradient is no number."""
        options, lr, step = self._options, own["scalars"][:1], own[STEP] + 1
        clip = None
        if options.max_grad_norm is not None:
            clip = (options.max_grad_norm / (norm + 1e-6)).clamp(max=1.0)
        out = {STEP: torch.where(finite, step, own[STEP])}
        for placement in self._layout.plan.trained:
            names = self._layout.of_parameter(placement.name)
            parameter, *kept = (own[name] for name in names)
            gradient = gradients[placement.name]
            if clip is not None:
                gradient = gradient * clip
            after = optimizer.update(
                options, placement, parameter, gradient, tuple(kept), lr, step, finite
            )
            out |= dict(zip(names, after, strict=True))
        return out

    def _reduction(self, own: Tensors) -> Reduction:
        index = {name: own[f"heads.{key}"] for name, key in self._heads.items()}
        return Reduction(self._layout.plan, self._mesh, self._options, index)

    # -- into the region and out of it

    def _enter(self, given: Tensors) -> dict[str, torch.Tensor]:
        """Each device's own part of every argument."""
        return {
            name: self._mesh.enter_manual(tensor, self._axes(name))
            for name, tensor in given.items()
        }

    def _axes(self, name: str) -> Axes:
        if name in INPUTS:
            return BATCH_AXES
        if name in self._constant_axes:
            return self._constant_axes[name]
        return (None,) if name == "scalars" else self._layout.placement(name).axes

    def _leave(self, name: str, tensor: torch.Tensor) -> torch.Tensor:
        """A result over all devices; `report` and `order` are the same on each."""
        if name in ("report", "order"):
            return self._mesh.leave_manual(tensor, (None,), tuple(tensor.shape))
        placement = self._layout.placement(name)
        return self._mesh.leave_manual(
            tensor, placement.axes, [int(size) for size in placement.shape]
        )
